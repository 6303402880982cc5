"""Lines and blocks of lines cut out of PDF documents, with the text layer as truth: real typesetting.

    document = typeset((Path("manual.pdf"),), random.Random(1), lines=(1, 6), difficulty=0.3)

A crop holds whole lines of printable ASCII and nothing else of the page; ligatures and typographic quotes become the characters
they stand for. Needs the `pdf` extra.
"""

import atexit
import os
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from minimonkey.scripts.synthetic.canvas import Document
from minimonkey.scripts.synthetic.text_images import CharacterBox, degrade
from minimonkey.scripts.synthetic.vocabulary import READ_ALL, ask, ask_line


try:
    import pypdfium2
except ImportError:  # said when a PDF is opened: all other documents do without
    pypdfium2 = None

# What a keyboard writes for what a typesetter prints.
PLAIN = str.maketrans(
    {
        **{"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2022": "*"},
        **{"\u2010": "-", "\u2013": "-", "\u2212": "-", "\xa0": " "},
    }
)
LINE_HEIGHTS = (15, 34)  # pixels from the highest to the lowest point of a line
FEWEST_CHARACTERS, WIDEST_GAP = 4, 2.5  # of a line; between its characters, in line heights (more is a table)
LEADER = ". . ."  # from a heading to its page; nobody counts the dots
WIDEST_CROP = 1150  # pixels: 80 characters are then still legible in twelve tiles of Nano
MOST_PAGES = 200  # tried for one crop


@dataclass(frozen=True)
class Line:
    """A line of a page: its text, and the box of each of its characters that is not a space (points, y downwards)."""

    text: str
    boxes: tuple[tuple[str, float, float, float, float], ...]

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        _, left, top, right, bottom = zip(*self.boxes)
        return min(left), min(top), max(right), max(bottom)


def page_lines(page: "pypdfium2.PdfPage") -> list[Line]:
    """Read the lines of a page in the order of its text layer, those included that a crop cannot use (with text "")."""
    height = page.get_height()
    layer = page.get_textpage()
    lines, boxes, text = [], [], ""
    for index in range(layer.count_chars()):
        character = chr(pypdfium2.raw.FPDFText_GetUnicode(layer, index))
        if character in ("\r", "\n"):
            lines.append((text, boxes))
            boxes, text = [], ""
        elif character.strip():
            left, bottom, right, top = layer.get_charbox(index)
            text += (plain := unicodedata.normalize("NFKC", character).translate(PLAIN))
            # The letters of a ligature share its box.
            width = (right - left) / len(plain)
            edges = [left + i * width for i in range(len(plain) + 1)]
            boxes += [(*each, height - bottom) for each in zip(plain, edges, [height - top] * len(plain), edges[1:])]
        elif text and not text.endswith(" "):
            text += " "
    lines.append((text, boxes))
    return [Line(_usable(text.strip(), boxes), tuple(boxes)) for text, boxes in lines if boxes]


def _usable(text: str, boxes: list[tuple]) -> str:
    """Return the text of a line, or "" where it is short, has other characters than ASCII, or is set apart like a table."""
    is_ascii = text.isascii() and text.isprintable()
    top, bottom = min(box[2] for box in boxes), max(box[4] for box in boxes)
    gaps = [after[1] - before[3] for before, after in zip(boxes, boxes[1:])]
    is_together = all(-(bottom - top) < gap < WIDEST_GAP * (bottom - top) for gap in gaps)
    letters = sum(character.isalnum() for character in text)
    is_text = len(text) >= FEWEST_CHARACTERS and letters > len(text) / 2 and LEADER not in text
    return text if is_ascii and is_together and is_text else ""


