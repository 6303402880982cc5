"""Images of words with known text: endless, deterministic training and test material for MiniMonkey-Nano.

Sample `i` is a pure function of (seed, i): nothing is stored, and any worker can make any sample. Words and fonts come from
materials.py.

    python scripts/synthetic/text_images.py sheet.png --split held_out
"""

import argparse
import io
import math
import random
import string
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as for the scripts in the folder above

from minimonkey.scripts.repository import number_within, reports_errors
from minimonkey.scripts.synthetic.materials import font_families, load_font, words


CHARACTERS = string.ascii_letters + string.digits + ".,:;-!?'\"()/&%$#@+*="


@dataclass(frozen=True)
class CharacterBox:
    """Where one character stands, in pixels of the image: left, top, right, bottom."""

    character: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class TextImage:
    """An image, the text it shows (lines joined by newlines) and the place of every character."""

    image: Image.Image
    text: str
    characters: tuple[CharacterBox, ...]


def any_font(rng: random.Random, split: str) -> Path:
    """Choose a font file; every family is equally likely, however many weights it has."""
    return rng.choice(rng.choice(font_families(split)))


def random_word(rng: random.Random, split: str, max_length: int, dictionary_only: bool = False) -> str:
    """Return a dictionary word of at most `max_length` letters; now and then a number or a random string instead."""
    kind = 1.0 if dictionary_only else rng.random()
    if kind < 0.08:
        return "".join(rng.choice(string.digits) for _ in range(rng.randint(1, max_length)))
    if kind < 0.14:
        price = f"{rng.randint(0, 999)}.{rng.randint(0, 99):02d}"
        return rng.choice(("", "$")) + price if len(price) < max_length else str(rng.randint(0, 99))
    if kind < 0.24:
        return "".join(rng.choice(CHARACTERS[:62]) for _ in range(rng.randint(1, max_length)))
    by_length = words(split)
    lengths = [length for length in by_length if length <= max_length]
    weights = [len(by_length[length]) ** 0.5 for length in lengths]
    word = rng.choice(by_length[rng.choices(lengths, weights)[0]])
    case = rng.random()
    word = word.upper() if case < 0.25 else word.capitalize() if case < 0.5 else word
    if not dictionary_only and rng.random() < 0.06:
        word += rng.choice(".,:!?")
    return word


def colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose background and ink with enough contrast to be readable."""
    while True:
        background = tuple(rng.randint(0, 255) for _ in range(3))
        ink = tuple(rng.randint(0, 255) for _ in range(3))
        if rng.random() < 0.5:
            background, ink = tuple(230 + c // 10 for c in background), tuple(c // 4 for c in ink)
        luminance = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (background, ink)]
        if abs(luminance[0] - luminance[1]) > 80:
            return background, ink


def draw_lines(lines, font, background, ink, margins, spacing) -> tuple[Image.Image, list[CharacterBox]]:
    """Draw `lines` under each other on a canvas that fits them plus `margins` (left, top, right, bottom; pixels)."""
    left, top, right, bottom = margins
    ascent, descent = font.getmetrics()
    height = ascent + descent
    pitch = round(height * spacing)
    width = max(math.ceil(font.getlength(line)) for line in lines)
    image = Image.new("RGB", (left + width + right, top + pitch * (len(lines) - 1) + height + bottom), background)
    draw = ImageDraw.Draw(image)
    characters = []
    for number, line in enumerate(lines):
        y = top + number * pitch
        draw.text((left, y), line, font=font, fill=ink, features=no_ligatures())
        characters += character_boxes(line, font, left, y)
    return image, characters


def character_boxes(line: str, font: ImageFont.FreeTypeFont, left: float, top: float) -> list[CharacterBox]:
    """Return where the characters of a line drawn at (left, top) stand; spaces are left out."""
    ascent, descent = font.getmetrics()
    upper, lower = top + 0.1 * ascent, top + ascent + 0.3 * descent
    edges = [left + font.getlength(line[:i]) for i in range(len(line) + 1)]
    return [
        CharacterBox(character, (edges[i], upper, edges[i + 1], lower))
        for i, character in enumerate(line)
        if character != " "
    ]


@lru_cache
def no_ligatures() -> list[str] | None:
    """Return the font features that draw every character by itself; without Raqm, Pillow has none, and joins nothing."""
    return ["-liga"] if features.check("raqm") else None


def degrade(image: Image.Image, rng: random.Random, strength: float, most_blur: float = 1.2) -> Image.Image:
    """Add blur (radius up to `most_blur` px), noise and JPEG artefacts, each as likely as `strength` (0 to 1) is large."""
    if rng.random() < 0.35 * strength:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, most_blur)))
    if rng.random() < 0.35 * strength:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(3, 18), (*image.size[::-1], 1))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.3 * strength:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(30, 90))
        image = Image.open(buffer).convert("RGB")
    return image


def render(
    lines: list[str], font_path: Path, rng: random.Random, strength: float = 1.0, margin: float = 1.0
) -> TextImage:
    """Render `lines` in one font.

    Args:
        lines: Text, one string a line.
        font_path: A TrueType or OpenType file.
        rng: Decides size, colours, margins and damage.
        strength: 0 gives clean images, 1 the full range of blur, noise, tilt and JPEG artefacts.
        margin: Largest empty border, in line heights.
    """
    size = rng.randint(18, 44)
    font = load_font(font_path, size)
    background, ink = colours(rng)
    margins = tuple(round(rng.uniform(0.05, 0.05 + margin) * size * rng.random()) + 2 for _ in range(4))
    image, characters = draw_lines(lines, font, background, ink, margins, spacing=rng.uniform(0.95, 1.4))
    if rng.random() < 0.3 * strength:
        image, characters = _rotate(image, characters, rng.uniform(-4, 4), background)
    return TextImage(degrade(image, rng, strength), "\n".join(lines), tuple(characters))


def _rotate(image, characters, degrees, background):
    """Rotate about the centre; each character box keeps its size and moves with its centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre_x, centre_y = image.width / 2, image.height / 2
    moved = []
    for item in characters:
        x0, y0, x1, y1 = item.box
        dx, dy = (x0 + x1) / 2 - centre_x, (y0 + y1) / 2 - centre_y
        shift_x, shift_y = dx * cos + dy * sin - dx, -dx * sin + dy * cos - dy
        moved.append(CharacterBox(item.character, (x0 + shift_x, y0 + shift_y, x1 + shift_x, y1 + shift_y)))
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=background), moved


