"""Words where multi-scale cropping cuts: on seams of the detailed grid, and inside a tile of the adaptive one.

A model that reads them uses the words that the adaptive tiles show whole; the detailed tiles alone cut every word in parts.
"""

import random
from dataclasses import dataclass

from minimonkey.scripts.synthetic.canvas import TILE_SIZE, Box, Canvas, Document, Style
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.text_images import any_font
from minimonkey.scripts.synthetic.vocabulary import READ_ALL, ask, ask_line, distinct_words, document_style, some
from minimonkey.tiling import PRESETS, choose_grids


DEFAULT_RANGES = PRESETS["default"]
MOST_TRIES = 600


@dataclass(frozen=True)
class Seams:
    """Where a grid cuts an image: x of the upright cuts, y of the level ones."""

    upright: tuple[float, ...]
    level: tuple[float, ...]

    @classmethod
    def of(cls, size: tuple[int, int], grid: tuple[int, int]) -> "Seams":
        """Return the seams of a grid (columns, rows) in pixels of an image (width, height)."""
        ends = [tuple(length * i / parts for i in range(1, parts)) for length, parts in zip(size, grid)]
        return cls(*ends)

    def cut(self, box: Box) -> bool:
        """Tell whether a seam goes through a box."""
        left, top, right, bottom = box
        return any(left < x < right for x in self.upright) or any(top < y < bottom for y in self.level)


@dataclass(frozen=True)
class _Placed:
    text: str
    style: Style
    x: int
    y: int
    box: Box


def seam(
    rng: random.Random, split: str, difficulty: float, ranges: tuple[int, int, int, int] = DEFAULT_RANGES
) -> Document:
    """Draw up to eight words below each other, each cut by a seam of the detailed grid.

    Args:
        ranges: Tile ranges of the grids, as `tiling.choose_grids` takes them.

    Raises:
        ValueError: Ranges whose detailed grid never has a seam.
    """
    size, detailed, adaptive = _sizes(rng, difficulty, ranges)
    style = document_style(rng, split, difficulty)
    count = rng.randint(1 + round(2 * difficulty), 2 + round(6 * difficulty))
    placed: list[_Placed] = []
    for attempt in range(MOST_TRIES):
        if len(placed) == count or (placed and attempt > MOST_TRIES // 2):
            break
        candidate = _candidate(size, detailed, style, rng, split)
        is_strict = attempt < MOST_TRIES * 3 // 4
        if _fits(candidate, size, detailed, placed) and not (is_strict and adaptive.cut(candidate.box)):
            placed.append(candidate)
    return _document(sorted(placed, key=lambda item: item.y), size, style, rng, difficulty)


def _sizes(
    rng: random.Random, difficulty: float, ranges: tuple[int, int, int, int]
) -> tuple[tuple[int, int], Seams, Seams]:
    """Choose the size of an image whose detailed grid has seams; return it with the seams of both grids."""
    for _ in range(100):
        size = tuple(round(TILE_SIZE * rng.uniform(1.8, 2.4 + 1.8 * difficulty)) for _ in range(2))
        detailed, adaptive = choose_grids(*size, tuple(ranges), TILE_SIZE)
        if detailed != (1, 1):
            return size, Seams.of(size, detailed), Seams.of(size, adaptive)
    raise ValueError(f"The tile ranges {ranges} give detailed grids of one tile, which have no seams; raise max_tiles.")


def _candidate(size: tuple[int, int], detailed: Seams, style: Style, rng: random.Random, split: str) -> _Placed:
    """Place a word somewhere on a seam, which goes through the middle part of its ink."""
    text = distinct_words(rng, split, 1, 9)[0]
    text = rng.choice((text, text.capitalize(), text.upper()))
    if rng.random() < 0.3:
        style = Style(any_font(rng, split), style.size, style.background, style.ink)
    font = style.font()
    left, top, right, bottom = font.getbbox(text)
    x, y = rng.uniform(2, size[0] - right - 2), rng.uniform(2, size[1] - bottom - 2)
    share = rng.uniform(0.3, 0.7)
    if rng.random() < len(detailed.upright) / (len(detailed.upright) + len(detailed.level)):
        x = rng.choice(detailed.upright) - left - share * (right - left)
    else:
        y = rng.choice(detailed.level) - top - share * (bottom - top)
    ascent, descent = font.getmetrics()
    x, y = round(x), round(y)
    box = (x + min(left, 0), y, x + max(right, font.getlength(text)), y + ascent + descent)
    return _Placed(text, style, x, y, box)


def _fits(item: _Placed, size: tuple[int, int], detailed: Seams, placed: list[_Placed]) -> bool:
    """Tell whether a word is whole in the image, cut by a seam, and on a line of its own."""
    left, top, right, bottom = item.box
    is_whole = left >= 2 and top >= 0 and right <= size[0] - 2 and bottom <= size[1]
    is_alone = all(bottom <= other.box[1] or top >= other.box[3] for other in placed)
    is_new = all(item.text.lower() != other.text.lower() for other in placed)
    return is_whole and is_alone and is_new and detailed.cut(item.box)


def _document(
    placed: list[_Placed], size: tuple[int, int], style: Style, rng: random.Random, difficulty: float
) -> Document:
    canvas = Canvas(size, style.background)
    for item in placed:
        canvas.text(item.x, item.y, item.text, item.style.font(), style.ink)
    lines = [item.text for item in placed]
    questions = [ask(rng, READ_ALL, "\n".join(lines))]
    questions += some(rng, [ask_line(rng, lines) for _ in lines], 2) if len(lines) > 1 else []
    # A photograph at an angle would move the words off the seams.
    return finish(canvas, questions, rng, difficulty, style.size, is_flat=True)
