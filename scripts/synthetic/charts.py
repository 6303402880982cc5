"""Charts with readable values: bars, horizontal bars, lines and pies.

A value either stands beside its mark, or lies exactly on a labelled line of the axis.
"""

import colorsys
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from minimonkey.scripts.synthetic.canvas import (
    CENTRE,
    LEFT,
    RIGHT,
    TILE_SIZE,
    Box,
    Canvas,
    Colour,
    Document,
    Question,
    Style,
    blend,
)
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.vocabulary import TITLE, ask, distinct_words, document_style, some


VALUE = ("What is the value of {label}?", "How much is {label}?", "What value does {label} have?")
HIGHEST = ("Which has the highest value?", "What has the largest value?", "Which one is the highest?")
LOWEST = ("Which has the lowest value?", "What has the smallest value?", "Which one is the lowest?")
HIGHEST_VALUE = ("What is the highest value?", "How much is the largest value?")
SMOOTHING = 3


@dataclass(frozen=True)
class _Data:
    """What a chart shows: labels and their values, and the lines of the axis."""

    labels: list[str]
    values: list[int]
    ticks: list[int]
    is_labelled: bool
    """Whether values are written beside their marks."""
    colours: list[Colour]

    def share(self, value: float) -> float:
        """Return how far a value is from the foot of the axis to its top."""
        return value / self.ticks[-1]


