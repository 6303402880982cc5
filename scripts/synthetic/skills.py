"""Small tasks that reading does not teach, to adapt a model to: finding a word, counting, naming a shape, six cameras.

    find     a few words in one tile             "Where is tea?"            "<box>[[71, 107, 366, 330]]</box>"
    count    one to six shapes of one kind       "How many rings are there?"      "2"
    shape    one shape                           "Which shape is this: ring, star ...?"   "star"
    views    six cameras of a car, stitched      "Which camera shows the red truck?"      "CAM_BACK"

Boxes and stitched views are those of the published data (grounding.py, multi_view.py); a camera is one tile of Nano's. Of
`find` the words and fonts are one side's of the split; what is drawn otherwise differs by chance alone.
"""

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from minimonkey.grounding import format_box, normalise
from minimonkey.multi_view import CAMERAS, stitch_views
from minimonkey.scripts.synthetic.canvas import LEFT, TILE_SIZE, Canvas, Colour, Document
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.text_images import degrade
from minimonkey.scripts.synthetic.vocabulary import ask, distinct_words, document_style


WHERE = ("Where is {word}?", "Find {word}.", "Where does {word} stand?")
HOW_MANY = ("How many {shapes} are there?", "Count the {shapes}.")
WHICH_SHAPE = ("Which shape is this: {shapes}?", "Classify the image: {shapes}.")
WHAT_IN = ("What is in {camera}?", "What does {camera} show?")
WHICH_CAMERA = ("Which camera shows the {thing}?", "Where is the {thing}?")
CARS_IN_ALL = ("How many vehicles are around?", "How many vehicles do the cameras show?")
MOST_SHAPES = 6

Box = tuple[float, float, float, float]


