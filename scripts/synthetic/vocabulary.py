"""Words, names, dates and amounts for documents, and wordings of questions about them.

Words come from the split of materials.py. The fixed words of forms, receipts and months (`LABELS`) and the wordings of
questions belong to both splits.
"""

import random
import string

from minimonkey.scripts.synthetic.canvas import Question, Style
from minimonkey.scripts.synthetic.materials import monospaced_fonts
from minimonkey.scripts.synthetic.text_images import any_font, colours, random_word


MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
STREETS = ("Street", "Road", "Avenue", "Lane")
RECEIPT_LABELS = {
    "subtotal": ("Subtotal", "Sub-total", "SUBTOTAL"),
    "tax": ("Tax", "VAT", "Sales tax", "TAX"),
    "total": ("Total", "TOTAL", "Amount due", "Total due"),
    "cash": ("Cash", "CASH", "Paid", "Card"),
    "change": ("Change", "CHANGE"),
    "date": ("Date", "DATE"),
    "number": ("Receipt", "No.", "Order", "Ticket"),
    "thanks": ("Thank you!", "THANK YOU", "Please come again", "Thanks for your visit"),
}
FORM_TITLES = (
    "Application form",
    "REGISTRATION",
    "Invoice",
    "Order form",
    "Customer details",
    "Member card",
    "FORM 12",
)

READ_ALL = (
    "Read the text.",
    "Read all the text.",
    "Read all the text in the image.",
    "Read the all text in the image.",
    "What is written in the image?",
    "What text is in the image?",
    "What does the image say?",
    "Transcribe the text.",
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
NTH_LINE = ("What is written in the {ordinal} line?", "Read the {ordinal} line.", "What does line {number} say?")
LAST_LINE = ("What is written in the last line?", "Read the last line.")
TITLE = ("What is the title?", "Read the title.", "What is the heading?")
VALUE_OF = ("What is the {key}?", "Read the {key}.", "What {key} is given?")


def ask(rng: random.Random, wordings: tuple[str, ...], answer: str, **fields) -> Question:
    """Ask a question in one of its wordings."""
    return Question(rng.choice(wordings).format(**fields), answer)


def ask_line(rng: random.Random, lines: list[str]) -> Question:
    """Ask what one line says, counted from the top, or the last one."""
    number = rng.randrange(len(lines))
    if number >= len(ORDINALS) or (number == len(lines) - 1 and rng.random() < 0.5):
        return ask(rng, LAST_LINE, lines[-1])
    return ask(rng, NTH_LINE, lines[number], ordinal=ORDINALS[number], number=number + 1)


def some(rng: random.Random, questions: list[Question], most: int) -> list[Question]:
    """Choose at most `most` of the questions, in their order."""
    chosen = sorted(rng.sample(range(len(questions)), min(most, len(questions))))
    return [questions[i] for i in chosen]


# --- words -----------------------------------------------------------------------------------------------------------


def lower_word(rng: random.Random, split: str, longest: int) -> str:
    return random_word(rng, split, longest, dictionary_only=True).lower()


def distinct_words(rng: random.Random, split: str, count: int, longest: int) -> list[str]:
    """Choose lower-case words none of which is part of another."""
    chosen: list[str] = []
    while len(chosen) < count:
        word = lower_word(rng, split, longest)
        if len(word) > 2 and not any(word in other or other in word for other in chosen):
            chosen.append(word)
    return chosen


def sentence_line(rng: random.Random, split: str, count: int) -> str:
    """Write words as in running text, with punctuation."""
    words = [lower_word(rng, split, 10) for _ in range(count)]
    words[0] = words[0].capitalize()
    for i in range(count - 1):
        ending = rng.random()
        if ending < 0.08:
            words[i] += ","
        elif ending < 0.14:
            words[i] += "."
            words[i + 1] = words[i + 1].capitalize()
    return " ".join(words)


# --- values ----------------------------------------------------------------------------------------------------------


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def price(rng: random.Random, most: int = 99) -> float:
    return rng.randint(20, most * 100) / 100


def date(rng: random.Random, split: str = "") -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1980, 2029)
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}/{month:02d}/{year}",
            f"{day:02d}.{month:02d}.{year % 100:02d}",
            f"{day} {MONTHS[month - 1]} {year}",
            f"{MONTHS[month - 1]} {day}, {year}",
        )
    )


def clock(rng: random.Random, split: str = "") -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def person(rng: random.Random, split: str) -> str:
    return f"{lower_word(rng, split, 7).capitalize()} {lower_word(rng, split, 9).capitalize()}"


def phone(rng: random.Random, split: str = "") -> str:
    return rng.choice((f"{digits(rng, 3)}-{digits(rng, 4)}", f"({digits(rng, 3)}) {digits(rng, 3)} {digits(rng, 3)}"))


def mail(rng: random.Random, split: str) -> str:
    return f"{lower_word(rng, split, 7)}@{lower_word(rng, split, 7)}.{rng.choice(('com', 'org', 'net'))}"


def code(rng: random.Random, split: str = "") -> str:
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(1, 3)))
    return letters + rng.choice(("", "-")) + digits(rng, rng.randint(2, 6))


def money(rng: random.Random, split: str = "") -> str:
    return rng.choice(("", "$")) + f"{price(rng, 999):.2f}"


def address(rng: random.Random, split: str) -> str:
    return f"{rng.randint(1, 199)} {lower_word(rng, split, 8).capitalize()} {rng.choice(STREETS)}"


def place(rng: random.Random, split: str) -> str:
    return lower_word(rng, split, 10).capitalize()


FORM_FIELDS = {
    "Name": person,
    "Date": date,
    "Phone": phone,
    "Email": mail,
    "City": place,
    "Address": address,
    "Account": lambda rng, split: digits(rng, rng.randint(5, 9)),
    "Order no.": code,
    "Amount": money,
    "Time": clock,
    "Room": lambda rng, split: str(rng.randint(1, 499)),
    "Age": lambda rng, split: str(rng.randint(18, 99)),
    "Company": lambda rng, split: f"{place(rng, split)} Ltd.",
    "Reference": code,
    "Birth date": date,
    "Signature": person,
}

LABELS = frozenset(
    word.strip(".,!?-").lower()
    for texts in (
        *RECEIPT_LABELS.values(),
        MONTHS,
        STREETS,
        FORM_TITLES,
        tuple(FORM_FIELDS),
        ("Sub", "Ltd", "com org net"),
    )
    for text in texts
    for word in text.replace("-", " ").split()
)
"""Every fixed word that documents show, in lower case."""


# --- looks -----------------------------------------------------------------------------------------------------------


def text_size(rng: random.Random, difficulty: float) -> int:
    """Choose a text size in pixels an em: 18 to 24 for the easiest documents, 12 to 18 for the hardest."""
    return rng.randint(round(18 - 6 * difficulty), round(24 - 6 * difficulty))


def document_style(rng: random.Random, split: str, difficulty: float, is_printed: bool = False) -> Style:
    """Choose a style, mostly dark ink on light paper; `is_printed` makes monospaced fonts likelier."""
    path = rng.choice(monospaced_fonts(split)) if is_printed and rng.random() < 0.5 else any_font(rng, split)
    if rng.random() < 0.2 * difficulty:
        background, ink = colours(rng)
    else:
        shade = rng.randint(235, 255)
        background = tuple(shade - rng.randint(0, 12) for _ in range(3))
        ink = tuple(rng.randint(0, 70) for _ in range(3))
    return Style(path, text_size(rng, difficulty), background, ink)