def training_sample(index: int, seed: int, progress: float) -> TextImage:
    """Make sample `index` of a curriculum; `progress`: 0 (short clean words) to 1 (long words, damage, several lines)."""
    rng = random.Random(f"{seed}/training/{index}")
    max_length = 4 + round(10 * min(1.0, progress * 2.5)) if rng.random() < 0.8 else 14
    count = 1
    if progress > 0.3 and rng.random() < 0.35:
        count = rng.randint(2, 4)
    texts = [random_word(rng, "training", max_length if count == 1 else min(max_length, 9)) for _ in range(count)]
    lines = [texts[0]]
    for text in texts[1:]:
        if len(lines[-1]) + len(text) < 12 and rng.random() < 0.6:
            lines[-1] += " " + text
        else:
            lines.append(text)
    strength = min(1.0, progress * 2)
    return render(lines, any_font(rng, "training"), rng, strength, margin=0.3 + min(1.2, 3 * progress))


def training_page(index: int, seed: int, strength: float, plain_share: float = 0.0) -> TextImage:
    """Make sample `index` of small text in several lines, where one image shows dozens of letters at about patch size.

    Args:
        strength: Amount of blur, noise and JPEG artefacts, 0 to 1.
        plain_share: Share of pages in black on white.
    """
    rng = random.Random(f"{seed}/page/{index}")
    size = rng.randint(13, 36)
    font = load_font(any_font(rng, "training"), size)
    background, ink = ((255, 255, 255), (0, 0, 0)) if rng.random() < plain_share else colours(rng)
    spacing = rng.uniform(1.0, 1.4)
    lines = []
    for _ in range(min(rng.randint(2, 6), max(1, int(112 / (size * 1.2 * spacing))))):
        line = random_word(rng, "training", 12)
        if rng.random() < 0.5:
            line += " " + random_word(rng, "training", 6)
        lines.append(line)
    margins = tuple(rng.randint(0, 6) for _ in range(4))
    image, characters = draw_lines(lines, font, background, ink, margins, spacing)
    return TextImage(degrade(image, rng, strength), "\n".join(lines), tuple(characters))


def held_out_word(index: int, seed: int = 0, strength: float = 1.0) -> TextImage:
    """Make sample `index` of the test: one unseen dictionary word in an unseen font."""
    rng = random.Random(f"{seed}/held_out/{index}")
    word = random_word(rng, "held_out", max_length=14, dictionary_only=True)
    return render([word], any_font(rng, "held_out"), rng, strength)


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a sheet of samples, to look at.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=("training", "held_out"), default="training")
    parser.add_argument(
        "--progress", type=number_within(0, 1), default=1.0, help="point of the training curriculum, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    sheet = Image.new("RGB", (5 * 240, 10 * 100), "white")
    for i in range(50):
        held_out = args.split == "held_out"
        sample = held_out_word(i, args.seed) if held_out else training_sample(i, args.seed, args.progress)
        picture = sample.image.copy()
        picture.thumbnail((230, 90))
        sheet.paste(picture, (i % 5 * 240, i // 5 * 100))
    sheet.save(args.out)


if __name__ == "__main__":
    sys.exit(main())
