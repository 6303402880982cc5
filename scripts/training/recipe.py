"""A recipe: everything that decides a training run, as a YAML file.

    recipe = read_recipe(Path("scripts/training/recipes/nano-smoke.yaml"), ["batch_size=4", "lora.r=8"])

A key that is unknown, or does not fit another, raises before anything is loaded. Paths count from the folder that the
command runs in.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from precision import choose_dtype
from repository import root_class


PARTS = ("language_model", "projector", "vision")
UNTRAINED_NANO = "untrained-nano"
PUBLISHED_TRAINING_RANGES = (1, 8, 1, 4)  # detailed up to 8 tiles, adaptive 1 to 4


@dataclass
class LoraRecipe:
    """Low-rank adapters on every attention and MLP projection of the language model."""

    r: int = 16
    alpha: int | None = None
    """2 r if not given."""
    dropout: float = 0.0
    merge: bool = True
    """Also write the whole model with the adapters added to its weights."""


@dataclass
class LettersRecipe:
    """A second loss on rendered documents: naming the character at every patch, see training/letters.py."""

    weight: float = 0.3
    only: bool = False
    """Without answers, for the vision tower alone; for the first minutes of a fresh model."""


@dataclass
class Recipe:
    """One run of scripts/finetune.py."""

    model: str
    """A MiniMonkey folder or Hub id, or `untrained-nano`."""
    output: str
    data: str | dict
    """A meta JSON in the InternVL format, or its content."""
    learning_rate: float
    eval_data: str | dict | None = None
    """As `data`; its loss is measured at the end and every `eval_every` steps."""

    # What is trained
    train: list[str] = field(default_factory=lambda: ["language_model"])
    """Of language_model, projector, vision; the rest stays as it is."""
    lora: LoraRecipe | None = None
    letters: LettersRecipe | None = None
    depth: int | None = None
    """Keep this many layers of vision tower and language model, to try a large model on a small machine."""
    language_layers: int | None = None
    """Deepen the language model to this many layers; the new ones begin without effect, see `models.deepen`."""

    # Data
    tile_ranges: list[list[int]] = field(default_factory=lambda: [list(PUBLISHED_TRAINING_RANGES)])
    """(min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles); each sample takes one of them."""
    max_seq_length: int = 4096
    too_long: Literal["raise", "skip"] = "raise"
    """What happens to an example of more tokens. It is never cut; those that are skipped are counted."""
    order: Literal["shuffled", "grouped", "curriculum"] = "shuffled"
    """`grouped`: shuffled, examples of like length in a batch. `curriculum`: each dataset in its own order."""
    grounding_tokens: bool = False
    """Whether <ref>, <box> and <quad> in the data are control tokens, as in `chat(..., grounding_tokens=True)`."""
    workers: int = 2

    # Steps
    epochs: float = 1.0
    max_steps: int | None = None
    """Instead of `epochs`."""
    batch_size: int = 16
    """Of an optimizer step, over all processes and accumulated micro batches."""
    micro_batch_size: int = 1
    """Of a forward pass on one device."""

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the layers, AdamW for the rest."""
    matrix_learning_rate: float | None = None
    """Of Muon's matrices; `learning_rate` if not given."""
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "linear", "constant_with_warmup", "warmup_stable_decay"] = "cosine"
    warmup_ratio: float = 0.03
    decay_ratio: float = 0.5
    """Share of the steps in which the rate of `warmup_stable_decay` falls to zero."""

    # Numbers and memory
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the weights while they are trained. AdamW's steps are mostly lost in bfloat16 weights; `auto`, bfloat16 where the
    machine is fast in it, suits those that are frozen under LoRA."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16; `auto`: where the machine is fast in it."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    attention: str | None = None
    device: Literal["auto", "cpu"] = "auto"

    # The run
    seed: int = 1
    save_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    eval_every: int | None = None

    def __post_init__(self):
        _check_values(self)


# Keys that may change between the parts of an interrupted run: they decide neither samples nor steps.
FREE_ON_RESUME = ("output", "workers", "save_every", "keep_checkpoints", "log_every", "eval_every", "eval_data")


def read_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """The recipe of a YAML file, with `key=value` (or `lora.r=value`) put in.

    Raises:
        ValueError: No such file, or keys or values that a recipe does not have.
    """
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}; see scripts/training/recipes.")
    values = _read_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}.")
    for override in overrides:
        _put(values, override)
    return _build(Recipe, values, str(path))


def _put(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set takes key=value, got {override!r}.")
    *outer, last = key.split(".")
    for name in outer:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {name} is a value and holds no keys.")
    values[last] = _read_yaml(text, f"--set {override}")


def _read_yaml(text: str | bytes, where: str):
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _build(kind: type, values: dict[str, Any], where: str):
    """A dataclass from a mapping, every value checked against the type of its field."""
    types_of = typing.get_type_hints(kind)
    unknown = {str(name) for name in values} - types_of.keys()
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(types_of)}.")
    required = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing.")
    return kind(**{name: _fit(value, types_of[name], f"{where}: {name}") for name, value in values.items()})


