"""Bills that fit one tile, with questions that take two steps: reading prices, and reckoning with them.

Answers show the steps, one a line; the result is what the last line says, after its equals sign if there is one:

    tea 3
    milk 5
    3 + 5 = 8
"""

import random

from minimonkey.scripts.synthetic.canvas import LEFT, RIGHT, TILE_SIZE, Canvas, Document, Question
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.vocabulary import distinct_words, document_style


TOGETHER = ("What do {first} and {second} cost together?", "How much are {first} and {second}?")
CHANGE = (
    "What is left of {given} for {first} and {second}?",
    "Pay {first} and {second} with {given}: what is the change?",
)
MOST = ("What costs most?", "Which is the dearest?")
LONGEST_NAME, HIGHEST_PRICE, GIVEN = 5, 9, 20


def bill(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw two names with whole prices (three from difficulty 0.5 on), and ask for a sum, the change, and the dearest."""
    style = document_style(rng, split, difficulty)
    names = distinct_words(rng, split, 2 + (difficulty >= 0.5), LONGEST_NAME)
    prices = dict(zip(names, rng.sample(range(1, HIGHEST_PRICE + 1), len(names))))
    canvas = Canvas((TILE_SIZE, TILE_SIZE), style.background)
    pitch = TILE_SIZE / len(names)
    for number, (name, price) in enumerate(prices.items()):
        y = pitch * number + (pitch - style.height) / 2
        font = style.fitting_font(f"{name}  {price}", TILE_SIZE - 16)
        canvas.text(8, y, name, font, style.ink, LEFT)
        canvas.text(TILE_SIZE - 8, y, str(price), font, style.ink, RIGHT)
    questions = [_together(rng, prices), _change(rng, prices), _most(rng, prices)]
    return finish(canvas, questions, rng, difficulty, style.size)


def _two(rng: random.Random, prices: dict[str, int]) -> tuple[str, str, int, int]:
    first, second = rng.sample([*prices], 2)
    return first, second, prices[first], prices[second]


def _together(rng: random.Random, prices: dict[str, int]) -> Question:
    first, second, a, b = _two(rng, prices)
    steps = [f"{first} {a}", f"{second} {b}", f"{a} + {b} = {a + b}"]
    return Question(rng.choice(TOGETHER).format(first=first, second=second), "\n".join(steps))


def _change(rng: random.Random, prices: dict[str, int]) -> Question:
    first, second, a, b = _two(rng, prices)
    steps = [f"{first} {a}", f"{second} {b}", f"{a} + {b} = {a + b}", f"{GIVEN} - {a + b} = {GIVEN - a - b}"]
    return Question(rng.choice(CHANGE).format(first=first, second=second, given=GIVEN), "\n".join(steps))


def _most(rng: random.Random, prices: dict[str, int]) -> Question:
    steps = [f"{name} {price}" for name, price in prices.items()]
    return Question(rng.choice(MOST), "\n".join([*steps, max(prices, key=lambda name: prices[name])]))