def blocks(lines: Sequence[Line], count: int) -> Iterator[Sequence[Line]]:
    """Find every run of `count` usable lines below each other in one column with nothing else of the page in its box."""
    for start in range(len(lines) - count + 1):
        block = lines[start : start + count]
        boxes = [line.box for line in block]
        heights = [bottom - top for _, top, _, bottom in boxes]
        follow_each_other = all(
            0 < after[1] - before[1] < 3 * max(heights) and min(before[2], after[2]) > max(before[0], after[0])
            for before, after in zip(boxes, boxes[1:])
        )
        left, top, right, bottom = _around(block)
        is_alone = not any(
            x1 > left - 2 and x0 < right + 2 and y1 > top and y0 < bottom
            for number, line in enumerate(lines)
            if not start <= number < start + count
            for x0, y0, x1, y1 in [line.box]
        )
        if all(line.text for line in block) and follow_each_other and is_alone:
            yield block


def _around(block: Sequence[Line]) -> tuple[float, float, float, float]:
    left, top, right, bottom = zip(*(line.box for line in block))
    return min(left), min(top), max(right), max(bottom)


def typeset(
    paths: Sequence[Path], rng: random.Random, lines: tuple[int, int] = (1, 6), difficulty: float = 0.3
) -> Document:
    """Cut some of `lines` (fewest, most) out of a random page of a random document, all documents being equally likely.

    Args:
        difficulty: How much blur, noise and JPEG artefacts there may be, 0 to 1.

    Raises:
        ValueError: A document cannot be opened, or no page tried had such lines.
        ImportError: pypdfium2 is missing.
    """
    for _ in range(MOST_PAGES):
        pages = opened(rng.choice(paths), os.getpid())
        page = pages[rng.randrange(len(pages))]
        found = list(blocks(page_lines(page), rng.randint(*lines)))
        if found:
            return _cut(page, rng.choice(found), rng, difficulty)
    raise ValueError(
        f"{MOST_PAGES} pages of {len(paths)} documents hold no {lines[0]} to {lines[1]} lines of plain text."
    )


@lru_cache(maxsize=32)
def opened(path: Path, process: int) -> "pypdfium2.PdfDocument":
    """Open a PDF, once in each process: a fork would share the place that is read.

    Raises:
        ValueError: It is no PDF, or is encrypted, or has no pages.
        ImportError: pypdfium2 is missing.
    """
    if pypdfium2 is None:
        raise ImportError("PDFs are read by pypdfium2: pip install pypdfium2 (the `pdf` extra).")
    try:
        document = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be opened as a PDF: {error}") from error
    if not len(document):
        raise ValueError(f"{path} has no pages.")
    return document


atexit.register(opened.cache_clear)  # or pypdfium2 complains about open documents


def _cut(page: "pypdfium2.PdfPage", block: Sequence[Line], rng: random.Random, difficulty: float) -> Document:
    """Render the block alone, with a narrow margin."""
    left, top, right, bottom = _around(block)
    height = sorted(line.box[3] - line.box[1] for line in block)[len(block) // 2]
    scale = min(rng.uniform(*LINE_HEIGHTS) / height, WIDEST_CROP / (right - left))
    sides, ends = [[rng.uniform(0.1, most) * height for _ in range(2)] for most in (0.4, 0.2)]
    left, top, right, bottom = left - sides[0], top - ends[0], right + sides[1], bottom + ends[1]
    left, top = max(0.0, left), max(0.0, top)
    cut = (left, max(0.0, page.get_height() - bottom), max(0.0, page.get_width() - right), top)
    image = page.render(scale=scale, crop=cut).to_pil().convert("RGB")
    characters = [
        CharacterBox(character, ((x0 - left) * scale, (y0 - top) * scale, (x1 - left) * scale, (y1 - top) * scale))
        for line in block
        for character, x0, y0, x1, y1 in line.boxes
    ]
    texts = [line.text for line in block]
    questions = [ask(rng, READ_ALL, "\n".join(texts)), *([ask_line(rng, texts)] if len(texts) > 1 else [])]
    damaged = degrade(image, rng, difficulty, most_blur=min(1.0, height * scale / 25))
    return Document(damaged, tuple(questions), tuple(characters))
