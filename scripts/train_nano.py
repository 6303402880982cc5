"""Train MiniMonkey-Nano, the small model at the root of this repository, from scratch on rendered text.

    python scripts/train_nano.py OUT         an hour and a half on two CPU cores; --resume goes on after an interruption

Two stages, the first for the vision tower alone:

1. *Letters.* A linear head names the character at every patch. The renderer knows them all, so a picture gives hundreds of
   labels instead of ten, and letters are learned in minutes instead of hours. The head is dropped at the end.
2. *Reading.* The whole model answers with the text of the picture; the head keeps a small weight. At the end one picture
   in eight is cut by multi-scale cropping with one of MSAC_RANGES, so that the model has seen many tiles.

Source of the optimizer: Muon for matrices, AdamW for the rest; AdamW alone stays on the first plateau far longer.
"""

import argparse
import functools
import json
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from precision import add_dtype_argument, choose_dtype
from repository import add_device_argument, load_processor, preparing, readable, root_class, whole_number
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from synthetic.materials import materials
from synthetic.text_images import TextImage, training_page, training_sample
from training.letters import CELLS_PER_PATCH, CLASSES, cell_labels, letters_loss
from training.nano import ONE_TILE, PATCH_SIZE, RANGE_NAMES, TILE_SIZE, write_untrained
from training.optimizers import Muon


logger = logging.getLogger("train_nano")

QUESTIONS = (
    "Read the text.",
    "Read all the text.",
    "Read the all text in the image.",
    "Read all the text in the image.",
    "What does it say?",
    "What does the image say?",
    "What is written here?",
    "What is written in the image?",
    "What text is in the image?",
    "What word is this?",
)
layer_grids = root_class("tiling.layer_grids")
MSAC_RANGES = ((1, 4, 1, 3), (2, 4, 2, 5), (2, 6, 1, 4), (4, 8, 3, 6), (1, 6, 1, 1))


# --- data ------------------------------------------------------------------------------------------------------------


def letters_picture(index: int, seed: int) -> TextImage:
    """Pages of small text first, black on white among them; single words, large and stretched, more and more."""
    if random.Random(f"{seed}/letters/{index}").random() > min(0.6, index / 40_000):
        return training_page(index, seed, min(1.0, index / 60_000), plain_share=max(0.15, 1 - index / 20_000))
    return training_sample(index, seed, min(0.64, index / 100_000))


def reading_picture(index: int, seed: int, progress: float) -> TextImage:
    """Mostly single words, whose length and damage grow; pages for one picture in five or eight."""
    rng = random.Random(f"{seed}/reading/{index}")
    if rng.random() < (0.12 if progress < 0.15 else 0.2):
        return training_page(index, seed, strength=0.6)
    is_hard = progress >= 0.2 and rng.random() < 0.15
    return training_sample(index, seed, 0.64 if is_hard else 0.05 + 0.25 * min(1.0, progress * 8))


class Pictures(torch.utils.data.Dataset):
    """Sample i of a stage as model inputs; any worker can make any sample."""

    def __init__(self, processor, indices: range, size: int, seed: int, reading: bool):
        self.processor, self.indices, self.size, self.seed, self.reading = processor, indices, size, seed, reading

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict:
        index = self.indices[position]
        progress = index / self.size
        rng = random.Random(f"{self.seed}/options/{index}")
        ranges = rng.choice(MSAC_RANGES) if self.reading and progress > 0.6 and rng.random() < 0.12 else ONE_TILE
        picture = reading_picture(index, self.seed, progress) if self.reading else letters_picture(index, self.seed)
        settings = dict(zip(RANGE_NAMES, ranges))
        if self.reading:
            item = self._conversation(rng.choice(QUESTIONS), picture, settings)
        else:
            item = self.processor.image_processor(picture.image, return_tensors="pt", **settings)
        columns, rows, adaptive_columns, adaptive_rows = item.pop("tile_grids")[0].tolist()
        item.pop("tile_counts")
        grids = layer_grids((columns, rows), (adaptive_columns, adaptive_rows))
        labels = cell_labels(picture.image, picture.characters, grids, TILE_SIZE // PATCH_SIZE)
        return {**item, "cell_labels": labels}

    def _conversation(self, question: str, picture: TextImage, settings: dict) -> dict:
        """A question about the picture and its answer as model inputs, labels for the answer alone."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = dict(self.processor(images=picture.image, text=prompt, images_kwargs=settings))
        prompt_ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask")
        answer_ids = self.processor.tokenizer(picture.text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        return {
            **inputs,
            "input_ids": torch.tensor(prompt_ids + answer_ids),
            "labels": torch.tensor([-100] * len(prompt_ids) + answer_ids),
        }


def collate(samples: list[dict], pad_token_id: int) -> dict:
    batch = {name: torch.cat([s[name] for s in samples]) for name in ("pixel_values", "cell_labels")}
    if "input_ids" in samples[0]:
        lengths = torch.tensor([len(s["input_ids"]) for s in samples])
        ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True, padding_value=pad_token_id)
        batch["input_ids"] = ids
        batch["attention_mask"] = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        batch["labels"] = pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=-100)
    return batch


# --- training --------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """The model to train and, on its vision tower, the linear head that names the characters under each patch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.vision_config.hidden_size, CELLS_PER_PATCH * CLASSES)
        self._patch_states = None
        model.model.vision_tower.register_forward_hook(self._keep_patch_states)

    def _keep_patch_states(self, module, args, output) -> None:
        self._patch_states = output.last_hidden_state[:, 1:]  # without the class token

    def forward(self, pixel_values: torch.Tensor, cell_labels: torch.Tensor, **text) -> tuple[torch.Tensor, dict]:
        """The loss to minimise and its parts; `text` is empty in the first stage."""
        if text:
            reading_loss = self.model(pixel_values=pixel_values, **text).loss
        else:
            self.model.model.vision_tower(pixel_values=pixel_values)
        letters = letters_loss(self.head(self._patch_states), cell_labels)
        if not text:
            return letters, {"letters": letters.item()}
        loss = reading_loss + 0.3 * letters
        return loss, {"reading": reading_loss.item(), "letters": letters.item()}


