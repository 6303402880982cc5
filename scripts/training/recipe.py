"""A recipe: everything that decides a training run, as a YAML file with the options of transformers' Trainer and ours.

    recipe = read_recipe(Path("scripts/training/recipes/nano-smoke.yaml"), ["batch_size=4", "lora_r=8"])

transformers' HfArgumentParser reads it. An option that is unknown, of the wrong type, or incompatible with another, raises
before anything is loaded. Paths are relative to the folder that the command runs in.
"""

import difflib
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_kernels_available

from minimonkey.scripts.precision import choose_dtype
from minimonkey.scripts.training.dropping import Dropping, read_dropping
from minimonkey.tiling import PRESETS, SLICES, check_tiling


PARTS = ("language_model", "projector", "vision")
UNTRAINED_NANO = "untrained-nano"
PUBLISHED_TRAINING_RANGES = (1, 8, 1, 4)  # detailed up to 8 tiles, adaptive 1 to 4

AT_LEAST_ZERO = ("weight_decay", "max_grad_norm", "adam_epsilon", "letters_weight", "dataloader_num_workers")


@dataclass(kw_only=True)
class Recipe(TrainingArguments):
    """One run of scripts/finetune.py: the arguments of its Trainer, some with other defaults, and what we add."""

    model: str
    """A MiniMonkey folder or Hub id, or `untrained-nano`."""
    dimensions: dict[str, Any] | str | None = None
    """Of an untrained Nano, where they are to differ: `{vision: {num_hidden_layers: 4}, text: {hidden_size: 256}}`."""
    data: dict[str, Any] | str | None = field()
    """A meta JSON in the InternVL format, or its content."""
    eval_data: dict[str, Any] | str | None = None
    """As `data`; its loss is measured at the end and every `eval_steps`."""

    # Options of Trainer that have no default here, or a different one
    output_dir: str = field()
    learning_rate: float = field()
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int | None = None
    """As for training if not given."""
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    """A number below 1 is a share of the steps."""
    bf16: bool | None = None
    """Compute in bfloat16; if not given, where the machine is fast in it."""
    logging_steps: float = 10
    logging_first_step: bool = True
    save_steps: float = 200
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 2
    report_to: str | None = "tensorboard"
    seed: int = 1
    # Not free to choose: the samples are laid out in the order of the run, and hold more than the model takes.
    train_sampling_strategy: str = field(default="sequential", init=False)
    remove_unused_columns: bool = field(default=False, init=False)
    prediction_loss_only: bool = field(default=True, init=False)

    # What is trained
    train: list[str] = field(default_factory=lambda: ["language_model"], metadata={"choices": PARTS})
    """The rest stays as it is."""
    train_only: list[str] | None = None
    """Of these parts only parameters with one of these texts in their name, as `visual_mlp` for visual experts."""
    frozen: list[str] | None = None
    """Parameters with one of these texts in their name stay as they are."""
    fresh_projector: bool = False
    """Begin with a projector that has learned nothing, as where a tower meets a language model for the first time."""
    lora_r: int | None = None
    """Train instead adapters of this rank on every attention and MLP projection of the language model."""
    lora_alpha: int | None = None
    """2 lora_r if not given."""
    lora_dropout: float = 0.0
    lora_merge: bool = True
    """Also write the whole model with the adapters added to its weights."""
    lora_also: list[str] | None = None
    """Under LoRA also train, whole and in float32, modules of projector and language model with one of these texts in their
    name: `norm`, `multi_modal_projector`."""
    frozen_weights: Literal["int8", "int4", "bluelm", "bfloat16"] | None = None
    """Under LoRA store the weights that stay as they are in fewer bits, as quantize.py does."""
    letters_weight: float | None = None
    """Weight of an auxiliary loss on rendered documents: naming the character at every patch, see letters.py."""
    letters_only: bool = False
    """Use that loss alone, without answers, for the vision tower; for the first minutes of a fresh model."""
    teacher: str | None = None
    """A MiniMonkey folder or Hub id whose vision tower this one's learns from, without answers, see distillation.py."""
    distillation: Literal["relations", "cosine"] = "relations"
    """`relations`: between the queries, keys and values of all layers (MiniViT); `cosine`: the states of the last layers."""
    distilled_layers: int | None = None
    """Only the last so many layers of this vision tower."""
    depth: int | None = None
    """Keep this many layers of vision tower and language model, to try a large model on a small machine."""
    language_layers: int | None = None
    """Deepen the language model to this many layers; the new ones begin without effect, see `models.deepen`."""

    # The way from vision tower to language model, see grafting.py
    projector: Literal["mlp", "resampler"] | None = None
    """Of this kind; fresh where the model has another."""
    resampler_queries: int | None = None
    """Tokens of a tile or slice; 64 and 96 in MiniCPM-V."""
    mining: bool = False
    """Put patch mining into the model: an image is its thumbnail, which asks the detailed tiles."""
    tiling: str | None = None
    """How images are cut, now and by the trained model's processor; that of the model's processor if not given."""

    # Data
    tile_ranges: list[list[int]] | str | None = field(default_factory=lambda: [list(PUBLISHED_TRAINING_RANGES)])
    """(min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles); each sample takes one of them."""
    max_seq_length: int = 4096
    too_long: Literal["raise", "skip"] = "raise"
    """What happens to an example with more tokens. It is never cut; skipped examples are counted."""
    order: Literal["shuffled", "grouped", "curriculum"] = "shuffled"
    """`grouped`: shuffled, with examples of similar length in a batch. `curriculum`: each dataset in its own order."""
    grounding_tokens: bool = False
    """Whether <ref>, <box> and <quad> in the data are control tokens, as in `chat(..., grounding_tokens=True)`."""

    # Packing, see packing.py
    pack_tokens: int | None = None
    """Join samples to rows of at most this many tokens; `batch_size` then counts rows."""
    pack_tiles: int = 48
    """Most tiles of a row."""
    pack_buffer: int = 20
    """Rows that are open while samples are laid into them."""
    loss_reduction: Literal["token", "square", "sample"] = "token"
    """How much the tokens of an answer of n tokens weigh: 1, 1 / sqrt(n), or 1 / n."""

    drop_tokens: dict[str, Any] | str | None = None
    """Leave out tokens of detailed tiles: `{steps: 0.33, share: [0.25, 1.0], by: [random, blocks, scm]}`, see dropping.py."""

    # Steps
    batch_size: int | None = None
    """Of an optimizer step, over all processes and accumulated micro batches; instead of gradient_accumulation_steps."""
    muon_learning_rate: float | None = None
    """Train the matrices of the layers with Muon at this rate; the rest with AdamW at `learning_rate`."""
    decay_ratio: float = 0.5
    """Share of the steps in which the rate of `warmup_stable_decay` falls to zero."""

    # Numbers
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the weights while they are trained. AdamW's steps are mostly lost in bfloat16 weights; `auto`, bfloat16 where the
    machine is fast in it, suits those that are frozen under LoRA."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn_implementation: str | None = None
    """As transformers takes it; `owner/kernel` of the Hub needs the package kernels. On a CPU, `eager` goes back through short
    sequences in less time than `sdpa`."""
    compile_layers: bool = False
    """Compile the layers of vision tower and language model: minutes at the start, then less time for each step."""
    pad_to_multiple_of: int = 1
    """Pad the sequences of a micro batch to a multiple of this, so that few shapes occur: a CPU prepares each new one."""

    def __post_init__(self):
        for name in ("data", "dimensions", "eval_data", "tile_ranges", "drop_tokens"):
            setattr(self, name, _structure(name, getattr(self, name)))
        _check(self)
        self._choose_types()
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.eval_steps is not None:
            self.eval_strategy = "steps"
        if self.use_cpu and "WORLD_SIZE" in os.environ:
            self.ddp_backend = self.ddp_backend or "gloo"
        if self.gradient_checkpointing and hasattr(self, "activation_checkpointing"):  # its name from 5.23 on
            self.activation_checkpointing, self.gradient_checkpointing = True, None
        super().__post_init__()
        self._divide_batch()

    def _choose_types(self) -> None:
        """Fill in types that were left to the machine, and say so in a line."""
        if self.bf16 is not False and not self.use_cpu and not torch.accelerator.is_available():
            raise ValueError("There is no GPU here; train on the CPU with use_cpu: true (--set use_cpu=true).")
        if self.bf16 is None or self.dtype == "auto":
            device = "cpu" if self.use_cpu else torch.accelerator.current_accelerator()
            fast = choose_dtype("auto", device or "cpu")
            self.bf16 = fast == torch.bfloat16 if self.bf16 is None else self.bf16
            self.dtype = str(fast).removeprefix("torch.") if self.dtype == "auto" else self.dtype

    def _divide_batch(self) -> None:
        share = self.per_device_train_batch_size * self.world_size
        if self.batch_size is None:
            self.batch_size = share * self.gradient_accumulation_steps
        if self.batch_size % share:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide among {self.world_size} processes with "
                f"per_device_train_batch_size {self.per_device_train_batch_size}; take a multiple of {share}."
            )
        self.gradient_accumulation_steps = self.batch_size // share

    @property
    def names_letters(self) -> bool:
        """Whether there is a loss for naming characters."""
        return self.letters_only or self.letters_weight is not None

    @property
    def dropping(self) -> Dropping | None:
        """Which image tokens are left out."""
        return None if self.drop_tokens is None else read_dropping(self.drop_tokens)

    def set_steps(self, steps: int) -> None:
        """Set the number of optimizer steps, which the data decide, and what follows from it.

        Raises:
            ValueError: The rate would still rise when the run ends or begins to decay.
        """
        self.max_steps = steps
        decays = self.lr_scheduler_type == "warmup_stable_decay"
        if self.warmup_steps < 1:
            self.warmup_steps = round(self.warmup_steps * steps)
        elif self.warmup_steps > steps * (1 - self.decay_ratio * decays):
            raise ValueError(f"warmup_steps {self.warmup_steps:g} are too many for the {steps} steps of this run.")
        if decays:
            decay = {"num_decay_steps": max(1, round(self.decay_ratio * steps)), "decay_type": "linear"}
            self.lr_scheduler_kwargs = decay | (self.lr_scheduler_kwargs or {})


