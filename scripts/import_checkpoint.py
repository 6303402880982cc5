"""Turn a checkpoint of the family into a folder that loads with AutoModel and trust_remote_code.

    python scripts/import_checkpoint.py mx262/MiniMonkey MiniMonkey-2B
    python scripts/import_checkpoint.py OpenGVLab/InternVL3-1B-hf InternVL3-1B-MSAC
    python scripts/import_checkpoint.py path/of/a/checkpoint OUT --image-token-id 92546      without a tokenizer

Takes published Mini-Monkey, InternVL2, InternVL2.5 and Mono-InternVL checkpoints, and InternVL in transformers' own format.
Every name and shape is checked before anything is written. OUT appears when it is complete; until then the work is in
OUT.partial, and the same command resumes there after an interruption.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download

from minimonkey.checkpoint import convert_tensor
from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.conversation import IMAGE_TOKENS, get_template
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.importing.config import WRONG_VALUES, check_config, one_line, read_json
from minimonkey.scripts.importing.folder import (
    check_free,
    generation_config,
    image_processor,
    new_folder,
    save_processor,
)
from minimonkey.scripts.importing.published import published_preset
from minimonkey.scripts.importing.tokenizer import convert_tokenizer, has_tokenizer
from minimonkey.scripts.importing.weights import Shard, check_against_model, convert_shards, read_shards
from minimonkey.scripts.repository import ROOT, reports_errors


DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]


def import_checkpoint(source: str, out: Path, image_token_id: int | None = None) -> None:
    """Check, convert and write a checkpoint; see the module's docstring.

    Raises:
        ValueError: Anything that does not fit, before OUT exists.
    """
    check_free(out)
    folder = resolve_source(source)
    config_dict = read_config(folder)
    if "llm_config" not in config_dict and "text_config" not in config_dict:
        raise ValueError(
            f"{folder / 'config.json'} is no configuration of this family: it has neither llm_config nor text_config."
        )
    shards = read_shards(folder)
    check_layers(config_dict, shards)
    tokenizer, with_bos = convert_tokenizer(folder) if has_tokenizer(folder) else (None, True)
    config_dict["image_token_id"] = find_image_token(tokenizer, image_token_id, config_dict)
    config = make_config(config_dict)
    get_template(config.template)

    def convert(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return convert_tensor(name, tensor, config.text_config)

    check_against_model(shards, expected_shapes(config), convert, config.tie_word_embeddings)
    with new_folder(out, fingerprint(config, shards)) as work:
        convert_shards(shards, work, convert)
        write_settings(work, config, tokenizer, with_bos, published_preset(source))


def resolve_source(source: str) -> Path:
    """Return a local folder, or the snapshot of a Hub repository."""
    if not source:
        raise ValueError("SRC is empty; give a Hub id or a folder.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {source}.")
    return Path(snapshot_download(source, allow_patterns=DOWNLOADED))


def read_config(folder: Path) -> dict:
    """Read a checked `config.json` in the form `MiniMonkeyConfig` takes.

    Raises:
        ValueError: The file is missing or is not a configuration.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json.")
    check_config(read_json(path), path)
    try:
        return MiniMonkeyConfig.get_config_dict(folder)[0]
    except WRONG_VALUES as error:
        raise ValueError(f"{path} is no configuration that can be read: {one_line(error)}") from error


def make_config(config_dict: dict):
    """Make the `MiniMonkeyConfig` of a dict.

    Raises:
        ValueError: A value in it is not possible.
    """
    try:
        return MiniMonkeyConfig.from_dict(config_dict)
    except WRONG_VALUES as error:
        raise ValueError(f"config.json does not describe a model of this family: {one_line(error)}") from error


def check_layers(config_dict: dict, shards: list[Shard]) -> None:
    """Raise `ValueError` if a part of the model has more layers than there are weights."""
    weights = sum(len(shard.shapes) for shard in shards)
    for name, part in config_dict.items():
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > weights:
            raise ValueError(f"{name} has {layers} layers, but the checkpoint holds {weights} weights in all.")


def find_image_token(tokenizer, given: int | None, config: dict) -> int:
    """Return the id of <IMG_CONTEXT>: the tokenizer's, the given one, or the configuration's; they may not differ."""
    from_tokenizer = None
    if tokenizer is not None:
        image_tokens = IMAGE_TOKENS[:3]
        missing = [token for token in image_tokens if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"The checkpoint's tokenizer lacks {', '.join(missing)}.")
        from_tokenizer = tokenizer.convert_tokens_to_ids(image_tokens[2])
    known = {
        name: value for name, value in (("tokenizer", from_tokenizer), ("--image-token-id", given)) if value is not None
    }
    if not known and config.get("image_token_id") is not None:
        return config["image_token_id"]
    if not known:
        raise ValueError(
            "The checkpoint has no tokenizer to ask for the id of <IMG_CONTEXT>; pass it with --image-token-id "
            "(92546 for InternVL2-2B and Mini-Monkey, 151648 for 1B, 32013 for 4B)."
        )
    if len(set(known.values())) > 1:
        raise ValueError(f"The ids of <IMG_CONTEXT> contradict each other: {known}.")
    return next(iter(known.values()))


def expected_shapes(config) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the model's weights, without allocating them."""
    try:
        with torch.device("meta"):
            model = MiniMonkeyForConditionalGeneration(config)
    except (*WRONG_VALUES, RuntimeError, AssertionError) as error:
        raise ValueError(f"config.json describes no model that can be made: {one_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def fingerprint(config, shards: list[Shard]) -> str:
    """Return a digest that tells whether half-done work belongs to this source."""
    files = [(shard.path.name, shard.path.stat().st_size, shard.path.stat().st_mtime_ns) for shard in shards]
    return hashlib.sha256(json.dumps([config.to_dict(), files], sort_keys=True, default=str).encode()).hexdigest()


def write_settings(work: Path, config, tokenizer, with_bos: bool, preset: str | None) -> None:
    """Write everything but the weights: configuration, tokenizer, processor and the code that loads them."""
    config.architectures = ["MiniMonkeyForConditionalGeneration"]
    config.save_pretrained(work)
    if tokenizer is None:
        image_processor(config, preset=preset).save_pretrained(work)
    else:
        save_processor(work, config, tokenizer, with_bos, preset=preset)
        generation_config(config, tokenizer).save_pretrained(work)
    for code in ROOT.glob("*.py"):
        shutil.copy(code, work)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="Hub id or folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--image-token-id", type=int, metavar="N", help="id of <IMG_CONTEXT>, if SRC has no tokenizer")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    import_checkpoint(args.source, args.out, args.image_token_id)
    print(f"Wrote {args.out}. Load it with AutoModel.from_pretrained({str(args.out)!r}, trust_remote_code=True).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
