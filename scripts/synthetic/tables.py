"""Tables with a header: words, whole numbers or prices in cells."""

import random

from minimonkey.scripts.synthetic.canvas import CENTRE, LEFT, RIGHT, TILE_SIZE, Canvas, Document, Style, blend
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.vocabulary import READ_ALL, ask, distinct_words, document_style, price, some


CELL = ("What is the {column} of {row}?", "What is the {column} in the row {row}?", "Read the {column} of {row}.")
HEADER = ("What is written in the header?", "Read the first row.", "What are the columns?")
ROW = ("Read the row of {row}.", "What does the row {row} say?")
LOOKS = ("grid", "rules", "stripes", "plain")


def table(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a table of two to five columns and two to nine rows below the header."""
    style = document_style(rng, split, difficulty)
    most_width = TILE_SIZE * (2.2 + difficulty)
    rows = _cells(rng, split, 2 + round(rng.uniform(0, 3 * difficulty)), 2 + round(rng.uniform(0, 2 + 5 * difficulty)))
    padding = rng.randint(4, 10)
    while len(rows[0]) > 2 and sum(_widths(rows, style, padding)) > most_width:
        rows = [row[:-1] for row in rows]
    widths = [round(width * rng.uniform(1.0, 1.2)) for width in _widths(rows, style, padding)]
    canvas = _draw(rows, widths, style, padding, rng)
    questions = [
        ask(rng, CELL, value, column=column, row=row[0])
        for row in rows[1:]
        for column, value in zip(rows[0][1:], row[1:])
    ]
    lines = [" ".join(row) for row in rows]
    row = rng.randrange(1, len(rows))
    questions = [
        ask(rng, READ_ALL, "\n".join(lines)),
        ask(rng, HEADER, lines[0]),
        ask(rng, ROW, lines[row], row=rows[row][0]),
        *some(rng, questions, 4),
    ]
    return finish(canvas, questions, rng, difficulty, style.size)


def _cells(rng: random.Random, split: str, columns: int, rows: int) -> list[list[str]]:
    """Choose header and rows; the first column names the rows."""
    names = distinct_words(rng, split, columns + rows, 8)
    form = rng.choice((str.capitalize, str.capitalize, str.upper))
    header, labels = [form(name) for name in names[:columns]], [name.capitalize() for name in names[columns:]]
    kinds = [rng.choice(("number", "number", "price", "word")) for _ in header[1:]]
    return [header, *([label, *(_value(rng, split, kind) for kind in kinds)] for label in labels)]


def _value(rng: random.Random, split: str, kind: str) -> str:
    if kind == "number":
        return str(rng.randint(0, rng.choice((9, 99, 999, 9999))))
    return f"{price(rng):.2f}" if kind == "price" else distinct_words(rng, split, 1, 7)[0]


def _widths(rows: list[list[str]], style: Style, padding: int) -> list[int]:
    """Return the width of each column, with `padding` on both sides."""
    font = style.font()
    return [round(max(map(font.getlength, column))) + 2 * padding for column in zip(*rows)]


def _draw(rows: list[list[str]], widths: list[int], style: Style, padding: int, rng: random.Random) -> Canvas:
    margin, height = rng.randint(6, 16), round(style.height * rng.uniform(1.1, 1.5))
    width, bottom = sum(widths) + 2 * margin, margin + height * len(rows)
    canvas, look = Canvas((width, bottom + margin), style.background), rng.choice(LOOKS)
    left_edges = [margin + sum(widths[:i]) for i in range(len(widths) + 1)]
    top_edges = [margin + height * i for i in range(len(rows) + 1)]
    if look == "stripes":
        for top in top_edges[1:-1:2]:
            box = (margin, top, width - margin, top + height - 1)
            canvas.draw.rectangle(box, fill=style.mix(0.1))
    if rng.random() < 0.4:
        canvas.draw.rectangle((margin, margin, width - margin, margin + height), fill=style.mix(0.18))
    pale = blend(style.background, style.ink, rng.uniform(0.4, 0.9))
    horizontal = {"grid": top_edges, "rules": top_edges, "stripes": [], "plain": top_edges[1:2]}[look]
    for y in horizontal:
        canvas.draw.line((margin, y, width - margin, y), fill=pale)
    for x in left_edges if look == "grid" else []:
        canvas.draw.line((x, margin, x, bottom), fill=pale)
    aligns = [LEFT] + [rng.choice((LEFT, CENTRE, RIGHT)) for _ in widths[1:]]
    for row, top in zip(rows, top_edges):
        y = top + (height - style.height) / 2
        for text, left, column, align in zip(row, left_edges, widths, aligns):
            canvas.text(left + padding + align * (column - 2 * padding), y, text, style.font(), style.ink, align)
    return canvas
