"""Running text: one word, one line, a page of lines."""

import random

from minimonkey.scripts.synthetic.canvas import CENTRE, LEFT, TILE_SIZE, Canvas, Document, Style
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.text_images import any_font, random_word, render
from minimonkey.scripts.synthetic.vocabulary import (
    READ_ALL,
    TITLE,
    ask,
    ask_line,
    document_style,
    lower_word,
    sentence_line,
)


FIRST_WORD = ("What is the first word?", "Read the first word.")
LAST_WORD = ("What is the last word?", "Read the last word.")
BULLETS = ("- ", "* ", "{number}. ", "{number}) ")


def word(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw one word, number or price, about as large as a tile."""
    text = random_word(rng, split, 4 + round(10 * difficulty))
    shown = render([text], any_font(rng, split), rng, difficulty, margin=0.3 + 0.9 * difficulty)
    return Document(shown.image, (ask(rng, READ_ALL, text),), shown.characters)


def line(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw one line of two to seven words, at most four tiles long."""
    style = document_style(rng, split, difficulty)
    style = Style(style.path, style.size + rng.randint(0, 8), style.background, style.ink)
    words = [_any_word(rng, split) for _ in range(rng.randint(2, 3 + round(4 * difficulty)))]
    margin = rng.randint(4, 16)
    while len(words) > 1 and style.font().getlength(" ".join(words)) > 4 * TILE_SIZE - 2 * margin:
        words.pop()
    text, font = " ".join(words), style.font()
    height = style.height + 2 * rng.randint(3, 14)
    canvas = Canvas((round(font.getlength(text)) + 2 * margin, height), style.background)
    canvas.text(margin, (height - style.height) / 2, text, font, style.ink)
    questions = [ask(rng, READ_ALL, text), ask(rng, FIRST_WORD, words[0]), ask(rng, LAST_WORD, words[-1])]
    return finish(canvas, questions, rng, difficulty, style.size)


def page(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a title, perhaps, and lines of text: running, a list, or unconnected words and numbers."""
    style = document_style(rng, split, difficulty)
    width = round(TILE_SIZE * rng.uniform(1.6, 2 + 1.2 * difficulty))
    margin = rng.randint(8, 20)
    count = rng.randint(2, 4 + round(9 * difficulty))
    canvas = Canvas((width, 100 + 40 * (count + 2)), style.background)
    y, questions, lines = rng.randint(6, 20), [], []
    if rng.random() < 0.4:
        title, y = _title(canvas, style, margin, y, rng, split)
        questions, lines = [ask(rng, TITLE, title)], [title]
    lines += _body(canvas, style, margin, y, _texts(style, width - 2 * margin, count, rng, split), rng)
    canvas.cut(canvas.characters[-1].box[3] + rng.randint(8, 20))
    questions = [ask(rng, READ_ALL, "\n".join(lines)), ask_line(rng, lines), ask_line(rng, lines), *questions]
    return finish(canvas, questions, rng, difficulty, style.size)


def _any_word(rng: random.Random, split: str) -> str:
    return random_word(rng, split, 10) if rng.random() < 0.5 else lower_word(rng, split, 10)


def _title(canvas: Canvas, style: Style, margin: int, y: int, rng: random.Random, split: str) -> tuple[str, int]:
    """Draw a larger first line; return it and where the next line may begin."""
    font = style.font(rng.uniform(1.2, 1.7))
    words = [lower_word(rng, split, 8).capitalize() for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        words = [text.upper() for text in words]
    while len(words) > 1 and font.getlength(" ".join(words)) > canvas.width - 2 * margin:
        words.pop()
    text, align = " ".join(words), rng.choice((LEFT, CENTRE))
    canvas.text(margin + align * (canvas.width - 2 * margin), y, text, font, style.ink, align)
    bottom = y + sum(font.getmetrics())
    if rng.random() < 0.3:
        canvas.draw.line((margin, bottom + 2, canvas.width - margin, bottom + 2), fill=style.mix(0.6))
    return text, bottom + rng.randint(5, 14)


def _texts(style: Style, width: int, count: int, rng: random.Random, split: str) -> list[str]:
    """Write lines no wider than `width`."""
    font, form = style.font(), rng.choice(("running", "list", "mixed"))
    bullet = rng.choice(BULLETS) if form == "list" else ""
    lines = []
    for number in range(1, count + 1):
        prefix = bullet.format(number=number)
        if form == "running":
            words = sentence_line(rng, split, 8).split()
        else:
            words = [_any_word(rng, split) for _ in range(rng.randint(1, 3 if form == "list" else 4))]
        while len(words) > 1 and font.getlength(prefix + " ".join(words)) > width:
            words.pop()
        lines.append(prefix + " ".join(words))
    return lines


def _body(canvas: Canvas, style: Style, margin: int, y: int, lines: list[str], rng: random.Random) -> list[str]:
    align = CENTRE if rng.random() < 0.15 else LEFT
    pitch = style.height * rng.uniform(1.0, 1.4)
    for number, text in enumerate(lines):
        x = margin + align * (canvas.width - 2 * margin)
        canvas.text(x, y + number * pitch, text, style.font(), style.ink, align)
    return lines
