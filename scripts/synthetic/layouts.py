"""Pages as they are set: one or two columns, headings, paragraphs, lists, photographs, logos, frames and rules.

Text is read column by column. It has capitals, digits, punctuation and, where the page's fonts have them, accents. A bullet
that is drawn as a dot is read "*", as in crops of PDF documents.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageFont

from minimonkey.scripts.synthetic.canvas import (
    CENTRE,
    LEFT,
    RIGHT,
    TILE_SIZE,
    Canvas,
    Colour,
    Document,
    Question,
    Style,
    line_height,
)
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.drawings import Area, frame, logo, photograph, rule
from minimonkey.scripts.synthetic.prose import ACCENTED, CASES, SIGNS, prose, shown, wrapped
from minimonkey.scripts.synthetic.seams import DEFAULT_RANGES
from minimonkey.scripts.synthetic.text_images import CharacterBox, any_font, no_ligatures
from minimonkey.scripts.synthetic.vocabulary import (
    ORDINALS,
    READ_ALL,
    TITLE,
    ask,
    ask_line,
    document_style,
    some,
)
from minimonkey.tiling import msac_grids


LINE_AFTER = ('What is the line after "{line}"?', 'Which line follows "{line}"?', 'Read the line after "{line}".')
HOW_MANY = ("How many lines of text are there?", "How many lines are there?", "Count the lines.")
ONE_HEADING = (*TITLE, "What does the heading say?")
NTH_HEADING = ("What is the {ordinal} heading?", "Read the {ordinal} heading.")
UNDER = ('What is written under "{heading}"?', 'Read the text under "{heading}".')
COLUMN = ("Read the {side} column.", "What does the {side} column say?", "What is written in the {side} column?")
COLUMN_LINE = ("Read the {ordinal} line of the {side} column.", "What is line {number} of the {side} column?")
SIDES = ("left", "right")

DOT = "\u2022"
BULLETS = ("- ", "* ", DOT + " ", "{number}. ", "{number}) ", "({number}) ", "{letter}) ", "{letter}. ")
MOST_LINES_OF_A_BLOCK = 5
WIDEST_SPACE = 3.5  # of a justified line, in spaces of its font
SHARP = 0.8  # least scale at which default tiles show a page, where blank paper below it can help
PADDINGS = (0, 0.06, 0.12, 0.18, 0.24)  # shares of its height
BESIDE = 190  # pixels that a column needs to set text beside a photograph


@dataclass(frozen=True)
class _Block:
    """A heading, a paragraph, a list or a caption, and its lines as they are read."""

    kind: str
    lines: list[str]
    column: int | None = None
    """0 left, 1 right; None: across the page."""


@dataclass(frozen=True)
class _Look:
    """What a page's texts have in common."""

    style: Style
    heading: Style
    accented: str
    split: str
    has_dots: bool

    @classmethod
    def choose(cls, rng: random.Random, split: str, difficulty: float, size: int | None) -> "_Look":
        style = document_style(rng, split, difficulty)
        style = Style(style.path, size or style.size, style.background, style.ink)
        path = any_font(rng, split) if rng.random() < 0.4 else style.path
        ink = style.ink
        if max(ink) <= 70 and rng.random() < 0.3:
            ink = tuple(rng.randint(0, 130) for _ in range(3))
        both = [shown(each, ACCENTED + SIGNS) for each in {path, style.path}]
        accented = "".join(character for character in both[0] if all(character in each for each in both))
        has_dots = bool(shown(style.path, DOT))
        accented = accented if rng.random() < 0.4 else ""
        return cls(style, Style(path, style.size, style.background, ink), accented, split, has_dots)


