"""An auxiliary loss that teaches a fresh vision tower its letters: a linear head names the character at every patch.

Rendered documents know the place of every character, so an image gives hundreds of labels instead of one answer, and letters
are learned in minutes instead of hours. The head is dropped from the trained model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from minimonkey.scripts.training.encode import IGNORED


CELLS_PER_PATCH = 2  # characters are narrower than a patch, so each patch predicts two, side by side
CHARACTER_CLASS = {chr(33 + i): i + 1 for i in range(94)}  # printable ASCII; 0: no character here
CLASSES = len(CHARACTER_CLASS) + 1
BACKGROUND_WEIGHT = 0.2  # most of an image is background


def cell_labels(image: Image.Image, characters: Sequence, grids: list[tuple[int, int]], patches: int) -> torch.Tensor:
    """Return the character at each cell of each tile: (tiles, patches, patches * CELLS_PER_PATCH).

    Args:
        characters: With `character` and `box` (x0, y0, x1, y1) in pixels of the image.
        grids: (columns, rows) of the grids that the image is cut in, in order.
        patches: Patches along one side of a tile.
    """
    return torch.from_numpy(np.concatenate([_labels_of_grid(image, characters, grid, patches) for grid in grids]))


def _labels_of_grid(image: Image.Image, characters: Sequence, grid: tuple[int, int], patches: int) -> np.ndarray:
    columns, rows = grid
    height, width = rows * patches, columns * patches * CELLS_PER_PATCH
    labels = np.zeros((height, width), dtype=np.int64)
    for item in characters:
        x0, y0, x1, y1 = item.box
        left, right = (x / image.width * width for x in (x0, x1))
        top, bottom = (y / image.height * height for y in (y0, y1))
        # The cells whose centre the character covers, or at least the cell that holds its own centre.
        left, right = min(round(left), int((left + right) / 2)), max(round(right), int((left + right) / 2) + 1)
        top, bottom = min(round(top), int((top + bottom) / 2)), max(round(bottom), int((top + bottom) / 2) + 1)
        labels[max(top, 0) : bottom, max(left, 0) : right] = CHARACTER_CLASS.get(item.character, IGNORED)
    tiles = labels.reshape(rows, patches, columns, patches * CELLS_PER_PATCH).swapaxes(1, 2)
    return tiles.reshape(rows * columns, patches, patches * CELLS_PER_PATCH)


def letters_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of (tiles, patches of a tile, CELLS_PER_PATCH * CLASSES) logits and `cell_labels`."""
    weight = torch.ones(CLASSES, device=logits.device)
    weight[0] = BACKGROUND_WEIGHT
    return nn.functional.cross_entropy(
        logits.float().reshape(-1, CLASSES), labels.reshape(-1), weight=weight, ignore_index=IGNORED
    )


def with_letters(model_class: type, loss_weight: float | None) -> type:
    """Return the model's class with the head, whose loss is added to that of the answers; without a weight it replaces it.

    It keeps name and module of the model's class: weights are converted and code is saved by these.
    """

    class WithLetters(model_class):
        def __init__(self, config):
            super().__init__(config)
            width = config.vision_config.hidden_size
            self.letters_head = nn.Linear(width, CELLS_PER_PATCH * CLASSES)
            self._patch_states = []
            self.model.vision_tower.register_forward_hook(self._keep_patch_states)

        def _keep_patch_states(self, module, args, output) -> None:
            self._patch_states.append(output.last_hidden_state[:, 1:])  # without the class token

        def forward(self, cell_labels=None, labels=None, num_items_in_batch=None, **inputs):
            """Run as the model does, with cell_labels (tiles, patches, cells of a row of patches)."""
            if cell_labels is None:
                self._patch_states.clear()
                return super().forward(labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
            self._patch_states.clear()
            if loss_weight is None:
                self.encode_tiles(inputs["pixel_values"])
                output = None
            else:
                output = super().forward(labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
            loss = letters_loss(self.letters_head(torch.cat(self._patch_states)), cell_labels)
            self._patch_states.clear()
            # This micro batch's share of the step, by which the loss of the answers is weighted too.
            share = 1.0 if num_items_in_batch is None else (labels != IGNORED).sum() / num_items_in_batch
            if loss_weight is None:
                return {"loss": share * loss}
            output.loss = output.loss + loss_weight * share * loss
            return output

    WithLetters.__name__ = WithLetters.__qualname__ = model_class.__name__
    WithLetters.__module__ = model_class.__module__
    return WithLetters
