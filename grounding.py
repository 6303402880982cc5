"""Boxes in answers: reading, writing and drawing them.

    >>> parse_boxes("<ref>the dog</ref><box>[[100, 250, 500, 1000]]</box>")
    [Grounding(label='the dog', box=(100.0, 250.0, 500.0, 1000.0))]
    >>> denormalise((100, 250, 500, 1000), (640, 480))
    (64.0, 120.0, 320.0, 480.0)

A box is (x1, y1, x2, y2), left, top, right, bottom, from 0 to 1000 of the whole upright image, however it was cut.

Deals with text and images, not with models.

Source: the chat data format in InternVL's documentation.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .image_decoding import to_rgb


SCALE = 1000
"""The right and lower edge of every image in the coordinates of an answer."""

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b")
"""Outlines, one for each label in turn."""

LEAST_FONT_SIZE = 14  # pixels

Box = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_FOUR_NUMBERS = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_LIST = re.compile(rf"\s*\[\s*{_FOUR_NUMBERS.pattern}(?:\s*,\s*{_FOUR_NUMBERS.pattern})*\s*(?:,\s*)?\]\s*")
_TAGGED = re.compile(
    r"(?:<ref>(?P<label>(?:(?!</?ref>).)*)</ref>\s*)?<box>(?P<boxes>[^<]*)(?P<close></box>)?", re.DOTALL
)


@dataclass(frozen=True)
class Grounding:
    """One box of an answer, 0 to 1000, and what stands there; `label` is None where the answer does not say."""

    label: str | None
    box: Box


# --- text ------------------------------------------------------------------------------------------------------------


def parse_boxes(text: str) -> list[Grounding]:
    """Parse every box of an answer, in order.

    Reads `<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>`, each box of a list with the same label, and `<box>`
    without a label. Decoding with `skip_special_tokens=True` takes these tags away; in an answer without `<box>`,
    every list of four numbers that can be a box is one, without a label, and other lists are text.

    Returns:
        An empty list where the answer has no box. A `<ref>` without a box gives none.

    Raises:
        ValueError: What stands in a `<box>` is not a list of boxes, or the answer ends in it. Nothing is left out or
            repaired.
    """
    if "<box>" not in text:
        boxes = (_as_box(match.groups()) for match in _FOUR_NUMBERS.finditer(text))
        return [Grounding(None, box) for box in boxes if _fault(box) is None]
    found = []
    for match in _TAGGED.finditer(text):
        label = match["label"]
        for box in _read_list(match["boxes"], match["close"] is not None):
            found.append(Grounding(None if label is None else label.strip(), box))
    return found


def _read_list(text: str, is_closed: bool) -> list[Box]:
    """Read the boxes in the text of one `<box>`."""
    if not is_closed:
        raise ValueError(
            f"<box>{text} has no </box>: the answer was cut there (raise max_new_tokens), or something else stands "
            "in it."
        )
    if not (_LIST.fullmatch(text) or _FOUR_NUMBERS.fullmatch(text.strip())):
        raise ValueError(f"<box>{text}</box> is not a list of boxes like [[x1, y1, x2, y2]].")
    return [_checked(_as_box(match.groups()), f"<box>{text}</box>") for match in _FOUR_NUMBERS.finditer(text)]


def format_box(label: str | None, boxes: Iterable[Sequence[float]]) -> str:
    """Write one object as the published data does: `<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>`.

    Args:
        label: What stands in the boxes; None for boxes alone.
        boxes: One or more boxes, 0 to 1000; see `normalise`.

    Raises:
        ValueError: No box, something that is not a box, or a label that holds one of the tags.
    """
    lists = [[int(v) if v == int(v) else v for v in _checked(_as_box(box), "The box")] for box in _box_list(boxes)]
    if label is None:
        return f"<box>{lists}</box>"
    tags = [tag for tag in ("<ref>", "</ref>", "<box>", "</box>") if tag in label]
    if tags:
        raise ValueError(f"The label {label!r} holds {tags[0]}; give the words alone.")
    return f"<ref>{label}</ref><box>{lists}</box>"


def _box_list(boxes: Iterable[Sequence[float]]) -> list[Sequence[float]]:
    boxes = list(boxes)
    if not boxes or any(isinstance(box, (int, float)) for box in boxes):
        raise ValueError(f"boxes must be a list of one or more (x1, y1, x2, y2), got {boxes}.")
    return boxes


# --- coordinates -----------------------------------------------------------------------------------------------------


def denormalise(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Convert a box of 0 to 1000 to (left, top, right, bottom) in pixels, not rounded.

    Args:
        box: (x1, y1, x2, y2).
        size: (width, height) of the upright image in pixels, `image.size` in PIL.

    Raises:
        ValueError: Not a box, or a size below one pixel.
    """
    width, height = _check_size(size)
    x1, y1, x2, y2 = _checked(_as_box(box), "The box")
    return x1 / SCALE * width, y1 / SCALE * height, x2 / SCALE * width, y2 / SCALE * height


