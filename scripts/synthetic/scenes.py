"""Text as it occurs in the world: signs and letters on textures, at angles, from large to small."""

import random

import numpy as np
from PIL import Image

from minimonkey.scripts.synthetic.canvas import TILE_SIZE, Colour, Document
from minimonkey.scripts.synthetic.damage import light, warp
from minimonkey.scripts.synthetic.materials import load_font
from minimonkey.scripts.synthetic.text_images import CharacterBox, any_font, colours, degrade, draw_lines, random_word
from minimonkey.scripts.synthetic.vocabulary import READ_ALL, ask, ask_line


SIGN = ("What does the sign say?", "What is written on the sign?", "Read the sign.")
TEXTURES = ("noise", "stripes", "bricks", "gradient")


def scene(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw one to four texts below each other on a texture, each rotated and slanted in its own way."""
    width, height = (round(TILE_SIZE * rng.uniform(1.5, 2 + 1.5 * difficulty)) for _ in range(2))
    image, base = _texture((width, height), rng)
    count = rng.randint(1, 1 + round(3 * difficulty))
    band = height / count
    lines, characters, signs = [], [], []
    for number in range(count):
        text, is_sign = _text(rng, split), rng.random() < 0.5
        size = rng.randint(round(26 - 8 * difficulty), 64 if count == 1 else 44)
        sprite, mask, boxes = _sprite(text, base, is_sign, rng, split, size)
        place = (0, number * band, width, (number + 1) * band)
        image, moved = _paste(image, sprite, mask, boxes, place, rng, difficulty)
        characters += moved
        lines.append(text)
        signs += [text] if is_sign else []
    if rng.random() < 0.5 * difficulty:
        image = light(image, rng)
    image = degrade(image, rng, difficulty, most_blur=1.0)
    questions = [ask(rng, READ_ALL, "\n".join(lines))]
    if count > 1:
        questions.append(ask_line(rng, lines))
    if len(signs) == 1:
        questions.append(ask(rng, SIGN, signs[0]))
    return Document(image, tuple(questions), tuple(characters))


def _text(rng: random.Random, split: str) -> str:
    words = [random_word(rng, split, 9) for _ in range(rng.choice((1, 1, 1, 2)))]
    return " ".join(words)


def _sprite(
    text: str, base: Colour, is_sign: bool, rng: random.Random, split: str, size: int
) -> tuple[Image.Image, Image.Image, list[CharacterBox]]:
    """Draw a text, on a sign of its own or bare; return its pixels, a mask of those that show, and its characters."""
    font = load_font(any_font(rng, split), size)
    if is_sign:
        background, ink = colours(rng)
        margins = tuple(rng.randint(4, 14) for _ in range(4))
    else:
        background, ink, margins = base, _contrasting(base, rng), (6, 4, 6, 4)
    image, characters = draw_lines([text], font, background, ink, margins, 1.0)
    if is_sign:
        return image, Image.new("L", image.size, 255), characters
    shown, _ = draw_lines([text], font, (0, 0, 0), (255, 255, 255), margins, 1.0)
    return Image.new("RGB", image.size, ink), shown.convert("L"), characters


def _contrasting(base: Colour, rng: random.Random) -> Colour:
    """Choose an ink far from the texture's middle colour."""
    while True:
        ink = tuple(rng.randint(0, 255) for _ in range(3))
        if abs(_luminance(ink) - _luminance(base)) > 100:
            return ink


def _luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _paste(image, sprite, mask, characters, place, rng: random.Random, difficulty: float):
    """Put a text somewhere in `place` (left, top, right, bottom), turned, slanted and small enough to fit."""
    corners = _slanted_corners(sprite.size, place, rng, difficulty)
    seen, moved = warp(sprite, characters, corners, image.size, (0, 0, 0))
    shown, _ = warp(mask.convert("RGB"), [], corners, image.size, (0, 0, 0))
    # Bicubic resampling mixes the fill into the rim; a mask that was warped alike fades it out.
    result = Image.composite(seen, image, shown.convert("L"))
    return result, moved


def _slanted_corners(size, place, rng: random.Random, difficulty: float) -> list[tuple[float, float]]:
    """Return the corners of a sprite after turning and slanting it, scaled to fit and moved into `place`."""
    width, height = size
    angle = np.radians(rng.uniform(-18, 18) * difficulty * rng.random())
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    corners += np.array([(rng.uniform(0, 0.15), rng.uniform(0, 0.25)) for _ in range(4)]) * height * difficulty
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    corners = corners @ turn
    corners -= corners.min(axis=0)
    extent = corners.max(axis=0)
    left, top, right, bottom = place
    room = np.array([right - left - 4, bottom - top - 4])
    corners *= min(1.0, *(room / extent))
    spare = room - corners.max(axis=0)
    return [tuple(corner) for corner in corners + (left + 2, top + 2) + spare * (rng.random(), rng.random())]


# --- textures --------------------------------------------------------------------------------------------------------


def _texture(size: tuple[int, int], rng: random.Random) -> tuple[Image.Image, Colour]:
    """Draw a wall to write on; return it and its middle colour."""
    width, height = size
    base = np.array([rng.randint(30, 225) for _ in range(3)], dtype=float)
    generator = np.random.default_rng(rng.getrandbits(32))
    kind, strength = rng.choice(TEXTURES), rng.uniform(6, 28)
    y, x = np.mgrid[:height, :width]
    if kind == "stripes":
        period, tilt = rng.uniform(8, 40), rng.uniform(-1, 1)
        pattern = np.sin(2 * np.pi * (x + tilt * y) / period)
    elif kind == "bricks":
        tall, wide = rng.randint(12, 28), rng.randint(26, 60)
        row = y // tall
        is_mortar = (y % tall < 2) | ((x + row % 2 * wide // 2) % wide < 2)
        pattern = np.where(is_mortar, 1.0, _clouds(generator, size, 20))
    elif kind == "gradient":
        pattern = 2 * (x / width * rng.uniform(-1, 1) + y / height * rng.uniform(-1, 1))
    else:
        pattern = _clouds(generator, size, rng.randint(3, 40))
    grain = generator.normal(0, rng.uniform(0, 6), (height, width))
    pixels = base + (strength * pattern + grain)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), tuple(base.astype(int).tolist())


def _clouds(generator: np.random.Generator, size: tuple[int, int], scale: int) -> np.ndarray:
    """Return noise whose spots are about `scale` pixels wide, from -1 to 1."""
    width, height = size
    coarse = generator.uniform(0, 255, (height // scale + 2, width // scale + 2)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) / 127.5 - 1
