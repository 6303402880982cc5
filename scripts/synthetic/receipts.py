"""Receipts: a shop, items with prices, and sums that are right."""

import random

from PIL import ImageFont

from minimonkey.scripts.synthetic.canvas import CENTRE, LEFT, RIGHT, Canvas, Document, Question, Style, line_height
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.vocabulary import (
    READ_ALL,
    RECEIPT_LABELS,
    VALUE_OF,
    address,
    ask,
    clock,
    date,
    digits,
    distinct_words,
    document_style,
    phone,
    price,
    some,
)


TOTAL = ("What is the total?", "How much is the total?", "What is the total amount?", "What was paid in total?")
ITEM = ("How much is {item}?", "What does {item} cost?", "What is the price of {item}?")
SHOP = ("What is the name of the shop?", "Which shop is this from?", "What is the store name?")


class _Roll:
    """A receipt that is written from top to bottom."""

    def __init__(self, style: Style, width: int, rng: random.Random):
        self.style, self.rng = style, rng
        self.margin, self.y = rng.randint(10, 18), rng.randint(8, 16)
        self.pitch = style.height * rng.uniform(1.0, 1.25)
        self.canvas = Canvas((width, 1200), style.background)
        self.lines: list[str] = []

    def centred(self, text: str, scale: float = 1.0) -> None:
        """Draw a centred text, as large as fits."""
        font = self.style.fitting_font(text, self.canvas.width - self.margin, scale)
        self.canvas.text(self.canvas.width / 2, self.y, text, font, self.style.ink, CENTRE)
        self._end_line(text, font)

    def row(self, left: str, right: str, scale: float = 1.0) -> None:
        """Draw two texts on one line, as large as fits."""
        font = self.style.fitting_font(f"{left}  {right}", self.canvas.width - 2 * self.margin, scale)
        self.canvas.text(self.margin, self.y, left, font, self.style.ink, LEFT)
        self.canvas.text(self.canvas.width - self.margin, self.y, right, font, self.style.ink, RIGHT)
        self._end_line(f"{left} {right}", font)

    def _end_line(self, text: str, font: ImageFont.FreeTypeFont) -> None:
        self.y += max(self.pitch, line_height(font))
        self.lines.append(text)

    def rule(self) -> None:
        """Draw a rule of dashes (lines, not characters), or leave only space."""
        self.y += 2
        if self.rng.random() < 0.8:
            dash = self.rng.choice((3, 6, self.canvas.width))
            for x in range(self.margin, self.canvas.width - self.margin, 2 * dash):
                end = min(x + dash, self.canvas.width - self.margin)
                self.canvas.draw.line((x, self.y, end, self.y), fill=self.style.mix(0.7))
        self.y += 4

    def room(self, right: str) -> float:
        """Return the width in pixels that remains to the left of `right`."""
        return self.canvas.width - 2 * self.margin - self.style.font().getlength(right + "  ")


def receipt(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a receipt: shop, perhaps address and date, items, sums, perhaps how it was paid."""
    style = document_style(rng, split, difficulty, is_printed=True)
    roll = _Roll(style, round(style.size * rng.uniform(13.5, 17)), rng)
    label = {name: rng.choice(spellings) for name, spellings in RECEIPT_LABELS.items()}
    questions = _head(roll, label, rng, split, difficulty)
    roll.rule()
    prices = _items(roll, rng, split, 1 + round(rng.uniform(1, 2 + 5 * difficulty)))
    questions += [ask(rng, ITEM, text, item=name) for name, text in prices.items()]
    roll.rule()
    questions += _sums(roll, label, prices, rng, difficulty)
    roll.canvas.cut(roll.y + rng.randint(4, 14))
    read_all = ask(rng, READ_ALL, "\n".join(roll.lines))
    return finish(roll.canvas, [read_all, *some(rng, questions, 5)], rng, difficulty, style.size)


def _head(roll: _Roll, label: dict, rng: random.Random, split: str, difficulty: float) -> list[Question]:
    shop = " ".join(distinct_words(rng, split, rng.randint(1, 2), 8))
    shop = rng.choice((shop.upper(), shop.title()))
    roll.centred(shop, rng.uniform(1.1, 1.6))
    questions = [ask(rng, SHOP, shop)]
    if rng.random() < 0.6 * difficulty:
        roll.centred(address(rng, split))
    if rng.random() < 0.3 * difficulty:
        roll.centred(phone(rng))
    if rng.random() < 0.4 + 0.4 * difficulty:
        day = date(rng)
        roll.row(label["date"], day) if rng.random() < 0.5 or len(day) > 10 else roll.row(day, clock(rng))
        questions.append(ask(rng, VALUE_OF, day, key="date"))
    if rng.random() < 0.3 * difficulty:
        number = digits(rng, rng.randint(3, 6))
        roll.row(label["number"], number)
        name = label["number"].lower().replace("no.", "")
        questions.append(ask(rng, VALUE_OF, number, key=f"{name} number".strip()))
    return questions


def _items(roll: _Roll, rng: random.Random, split: str, count: int) -> dict[str, str]:
    """Draw distinct items; return their prices as they are written."""
    sign, form = rng.choice(("", "", "$")), rng.choice((str.lower, str.upper, str.capitalize))
    prices = {}
    for name in distinct_words(rng, split, count, 9):
        text = f"{sign}{price(rng, rng.choice((9, 99))):.2f}"
        prices[form(name)] = text
        shown = form(name)
        quantity = f"{rng.randint(1, 9)} x "
        if rng.random() < 0.2 and roll.style.font().getlength(quantity + shown) < roll.room(text):
            shown = quantity + shown
        roll.row(shown, text)
    return prices


def _sums(roll: _Roll, label: dict, prices: dict[str, str], rng: random.Random, difficulty: float) -> list[Question]:
    sign = "$" if next(iter(prices.values())).startswith("$") else ""
    total = sum(round(float(text.strip("$")) * 100) for text in prices.values())
    questions = []
    if rng.random() < 0.6 * difficulty:
        tax = round(total * rng.choice((5, 7, 10, 20)) / 100)
        subtotal, taxes = (f"{sign}{cents / 100:.2f}" for cents in (total, tax))
        roll.row(label["subtotal"], subtotal)
        roll.row(label["tax"], taxes)
        questions += [ask(rng, VALUE_OF, subtotal, key="subtotal"), ask(rng, VALUE_OF, taxes, key="tax")]
        total += tax
    shown = f"{sign}{total / 100:.2f}"
    roll.row(label["total"], shown, rng.choice((1.0, 1.0, 1.2)))
    questions += [ask(rng, TOTAL, shown)] * 2  # the question that receipts exist for
    if rng.random() < 0.4 * difficulty:
        paid = -(-total // 500) * 500
        given, change = (f"{sign}{cents / 100:.2f}" for cents in (paid, paid - total))
        roll.row(label["cash"], given)
        roll.row(label["change"], change)
        questions.append(ask(rng, VALUE_OF, change, key="change"))
    if rng.random() < 0.5:
        roll.rule()
        roll.centred(label["thanks"])
    return questions