def normalise(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Convert a box of (left, top, right, bottom) in pixels to integers of 0 to 1000, rounded as in the published data.

    Args:
        box: (left, top, right, bottom), within the image.
        size: (width, height) of the upright image in pixels.

    Raises:
        ValueError: Something that is not a box, a box that lies outside the image, or a size below one pixel.
    """
    width, height = _check_size(size)
    left, top, right, bottom = _checked(_as_box(box), f"The box in a {width} x {height} picture", width, height)
    return (
        round(left / width * SCALE),
        round(top / height * SCALE),
        round(right / width * SCALE),
        round(bottom / height * SCALE),
    )


def _as_box(values: Sequence) -> Box:
    if len(values) != 4:
        raise ValueError(f"A box is four numbers (x1, y1, x2, y2), got {len(values)}: {list(values)}.")
    return tuple(float(value) for value in values)


def _fault(box: Box, width: float = SCALE, height: float = SCALE) -> str | None:
    """Return what is wrong with a box, if anything; one without extent is a box, since small objects are rounded to that."""
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)) or min(box) < 0 or max(x1, x2) > width or max(y1, y2) > height:
        return f"its x must be from 0 to {width} and its y from 0 to {height}"
    if x2 < x1 or y2 < y1:
        return "its second corner must not lie left of or above the first"
    return None


def _checked(box: Box, subject: str, width: float = SCALE, height: float = SCALE) -> Box:
    """Return `box`, if it is one."""
    fault = _fault(box, width, height)
    if fault:
        raise ValueError(f"{subject} cannot be used: of ({', '.join(f'{value:g}' for value in box)}), {fault}.")
    return box


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"The picture must be at least 1 x 1 pixels, got {width} x {height} (width x height).")
    return width, height


# --- images ----------------------------------------------------------------------------------------------------------


def draw_boxes(
    image: Image.Image,
    groundings: Iterable[Grounding],
    colours: Sequence[str | tuple[int, int, int]] = COLOURS,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont | None = None,
) -> Image.Image:
    """Draw boxes and captions into a copy of an image, a new upright RGB image with otherwise the same pixels.

    Args:
        image: The image that the boxes are of; EXIF orientation is applied, as for the model.
        groundings: Boxes and their labels, see `parse_boxes`; the same label gets the same colour, None gets no caption.
        colours: One for each label in turn.
        font: By default Pillow's own in a size that fits the image; it has Latin letters only, so that Chinese labels
            need `ImageFont.truetype(...)`.

    Raises:
        ValueError: Not a PIL image, a grounding whose box is not one, or no colours.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"Boxes are drawn in a PIL image, got {type(image).__name__}; open a file with Image.open(path), turn an array "
            "into a picture with Image.fromarray(array)."
        )
    if not colours:
        raise ValueError("colours must name at least one colour.")
    canvas = to_rgb(image).copy()
    draw = ImageDraw.Draw(canvas)
    short_side = min(canvas.size)
    font = font or ImageFont.load_default(size=max(LEAST_FONT_SIZE, short_side // 25))
    line_width = max(2, short_side // 200)
    groundings = list(groundings)
    labels = list(dict.fromkeys(grounding.label for grounding in groundings))
    for grounding in groundings:
        left, top, right, bottom = denormalise(grounding.box, canvas.size)
        colour = colours[labels.index(grounding.label) % len(colours)]
        corners = (left, top, min(right, canvas.width - 1), min(bottom, canvas.height - 1))
        draw.rectangle((min(left, corners[2]), min(top, corners[3]), *corners[2:]), outline=colour, width=line_width)
        if grounding.label:
            _draw_caption(draw, canvas.size, (left, top), " ".join(grounding.label.split()), colour, font)
    return canvas


def _draw_caption(draw: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[float, float], text, colour, font):
    """Draw `text` on a filled patch above `corner`, moved so that it lies within the image."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    margin = max(2, (bottom - top) // 5)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(corner[0], size[0] - width))
    y = max(0, min(corner[1] - height, size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + margin - left, y + margin - top), text, fill="white", font=font)


__all__ = ["Grounding", "denormalise", "draw_boxes", "format_box", "normalise", "parse_boxes"]