@dataclass
class Stage:
    name: str
    steps: int
    reading: bool
    learning_rates: tuple[float, float]
    """Of the matrices (Muon) and of the rest (AdamW)."""
    decay_from: float
    """Share of the steps after which the rates fall to zero."""


def optimizers(learner: Learner, stage: Stage) -> list[torch.optim.Optimizer]:
    trained = learner.named_parameters()
    if not stage.reading:
        trained = [(name, p) for name, p in trained if "vision_tower" in name or name.startswith("head")]
    matrices, rest = [], []
    for name, parameter in trained:
        is_hidden = parameter.ndim == 2 and any(part in name for part in ("encoder", "projector", "layers"))
        (matrices if is_hidden else rest).append(parameter)
    return [
        Muon(matrices, lr=0.0, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def run_stage(learner: Learner, processor, stage: Stage, args: argparse.Namespace) -> None:
    """Train one stage, writing OUT/training-<stage>.pt now and then; with --resume, go on from there."""
    checkpoint = args.out / f"training-{stage.name}.pt"
    updates, first = optimizers(learner, stage), 0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        learner.load_state_dict(saved["learner"])
        for optimizer, state in zip(updates, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first = saved["step"]
    size = stage.steps * args.batch_size
    data = Pictures(processor, range(first * args.batch_size, size), size, args.seed, stage.reading)
    loader = torch.utils.data.DataLoader(
        data,
        args.batch_size,
        num_workers=args.workers,
        collate_fn=functools.partial(collate, pad_token_id=processor.tokenizer.pad_token_id),
    )
    started, history = time.time(), []
    for step, batch in enumerate(loader, start=first + 1):
        progress = step / stage.steps
        scale = min(1.0, step / 100) * min(1.0, max(0.02, (1 - progress) / (1 - stage.decay_from)))
        for optimizer, rate in zip(updates, stage.learning_rates):
            optimizer.param_groups[0]["lr"] = rate * scale
        batch = {name: value.to(args.device) for name, value in batch.items()}
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            loss, parts = learner(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optimizer in updates:
            optimizer.step()
            optimizer.zero_grad()
        history.append(parts)
        if step % 50 == 0 or step == stage.steps:
            means = ", ".join(f"{name} {np.mean([h[name] for h in history]):.3f}" for name in parts)
            logger.info("%s %d/%d: %s (%.0f s)", stage.name, step, stage.steps, means, time.time() - started)
            history = []
        if step % 200 == 0 or step == stage.steps:
            state = {
                "learner": learner.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in updates],
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the new model")
    parser.add_argument("--letters-steps", type=whole_number(0), default=2000)
    parser.add_argument("--reading-steps", type=whole_number(0), default=2600)
    parser.add_argument("--batch-size", type=whole_number(1), default=32)
    parser.add_argument("--workers", type=whole_number(0), default=1)
    parser.add_argument("--seed", type=whole_number(0), default=1)
    add_device_argument(parser, "cpu")
    add_dtype_argument(parser, "of computation; ")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in OUT")
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.dtype == torch.float16:
        parser.error("--dtype float16 needs its losses scaled; take bfloat16 or float32")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    model_class = root_class("modeling_minimonkey.MiniMonkeyForConditionalGeneration")
    with preparing():
        if not (args.resume and (args.out / "model.safetensors").exists()):
            write_untrained(args.out)
        (args.out / "materials.json").write_text(json.dumps(materials(), indent=1) + "\n")
        processor = load_processor(args.out)
        with readable(args.out):
            model = model_class.from_pretrained(args.out, dtype=torch.float32)
    learner = Learner(model).to(args.device).train()
    run_stage(learner, processor, Stage("letters", args.letters_steps, False, (6e-3, 2e-3), 0.9), args)
    run_stage(learner, processor, Stage("reading", args.reading_steps, True, (4e-3, 2e-3), 0.5), args)
    learner.model.to(torch.bfloat16).save_pretrained(args.out)
    logger.info("Wrote %s", args.out)


if __name__ == "__main__":
    main()
