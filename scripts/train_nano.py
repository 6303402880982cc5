"""Train MiniMonkey-Nano, the small model at the root of this repository, from scratch on rendered text.

    apt-get install wamerican $(python -c "import sys; sys.path.insert(0, 'scripts'); \
        from synthetic.text_images import FONT_PACKAGES; print(FONT_PACKAGES)")
    python scripts/train_nano.py OUT --max-steps 12000
    python scripts/train_nano.py OUT --max-steps 12000 --resume        after an interruption

The model learns to answer with the text of a picture. Beside that loss, a linear head on the vision tower names the
character at every patch; the renderer knows them all, so every picture gives hundreds of labels instead of ten, and the
vision tower learns letters within minutes instead of after hours. The head is dropped at the end.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from synthetic.text_images import CHARACTERS, TextImage, training_sample

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tiling import msac_grids  # noqa: E402


CELLS_PER_PATCH = 2  # characters are narrower than a patch, so each patch names two, side by side
CHARACTER_CLASS = {character: i + 1 for i, character in enumerate(CHARACTERS)}  # 0: no character here
READING_QUESTIONS = (
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
MSAC_RANGES = ((1, 4, 1, 3), (2, 4, 2, 5), (2, 6, 1, 4), (4, 8, 3, 6), (1, 6, 1, 1))


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


def tile_ranges(index: int, progress: float) -> tuple[int, int, int, int]:
    """One tile an image while letters are learned; multi-scale tiles for one image in four at the end."""
    rng = random.Random(f"tiles/{index}")
    return rng.choice(MSAC_RANGES) if progress > 0.65 and rng.random() < 0.25 else (1, 1, 1, 1)


class ReadingDataset(torch.utils.data.Dataset):
    """Sample i of the curriculum as model inputs; the position in the curriculum is i / size."""

    def __init__(self, processor, size: int, seed: int, patches: int):
        self.processor, self.size, self.seed, self.patches = processor, size, seed, patches

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        progress = index / self.size
        sample = training_sample(index, self.seed, progress)
        ranges = tile_ranges(index, progress)
        pixel_values, grids = self.processor.tiles(sample.image, ranges)
        question = READING_QUESTIONS[random.Random(f"question/{index}").randrange(len(READING_QUESTIONS))]
        prompt, answer = self.processor.token_ids(question, sample.text, len(pixel_values))
        return {
            "input_ids": torch.tensor(prompt + answer),
            "labels": torch.tensor([-100] * len(prompt) + answer),
            "pixel_values": pixel_values,
            "cell_labels": torch.from_numpy(np.concatenate([cell_labels(sample, grid, self.patches) for grid in grids])),
        }


def collate(samples: list[dict], pad_token_id: int) -> dict:
    ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1])[None] < lengths[:, None]).long(),
        "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=-100),
        "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
        "cell_labels": torch.cat([s["cell_labels"] for s in samples]),
    }


class ReaderWithCharacterMap(nn.Module):
    """The model to train and, on its vision tower, the linear head that names the characters under each patch."""

    def __init__(self, model: nn.Module, weight: float = 1.0):
        super().__init__()
        self.model = model
        self.weight = weight
        self.head = nn.Linear(
            model.config.vision_config.hidden_size, CELLS_PER_PATCH * (len(CHARACTERS) + 1)
        )
        self._patch_states = None
        model.model.vision_tower.register_forward_hook(self._keep_patch_states)

    def _keep_patch_states(self, module, args, output) -> None:
        self._patch_states = output.last_hidden_state[:, 1:]  # without the class token

    def forward(self, cell_labels: torch.Tensor, **inputs) -> dict:
        outputs = self.model(**inputs)
        logits = self.head(self._patch_states).float()
        class_weight = torch.ones(len(CHARACTERS) + 1, device=logits.device)
        class_weight[0] = 0.2  # most of a picture is background
        map_loss = nn.functional.cross_entropy(
            logits.view(-1, len(CHARACTERS) + 1), cell_labels.view(-1), weight=class_weight
        )
        self._patch_states = None
        return {
            "loss": outputs.loss + self.weight * map_loss,
            "reading_loss": outputs.loss.detach(),
            "map_loss": map_loss.detach(),
        }


class SequentialTrainer(Trainer):
    """Trainer that keeps the order of the curriculum and logs both losses."""

    _loss_parts = (0.0, 0.0)

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        self._loss_parts = (outputs["reading_loss"], outputs["map_loss"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        reading, character_map = self._loss_parts
        super().log({**logs, "reading_loss": float(reading), "map_loss": float(character_map)}, *args, **kwargs)
