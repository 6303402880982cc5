"""transformers' Trainer with what it lacks here: Muon, the processor beside every checkpoint, a count of redrawn documents."""

import os
from pathlib import Path

import torch
from repository import root_class
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from training.optimizers import MuonWithAdamW, matrices_and_rest
from training.recipe import Recipe


class FineTuner(Trainer):
    """A Trainer for one recipe.

    The processor is not passed to Trainer as `processing_class`: it would make the tokenizer's `eos_token` the model's, while
    answers end with the separator of the chat template.
    """

    def __init__(self, recipe: Recipe, processor, **kwargs):
        super().__init__(**kwargs)
        self.recipe, self.processor, self.redrawn = recipe, processor, 0
        self._check_wrapper()
        self._check_tiles()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sharded_layers(self.model)

    def _check_wrapper(self) -> None:
        """Trainer quietly runs DDP where sharding was asked for but is not to be had (on a CPU, for example)."""
        for variable, name, is_enabled in (
            ("ACCELERATE_USE_FSDP", "FSDP", self.is_fsdp_enabled),
            ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", self.is_deepspeed_enabled),
        ):
            if os.environ.get(variable, "false").lower() == "true" and not is_enabled:
                raise ValueError(
                    f"{name} was asked for, but accelerate would run {self.accelerator.distributed_type.value} on "
                    f"{self.args.device.type}; {name} needs GPUs. Without them start with torchrun (DDP)."
                )
        if self.recipe.optimizer == "muon" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("Muon orthogonalises whole matrices, which FSDP and DeepSpeed split; use DDP or adamw.")

    def _check_tiles(self) -> None:
        """Processes that share the weights have to run the vision tower equally often, once."""
        is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        most = max(r[1] + r[3] + 1 for source in self.train_dataset.sources for r in source.ranges)
        at_once = root_class("modeling_minimonkey.VISION_CHUNK_TILES")
        if is_sharded and self.recipe.micro_batch_size * most > at_once:
            raise ValueError(
                f"Micro batches of {self.recipe.micro_batch_size} with up to {most} tiles each go through the vision tower in "
                f"parts of {at_once}, in one process oftener than in another, which FSDP and ZeRO-3 cannot wait for. Take a "
                "smaller micro_batch_size or fewer tiles, or ZeRO-2."
            )

    def create_optimizer(self, model=None):
        if self.recipe.optimizer != "muon":
            return super().create_optimizer(*(() if model is None else (model,)))
        recipe = self.recipe
        self.optimizer = MuonWithAdamW(
            *matrices_and_rest(self.model if model is None else model),
            matrix_learning_rate=recipe.matrix_learning_rate or recipe.learning_rate,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=tuple(recipe.betas),
        )
        return self.optimizer

    def _prepare_inputs(self, inputs):
        self.redrawn += inputs.pop("redrawn", 0)
        return super()._prepare_inputs(inputs)

    def redrawn_everywhere(self) -> int:
        """Documents that were too long and drawn anew, of all processes, since this start."""
        return int(self.accelerator.reduce(torch.tensor(self.redrawn, device=self.args.device), "sum"))

    def log(self, logs: dict, *args, **kwargs) -> None:
        super().log({**logs, "redrawn": self.redrawn} if self.redrawn else logs, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)


def sharded_layers(model) -> list[str]:
    """The classes whose instances FSDP shards one by one: the layers of vision tower and language model.

    `_no_split_modules`, which accelerate would take, also names layers that a model with visual experts has replaced, and a
    name without a layer is refused.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    stacks = (base.model.vision_tower.encoder.layer, base.model.language_model.layers)
    return sorted({type(layer).__name__ for stack in stacks for layer in stack})


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Trainer's arguments for a recipe, without the number of steps, which the data decide.

    Made before the model is loaded: DeepSpeed's ZeRO-3 has to be known then.

    Raises:
        ValueError: A batch that does not divide among processes and micro batches.
    """
    output = Path(recipe.output)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    known = TrainingArguments.__dataclass_fields__
    # 5.23 renamed it
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=1,  # until the data are known
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type=recipe.schedule,
        bf16=recipe.bf16,
        use_cpu=recipe.device == "cpu",
        ddp_backend="gloo" if recipe.device == "cpu" and "WORLD_SIZE" in os.environ else None,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        eval_strategy="no" if recipe.eval_every is None else "steps",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        train_sampling_strategy="sequential",  # the samples are laid out in the order of the run
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        report_to="tensorboard",
        seed=recipe.seed,
        **{checkpointing: recipe.gradient_checkpointing},
        **{f"{checkpointing}_kwargs": {"use_reentrant": False} if recipe.gradient_checkpointing else None},
    )
    share = recipe.micro_batch_size * arguments.world_size
    if recipe.batch_size % share:
        raise ValueError(
            f"batch_size {recipe.batch_size} does not divide among {arguments.world_size} processes with micro batches "
            f"of {recipe.micro_batch_size}; take a multiple of {share}."
        )
    arguments.gradient_accumulation_steps = recipe.batch_size // share
    return arguments


def set_steps(arguments: TrainingArguments, recipe: Recipe, steps: int) -> None:
    """Put in the number of optimizer steps, and what follows from it."""
    arguments.max_steps = steps
    arguments.warmup_steps = round(recipe.warmup_ratio * steps)
    if recipe.schedule == "warmup_stable_decay":
        arguments.lr_scheduler_kwargs = {
            "num_decay_steps": max(1, round(recipe.decay_ratio * steps)),
            "decay_type": "linear",
        }


def complete_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; one that was being written when the run died has no state yet."""
    found = [
        folder for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (folder / "trainer_state.json").is_file()
    ]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(reversed(complete_checkpoints(output)), None)
