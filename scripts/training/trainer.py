"""transformers' Trainer with what it lacks here: Muon, the processor next to every checkpoint, a count of redrawn documents."""

import os
from pathlib import Path

import torch
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minimonkey.modeling_minimonkey import VISION_CHUNK_TILES
from minimonkey.scripts.training.optimizers import MuonWithAdamW, matrices_and_rest
from minimonkey.scripts.training.packing import weighted_loss
from minimonkey.scripts.training.recipe import Recipe


class FineTuner(Trainer):
    """A Trainer whose `args` are a recipe.

    The processor is not passed to Trainer as `processing_class`: it would make the tokenizer's `eos_token` the model's, while
    answers end with the separator of the chat template.
    """

    args: Recipe

    def __init__(self, processor, **kwargs):
        super().__init__(**kwargs)
        self.processor, self.redrawn = processor, 0
        self._check_wrapper()
        self._check_tiles()
        self._check_dropping()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sharded_layers(self.model)

    def _check_wrapper(self) -> None:
        """Raise `ValueError` where Trainer would quietly run DDP in place of sharding that it cannot do (on a CPU, say)."""
        for variable, name, is_enabled in (
            ("ACCELERATE_USE_FSDP", "FSDP", self.is_fsdp_enabled),
            ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", self.is_deepspeed_enabled),
        ):
            if os.environ.get(variable, "false").lower() == "true" and not is_enabled:
                raise ValueError(
                    f"{name} was asked for, but accelerate would run {self.accelerator.distributed_type.value} on "
                    f"{self.args.device.type}; {name} needs GPUs. Without them start with torchrun (DDP)."
                )
        if self.args.muon_learning_rate is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Muon orthogonalises whole matrices, which FSDP and DeepSpeed split; use DDP or AdamW alone."
            )

    def _check_tiles(self) -> None:
        """Raise `ValueError` unless processes that share the weights run the vision tower equally often: once."""
        is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        most = max(r[1] + r[3] + 1 for source in self.train_dataset.sources for r in source.ranges)
        most = self.args.pack_tiles if self.args.pack_tokens else most
        at_once = self.args.per_device_train_batch_size
        if is_sharded and self.processor.image_processor.cuts_slices():
            raise ValueError(
                "Slices go through the vision tower once for each of their sizes, in one process oftener than in another, "
                "which FSDP and ZeRO-3 cannot wait for. Take DDP or ZeRO-2, or another tiling."
            )
        if is_sharded and at_once * most > VISION_CHUNK_TILES:
            raise ValueError(
                f"Micro batches of {at_once} with up to {most} tiles each go through the vision tower in parts of "
                f"{VISION_CHUNK_TILES}, in one process oftener than in another, which FSDP and ZeRO-3 cannot wait for. Take a "
                "smaller per_device_train_batch_size or fewer tiles, or ZeRO-2."
            )

    def _check_dropping(self) -> None:
        """Raise `ValueError` where tokens that are to be dropped cannot be scored, or are nowhere."""
        dropping = self.args.dropping
        if dropping is None:
            return
        if dropping.needs_scores and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "drop_tokens by scm reads the first layers by themselves, whose weights FSDP and ZeRO-3 split; take by: "
                "[random, blocks], or DDP."
            )
        if self.train_dataset.encoder.has_layouts or self.model.config.projector != "mlp":
            raise ValueError(
                "drop_tokens needs tiles whose tokens lie in rows and columns; leave out slices, mining and a resampler."
            )
        if all(most == 1 for source in self.train_dataset.sources for _, most, _, _ in source.ranges):
            raise ValueError("drop_tokens has nothing to leave out: all tile_ranges have one detailed tile at most.")

    def create_optimizer(self, model=None):
        recipe = self.args
        if recipe.muon_learning_rate is None:
            return super().create_optimizer(*(() if model is None else (model,)))
        self.optimizer = MuonWithAdamW(
            *matrices_and_rest(self.model if model is None else model),
            matrix_learning_rate=recipe.muon_learning_rate,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
        )
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the batches of a step and what their loss is divided by: all answers' tokens, or the sum of their weights."""
        batches, divisor = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "loss_weights" in batches[0]:
            divisor = sum(batch["loss_weights"][:, 1:].sum() for batch in batches).to(device)
            divisor = self.accelerator.gather(divisor).sum() if self.args.world_size > 1 else divisor
        return batches, divisor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss as Trainer does, or the weighted one (packing.py) of batches with `loss_weights`."""
        if "loss_weights" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = inputs.pop("loss_weights")
        divisor = weights[:, 1:].sum() if num_items_in_batch is None else num_items_in_batch
        loss, output = weighted_loss(model, inputs, weights, divisor)
        if num_items_in_batch is not None:
            loss = loss * self.args.world_size  # the mean over processes follows
        return (loss, output) if return_outputs else loss

    def _prepare_inputs(self, inputs):
        self.redrawn += inputs.pop("redrawn", 0)
        return super()._prepare_inputs(inputs)

    def redrawn_everywhere(self) -> int:
        """Count the documents that were too long and drawn anew, over all processes, since this start."""
        return int(self.accelerator.reduce(torch.tensor(self.redrawn, device=self.args.device), "sum"))

    def log(self, logs: dict, *args, **kwargs) -> None:
        super().log({**logs, "redrawn": self.redrawn} if self.redrawn else logs, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)


def sharded_layers(model) -> list[str]:
    """Return the classes whose instances FSDP shards one by one: the layers of vision tower and language model.

    `_no_split_modules`, which accelerate would take, also names layers that a model with visual experts has replaced, and a
    name without a layer is refused.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    stacks = (base.model.vision_tower.encoder.layer, base.model.language_model.layers)
    return sorted({type(layer).__name__ for stack in stacks for layer in stack})


def complete_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; one that was being written when the run died has no state yet."""
    found = [
        folder for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (folder / "trainer_state.json").is_file()
    ]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def last_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    return next(reversed(complete_checkpoints(output)), None)