class RecipeParser(HfArgumentParser):
    """Reads recipes; errors are raised, since recipes do not only come from a command line."""

    def __init__(self):
        super().__init__(Recipe)

    def error(self, message: str):
        """Raise `ValueError` instead of exiting the program."""
        raise ValueError(message)


def read_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read the recipe of a YAML file, with `name=value` put in.

    Raises:
        ValueError: No such file, or options or values that a recipe does not have.
    """
    return make_recipe(read_options(path) | read_overrides(overrides), str(path))


def read_options(path: Path) -> dict[str, Any]:
    """Read the options of a recipe's file, unchecked."""
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}; see scripts/training/recipes.")
    options = _parse(path.read_bytes(), str(path))
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold names and values, got {type(options).__name__}.")
    return options


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """Read `name=value` texts as options; values are YAML."""
    options = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {override!r}.")
        options[name] = _parse(text, f"--set {override}")
    return options


def make_recipe(options: dict[str, Any], where: str) -> Recipe:
    """Return the recipe with these options, checked; `where` they come from is told in errors."""
    try:
        _check_names(options)
        _check_types(options)
        arguments = [word for name, value in options.items() for word in _as_arguments(name, value)]
        (recipe,) = RecipeParser().parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, OSError, ImportError) as error:  # the last two of options that name a file or need a package
        raise ValueError(f"{where}: {error}") from error
    return recipe