class _Column:
    """A part of a page that is written from top to bottom."""

    def __init__(self, canvas: Canvas, look: _Look, rng: random.Random, place: tuple[float, float, float], number=None):
        self.canvas, self.look, self.rng, self.number = canvas, look, rng, number
        self.left, self.y, self.width = place
        self.blocks: list[_Block] = []

    def heading(self, scale: float) -> None:
        """Draw a heading of one line, or two if it is long; sometimes with a rule below."""
        rng, style = self.rng, self.look.heading
        font = style.font(scale)
        case = rng.choices(("title", "upper", "sentence"), (0.4, 0.25, 0.35))[0]
        lines = wrapped(self._words(case), font, self.width, rng.choice((1, 1, 1, 2)), rng)
        lines = self._tidy(lines) or [f"Part {rng.randint(1, 99)}"]
        if rng.random() < 0.15:
            number = rng.choice(("{}.", "{}", "{}.1", "{})")).format(rng.randint(1, 9)) + " "
            if font.getlength(number + lines[0]) <= self.width:
                lines[0] = number + lines[0]
        self._set(lines, font, style.ink, rng.choice((LEFT, LEFT, CENTRE)), 1.05)
        self.blocks.append(_Block("heading", lines, self.number))
        if rng.random() < 0.25:
            self.rule()
        self.y += rng.randint(1, 6)

    def paragraph(self, count: int) -> None:
        """Draw a paragraph: plain, on a tint, reversed, in a frame, beside a photograph or a rule."""
        rng, style = self.rng, self.look.style
        font = style.font(rng.choice((1.0, 1.0, 1.0, 1.0, 0.85, 1.25)))
        form = rng.choices(("plain", "tint", "reversed", "frame", "rule", "beside"), (64, 8, 6, 8, 5, 9))[0]
        form = "plain" if form == "beside" and self.width < BESIDE else form
        room = {"plain": 0, "rule": 8, "beside": round(self.width * rng.uniform(0.3, 0.4))}.get(form, 12)
        case = rng.choices([*CASES], [*CASES.values()])[0]
        lines = wrapped(self._words(case), font, self.width - room, count, rng, hyphenates=rng.random() < 0.3)
        if not (lines := self._tidy(lines)):
            return
        spacing = rng.uniform(1.0, 1.3)
        left, top, width = round(self.left), round(self.y), round(self.width)
        height = round((len(lines) - 1) * line_height(font) * spacing + line_height(font))
        ink, shift = style.ink, room / 2
        area = (left, top, left + width, top + height + 8)
        if form in ("tint", "reversed", "frame"):
            self._box(form, area)
            ink = style.background if form == "reversed" else ink
            self.y += 4
        elif form == "rule":
            self.canvas.draw.line((left + 2, top, left + 2, top + height), fill=style.mix(0.6), width=2)
            shift = room
        elif form == "beside":
            is_left, side = rng.random() < 0.5, room - 8
            at = left if is_left else left + width - side
            height = max(height, round(side * rng.uniform(0.6, 1.1)))
            self._photograph((at, top, at + side, top + height))
            shift = room if is_left else 0
        align = rng.choices((LEFT, None, CENTRE, RIGHT), (55, 25, 12, 8))[0]
        self._set(lines, font, ink, align, spacing, (self.left + shift, self.width - room))
        self.blocks.append(_Block("text", lines, self.number))
        self.y = max(self.y, top + height) + (5 if form in ("tint", "reversed", "frame") else 0)

    def items(self, count: int) -> None:
        """Draw a list with bullets or numbers; an item goes on in a second line now and then."""
        rng, style = self.rng, self.look.style
        font, bullet = style.font(rng.choice((1.0, 1.0, 0.9))), rng.choice(BULLETS)
        bullet = "- " if DOT in bullet and not self.look.has_dots else bullet
        first, hanging, spacing = rng.choice((1, 1, 1, rng.randint(2, 40))), rng.random() < 0.8, rng.uniform(1.0, 1.35)
        lines, words = [], self._words(rng.choice(("sentence", "lower", "title")))
        inset = rng.choice((0, 0, 6, 12))
        for number in range(count):
            mark = bullet.format(number=first + number, letter="abcdefghij"[number % 10])
            reach = font.getlength(mark)
            width = self.width - inset - reach
            item = wrapped(words, font, width * rng.uniform(0.5, 1), rng.choice((1, 1, 2)), rng)
            if len(lines) + len(item) > count or not item:
                break
            shown_lines = [mark + item[0], *item[1:]]
            self._set(shown_lines[:1], font, style.ink, LEFT, spacing, (self.left + inset, self.width))
            shift = inset + (reach if hanging else 0)
            self._set(shown_lines[1:], font, style.ink, LEFT, spacing, (self.left + shift, self.width))
            lines += [line.replace(DOT, "*") for line in shown_lines]
        if lines:
            self.blocks.append(_Block("list", lines, self.number))

    def picture(self) -> None:
        """Draw a photograph as wide as the column or narrower, sometimes framed, sometimes with a caption."""
        rng, style = self.rng, self.look.style
        width = round(self.width * rng.choice((1.0, 1.0, rng.uniform(0.4, 0.9))))
        height = round(min(width * rng.uniform(0.25, 0.7), 110))
        left, top = round(self.left + rng.choice((0, 0.5, 1)) * (self.width - width)), round(self.y)
        self._photograph((left, top, left + width, top + height))
        self.y += height + 4
        if rng.random() < 0.35:
            font = style.font(0.85)
            start = rng.choice(("Fig. {}: ", "Figure {}. ", "Image {}: ", "")).format(rng.randint(1, 19))
            caption = wrapped(self._words("sentence"), font, self.width - font.getlength(start), 1, rng)
            if caption:
                lines = [start + caption[0]]
                self._set(lines, font, style.ink, rng.choice((LEFT, CENTRE)), 1.0)
                self.blocks.append(_Block("caption", lines, self.number))

    def rule(self) -> None:
        """Draw a rule across the column."""
        y = round(self.y) + 2
        rule(self.canvas, (self.left, y), (self.left + self.width, y), self.rng, self.look.style.mix(0.6))
        self.y = y + 4

    def gap(self) -> None:
        """Leave room between blocks."""
        self.y += self.rng.randint(5, 12)

    def _words(self, case: str):
        return prose(self.rng, self.look.split, self.look.accented, case)

    def _tidy(self, lines: list[str]) -> list[str]:
        return [line for line in lines if line.strip()]

    def _box(self, form: str, area: Area) -> None:
        style, rng = self.look.style, self.rng
        if form == "frame":
            frame(self.canvas, area, rng, style.mix(rng.uniform(0.4, 1)))
        else:
            self.canvas.draw.rectangle(
                area, fill=style.ink if form == "reversed" else style.mix(rng.uniform(0.06, 0.2))
            )

    def _photograph(self, area: Area) -> None:
        left, top, right, bottom = area
        self.canvas.image.paste(photograph((right - left, bottom - top), self.rng), (left, top))
        if self.rng.random() < 0.3:
            self.canvas.draw.rectangle(area, outline=self.look.style.mix(0.8))

    def _set(
        self,
        lines: Sequence[str],
        font: ImageFont.FreeTypeFont,
        ink: Colour,
        align: float | None,
        spacing: float,
        place: tuple[float, float] | None = None,
    ) -> None:
        """Draw lines below each other in `place` (left, width), aligned, or justified with None; move down behind them."""
        left, width = place or (self.left, self.width)
        pitch, space = line_height(font) * spacing, font.getlength(" ")
        for number, line in enumerate(lines):
            words = line.split(" ")
            lengths = [font.getlength(word) for word in words] if align is None and len(words) > 1 else []
            between = (width - sum(lengths)) / (len(words) - 1) if lengths else space
            is_last = number == len(lines) - 1
            if lengths and not is_last and between < WIDEST_SPACE * space:
                x = left
                for word, length in zip(words, lengths):
                    self._draw(x, self.y, word, font, ink)
                    x += length + between
            else:
                x = left + (align or LEFT) * (width - font.getlength(line))
                self._draw(x, self.y, line, font, ink)
            self.y += line_height(font) if is_last and spacing > 1.1 else pitch

    def _draw(self, x: float, y: float, text: str, font: ImageFont.FreeTypeFont, ink: Colour) -> None:
        x, y = round(x), round(y)
        self.canvas.draw.text((x, y), text, font=font, fill=ink, features=no_ligatures())
        self.canvas.characters += boxes(text, font, x, y)


