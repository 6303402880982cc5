"""Synthetic documents, and the canvas they are drawn on, which remembers where every character stands."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minimonkey.scripts.synthetic.materials import load_font
from minimonkey.scripts.synthetic.text_images import CharacterBox, character_boxes, no_ligatures


TILE_SIZE = 112  # of MiniMonkey-Nano; images are about a whole number of tiles wide

Colour = tuple[int, ...]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image."""

LEFT, CENTRE, RIGHT = 0.0, 0.5, 1.0


@dataclass(frozen=True)
class Question:
    """A question about an image, and the one right answer; lines of an answer are joined by newlines."""

    text: str
    answer: str


@dataclass(frozen=True)
class Document:
    """An image, what may be asked about it, and the place of every character, line by line."""

    image: Image.Image
    questions: tuple[Question, ...]
    characters: tuple[CharacterBox, ...]


@dataclass(frozen=True)
class Style:
    """Font, size (pixels an em) and colours of a text."""

    path: Path
    size: int
    background: Colour
    ink: Colour

    def font(self, scale: float = 1.0) -> ImageFont.FreeTypeFont:
        return load_font(self.path, max(10, round(self.size * scale)))

    def fitting_font(self, text: str, width: float, scale: float = 1.0) -> ImageFont.FreeTypeFont:
        """Return the font at `scale`, or as much smaller as `text` needs to be at most `width` pixels long."""
        while scale > 0.5 and self.font(scale).getlength(text) > width:
            scale -= 0.1
        return self.font(scale)

    @property
    def height(self) -> int:
        """Height of a line, from the highest to the lowest point that the font draws."""
        return line_height(self.font())

    def mix(self, share: float) -> Colour:
        """Mix a colour between background (0) and ink (1)."""
        return blend(self.background, self.ink, share)


def line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def blend(first: Colour, second: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


class Canvas:
    """An image that is being drawn."""

    def __init__(self, size: tuple[int, int], background: Colour):
        self.image = Image.new("RGB", size, background)
        self.draw = ImageDraw.Draw(self.image)
        self.characters: list[CharacterBox] = []

    @property
    def width(self) -> int:
        return self.image.width

    def text(
        self,
        x: float,
        y: float,
        text: str,
        font: ImageFont.FreeTypeFont,
        ink: Colour,
        align: float = LEFT,
        halo: Colour | None = None,
    ) -> None:
        """Draw one line; `x` is its left end, centre or right end as `align` says, `y` its top.

        Args:
            halo: A colour around the letters, for text on top of lines.
        """
        x, y = round(x - align * font.getlength(text)), round(y)
        around = {} if halo is None else {"stroke_width": 2, "stroke_fill": halo}
        self.draw.text((x, y), text, font=font, fill=ink, features=no_ligatures(), **around)
        self.characters += character_boxes(text, font, x, y)

    def cut(self, height: float) -> None:
        """End the image below `height` pixels."""
        self.image = self.image.crop((0, 0, self.width, round(height)))
        self.draw = ImageDraw.Draw(self.image)
