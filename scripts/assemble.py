"""Join a vision tower and a language model into a new MiniMonkey with a fresh projector.

    python scripts/assemble.py OpenGVLab/InternViT-300M-448px Qwen/Qwen3-0.6B MyMonkey
    python scripts/assemble.py OpenGVLab/InternVL2-1B HuggingFaceTB/SmolLM2-135M-Instruct SmolMonkey --template chatml
    python scripts/assemble.py OpenGVLab/InternViT-300M-448px Qwen/Qwen3-0.6B MyMonkey --projector resampler --tiling slices

VISION is an InternViT, published or in transformers' format, or a whole InternVL, Mini-Monkey or MiniMonkey, whose vision
tower is used. LANGUAGE is a causal language model of transformers that is built like Llama (Qwen, Mistral, Phi, SmolLM, OLMo,
...). The result has everything a MiniMonkey has (MSAC, SCM, chat) but sees nothing yet: its projector is random, to be trained.
With `--projector resampler` every tile is as many tokens as `--queries`; with `--tiling slices` images are cut as in MiniCPM-V.
Before anything is written, the language model is checked to compute what it did before; OUT appears when it is complete.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM

from minimonkey.checkpoint import convert_tensor
from minimonkey.configuration_minimonkey import PROJECTORS, MiniMonkeyConfig, vision_config_from_published
from minimonkey.conversation import IMAGE_TOKEN, IMAGE_TOKENS, SLICES_END, SLICES_START, get_template
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.import_checkpoint import make_config, read_config, resolve_source
from minimonkey.scripts.importing.config import WRONG_VALUES, one_line
from minimonkey.scripts.importing.folder import check_free, generation_config, new_folder, save_processor
from minimonkey.scripts.importing.tokenizer import convert_tokenizer
from minimonkey.scripts.importing.weights import check_finite, read_shards
from minimonkey.scripts.repository import reports_errors, whole_number
from minimonkey.tiling import PRESETS, SLICES, TILINGS, check_tiling


PUBLISHED_VISION = "intern_vit_6b"
NATIVE_VISION = "internvl_vision"
VISION_PREFIX = "model.vision_tower."
LOGIT_TOLERANCE = 1e-5  # of the largest logit; the same operations on the same numbers


def read_vision_tower(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the configuration of a vision tower and its weights under the names they have in a MiniMonkey.

    Raises:
        ValueError: The folder holds no vision tower of this kind.
    """
    config_dict = read_config(folder)
    kind = config_dict.get("model_type")
    prefix, text_config = "", None
    if kind == PUBLISHED_VISION:
        prefix = "vision_model."
        vision = published_vision(config_dict)
    elif kind == NATIVE_VISION:
        prefix, vision = VISION_PREFIX, config_dict
    elif "vision_config" in config_dict and ("llm_config" in config_dict or "text_config" in config_dict):
        whole = make_config(config_dict)
        vision, text_config = whole.vision_config.to_dict(), whole.text_config
    else:
        raise ValueError(
            f"{folder} has model_type {kind!r}; VISION must be an InternViT ({PUBLISHED_VISION!r}, {NATIVE_VISION!r}) or a "
            "whole model that has one."
        )
    if not vision.get("num_hidden_layers"):
        raise ValueError(f"{folder} has no vision tower, only a patch embedding, as Mono-InternVL does.")
    tensors = {}
    for shard in read_shards(folder):
        with safe_open(shard.path, framework="pt") as file:
            for name in shard.shapes:
                if prefix or "vision" in name:
                    tensors |= convert_tensor(prefix + name, check_finite(file.get_tensor(name), name), text_config)
    return vision, {name: tensor for name, tensor in tensors.items() if name.startswith(VISION_PREFIX)}


def published_vision(config_dict: dict) -> dict:
    """Return a published vision configuration in transformers' terms; raises `ValueError` where it is none."""
    try:
        return vision_config_from_published(config_dict)
    except WRONG_VALUES as error:
        raise ValueError(f"The configuration of the vision tower cannot be: {one_line(error)}") from error


def extend_tokenizer(tokenizer, template, *more: str) -> None:
    """Add the image tokens, and the control tokens of the template that the tokenizer lacks, as special tokens."""
    spellings = template.system_header + template.user_header + template.assistant_header + template.separator
    wanted = [*dict.fromkeys(re.findall(r"<\|\w+\|>", spellings)), *IMAGE_TOKENS, *more]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = template.separator