def find(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw two or three words, one below the other at different indents, and ask where each is."""
    style = document_style(rng, split, difficulty)
    words = distinct_words(rng, split, 2 + (rng.random() < difficulty), 6)
    canvas = Canvas((TILE_SIZE, TILE_SIZE), style.background)
    pitch, questions = TILE_SIZE / len(words), []
    for number, word in enumerate(words):
        font = style.fitting_font(word, TILE_SIZE - 12)
        begun = len(canvas.characters)
        x = rng.uniform(4, TILE_SIZE - 4 - font.getlength(word))
        canvas.text(x, pitch * number + rng.uniform(0, max(0, pitch - style.height)), word, font, style.ink, LEFT)
        box = _around([character.box for character in canvas.characters[begun:]])
        questions.append(ask(rng, WHERE, format_box(None, [normalise(box, canvas.image.size)]), word=word))
    return finish(canvas, questions, rng, difficulty, style.size, is_flat=True)


def _around(boxes: list[Box]) -> Box:
    """Return the box around boxes, within the tile."""
    left, top, right, bottom = zip(*boxes)
    return max(0, min(left)), max(0, min(top)), min(TILE_SIZE, max(right)), min(TILE_SIZE, max(bottom))


# --- shapes ----------------------------------------------------------------------------------------------------------


def _star(draw: ImageDraw.ImageDraw, x: float, y: float, reach: float, colour: Colour) -> None:
    turns = [math.pi * i / 5 for i in range(10)]
    radii = [reach * (0.42 if i % 2 else 1) for i in range(10)]
    draw.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for a, r in zip(turns, radii)], fill=colour)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, reach: float, colour: Colour) -> None:
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=max(2, round(reach / 3)))


def _cross(draw: ImageDraw.ImageDraw, x: float, y: float, reach: float, colour: Colour) -> None:
    for across, down in ((1, 0.3), (0.3, 1)):
        draw.rectangle((x - reach * across, y - reach * down, x + reach * across, y + reach * down), fill=colour)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, reach: float, colour: Colour) -> None:
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)


def _square(draw: ImageDraw.ImageDraw, x: float, y: float, reach: float, colour: Colour) -> None:
    side = 0.85 * reach
    draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)


def _triangle(draw: ImageDraw.ImageDraw, x: float, y: float, reach: float, colour: Colour) -> None:
    draw.polygon([(x, y - reach), (x + reach, y + 0.8 * reach), (x - reach, y + 0.8 * reach)], fill=colour)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, Colour], None]] = {
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
PLURALS = {name: f"{name}es" if name == "cross" else f"{name}s" for name in SHAPES}


def _paper_and_ink(rng: random.Random) -> tuple[Colour, Colour]:
    """Choose a light colour and a dark one."""
    return tuple(rng.randint(200, 255) for _ in range(3)), tuple(rng.randint(0, 110) for _ in range(3))


def count(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw one to six shapes of one kind, one in each of nine places, and ask how many there are."""
    paper, ink = _paper_and_ink(rng)
    image = Image.new("RGB", (TILE_SIZE, TILE_SIZE), paper)
    draw, pitch = ImageDraw.Draw(image), TILE_SIZE / 3
    name, number = rng.choice(sorted(SHAPES)), rng.randint(1, MOST_SHAPES)
    for place in rng.sample(range(9), number):
        row, column = divmod(place, 3)
        reach = rng.uniform(0.28, 0.42) * pitch
        x, y = (pitch * (at + 0.5) + rng.uniform(-0.08, 0.08) * pitch for at in (column, row))
        SHAPES[name](draw, x, y, reach, ink)
    question = ask(rng, HOW_MANY, str(number), shapes=PLURALS[name])
    return Document(degrade(image, rng, difficulty, most_blur=1.0), (question,), ())


def shape(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw one shape, small or large, and ask which of six it is."""
    paper, ink = _paper_and_ink(rng)
    image = Image.new("RGB", (TILE_SIZE, TILE_SIZE), paper)
    name, reach = rng.choice(sorted(SHAPES)), rng.uniform(0.2, 0.42) * TILE_SIZE
    x, y = (rng.uniform(reach + 2, TILE_SIZE - reach - 2) for _ in range(2))
    SHAPES[name](ImageDraw.Draw(image), x, y, reach, ink)
    question = ask(rng, WHICH_SHAPE, name, shapes=", ".join(SHAPES))
    return Document(degrade(image, rng, difficulty, most_blur=1.0), (question,), ())


# --- cameras ---------------------------------------------------------------------------------------------------------

PAINTS: dict[str, Colour] = {
    "red": (200, 30, 30),
    "blue": (30, 60, 200),
    "white": (245, 245, 245),
    "yellow": (230, 200, 30),
}
VEHICLES = ("car", "truck")
NOTHING = "nothing"


def views(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a road by six cameras, vehicles of different looks on some, and ask what one shows, where one is, how many."""
    looks = [f"{paint} {vehicle}" for paint in PAINTS for vehicle in VEHICLES]
    things = dict.fromkeys(CAMERAS, NOTHING)
    things.update(zip(rng.sample(CAMERAS, rng.randint(1, 5)), rng.sample(looks, 5)))
    drawn = {camera: _view(rng, thing, difficulty) for camera, thing in things.items()}
    image = stitch_views(drawn, view_size=(TILE_SIZE, TILE_SIZE)).image
    camera = rng.choice(CAMERAS)
    seen = rng.choice([name for name, thing in things.items() if thing != NOTHING])
    questions = (
        ask(rng, WHAT_IN, things[camera], camera=camera),
        ask(rng, WHICH_CAMERA, seen, thing=things[seen]),
        ask(rng, CARS_IN_ALL, str(sum(thing != NOTHING for thing in things.values()))),
    )
    return Document(image, questions, ())


def _view(rng: random.Random, thing: str, difficulty: float) -> Image.Image:
    """Draw what one camera sees: sky, land, a road, and perhaps a vehicle on it."""
    side = TILE_SIZE
    sky, land = (tuple(rng.randint(*span) for _ in range(3)) for span in ((120, 210), (60, 120)))
    image = Image.new("RGB", (side, side), sky)
    draw, horizon = ImageDraw.Draw(image), rng.uniform(0.35, 0.5) * side
    draw.rectangle((0, horizon, side, side), fill=land)
    draw.polygon([(0.45 * side, horizon), (0.55 * side, horizon), (side, side), (0, side)], fill=(90, 90, 95))
    if thing != NOTHING:
        paint, vehicle = thing.split()
        size, x = rng.uniform(0.3, 0.5) * side, rng.uniform(0.3, 0.7) * side
        bottom = rng.uniform(0.7, 0.95) * side
        left, right, top = x - size / 2, x + size / 2, bottom - size * (0.95 if vehicle == "truck" else 0.4)
        draw.rectangle((left, top, right, bottom), fill=PAINTS[paint])
        if vehicle == "car":  # a lower body with a narrower cabin
            draw.rectangle((left + size / 5, top - size / 4, right - size / 5, top), fill=PAINTS[paint])
        for at in (left + size / 5, right - size / 5):
            draw.ellipse((at - size / 9, bottom - size / 9, at + size / 9, bottom + size / 9), fill=(15, 15, 15))
    return degrade(image, rng, difficulty, most_blur=0.8)
