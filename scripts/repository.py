"""Where the repository is, how scripts load a model with its code alone, and the options that several of them share.

Scripts run the code of this repository alone: from a Hub id or folder they read configuration, tokenizer and weights;
the Python files beside these are never executed.
"""

import argparse
import errno
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.packed_weights import can_pack
from minimonkey.processing_minimonkey import MiniMonkeyProcessor
from minimonkey.scripts.importing.config import WRONG_VALUES, check_config, one_line, read_json
from minimonkey.tiling import RANGE_NAMES


ROOT = Path(__file__).resolve().parents[1]
PACKED_FROM = 10**8  # parameters; small products take longer packed where other processes want the processor too
MOST_ERROR_CHARACTERS = 2000
PROCESSOR_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")


def load_processor(source: str | Path):
    """Load the processor of a Hub id or folder with this repository's code.

    Raises:
        ValueError: There is no MiniMonkey processor, or its tokenizer needs code of its own.
    """
    for path in (Path(source, name) for name in PROCESSOR_FILES):
        if path.is_file():
            read_json(path)
    try:
        image_processor = MiniMonkeyImageProcessor.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        settings, options = MiniMonkeyProcessor.get_processor_dict(source)
        return MiniMonkeyProcessor.from_args_and_dict([image_processor, tokenizer], settings, **options)
    except OSError as error:
        raise ValueError(
            f"{source} holds no MiniMonkey processor; published weights come through import_checkpoint.py."
        ) from error
    except WRONG_VALUES as error:
        raise ValueError(f"The processor of {source} cannot be used: {one_line(error)}") from error


def load_model(source: str | Path, **options):
    """Load the model of a Hub id or folder with this repository's code, ready to answer.

    Args:
        options: As `from_pretrained` takes them: `subfolder`, `dtype`, `attn_implementation`.

    Raises:
        ValueError: The model is of another kind, its files are damaged, or an option is not available here.
    """
    model_config(source, options.get("subfolder", ""))
    with readable(source):
        return MiniMonkeyForConditionalGeneration.from_pretrained(source, **options).eval()


def prepared(model):
    """Return a model for answers alone, on a CPU with what makes it faster there (`prepare_for_cpu`)."""
    if model.device.type == "cpu":
        model.prepare_for_cpu(pack=model.num_parameters() >= PACKED_FROM and can_pack(model.dtype))
    return model


def model_config(source: str | Path, subfolder: str = "") -> MiniMonkeyConfig:
    """Read the configuration of the MiniMonkey of a Hub id or folder, without its weights.

    Raises:
        ValueError: The model is of another kind, or its configuration is damaged.
    """
    config_path = Path(source, subfolder, "config.json")
    if config_path.is_file():
        check_config(read_json(config_path), config_path)
    settings, _ = MiniMonkeyConfig.get_config_dict(source, subfolder=subfolder)
    if settings.get("model_type") != MiniMonkeyConfig.model_type:
        raise ValueError(
            f"{source} holds a model of type {settings.get('model_type')!r}; the scripts take {MiniMonkeyConfig.model_type!r} "
            "and the published checkpoints that import_checkpoint.py knows."
        )
    with readable(source):
        return MiniMonkeyConfig.from_dict(settings)


@contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises for damaged files of `source`, or options it cannot have, into `ValueError`."""
    try:
        yield
    except (SafetensorError, ImportError, RuntimeError, *WRONG_VALUES) as error:
        raise ValueError(f"{source} cannot be loaded: {one_line(error)}") from error


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the weights: `--model`, and `--subfolder` of it, as `from_pretrained` takes them."""
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: this repository)")
    parser.add_argument("--subfolder", default="", help="of the model, where its weights are")


def add_tile_arguments(parser: argparse.ArgumentParser, preset: str | None = None) -> None:
    """Add `--preset`, and the four tile ranges by themselves."""
    parser.add_argument("--preset", default=preset, help="tile ranges of a published benchmark, e.g. docvqa")
    for name in RANGE_NAMES:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=None)


def tile_options(args: argparse.Namespace) -> dict[str, int | str]:
    """Return what was given for `add_tile_arguments`, as options of the image processor."""
    names = ("preset", *RANGE_NAMES)
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def add_device_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--device`, which has to exist; by default a GPU where there is one."""
    chosen = default or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=device_name, default=chosen, help="cuda, cpu, ... (default: %(default)s)")


def device_name(text: str) -> str:
    """Return the name of a device, if it exists here."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; take cpu, cuda, cuda:1 or the like") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type != "cpu" and (device.type != here.type or (device.index or 0) >= torch.accelerator.device_count()):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; take cpu")
    return text


def whole_number(least: int) -> Callable[[str], int]:
    """Return a `type` for `add_argument`: whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number") from error
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2**63, got {text[:40]}")
        return value

    return read


def number_within(least: float, most: float) -> Callable[[str], float]:
    """Return a `type` for `add_argument`: numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number") from error
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}, got {text[:40]}")
        return value

    return read


def reports_errors(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Wrap a script's `main` so that wrong input ends it with one line on the error stream; it returns the exit status.

    A `ValueError` or `OSError` is about what was given; anything else is a fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def reporting(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except (ValueError, OSError) as error:
            print(f"error: {_printable(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130

    return reporting


@contextmanager
def preparing() -> Iterator[None]:
    """Report errors as `reports_errors` does, for the part before a script's long work, whose errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {_printable(error)}", file=sys.stderr)
        raise SystemExit(1) from error


def _printable(error: Exception) -> str:
    """Return an error's message in one line, without terminal control characters, cut where a file made it very long."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "?" for character in text)
    if isinstance(error, OSError) and (error.errno == errno.ENOSPC or "No space left" in text):
        text += " Make room on that disk and start again."
    return text if len(text) <= MOST_ERROR_CHARACTERS else text[:MOST_ERROR_CHARACTERS] + " ..."
