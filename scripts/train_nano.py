"""Train MiniMonkey-Nano, the small model at the root of this repository, from scratch on rendered text.

    apt-get install wamerican fonts-...      the fonts are FONT_PACKAGES in scripts/synthetic/text_images.py
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
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from repository import root_class
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, GenerationConfig

from synthetic.byte_tokenizer import build_byte_tokenizer
from synthetic.text_images import CHARACTERS, TextImage, training_page, training_sample


logger = logging.getLogger("train_nano")

TILE_SIZE, PATCH_SIZE = 112, 8
CELLS_PER_PATCH = 2  # characters are narrower than a patch, so each patch names two, side by side
CHARACTER_CLASS = {character: i + 1 for i, character in enumerate(CHARACTERS)}  # 0: no character here
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
RANGE_NAMES = root_class("tiling.RANGE_NAMES")
layer_grids = root_class("tiling.layer_grids")
ONE_TILE = (1, 1, 1, 1)
MSAC_RANGES = ((1, 4, 1, 3), (2, 4, 2, 5), (2, 6, 1, 4), (4, 8, 3, 6), (1, 6, 1, 1))


def write_untrained(out: Path) -> None:
    """Configuration, tokenizer, processor and chat template of Nano, and weights to start from."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_byte_tokenizer(root_class("conversation.DEFAULT_SYSTEM_MESSAGE"))
    template = root_class("conversation.chat_template_jinja")(root_class("conversation.get_template")("internlm2-chat"))
    config = root_class("configuration_minimonkey.MiniMonkeyConfig")(
        vision_config={
            "hidden_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 576,
            "image_size": TILE_SIZE,
            "patch_size": PATCH_SIZE,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 512,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    image_processor = root_class("image_processing_minimonkey.MiniMonkeyImageProcessor")(
        size={"height": TILE_SIZE, "width": TILE_SIZE}, **dict(zip(RANGE_NAMES, ONE_TILE))
    )
    processor = root_class("processing_minimonkey.MiniMonkeyProcessor")(
        image_processor, tokenizer, image_seq_length=config.image_seq_length, chat_template=template
    )
    processor.save_pretrained(out)
    model = root_class("modeling_minimonkey.MiniMonkeyForConditionalGeneration")(config)
    initialize(model)
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        max_new_tokens=256,
    )
    model.save_pretrained(out)


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Weights from which a small vision tower learns letters quickly.

    Each attention head of the vision tower begins by looking at one neighbour of its patch (left, right, above, below):
    sines and cosines as position embeddings, a rotation of them as query projection.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in ("vision_tower", "projector", "layers")):
            nn.init.xavier_uniform_(parameter)
    tower, config = model.model.vision_tower, model.config.vision_config
    projection = tower.embeddings.patch_embeddings.projection
    nn.init.normal_(projection.weight, std=0.6 / math.sqrt(projection.weight[0].numel()))
    side, heads = TILE_SIZE // PATCH_SIZE, config.num_attention_heads
    quarter = config.hidden_size // heads // 4
    frequencies = torch.logspace(math.log10(0.2), math.log10(2.4), quarter)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles_x, angles_y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies
    waves = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    tower.embeddings.position_embeddings.zero_()
    tower.embeddings.position_embeddings[0, 1:] = 0.7 * waves.repeat(1, heads)
    neighbours = ((-1, 0), (1, 0), (0, -1), (0, 1))
    query = torch.block_diag(
        *(_rotation(frequencies * offset) for head in range(heads) for offset in neighbours[head % 4])
    )
    for layer in tower.encoder.layer:
        noise = torch.randn(2, config.hidden_size, config.hidden_size) * 0.01
        layer.attention.q_proj.weight.copy_(1.4 * query + noise[0])
        layer.attention.k_proj.weight.copy_(1.4 * torch.eye(config.hidden_size) + noise[1])


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """Turns (sin a, cos a) into (sin(a + angle), cos(a + angle))."""
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])


# --- data ------------------------------------------------------------------------------------------------------------


def cell_labels(sample: TextImage, grid: tuple[int, int], patches: int) -> np.ndarray:
    """The character at each cell of each tile: (tiles, patches, patches * CELLS_PER_PATCH)."""
    columns, rows = grid
    height, width = rows * patches, columns * patches * CELLS_PER_PATCH
    labels = np.zeros((height, width), dtype=np.int64)
    for item in sample.characters:
        x0, y0, x1, y1 = item.box
        left, right = (x / sample.image.width * width for x in (x0, x1))
        top, bottom = (y / sample.image.height * height for y in (y0, y1))
        # The cells whose centre the character covers, at least the one its own centre is in.
        left, right = min(round(left), int((left + right) / 2)), max(round(right), int((left + right) / 2) + 1)
        top, bottom = min(round(top), int((top + bottom) / 2)), max(round(bottom), int((top + bottom) / 2) + 1)
        labels[max(top, 0) : bottom, max(left, 0) : right] = CHARACTER_CLASS[item.character]
    tiles = labels.reshape(rows, patches, columns, patches * CELLS_PER_PATCH).swapaxes(1, 2)
    return tiles.reshape(rows * columns, patches, patches * CELLS_PER_PATCH)


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
        labels = [cell_labels(picture, grid, TILE_SIZE // PATCH_SIZE) for grid in grids]
        return {**item, "cell_labels": torch.from_numpy(np.concatenate(labels))}

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
        self.head = nn.Linear(model.config.vision_config.hidden_size, CELLS_PER_PATCH * (len(CHARACTERS) + 1))
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
        classes = len(CHARACTERS) + 1
        logits = self.head(self._patch_states).float().reshape(-1, classes)
        class_weight = torch.ones(classes, device=logits.device)
        class_weight[0] = 0.2  # most of a picture is background
        letters_loss = nn.functional.cross_entropy(logits, cell_labels.reshape(-1), weight=class_weight)
        if not text:
            return letters_loss, {"letters": letters_loss.item()}
        loss = reading_loss + 0.3 * letters_loss
        return loss, {"reading": reading_loss.item(), "letters": letters_loss.item()}


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
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
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
        with torch.autocast(args.device, torch.bfloat16):
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
    parser.add_argument("--letters-steps", type=int, default=2000)
    parser.add_argument("--reading-steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in OUT")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    if not (args.resume and (args.out / "model.safetensors").exists()):
        write_untrained(args.out)
    model_class = root_class("modeling_minimonkey.MiniMonkeyForConditionalGeneration")
    processor = AutoProcessor.from_pretrained(args.out, trust_remote_code=True)
    learner = Learner(model_class.from_pretrained(args.out, dtype=torch.float32)).to(args.device).train()
    run_stage(learner, processor, Stage("letters", args.letters_steps, False, (6e-3, 2e-3), 0.9), args)
    run_stage(learner, processor, Stage("reading", args.reading_steps, True, (4e-3, 2e-3), 0.5), args)
    learner.model.to(torch.bfloat16).save_pretrained(args.out)
    logger.info("Wrote %s", args.out)


if __name__ == "__main__":
    main()