def _fit(value, kind, where: str):
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        fitting = [option for option in options if _is_of(value, option)]
        return _fit(value, (fitting or options)[0], where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, where)
    if kind is float and isinstance(value, str):  # YAML reads 4e-9 as text, 4.0e-9 as a number
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{where} must be a number, got {value!r}.") from error
    if not _is_of(value, kind):
        raise ValueError(f"{where} must be {_describe(kind)}, got {value!r}.")
    return float(value) if kind is float else value


def _is_of(value, kind) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is_of(entry, item) for entry in value)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return str(kind) if typing.get_origin(kind) else f"of type {kind.__name__}"


def _check_values(recipe: Recipe) -> None:
    whole = ("max_seq_length", "batch_size", "micro_batch_size", "save_every", "keep_checkpoints", "log_every")
    for name, value in dataclasses.asdict(recipe).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}.")
    if recipe.seed < 0 or recipe.weight_decay < 0 or recipe.max_grad_norm < 0:
        raise ValueError("seed, weight_decay and max_grad_norm must be at least 0.")
    for name in (*whole, "max_steps", "depth", "language_layers", "eval_every"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if recipe.epochs <= 0 or recipe.learning_rate <= 0 or recipe.workers < 0:
        raise ValueError("epochs and learning_rate must be more than 0, workers at least 0.")
    if not 0 <= recipe.warmup_ratio < 1 or not 0 < recipe.decay_ratio <= 1 - recipe.warmup_ratio:
        raise ValueError("warmup_ratio must be in [0, 1), decay_ratio more than 0, and both together at most 1.")
    if not recipe.train or set(recipe.train) - set(PARTS):
        raise ValueError(f"train must name one or more of {', '.join(PARTS)}, got {recipe.train}.")
    check_ranges(recipe.tile_ranges, "tile_ranges")
    if recipe.language_layers is not None and (recipe.lora is not None or "language_model" not in recipe.train):
        raise ValueError("language_layers adds layers that have to be trained: train the language_model, without LoRA.")
    if recipe.language_layers is not None and recipe.depth is not None:
        raise ValueError("depth takes layers away and language_layers adds some; give one of them.")
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {recipe.betas}.")
    if recipe.matrix_learning_rate is not None and recipe.optimizer != "muon":
        raise ValueError("matrix_learning_rate belongs to optimizer: muon.")
    if recipe.eval_every is not None and recipe.eval_data is None:
        raise ValueError("eval_every needs eval_data.")
    if recipe.lora is not None:
        _check_lora(recipe)
    if recipe.letters is not None and ("vision" not in recipe.train or recipe.lora is not None):
        raise ValueError(f"letters teach the vision tower, but train is {recipe.train} (with LoRA it stays as it is).")
    if recipe.letters is not None and recipe.letters.only and recipe.train != ["vision"]:
        raise ValueError(f"With letters.only nothing but the vision tower is trained; train is {recipe.train}.")


def _check_lora(recipe: Recipe) -> None:
    if recipe.train != ["language_model"]:
        raise ValueError(f"LoRA trains adapters of the language model alone; train is {recipe.train}, leave it out.")
    if recipe.optimizer != "adamw":
        raise ValueError("LoRA's factors are no square updates for Muon to orthogonalise; take optimizer: adamw.")
    if recipe.lora.r < 1 or not 0 <= recipe.lora.dropout < 1:
        raise ValueError(f"lora.r must be at least 1 and lora.dropout in [0, 1), got {recipe.lora}.")


def check_ranges(ranges, where: str) -> None:
    """Raise `ValueError` unless these are one or more (min, max, adaptive min, adaptive max)."""
    if not isinstance(ranges, list) or not ranges or any(not isinstance(r, list) or len(r) != 4 for r in ranges):
        raise ValueError(f"{where} must be a list of [min, max, adaptive min, adaptive max], got {ranges!r}.")
    check_tile_range = root_class("tiling.check_tile_range")
    for least, most, adaptive_least, adaptive_most in ranges:
        try:
            check_tile_range(least, most, "detailed tile")
            check_tile_range(adaptive_least, adaptive_most, "adaptive tile")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def with_fast_types(recipe: Recipe) -> Recipe:
    """The recipe with types in place of `auto`, by what the machine can, which is said in a line.

    Raises:
        ValueError: It wants to compute in bfloat16 on a GPU (`device: auto`), and there is none.
    """
    if recipe.bf16 and recipe.device == "auto" and not torch.accelerator.is_available():
        raise ValueError("There is no GPU here; train on the CPU with device: cpu (--set device=cpu).")
    if "auto" not in (recipe.dtype, recipe.bf16):
        return recipe
    device = "cpu" if recipe.device == "cpu" else torch.accelerator.current_accelerator()
    dtype = choose_dtype("auto", device or "cpu")
    types_ = {"dtype": str(dtype).removeprefix("torch."), "bf16": dtype == torch.bfloat16}
    return dataclasses.replace(
        recipe, **{name: value for name, value in types_.items() if getattr(recipe, name) == "auto"}
    )


def changed_keys(recipe: Recipe, recorded: dict[str, Any]) -> list[str]:
    """Keys in which a recipe differs from the recorded one of the run that it is to go on with."""
    now = dataclasses.asdict(recipe)
    names = [name for name in now if name not in FREE_ON_RESUME]
    return [name for name in names if now[name] != recorded.get(name)]
