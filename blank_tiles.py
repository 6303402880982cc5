"""Which tiles of an image show nothing but paper, so that they need not be encoded.

Deals with grey values, not with prompts. A cell is blank if nearly all of its pixels have about the commonest grey of the
image; a tile is blank if all its cells are, and no cell beside them has anything either. Colours of the same grey are the
same here. Source of the idea: DocPrune (arXiv 2604.22281), which drops background by the mode of the grey values.
"""

import numpy as np
from PIL import Image

from .image_decoding import resize_image


CELL = 28  # pixels: one token of a published tile of 448
TOLERANCE = 8  # levels of grey around the commonest
BLANK_SHARE = 0.995  # of the pixels of a blank cell
PAPER_SHARE = 0.3  # of the pixels of an image; with less of one grey it is a photograph, of which nothing is blank


def blank_share(grey: np.ndarray, tile_size: int, tolerance: int = TOLERANCE) -> tuple[np.ndarray, float]:
    """Return what share of each cell, and of the image, has about the commonest grey.

    Args:
        grey: (rows * tile_size, columns * tile_size) uint8
        tile_size: Cells are counted from the corner of each tile; the last of a tile may be smaller.
    """
    mode = int(np.bincount(grey.ravel(), minlength=256).argmax())
    near = np.abs(grey.astype(np.int16) - mode) <= tolerance
    edges = [
        [tile + cell for tile in range(0, side, tile_size) for cell in range(0, tile_size, CELL)] for side in grey.shape
    ]
    count = np.add.reduceat(np.add.reduceat(near, edges[0], axis=0, dtype=np.int64), edges[1], axis=1)
    heights, widths = (np.diff([*edge, side]) for edge, side in zip(edges, grey.shape))
    return count / np.outer(heights, widths), float(near.mean())


def blank_tiles(grey: np.ndarray, tile_size: int) -> np.ndarray:
    """Return which tiles (rows * columns,) of an image in its grid are blank, row by row.

    Args:
        grey: (rows * tile_size, columns * tile_size) uint8
    """
    rows, columns = (side // tile_size for side in grey.shape)
    shares, paper = blank_share(grey, tile_size)
    if paper < PAPER_SHARE:
        return np.zeros(rows * columns, dtype=bool)
    shown = np.pad(shares < BLANK_SHARE, 1)
    around = np.lib.stride_tricks.sliding_window_view(shown, (3, 3)).any(axis=(2, 3))  # with one ring
    cells = -(-tile_size // CELL)
    return ~around.reshape(rows, cells, columns, cells).any(axis=(1, 3)).ravel()


def shown_tiles(image: Image.Image, grid: tuple[int, int], tile_size: int) -> list[bool]:
    """Return which tiles of an image in a grid of (columns, rows) show something; a grid of one tile always does."""
    if grid == (1, 1):
        return [True]
    size = (grid[0] * tile_size, grid[1] * tile_size)
    grey = resize_image(image.convert("L"), *size, Image.Resampling.BICUBIC)
    return (~blank_tiles(np.asarray(grey), tile_size)).tolist()