def _parse(text: str | bytes, where: str):
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _check_names(options: dict) -> None:
    known = [entry.name for entry in fields(Recipe) if entry.init]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known)
            hint = f"did you mean {' or '.join(close)}?" if close else "see scripts/training/recipe.py."
            raise ValueError(f"unknown {name}; {hint}")


def _check_types(options: dict) -> None:
    """Raise `ValueError` for values that a parser would take as the text of something else."""
    kinds = get_type_hints(Recipe)
    for name, value in options.items():
        kind = str(kinds[name])
        takes_object = "dict" in kind
        takes_list = takes_object or "list" in kind
        if kinds[name] in (str, str | None) and not isinstance(value, str | None):
            raise ValueError(f"{name} must be text, got {value!r}.")
        if isinstance(value, list | dict) and not takes_list:
            raise ValueError(f"{name} must be one value, got {value!r}.")
        if isinstance(value, dict) and not takes_object:
            raise ValueError(f"{name} must be a list, got {value!r}.")
        structure = _structure(name, value) if takes_list else value
        if name.endswith("_kwargs") and not isinstance(structure, dict | None):
            raise ValueError(f"{name} must hold names and values, got {value!r}.")


def _as_arguments(name: str, value) -> list[str]:
    """Return an option as on a command line, where the parser checks types; null leaves its default."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [f"--{name}", *value]
    try:
        return [f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"]
    except ValueError as error:
        raise ValueError(f"{name} holds itself: {value!r}.") from error


def _structure(name: str, value):
    """Parse lists and objects that the argument parser left as JSON."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def _check(recipe: Recipe) -> None:
    for name, what in (("model", "a folder or model"), ("output_dir", "a folder")):
        if not getattr(recipe, name).strip():
            raise ValueError(f"{name} must name {what}, got {getattr(recipe, name)!r}.")
    if "/" in (recipe.attn_implementation or "") and not is_kernels_available():
        raise ValueError(
            f"attn_implementation {recipe.attn_implementation!r} is a kernel of the Hub, which needs: pip install kernels"
        )
    _check_dimensions(recipe)
    _check_numbers(recipe)
    warmup_ratio = recipe.warmup_steps if recipe.warmup_steps < 1 else 0
    if warmup_ratio < 0 or not 0 < recipe.decay_ratio <= 1 - warmup_ratio:
        raise ValueError(
            "warmup_steps must not be negative, decay_ratio more than 0, and both shares together at most 1."
        )
    if recipe.batch_size is not None and recipe.gradient_accumulation_steps != 1:
        raise ValueError("batch_size decides gradient_accumulation_steps; give one of them.")
    if not recipe.train:
        raise ValueError(f"train must name one or more of {', '.join(PARTS)}.")
    check_ranges(recipe.tile_ranges, "tile_ranges")
    if recipe.eval_data is None and (recipe.eval_steps is not None or recipe.eval_strategy != "no"):
        raise ValueError("eval_steps and eval_strategy need eval_data.")
    if recipe.language_layers is not None and (recipe.lora_r is not None or "language_model" not in recipe.train):
        raise ValueError("language_layers adds layers that have to be trained: train the language_model, without LoRA.")
    if recipe.language_layers is not None and recipe.depth is not None:
        raise ValueError("depth takes layers away and language_layers adds some; give one of them.")
    if recipe.fresh_projector and "projector" not in recipe.train:
        raise ValueError(f"A fresh_projector has to be trained, but train is {recipe.train}; add projector.")
    _check_dropping(recipe)
    _check_lora(recipe)
    _check_grafts(recipe)
    _check_letters(recipe)
    _check_distillation(recipe)
    _check_packing(recipe)