@torch.no_grad()
def assemble(
    vision_source: str,
    language_source: str,
    out: Path,
    template_name: str,
    dtype: torch.dtype,
    tiling: str = "msac",
    **projector: str | int,
) -> None:
    """Read, join, check and write the model; see the module's docstring.

    Args:
        tiling: How its processor cuts images.
        **projector: `projector` and `resampler_queries` of its configuration.

    Raises:
        ValueError: Parts that do not fit, before OUT exists.
    """
    check_free(out)
    check_tiling(*PRESETS["default"], tiling=tiling)
    template = get_template(template_name)
    vision_config, vision_weights = read_vision_tower(resolve_source(vision_source))
    language_folder = resolve_source(language_source)
    tokenizer, with_bos = convert_tokenizer(language_folder)
    extend_tokenizer(tokenizer, template, *((SLICES_START, SLICES_END) if tiling == SLICES else ()))
    language_model = read_language_model(language_folder, len(tokenizer), dtype)
    model = build_model(vision_config, language_model.config, tokenizer, template_name, **projector).to(dtype)
    move_weights(model, vision_weights, language_model)
    check_same_logits(model, language_model)
    model.generation_config = generation_config(model.config, tokenizer)
    with new_folder(out, f"{vision_source} and {language_source}") as work:
        model.save_pretrained(work)
        save_processor(work, model.config, tokenizer, with_bos, tiling=tiling)


def read_language_model(folder: Path, tokens: int, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model with an embedding for each of at least `tokens` tokens; new ones are the mean of the old."""
    read_config(folder)
    read_shards(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True
        )
    except (*WRONG_VALUES, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a causal language model of transformers: {one_line(error)}") from error
    problems = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
    if problems:
        raise ValueError(f"The weights in {folder} are not those of a {type(model).__name__}: {problems}.")
    body = getattr(model, model.base_model_prefix, None)
    layers = getattr(body, "layers", None)
    if not layers or not hasattr(body, "embed_tokens") or not hasattr(layers[0], "self_attn"):
        raise ValueError(
            f"{type(model).__name__} is not built like Llama (embed_tokens, layers, self_attn), which a MiniMonkey expects."
        )
    for name, tensor in model.state_dict().items():
        check_finite(tensor, name)
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens)
    return model.eval()


def build_model(vision_config: dict, text_config, tokenizer, template_name: str, **projector: str | int) -> nn.Module:
    """Build a MiniMonkey of these parts with fresh weights."""
    config = MiniMonkeyConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        template=template_name,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **projector,
    )
    config.architectures = ["MiniMonkeyForConditionalGeneration"]
    return MiniMonkeyForConditionalGeneration(config).eval()


def move_weights(model: nn.Module, vision_weights: dict[str, torch.Tensor], language_model: nn.Module) -> None:
    """Move the parts' weights into the whole; raises `ValueError` with the names where they do not fit."""
    weights = dict(vision_weights)
    body = getattr(language_model, language_model.base_model_prefix)
    weights |= {f"model.language_model.{name}": tensor for name, tensor in body.state_dict().items()}
    head = language_model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"The output layer of {type(language_model).__name__} has a bias; that of a MiniMonkey has none."
        )
    weights["lm_head.weight"] = head.weight
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if ".multi_modal_projector." not in name]
    if missing or unexpected:
        raise ValueError(f"The parts do not fit: missing {missing[:5]}, unexpected {unexpected[:5]}.")


def check_same_logits(model: nn.Module, language_model: nn.Module) -> None:
    """Raise `ValueError` unless the language model inside `model` still computes what it computed outside.

    Some families treat their embeddings in ways that a MiniMonkey does not.
    """
    ids = torch.arange(3, 19)[None]
    kind = language_model.config.model_type
    before, after = language_model(input_ids=ids).logits, model(input_ids=ids).logits
    difference = (before - after).abs().max().item()
    if not difference <= LOGIT_TOLERANCE * max(1.0, before.abs().max().item()):
        raise ValueError(
            f"Inside a MiniMonkey this {kind} gives other logits (by up to {difference:.3g}): its output layer does more "
            "than multiply. It cannot be used without code of its own."
        )


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vision", metavar="VISION", help="Hub id or folder")
    parser.add_argument("language", metavar="LANGUAGE", help="Hub id or folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--template", default="chatml", help="chat template, see conversation.TEMPLATES (chatml)")
    parser.add_argument("--projector", choices=PROJECTORS, default="mlp", help="between the parts (mlp)")
    parser.add_argument("--queries", type=whole_number(1), default=None, help="tokens of a tile, of a resampler (64)")
    parser.add_argument(
        "--tiling", choices=(*TILINGS, SLICES), default="msac", help="how its processor cuts images (msac)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args(arguments)
    if args.queries is not None and args.projector != "resampler":
        parser.error("--queries belongs to --projector resampler")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    projector = {"projector": args.projector, "resampler_queries": args.queries or 64}
    assemble(args.vision, args.language, args.out, args.template, getattr(torch, args.dtype), args.tiling, **projector)
    print(f"Wrote {args.out}. Its projector is untrained: fine-tune it before you ask it about pictures.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