@lru_cache(maxsize=512)
def _advances(name: tuple[str, str], text_size: float) -> dict[str, float]:
    """Return the known widths of a font's letters, to be filled by `boxes`."""
    return {}


def boxes(text: str, font: ImageFont.FreeTypeFont, left: float, top: float) -> list[CharacterBox]:
    """Return where the characters of a line stand: exact for its ends, within by the width of each letter.

    Ten times as fast as `character_boxes`, which measures every part of the line.
    """
    ascent, descent = font.getmetrics()
    upper, lower = top + 0.1 * ascent, top + ascent + 0.3 * descent
    known = _advances(font.getname(), font.size)
    known.update((character, font.getlength(character)) for character in set(text) - known.keys())
    advances = [known[character] for character in text]
    factor, reach, placed = font.getlength(text) / max(sum(advances), 1), left, []
    for character, advance in zip(text, advances):
        end = reach + factor * advance
        if character != " ":
            placed.append(CharacterBox("*" if character == DOT else character, (reach, upper, end, lower)))
        reach = end
    return placed


def layout(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a page of one or two columns with a title across it, perhaps, and a line at its foot."""
    columns = 2 if rng.random() < 0.45 else 1
    size = rng.randint(round(15 - 4 * difficulty), round(18 - 5 * difficulty)) if columns == 2 else None
    look = _Look.choose(rng, split, difficulty, size)
    width = round(TILE_SIZE * (rng.uniform(3.3, 4.3) if columns == 2 else rng.uniform(1.7, 2.2 + 1.2 * difficulty)))
    canvas, margin = Canvas((width, 1500), look.style.background), rng.randint(10, 20)
    top, is_framed = rng.randint(8, 18), rng.random() < 0.12
    across = _Column(canvas, look, rng, (margin, top, width - 2 * margin))
    if rng.random() < 0.55:
        _head(across)
    gutter, count = rng.randint(16, 30), rng.randint(3, 5 + round(7 * difficulty))
    one = (width - 2 * margin - gutter * (columns - 1)) / columns
    parts = [
        _Column(canvas, look, rng, (margin + i * (one + gutter), across.y, one), i if columns == 2 else None)
        for i in range(columns)
    ]
    lowest = top + width * (0.75 if columns == 2 else 1.3 if width > 2.2 * TILE_SIZE else 1.6)
    for part in parts:
        _fill(part, max(2, count + rng.randint(-1, 1)), lowest)
    bottom = max(part.y for part in parts)
    if columns == 2 and rng.random() < 0.35:
        x = round(margin + one + gutter / 2)
        rule(canvas, (x, across.y), (x, bottom), rng, look.style.mix(0.6))
    foot = _Column(canvas, look, rng, (margin, bottom + rng.randint(6, 14), width - 2 * margin))
    if rng.random() < 0.2:
        _foot(foot)
    canvas.cut(_sharp_height(width, round(foot.y + rng.randint(6, 14))))
    if is_framed:
        frame(canvas, (2, 2, width - 3, canvas.image.height - 3), rng, look.style.mix(rng.uniform(0.4, 1)))
    blocks = [block for part in (across, *parts, foot) for block in part.blocks]
    return finish(canvas, _questions(rng, blocks), rng, difficulty, look.style.size)


def _head(across: _Column) -> None:
    """Draw a title across the page, sometimes beside or below a logo, sometimes above a photograph."""
    rng, place = across.rng, (across.left, across.width)
    if rng.random() < 0.3:
        side, top = rng.randint(22, 44), round(across.y)
        at = across.left if (is_left := rng.random() < 0.6) else across.left + across.width - side
        logo(across.canvas, (round(at), top, round(at) + side, top + side), rng, across.look.heading.ink)
        across.width -= side + 8
        across.left += (side + 8) * is_left
        across.y += rng.randint(0, 8)
        across.heading(rng.uniform(1.1, 1.5))
        across.left, across.width = place
        across.y = max(across.y, top + side + 4)
    else:
        across.heading(rng.uniform(1.2, 1.8))
    if rng.random() < 0.15:
        across.picture()
    elif rng.random() < 0.25:
        across.rule()
    across.gap()


def _sharp_height(width: int, height: int) -> int:
    """Return the height, or a little more, at which default tiles show the page without making it much smaller."""
    for share in PADDINGS:
        padded = round(height * (1 + share))
        (columns, _), _ = msac_grids(width, padded, *DEFAULT_RANGES, tile_size=TILE_SIZE)
        if columns * TILE_SIZE >= SHARP * width:
            return padded
    return height


def _fill(column: _Column, count: int, lowest: float) -> None:
    """Draw blocks in a column until it has about `count` lines, or ends below `lowest`."""
    rng, pictures = column.rng, 1
    while (written := sum(len(block.lines) for block in column.blocks)) < count and (column.y < lowest or not written):
        left = count - written
        kind = rng.choices(("paragraph", "items", "heading", "picture", "rule"), (50, 25, 17, 10 * pictures, 4))[0]
        if kind == "heading" and left > 1:
            column.heading(rng.uniform(1.0, 1.35))
            column.paragraph(min(left - 1, rng.randint(1, 4)))
        elif kind == "items":
            column.items(min(left, rng.randint(2, MOST_LINES_OF_A_BLOCK)))
        elif kind == "picture":
            column.picture()
            pictures = 0
        elif kind == "rule" and written:
            column.rule()
        else:
            column.paragraph(min(left, rng.randint(1, MOST_LINES_OF_A_BLOCK)))
        column.gap()


def _foot(foot: _Column) -> None:
    """Draw a page number or a small line."""
    rng, font = foot.rng, foot.look.style.font(0.85)
    number = str(rng.randint(1, 400))
    text = rng.choice(("{}", "- {} -", "Page {}", "{} / 400")).format(number)
    if rng.random() < 0.4:
        text = " ".join(wrapped(foot._words("sentence"), font, foot.width, 1, rng)) or number
    foot._set([text], font, foot.look.style.ink, rng.choice((LEFT, CENTRE, RIGHT)), 1.0)
    foot.blocks.append(_Block("foot", [text]))


def _questions(rng: random.Random, blocks: list[_Block]) -> list[Question]:
    """Ask for the whole text, and for some of: headings, what is under them, columns, lines, the number of lines."""
    lines = [line for block in blocks for line in block.lines]
    questions = [ask_line(rng, lines), ask_line(rng, lines), ask(rng, HOW_MANY, str(len(lines)))]
    followed = [i for i in range(len(lines) - 1) if lines.count(lines[i]) == 1]
    questions += [
        ask(rng, LINE_AFTER, lines[i + 1], line=lines[i]) for i in rng.sample(followed, min(2, len(followed)))
    ]
    headings = [(i, " ".join(block.lines)) for i, block in enumerate(blocks) if block.kind == "heading"]
    for number, (i, heading) in enumerate(headings[: len(ORDINALS)]):
        if len(headings) == 1:
            questions.append(ask(rng, ONE_HEADING, "\n".join(blocks[i].lines)))
        else:
            questions.append(ask(rng, NTH_HEADING, "\n".join(blocks[i].lines), ordinal=ORDINALS[number]))
        below = blocks[i + 1] if i + 1 < len(blocks) else None
        if below and below.kind in ("text", "list") and below.column == blocks[i].column:
            questions.append(ask(rng, UNDER, "\n".join(below.lines), heading=heading))
    for column, side in enumerate(SIDES):
        own = [line for block in blocks if block.column == column for line in block.lines]
        if own:
            questions.append(ask(rng, COLUMN, "\n".join(own), side=side))
            number = rng.randrange(min(len(own), len(ORDINALS)))
            asked = {"ordinal": ORDINALS[number], "number": number + 1, "side": side}
            questions.append(ask(rng, COLUMN_LINE, own[number], **asked))
    return [ask(rng, READ_ALL, "\n".join(lines)), *some(rng, questions, 5)]
