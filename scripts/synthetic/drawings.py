"""What stands on pages beside text: photographs, logos, frames and rules, all of them drawn."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from minimonkey.scripts.synthetic.canvas import Canvas, Colour


Area = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


def photograph(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Make something that looks like a photograph from afar: soft light, a horizon, blurred things, grain."""
    width, height = size
    generator = np.random.default_rng(rng.getrandbits(32))
    base = np.array([rng.randint(40, 215) for _ in range(3)], dtype=float)
    coarse = base + generator.normal(0, rng.uniform(20, 55), (rng.randint(3, 9), rng.randint(3, 9), 3))
    if rng.random() < 0.5:  # a horizon
        coarse[len(coarse) // 2 :] += [rng.randint(-80, 80) for _ in range(3)]
    pixels = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(pixels)
    for _ in range(rng.randint(0, 5)):
        x, y, reach = rng.randrange(width), rng.randrange(height), rng.randint(4, max(5, min(size) // 3))
        box, fill = (x - reach, y - reach, x + reach, y + reach * rng.uniform(0.4, 2)), _colour(rng)
        (draw.ellipse if rng.random() < 0.6 else draw.rectangle)(box, fill=fill)
    grain = generator.normal(0, rng.uniform(2, 14), (height, width, 1))
    grey = rng.random() < 0.3
    result = Image.fromarray(np.clip(np.asarray(pixels) + grain, 0, 255).astype(np.uint8))
    return result.convert("L").convert("RGB") if grey else result


def _colour(rng: random.Random) -> Colour:
    return tuple(rng.randint(0, 255) for _ in range(3))


def logo(canvas: Canvas, area: Area, rng: random.Random, ink: Colour) -> None:
    """Draw a mark in a square: rings, bars, a star, a letterless shield, overlapping discs."""
    left, top, right, bottom = area
    side, colour = min(right - left, bottom - top), ink if rng.random() < 0.4 else _colour(rng)
    x, y, draw = left + side / 2, top + side / 2, canvas.draw
    kind = rng.choice(("rings", "bars", "star", "shield", "discs", "grid"))
    if kind == "rings":
        for share in (0.5, 0.36, 0.2)[: rng.randint(1, 3)]:
            reach = share * side
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=max(2, side // 14))
    elif kind == "bars":
        count = rng.randint(3, 5)
        for i in range(count):
            height, step = rng.uniform(0.3, 1) * side, side / count
            draw.rectangle((left + i * step, top + side - height, left + (i + 0.7) * step, top + side), fill=colour)
    elif kind == "star":
        points, inner = rng.randint(3, 8), rng.uniform(0.3, 0.7)
        turns = [math.pi * i / points for i in range(2 * points)]
        reach = [side / 2 * (inner if i % 2 else 1) for i in range(2 * points)]
        draw.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for a, r in zip(turns, reach)], fill=colour)
    elif kind == "shield":
        draw.polygon(
            [(left, top), (left + side, top), (left + side, y), (x, top + side), (left, y)],
            fill=colour,
            outline=ink,
        )
    elif kind == "discs":
        for _ in range(rng.randint(2, 3)):
            reach = rng.uniform(0.2, 0.35) * side
            at = (rng.uniform(left + reach, left + side - reach), rng.uniform(top + reach, top + side - reach))
            draw.ellipse((at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach), fill=_colour(rng))
    else:
        count = rng.randint(2, 4)
        for row in range(count):
            for column in range(count):
                if rng.random() < 0.7:
                    a, b = left + column * side / count, top + row * side / count
                    draw.rectangle((a, b, a + 0.8 * side / count, b + 0.8 * side / count), fill=colour)


def frame(canvas: Canvas, area: Area, rng: random.Random, ink: Colour) -> None:
    """Draw a frame on the edges of an area: single, double, thick, or with round corners."""
    left, top, right, bottom = area
    kind = rng.choice(("single", "double", "thick", "round"))
    if kind == "round":
        canvas.draw.rounded_rectangle(area, radius=rng.randint(3, 8), outline=ink)
        return
    canvas.draw.rectangle(area, outline=ink, width=rng.randint(2, 3) if kind == "thick" else 1)
    if kind == "double" and min(right - left, bottom - top) > 12:
        canvas.draw.rectangle((left + 3, top + 3, right - 3, bottom - 3), outline=ink)


def rule(canvas: Canvas, start: tuple[float, float], end: tuple[float, float], rng: random.Random, ink: Colour) -> None:
    """Draw a line across or down: whole, thick, or of dashes or dots."""
    (x0, y0), (x1, y1) = start, end
    dash = rng.choice((0, 0, 0, 2, 4, 8))
    width = rng.choice((1, 1, 2))
    if not dash:
        canvas.draw.line((x0, y0, x1, y1), fill=ink, width=width)
        return
    length = math.hypot(x1 - x0, y1 - y0)
    for i in range(int(length // (2 * dash))):
        first, last = 2 * i * dash / length, (2 * i + 1) * dash / length
        ends = [(x0 + share * (x1 - x0), y0 + share * (y1 - y0)) for share in (first, last)]
        canvas.draw.line((*ends[0], *ends[1]), fill=ink, width=width)
