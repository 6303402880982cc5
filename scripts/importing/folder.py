"""A new model folder: the place it is made in, and what stands in it beside the weights."""

from pathlib import Path

from repository import root_class
from transformers import GenerationConfig


def check_free(out: Path) -> None:
    """Raise `ValueError` if something is in the way of a new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; remove it or choose another folder.")


def work_folder(out: Path) -> Path:
    """Where OUT is made until it is complete."""
    return out.with_name(out.name + ".partial")


def finish(out: Path) -> None:
    """OUT appears, complete."""
    if out.exists():
        out.rmdir()
    work_folder(out).replace(out)


def image_processor(config):
    """The image processor of a model of this configuration."""
    size = {"height": config.tile_size, "width": config.tile_size}
    return root_class("image_processing_minimonkey.MiniMonkeyImageProcessor")(size=size)


def save_processor(folder: Path, config, tokenizer, with_bos: bool) -> None:
    """Tokenizer, image processor and chat template as one."""
    template = root_class("conversation.get_template")(config.template)
    jinja = root_class("conversation.chat_template_jinja")(template, config.system_message, with_bos)
    root_class("processing_minimonkey.MiniMonkeyProcessor")(
        image_processor(config), tokenizer, image_seq_length=config.image_seq_length, chat_template=jinja
    ).save_pretrained(folder)


def generation_config(config, tokenizer) -> GenerationConfig:
    """Answers end with the template's separator."""
    separator = tokenizer.convert_tokens_to_ids(root_class("conversation.get_template")(config.template).separator)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=separator,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else separator,
    )
