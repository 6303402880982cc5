"""Forms: keys and their values."""

import random

from minimonkey.scripts.synthetic.canvas import CENTRE, LEFT, TILE_SIZE, Canvas, Document, Style
from minimonkey.scripts.synthetic.damage import finish
from minimonkey.scripts.synthetic.vocabulary import FORM_FIELDS, FORM_TITLES, READ_ALL, TITLE, ask, document_style, some


VALUE = ("What is the {key}?", "What is written for {key}?", "Read the {key}.", "What does the field {key} say?")
LAYOUTS = ("colon", "columns", "boxes", "underlined")


def form(rng: random.Random, split: str, difficulty: float) -> Document:
    """Draw a form of two to nine fields: `key: value` lines, two columns, values in boxes under their keys, or on lines."""
    style = document_style(rng, split, difficulty)
    value_style = document_style(rng, split, difficulty) if rng.random() < 0.3 else style
    value_style = Style(value_style.path, style.size, style.background, style.ink)
    width = round(TILE_SIZE * rng.uniform(2.0, 2.4 + 0.8 * difficulty))
    fields = _fields(style, value_style, width, rng, split, 2 + round(rng.uniform(0, 2 + 5 * difficulty)))
    canvas = Canvas((width, 1400), style.background)
    margin, y, lines, questions = rng.randint(10, 18), rng.randint(8, 18), [], []
    if rng.random() < 0.5:
        title = rng.choice(FORM_TITLES)
        font = style.fitting_font(title, width - 2 * margin, rng.uniform(1.1, 1.4))
        align = rng.choice((LEFT, CENTRE))
        canvas.text(margin + align * (width - 2 * margin), y, title, font, style.ink, align)
        y += sum(font.getmetrics()) + rng.randint(4, 10)
        lines, questions = [title], [ask(rng, TITLE, title)]
    y, shown = _draw_fields(canvas, fields, (style, value_style), (margin, y), rng)
    canvas.cut(y + rng.randint(6, 14))
    lines += shown
    questions += [ask(rng, VALUE, value, key=key.lower().rstrip(".")) for key, value in fields.items()]
    read_all = ask(rng, READ_ALL, "\n".join(lines))
    return finish(canvas, [read_all, *some(rng, questions, 5)], rng, difficulty, style.size)


def _fields(style: Style, value_style: Style, width: int, rng: random.Random, split: str, count: int) -> dict[str, str]:
    """Choose keys and values that fit beside each other."""
    fields: dict[str, str] = {}
    for key in rng.sample(sorted(FORM_FIELDS), count):
        value = FORM_FIELDS[key](rng, split)
        needed = style.font().getlength(key + ":  ") + value_style.font().getlength(value)
        if needed < width - 40:
            fields[key] = value
    return fields or {"Room": str(rng.randint(1, 499))}


def _draw_fields(
    canvas: Canvas, fields: dict[str, str], styles: tuple[Style, Style], origin: tuple[int, int], rng: random.Random
) -> tuple[float, list[str]]:
    """Draw the fields; return where they end and the lines that they make."""
    style, value_style = styles
    (margin, y), layout = origin, rng.choice(LAYOUTS)
    colon = ":" if layout == "colon" or rng.random() < 0.4 else ""
    font, value_font = style.font(), value_style.font()
    height = max(style.height, value_style.height)
    key_ink = style.ink if rng.random() < 0.6 else style.mix(0.7)
    column = max(font.getlength(key + colon + " ") for key in fields)
    if layout != "colon" and margin + column + max(map(value_font.getlength, fields.values())) + 12 > canvas.width:
        layout = "boxes" if layout == "boxes" else "colon"
    pitch = height * rng.uniform(1.1, 1.6)
    raised = font.getmetrics()[0] - value_font.getmetrics()[0]  # onto the baseline of the key
    lines = []
    for key, value in fields.items():
        key_width = font.getlength(key + colon + " ")
        canvas.text(margin, y, key + colon, font, key_ink)
        if layout == "boxes":
            y += height + 2
            canvas.draw.rectangle((margin, y, canvas.width - margin, y + height + 4), outline=style.mix(0.6))
            canvas.text(margin + 5, y + 2, value, value_font, style.ink)
            y += height + 4 + rng.randint(4, 8)
        else:
            x = margin + (key_width if layout == "colon" else column + 4)
            canvas.text(x, y + raised, value, value_font, style.ink)
            if layout == "underlined":
                bottom = y + height + 1
                canvas.draw.line((x - 2, bottom, canvas.width - margin, bottom), fill=style.mix(0.6))
            y += pitch
        lines += [key + colon, value] if layout == "boxes" else [f"{key}{colon} {value}"]
    return y, lines