def _check_dropping(recipe: Recipe) -> None:
    if recipe.drop_tokens is None:
        return
    if not isinstance(recipe.drop_tokens, dict):
        raise ValueError(f"drop_tokens holds names and values, or null for none, got {recipe.drop_tokens!r}.")
    read_dropping(recipe.drop_tokens)
    if recipe.letters_only or recipe.teacher is not None:
        raise ValueError(
            "With letters_only or a teacher no tokens are read, so none can be left out; leave out drop_tokens."
        )


def _check_grafts(recipe: Recipe) -> None:
    if recipe.resampler_queries is not None and (recipe.projector != "resampler" or recipe.resampler_queries < 1):
        raise ValueError(
            f"resampler_queries are at least 1 and belong to projector: resampler, got {recipe.resampler_queries} with "
            f"{recipe.projector}."
        )
    if (recipe.projector or recipe.mining) and (recipe.lora_r is not None or "projector" not in recipe.train):
        raise ValueError(
            "projector and mining put in what has to be trained: name the projector in train, without LoRA."
        )
    if recipe.tiling is not None:
        check_tiling(*PRESETS["default"], tiling=recipe.tiling)
    if recipe.tiling == SLICES and (recipe.mining or recipe.names_letters):
        raise ValueError("mining and letters need square tiles of a grid, not tiling: slices.")


