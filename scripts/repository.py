"""Where the repository is, how scripts reach its code, and the options that several of them have."""

import argparse
from pathlib import Path

from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parents[1]


def root_class(name: str):
    """A class, function or constant of the repository's code, `"module.name"`, loaded as `trust_remote_code` loads it.

    Each call looks at the files again, so it belongs outside loops.
    """
    return get_class_from_dynamic_module(name, str(ROOT))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights: `--model`, and `--subfolder` of it, as `from_pretrained` takes them."""
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: this repository)")
    parser.add_argument(
        "--subfolder", default="", help="of the model, where its weights are: nano-documents, for example"
    )


def add_tile_arguments(parser: argparse.ArgumentParser, preset: str | None = None) -> None:
    """`--preset`, and the four tile ranges by themselves."""
    parser.add_argument("--preset", default=preset, help="tile ranges of a published benchmark, e.g. docvqa")
    for name in root_class("tiling.RANGE_NAMES"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=None)


def tile_options(args: argparse.Namespace) -> dict[str, int | str]:
    """What was given for `add_tile_arguments`, as options of the image processor."""
    names = ("preset", *root_class("tiling.RANGE_NAMES"))
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
