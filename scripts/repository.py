"""Where the repository is, how scripts load a model by its code alone, and the options that several of them have.

Scripts run the code of this repository alone: of a Hub id or folder they read configuration, tokenizer and weights, and
the Python files beside them are never executed.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.processing_minimonkey import MiniMonkeyProcessor
from minimonkey.tiling import RANGE_NAMES


ROOT = Path(__file__).resolve().parents[1]


def load_processor(source: str | Path):
    """The processor of a Hub id or folder, by this repository's code.

    Raises:
        ValueError: There is no MiniMonkey processor, or a tokenizer that needs code of its own.
    """
    try:
        image_processor = MiniMonkeyImageProcessor.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        settings, options = MiniMonkeyProcessor.get_processor_dict(source)
    except OSError as error:
        raise ValueError(
            f"{source} holds no MiniMonkey processor; published weights come through import_checkpoint.py."
        ) from error
    return MiniMonkeyProcessor.from_args_and_dict([image_processor, tokenizer], settings, **options)


def load_model(source: str | Path, **options):
    """The model of a Hub id or folder, by this repository's code, ready to answer.

    Args:
        options: As `from_pretrained` takes them: `subfolder`, `dtype`, `attn_implementation`.

    Raises:
        ValueError: The model is of another kind.
    """
    settings, _ = MiniMonkeyConfig.get_config_dict(source, subfolder=options.get("subfolder", ""))
    if settings.get("model_type") != MiniMonkeyConfig.model_type:
        raise ValueError(
            f"{source} holds a model of type {settings.get('model_type')!r}; the scripts take {MiniMonkeyConfig.model_type!r} "
            "and the published checkpoints that import_checkpoint.py knows."
        )
    return MiniMonkeyForConditionalGeneration.from_pretrained(source, **options).eval()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights: `--model`, and `--subfolder` of it, as `from_pretrained` takes them."""
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: this repository)")
    parser.add_argument(
        "--subfolder", default="", help="of the model, where its weights are: nano-documents, for example"
    )


def add_tile_arguments(parser: argparse.ArgumentParser, preset: str | None = None) -> None:
    """`--preset`, and the four tile ranges by themselves."""
    parser.add_argument("--preset", default=preset, help="tile ranges of a published benchmark, e.g. docvqa")
    for name in RANGE_NAMES:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=None)


def tile_options(args: argparse.Namespace) -> dict[str, int | str]:
    """What was given for `add_tile_arguments`, as options of the image processor."""
    names = ("preset", *RANGE_NAMES)
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