def _check_packing(recipe: Recipe) -> None:
    for name in ("pack_tokens", "pack_tiles", "pack_buffer"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if recipe.names_letters and (recipe.pack_tokens is not None or recipe.loss_reduction != "token"):
        raise ValueError("letters weigh their loss by answers; leave out pack_tokens, and loss_reduction at token.")
    if recipe.pack_tokens is None:
        return
    if recipe.per_device_train_batch_size != 1:
        raise ValueError(
            f"With pack_tokens a row is a batch: per_device_train_batch_size is 1, got {recipe.per_device_train_batch_size}."
        )
    if recipe.order == "grouped":
        raise ValueError("Packed rows are equally long already; take order: shuffled or curriculum.")


def _check_dimensions(recipe: Recipe) -> None:
    if recipe.dimensions is None:
        return
    if recipe.model != UNTRAINED_NANO:
        raise ValueError(f"dimensions are those of a model that begins as {UNTRAINED_NANO}, not of {recipe.model!r}.")
    parts = recipe.dimensions.items() if isinstance(recipe.dimensions, dict) else [("", None)]
    if not all(part in ("vision", "text") and isinstance(fields, dict) for part, fields in parts):
        raise ValueError(
            f"dimensions must be vision and text, each with fields of its configuration, got {recipe.dimensions!r}."
        )


def _check_numbers(recipe: Recipe) -> None:
    for name in (entry.name for entry in fields(recipe)):
        value = getattr(recipe, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}.")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "batch_size", "gradient_accumulation_steps")
    for name in (*sizes, "max_seq_length", "depth", "language_layers", "save_total_limit", "pad_to_multiple_of"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if recipe.max_steps < 1 and recipe.max_steps != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 to count epochs, got {recipe.max_steps}.")
    for name in (
        "num_train_epochs",
        "learning_rate",
        "muon_learning_rate",
        "save_steps",
        "logging_steps",
        "eval_steps",
    ):
        value = getattr(recipe, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be more than 0, got {value}.")
    for name in AT_LEAST_ZERO:
        value = getattr(recipe, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be from 0 to below 1, got {getattr(recipe, name)}.")
    for name in ("seed", "data_seed"):
        value = getattr(recipe, name)
        if value is not None and not 0 <= value < 2**32:  # as NumPy takes them
            raise ValueError(f"{name} must be at least 0 and below 2**32, got {value}.")


def _check_lora(recipe: Recipe) -> None:
    if recipe.lora_r is None:
        if recipe.lora_alpha is not None or recipe.lora_dropout or not recipe.lora_merge:
            raise ValueError("lora_alpha, lora_dropout and lora_merge belong to lora_r, the rank of the adapters.")
        if recipe.lora_also is not None or recipe.frozen_weights is not None:
            raise ValueError(
                "lora_also and frozen_weights belong to lora_r: weights of few bits learn by adapters alone."
            )
        return
    if recipe.train_only is not None or recipe.frozen is not None:
        raise ValueError("train_only and frozen choose among trained weights; LoRA trains none of the model's own.")
    if recipe.train != ["language_model"]:
        raise ValueError(f"LoRA trains adapters of the language model alone; train is {recipe.train}, leave it out.")
    if recipe.muon_learning_rate is not None:
        raise ValueError(
            "LoRA's factors are no square updates for Muon to orthogonalise; leave out muon_learning_rate."
        )
    if recipe.lora_r < 1 or not 0 <= recipe.lora_dropout < 1:
        raise ValueError(
            f"lora_r must be at least 1 and lora_dropout in [0, 1), got {recipe.lora_r}, {recipe.lora_dropout}."
        )


def _check_letters(recipe: Recipe) -> None:
    if recipe.names_letters and ("vision" not in recipe.train or recipe.lora_r is not None):
        raise ValueError(f"letters teach the vision tower, but train is {recipe.train} (with LoRA it stays as it is).")
    if recipe.letters_only and (recipe.train != ["vision"] or recipe.letters_weight is not None):
        raise ValueError(
            f"With letters_only nothing but the vision tower is trained, by one loss; train is {recipe.train}, "
            f"letters_weight {recipe.letters_weight}."
        )


def _check_distillation(recipe: Recipe) -> None:
    if recipe.teacher is None:
        if recipe.distilled_layers is not None or recipe.distillation != "relations":
            raise ValueError("distillation and distilled_layers belong to teacher, the model to learn from.")
        return
    if recipe.train != ["vision"] or recipe.names_letters or recipe.lora_r is not None:
        raise ValueError(
            f"A teacher teaches the vision tower alone (train: [vision], no letters, no LoRA); train is {recipe.train}."
        )
    if recipe.compile_layers or recipe.pack_tokens is not None or recipe.loss_reduction != "token":
        raise ValueError(
            "With a teacher the inside of the layers is read: leave out compile_layers, pack_tokens and loss_reduction."
        )
    if recipe.distilled_layers is not None and recipe.distilled_layers < 1:
        raise ValueError(f"distilled_layers must be at least 1, got {recipe.distilled_layers}.")


def check_ranges(ranges, where: str) -> None:
    """Raise `ValueError` unless these are one or more (min, max, adaptive min, adaptive max)."""
    if not isinstance(ranges, list) or not ranges or any(not isinstance(r, list) or len(r) != 4 for r in ranges):
        raise ValueError(f"{where} must be a list of [min, max, adaptive min, adaptive max], got {ranges!r}.")
    for four in ranges:
        try:
            check_tiling(*four)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


# Options that may change between the parts of an interrupted run, by how they begin: they decide neither samples nor steps.
FREE_ON_RESUME = (
    *(
        "output_dir",
        "eval_",
        "do_",
        "per_device_eval_",
        "save_",
        "logging_",
        "log_",
        "dataloader_",
        "report_to",
        "run_name",
    ),
    *("disable_tqdm", "local_rank", "hub_", "push_to_hub", "project", "trackio_"),
)


def changed_options(recipe: Recipe, recorded: dict[str, Any]) -> list[str]:
    """Return the names of options in which a recipe differs from the recorded one of the run that it is to resume.

    Those that only one of two releases of transformers knows are left aside.
    """
    return [
        name
        for name, value in json.loads(json.dumps(recipe.to_dict())).items()
        if not name.startswith(FREE_ON_RESUME) and name in recorded and value != recorded[name]
    ]