def chart(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a chart of three to seven values in one of four forms."""
    style = document_style(rng, split, difficulty)
    style = Style(style.path, min(style.size, 20), style.background, style.ink)
    size = tuple(round(TILE_SIZE * rng.uniform(2.0, 2.3 + difficulty)) for _ in range(2))
    size = (max(size), min(size) if rng.random() < 0.7 else max(size))
    canvas = Canvas(size, style.background)
    questions, top = [], 6
    if rng.random() < 0.6:
        title, top = _title(canvas, style, rng, split)
        questions = [ask(rng, TITLE, title)]
    draw = rng.choice((_bars, _horizontal_bars, _line, _pie))
    data = draw(canvas, style, (8, top, size[0] - 10, size[1] - 8), rng, split, difficulty)
    return finish(canvas, [*_about(data, rng), *questions], rng, difficulty, style.size)


def _about(data: _Data, rng: random.Random) -> list[Question]:
    written = [str(value) for value in data.values]
    questions = [ask(rng, VALUE, value, label=label) for label, value in zip(data.labels, written)]
    questions = some(rng, questions, 4)
    order = sorted(data.values)
    if order[-1] > order[-2]:
        questions.append(ask(rng, HIGHEST, data.labels[data.values.index(order[-1])]))
    if order[0] < order[1]:
        questions.append(ask(rng, LOWEST, data.labels[data.values.index(order[0])]))
    return [*questions, ask(rng, HIGHEST_VALUE, str(order[-1]))]


def _title(canvas: Canvas, style: Style, rng: random.Random, split: str) -> tuple[str, int]:
    font = style.font(rng.uniform(1.0, 1.3))
    words = [text.capitalize() for text in distinct_words(rng, split, rng.randint(1, 3), 8)]
    while len(words) > 1 and font.getlength(" ".join(words)) > canvas.width - 16:
        words.pop()
    canvas.text(canvas.width / 2, 5, " ".join(words), font, style.ink, CENTRE)
    return " ".join(words), 5 + sum(font.getmetrics()) + rng.randint(4, 10)


def _data(
    rng: random.Random, split: str, difficulty: float, most: int, longest: int, is_labelled: bool | None = None
) -> _Data:
    """Choose the values of at most `most` marks, whose labels have at most `longest` letters."""
    count = rng.randint(3, max(3, min(most, 4 + round(3 * difficulty))))
    step = rng.choice((1, 2, 5, 10, 20, 50, 100, 200))
    ticks = [step * i for i in range(rng.randint(4, 6))]
    is_labelled = rng.random() < 0.6 if is_labelled is None else is_labelled
    lowest = max(1, ticks[-1] // 10)
    values = [rng.randint(lowest, ticks[-1]) if is_labelled else rng.choice(ticks[1:]) for _ in range(count)]
    labels = [text.capitalize() for text in distinct_words(rng, split, count, max(3, longest))]
    return _Data(labels, values, ticks, is_labelled, _palette(rng, count))


def _palette(rng: random.Random, count: int) -> list[Colour]:
    """Choose distinct colours, or the same one for all."""
    first, saturation, value = rng.random(), rng.uniform(0.4, 0.8), rng.uniform(0.6, 0.9)
    spread = rng.choice((0, 1)) / count
    hues = [(first + spread * i) % 1 for i in range(count)]
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value)) for hue in hues]


def _paint(canvas: Canvas, paint: Callable[[ImageDraw.ImageDraw, int], None]) -> None:
    """Draw slanted shapes with smooth edges: `paint` gets a larger drawing and how much larger it is."""
    width, height = canvas.image.size
    large = canvas.image.resize((width * SMOOTHING, height * SMOOTHING), Image.Resampling.NEAREST)
    paint(ImageDraw.Draw(large), SMOOTHING)
    canvas.image.paste(large.resize((width, height), Image.Resampling.BOX))


def _value_axis(canvas: Canvas, style: Style, data: _Data, plot: Box, is_upright: bool) -> None:
    """Draw labelled lines across the plot; a chart with written values may lack them."""
    left, top, right, bottom = plot
    pale = blend(style.background, style.ink, 0.25)
    for tick in data.ticks:
        share = data.share(tick)
        if is_upright:
            y = bottom - share * (bottom - top)
            canvas.draw.line((left, y, right, y), fill=pale)
            canvas.text(left - 4, y - style.height / 2, str(tick), style.font(), style.ink, RIGHT)
        else:
            x = left + share * (right - left)
            canvas.draw.line((x, top, x, bottom), fill=pale)
            canvas.text(x, bottom + 3, str(tick), style.font(), style.ink, CENTRE)


def _upright_plot(canvas, style, area, rng, split, difficulty) -> tuple[_Data, Box, list[float]]:
    """Draw axis and labels of a chart of upright values; return its data, its plot and the middle of each mark."""
    left, top, right, bottom = area
    letter = style.font().getlength("n")
    longest = int((right - left - 30) / 4 / letter) - 1
    data = _data(rng, split, difficulty, most=int((right - left - 30) / (5 * letter)), longest=min(longest, 8))
    has_axis = not data.is_labelled or rng.random() < 0.5
    gutter = max(style.font().getlength(str(tick)) for tick in data.ticks) + 6 if has_axis else 2
    plot = (left + gutter, top + style.height + 2, right, bottom - style.height - 4)
    slot = (plot[2] - plot[0]) / len(data.values)
    fitting = int(slot / letter) - 1
    if max(style.font().getlength(label) for label in data.labels) > slot - 4:
        labels = [text.capitalize() for text in distinct_words(rng, split, len(data.labels), max(3, fitting - 1))]
        data = replace(data, labels=labels)
    if has_axis:
        _value_axis(canvas, style, data, plot, is_upright=True)
    canvas.draw.line((plot[0], plot[3], plot[2], plot[3]), fill=style.ink)
    middles = [plot[0] + slot * (i + 0.5) for i in range(len(data.values))]
    for label, middle in zip(data.labels, middles):
        canvas.text(middle, plot[3] + 3, label, style.font(), style.ink, CENTRE)
    return data, plot, middles


def _bars(canvas: Canvas, style: Style, area: Box, rng: random.Random, split: str, difficulty: float) -> _Data:
    data, plot, middles = _upright_plot(canvas, style, area, rng, split, difficulty)
    half = (middles[1] - middles[0]) * rng.uniform(0.25, 0.42)
    for value, middle, colour in zip(data.values, middles, data.colours):
        top = plot[3] - data.share(value) * (plot[3] - plot[1])
        canvas.draw.rectangle((middle - half, top, middle + half, plot[3]), fill=colour)
        if data.is_labelled:
            canvas.text(middle, top - style.height - 1, str(value), style.font(), style.ink, CENTRE)
    return data


def _line(canvas: Canvas, style: Style, area: Box, rng: random.Random, split: str, difficulty: float) -> _Data:
    data, plot, middles = _upright_plot(canvas, style, area, rng, split, difficulty)
    points = [(x, plot[3] - data.share(value) * (plot[3] - plot[1])) for x, value in zip(middles, data.values)]
    colour, radius = data.colours[0], rng.uniform(2.5, 4)

    def paint(draw: ImageDraw.ImageDraw, scale: int) -> None:
        draw.line([(x * scale, y * scale) for x, y in points], fill=colour, width=2 * scale)
        for x, y in points:
            box = [(c + d) * scale for d in (-radius, radius) for c in (x, y)]
            draw.ellipse(box, fill=colour)

    _paint(canvas, paint)
    if data.is_labelled:
        for (x, y), value in zip(points, data.values):
            canvas.text(x, y - style.height - radius, str(value), style.font(), style.ink, CENTRE, style.background)
    return data


def _horizontal_bars(
    canvas: Canvas, style: Style, area: Box, rng: random.Random, split: str, difficulty: float
) -> _Data:
    left, top, right, bottom = area
    most = int((bottom - top) / (style.height + 6)) - 1
    data = _data(rng, split, difficulty, most=most, longest=8)
    gutter = max(map(style.font().getlength, data.labels)) + 6
    axis_width = style.font().getlength("  ".join(map(str, data.ticks)))
    if axis_width > right - left - gutter:
        data = replace(data, is_labelled=True)
    has_axis = not data.is_labelled
    room = style.font().getlength(str(data.ticks[-1]))  # right of the bars, for a value or half a tick
    plot = (left + gutter, top, right - room - 4, bottom - (style.height + 3 if has_axis else 0))
    if has_axis:
        _value_axis(canvas, style, data, plot, is_upright=False)
    slot = (plot[3] - plot[1]) / len(data.values)
    half = slot * rng.uniform(0.25, 0.4)
    for i, (label, value) in enumerate(zip(data.labels, data.values)):
        middle, end = plot[1] + slot * (i + 0.5), plot[0] + data.share(value) * (plot[2] - plot[0])
        canvas.draw.rectangle((plot[0], middle - half, end, middle + half), fill=data.colours[i])
        canvas.text(plot[0] - 5, middle - style.height / 2, label, style.font(), style.ink, RIGHT)
        if data.is_labelled:
            canvas.text(end + 4, middle - style.height / 2, str(value), style.font(), style.ink, LEFT)
    canvas.draw.line((plot[0], plot[1], plot[0], plot[3]), fill=style.ink)
    return data


def _pie(canvas: Canvas, style: Style, area: Box, rng: random.Random, split: str, difficulty: float) -> _Data:
    """Draw slices with a legend beside them that gives colour, name and value."""
    left, top, right, bottom = area
    most = int((bottom - top) / (style.height + 2))
    data = _data(rng, split, difficulty, most=most, longest=7, is_labelled=True)
    palette = [_palette_colour(rng, i, len(data.values)) for i in range(len(data.values))]
    legend = max(style.font().getlength(f"{a} {b}") for a, b in zip(data.labels, data.values)) + style.height + 6
    diameter = max(40, min(right - left - legend - 10, bottom - top))
    middle = (top + bottom) / 2
    box = (left, middle - diameter / 2, left + diameter, middle + diameter / 2)

    def paint(draw: ImageDraw.ImageDraw, scale: int) -> None:
        angle = -90.0
        for value, colour in zip(data.values, palette):
            turn = 360 * value / sum(data.values)
            draw.pieslice([c * scale for c in box], angle, angle + turn, fill=colour, outline=style.background)
            angle += turn

    _paint(canvas, paint)
    pitch = min(style.height * 1.5, (bottom - top) / len(data.values))
    y = middle - pitch * len(data.values) / 2
    x = max(box[2] + 8, right - legend)
    for label, value, colour in zip(data.labels, data.values, palette):
        side = style.height * 0.6
        canvas.draw.rectangle((x, y + 0.2 * style.height, x + side, y + 0.2 * style.height + side), fill=colour)
        canvas.text(x + side + 5, y, f"{label} {value}", style.font(), style.ink)
        y += pitch
    return data


def _palette_colour(rng: random.Random, i: int, count: int) -> Colour:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / count, rng.uniform(0.4, 0.8), rng.uniform(0.6, 0.9)))
