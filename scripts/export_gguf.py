"""Write the language model of a MiniMonkey as GGUF, the format of llama.cpp.

    python scripts/export_gguf.py MiniMonkey-2B 2b-q8.gguf
    python scripts/export_gguf.py MiniMonkey-2B 2b-q4.gguf --type Q4_K_M
    python scripts/export_gguf.py MiniMonkey-2B 2b-q8.gguf --mmproj 2b-mmproj.gguf      for llama.cpp by itself

`minimonkey chat --engine llama.cpp --gguf 2b-q8.gguf` answers with it, with all of MSAC and SCM: only the language model is
llama.cpp's there. With --mmproj, llama.cpp reads images by itself, with one grid of tiles by its own rule: no MSAC, no SCM.
Written are language models of the shapes Llama (InternLM2), Qwen2 and Phi-3. Needs `pip install gguf`, and llama-cpp-python for
Q4_K_M.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.scripts.export_checkpoint import read_chat_template
from minimonkey.scripts.exporting.gguf_file import (
    K_BLOCK,
    TYPES,
    Planned,
    check_rows,
    quantise,
    require_gguf,
    tensor_type,
    write_file,
)
from minimonkey.scripts.exporting.gguf_language import (
    ARCHITECTURES,
    check_language_model,
    for_llama_cpp,
    language_tensors,
    published_language_name,
    write_language_settings,
)
from minimonkey.scripts.exporting.gguf_tokenizer import tokenizer_kind, write_tokenizer
from minimonkey.scripts.exporting.gguf_vision import check_vision, for_clip, vision_name, write_vision_settings
from minimonkey.scripts.exporting.tokenizer import BOS_IN_TEMPLATE
from minimonkey.scripts.import_checkpoint import expected_shapes, make_config, read_config, resolve_source
from minimonkey.scripts.importing.weights import Shard, check_against_model, read_shards
from minimonkey.scripts.repository import reports_errors


def export_gguf(source: str, out: Path, kind: str = "Q8_0", mmproj: Path | None = None, subfolder: str = "") -> None:
    """Check a checkpoint and write its language model, and with `mmproj` its vision part; see the module's docstring.

    Args:
        kind: One of `TYPES`.
        subfolder: Of the source, where its weights are.

    Raises:
        ValueError: A source that is no MiniMonkey or is quantised, parts that llama.cpp does not compute alike, a format that
            does not fit, a file that exists, a package that is missing: all before anything is written.
    """
    gguf = require_gguf()
    for path in (out, *([] if mmproj is None else [mmproj])):
        check_new(path)
    if kind == "Q4_K_M":
        from minimonkey.scripts.engines.libllama import require_libllama

        require_libllama()
    home = resolve_source(source)
    folder = home / subfolder
    config = read_plain_config(folder)
    check_language_model(config)
    if mmproj is not None:
        check_vision(config)
    shards = read_shards(folder)
    check_against_model(shards, expected_shapes(config), lambda *named: dict([named]), config.tie_word_embeddings)
    language, vision = plan_language(config, shards), plan_vision(shards) if mmproj is not None else []
    plain = "F16" if kind == "Q4_K_M" else kind
    if kind == "Q4_K_M":
        check_rows(language, K_BLOCK, kind)
    keeps = ("token_embd.weight", "output.weight")
    types = {tensor.name: tensor_type(tensor, plain, tensor.name in keeps) for tensor in language}
    write_vocabulary = vocabulary_writer(home, folder, config, must=mmproj is not None)

    with new_file(out) as path:
        writer = gguf.GGUFWriter(path, ARCHITECTURES[config.text_config.model_type])
        writer.add_name(Path(source).resolve().name)
        writer.add_file_type(gguf.LlamaFileType[f"ALL_{plain}" if plain == "F32" else f"MOSTLY_{plain}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_language_settings(writer, config)
        write_vocabulary(writer)
        write_file(writer, language, types)
        if kind == "Q4_K_M":
            with new_file(out) as quantised:
                quantise(path, quantised, torch.get_num_threads())
                os.replace(quantised, path)
    if mmproj is not None:
        with new_file(mmproj) as path:
            writer = gguf.GGUFWriter(path, "clip")
            writer.add_name(f"{Path(source).resolve().name}: one grid of tiles, no MSAC")
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
            write_vision_settings(writer, config)
            write_file(writer, vision, {tensor.name: vision_type(tensor) for tensor in vision})


def check_new(path: Path) -> None:
    """Raise `ValueError` if a file to be written exists, or its folder does not."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already; remove it or choose another name.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} in.")


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Give a file beside `out` that becomes `out` when the block ends well, if it is still there, and is deleted else."""
    handle, name = tempfile.mkstemp(prefix=out.name + ".", suffix=".partial", dir=out.parent)
    os.close(handle)
    path = Path(name)
    try:
        yield path
        if path.exists():
            check_new(out)
            path.chmod(0o644)
            path.replace(out)
    finally:
        path.unlink(missing_ok=True)


def read_plain_config(folder: Path) -> MiniMonkeyConfig:
    """Read the configuration of a MiniMonkey whose weights are plain numbers.

    Raises:
        ValueError: Another model, or quantised weights.
    """
    config_dict = read_config(folder)
    if config_dict.get("model_type") != MiniMonkeyConfig.model_type or "text_config" not in config_dict:
        raise ValueError(f"{folder} holds no MiniMonkey in its own format; only such a model is exported.")
    parts = [config_dict, config_dict["text_config"]]
    if any(isinstance(part, dict) and part.get("quantization_config") for part in parts):
        raise ValueError(f"{folder} is quantised; export the checkpoint that it was made of, whose weights are whole.")
    return make_config(config_dict)


def plan_language(config: MiniMonkeyConfig, shards: list[Shard]) -> list[Planned]:
    """Return the tensors of the language model's file, those that come first in the model first."""
    gguf = require_gguf()
    text = config.text_config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[text.model_type])
    names = gguf.get_tensor_name_map(architecture, text.num_hidden_layers)
    planned = [Planned(name, tuple(t.shape), lambda t=t: t) for name, t in language_tensors(config).items()]
    for shard in shards:
        for ours, shape in shard.shapes.items():
            published = published_language_name(ours)
            if published is None or (ours == "lm_head.weight" and config.tie_word_embeddings):
                continue
            name = names.get_name(published, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ValueError(f"GGUF has no name for {ours} in a {text.model_type!r}.")

            def read(path=shard.path, ours=ours):
                return for_llama_cpp(ours, read_tensor(path, ours), text)

            planned.append(Planned(name, shape, read))
    return planned


def plan_vision(shards: list[Shard]) -> list[Planned]:
    """Return the tensors of the vision part's file."""
    planned = []
    for shard in shards:
        for ours, shape in shard.shapes.items():
            name = vision_name(ours)
            if name is None:
                continue

            def read(path=shard.path, ours=ours, name=name):
                return for_clip(name, read_tensor(path, ours))

            shape = for_clip(name, torch.empty(shape, device="meta")).shape
            planned.append(Planned(name, tuple(shape), read))
    return planned


def vision_type(planned: Planned):
    """Return the number format of a tensor of the vision part: matrices in 16 bits, what is added in 32."""
    types = require_gguf().GGMLQuantizationType
    return types.F32 if len(planned.shape) == 1 or "position_embd" in planned.name else types.F16


def read_tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def vocabulary_writer(home: Path, folder: Path, config: MiniMonkeyConfig, must: bool) -> Callable[[Any], None]:
    """Return what writes the tokenizer of a model's folder, or of the home of several, into a file.

    A line on the error stream says if there will be none.

    Args:
        must: Whether a file without a tokenizer is of no use.

    Raises:
        ValueError: There must be a tokenizer, and there is none that GGUF can have.
    """
    try:
        place = folder if (folder / "tokenizer.json").is_file() else home
        if not (place / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json.")
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokenizer_kind(json.loads(tokenizer.backend_tokenizer.to_str()))
    except ValueError as error:
        if must:
            raise
        print(f"No tokenizer is written, llama.cpp by itself cannot use the file: {error}", file=sys.stderr)
        return lambda writer: writer.add_tokenizer_model("no_vocab")
    ends: list[int] = []
    if (folder / "generation_config.json").is_file():
        end = GenerationConfig.from_pretrained(folder).eos_token_id
        ends = end if isinstance(end, list) else [] if end is None else [end]
    template = read_chat_template(place, config)

    def write(writer) -> None:
        write_tokenizer(writer, tokenizer, template, config.text_config.vocab_size, ends, BOS_IN_TEMPLATE in template)

    return write


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="Hub id or folder of a MiniMonkey")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write; must not exist")
    parser.add_argument("--subfolder", default="", help="of SRC, where the weights are")
    parser.add_argument("--type", choices=TYPES, default="Q8_0", help="number format (default: %(default)s)")
    parser.add_argument(
        "--mmproj", metavar="FILE", type=Path, help="also write the vision part, for llama.cpp by itself: no MSAC there"
    )
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    export_gguf(args.source, args.out, args.type, args.mmproj, args.subfolder)
    for path in (args.out, args.mmproj):
        if path is not None:
            print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
