"""Which tiles of an image show nothing but paper, so that they need not be encoded, and which of their tokens.

Deals with grey values, not with prompts. A cell is blank if nearly all of its pixels have about the commonest grey of the
image; a tile is blank if all its cells are, and no cell beside them has anything either. Colours of the same grey are the
same here. Source of the idea: DocPrune (arXiv 2604.22281), which drops background by the mode of the grey values.
"""

import numpy as np


CELL = 28  # pixels: one token of a published tile of 448
TOLERANCE = 8  # levels of grey around the commonest
BLANK_SHARE = 0.995  # of the pixels of a blank cell
PAPER_SHARE = 0.3  # of the pixels of an image; with less of one grey it is a photograph, of which nothing is blank


def blank_share(
    grey: np.ndarray, tile_size: int, tolerance: int = TOLERANCE, cell: int = CELL
) -> tuple[np.ndarray, float]:
    """Return what share of each cell, and of the image, has about the commonest grey.

    Args:
        grey: (rows * tile_size, columns * tile_size) uint8
        tile_size: Cells are counted from the corner of each tile; the last of a tile may be smaller.
    """
    mode = int(np.bincount(grey.ravel(), minlength=256).argmax())
    near = np.abs(grey.astype(np.int16) - mode) <= tolerance
    edges = [
        [tile + start for tile in range(0, side, tile_size) for start in range(0, tile_size, cell)]
        for side in grey.shape
    ]
    count = np.add.reduceat(np.add.reduceat(near, edges[0], axis=0, dtype=np.int64), edges[1], axis=1)
    heights, widths = (np.diff([*edge, side]) for edge, side in zip(edges, grey.shape))
    return count / np.outer(heights, widths), float(near.mean())


def blank_cells(grey: np.ndarray, tile_size: int, cell: int = CELL) -> np.ndarray:
    """Return which cells (cells down, cells across) of an image in its grid are blank, as all cells around them are.

    Args:
        grey: (rows * tile_size, columns * tile_size) uint8
        cell: Its side in pixels.
    """
    shares, paper = blank_share(grey, tile_size, cell=cell)
    if paper < PAPER_SHARE:
        return np.zeros(shares.shape, dtype=bool)
    shown = np.pad(shares < BLANK_SHARE, 1)
    return ~np.lib.stride_tricks.sliding_window_view(shown, (3, 3)).any(axis=(2, 3))  # with one ring


def blank_tiles(grey: np.ndarray, tile_size: int) -> np.ndarray:
    """Return which tiles (rows * columns,) of an image in its grid are blank, row by row.

    Args:
        grey: (rows * tile_size, columns * tile_size) uint8
    """
    rows, columns = (side // tile_size for side in grey.shape)
    cells = -(-tile_size // CELL)
    return blank_cells(grey, tile_size).reshape(rows, cells, columns, cells).all(axis=(1, 3)).ravel()


def page_of(tiles: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return tiles (columns * rows, 3, S, S), uint8, of a grid as the grey page (rows * S, columns * S) that they show."""
    columns, rows = grid
    red, green, blue = tiles.transpose(1, 0, 2, 3).astype(np.uint32)
    grey = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)  # as Pillow does
    size = grey.shape[-1]
    return grey.reshape(rows, columns, size, size).transpose(0, 2, 1, 3).reshape(rows * size, columns * size)


def shown_tiles(tiles: np.ndarray, grid: tuple[int, int]) -> list[bool]:
    """Return which tiles (columns * rows, 3, S, S), uint8, of a grid show something; a grid of one tile always does."""
    if grid == (1, 1):
        return [True]
    return (~blank_tiles(page_of(tiles, grid), tiles.shape[-1])).tolist()


def blank_tokens(tiles: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """Return which tokens (columns * rows * side * side,) of tiles (columns * rows, 3, S, S), uint8, show nothing but paper.

    Args:
        side: Tokens along a tile; they are in the order of the prompt, tile by tile, row by row.
    """
    columns, rows = grid
    size = tiles.shape[-1]
    blank = blank_cells(page_of(tiles, grid), size, size // side)
    return blank.reshape(rows, side, columns, side).swapaxes(1, 2).ravel()
