"""Running text that never ends: words as often as texts have them, numbers, brackets, quotes, and words with accents.

words = prose(random.Random(1), "training", accented="éàü")
lines = wrapped(words, font, width=200, count=4, rng=random.Random(2))
"""

import importlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from minimonkey.scripts.synthetic.materials import WORD_PACKAGE, is_held_out, load_font, words
from minimonkey.scripts.synthetic.text_images import random_word
from minimonkey.scripts.synthetic.vocabulary import clock, code, date, digits, lower_word, person, phone, price


ACCENTED = "àâäáãåæçèéêëìíîïñòóôöõùúûüßÀÂÄÁÇÈÉÊËÍÎÏÑÓÔÖÙÚÛÜ"
LANGUAGES = ("fr", "es", "de")
SIGNS = "€£§°"
LONGEST_WORD = 12
SHORTEST_PART = 3  # letters of a word before and after the hyphen that divides it
TIMES_USED = 0.6  # power of how often texts use a word: at 1, one word in twelve would be the same article
PROBE_SIZE = 24  # pixels an em at which glyphs are compared

Case = str
CASES: dict[Case, float] = {"sentence": 0.72, "upper": 0.1, "title": 0.08, "lower": 0.1}


@lru_cache
def used_words(split: str) -> tuple[list[str], list[float]]:
    """Return the English words of `split`, and the running sum of their weights by use."""
    counts = importlib.import_module(WORD_PACKAGE).SpellChecker(language="en").word_frequency.dictionary
    chosen = [word for length, same in words(split).items() if length <= LONGEST_WORD for word in same]
    return chosen, list(itertools.accumulate(counts[word] ** TIMES_USED for word in chosen))


@lru_cache
def accented_words(split: str) -> list[str]:
    """Return French, Spanish and German words of `split` that have accents, in lower case."""
    accents = re.compile(f"[a-z{ACCENTED.lower()}]{{3,{LONGEST_WORD}}}")
    checker = importlib.import_module(WORD_PACKAGE).SpellChecker
    return [
        word
        for language in LANGUAGES
        for word in sorted(checker(language=language).word_frequency.dictionary)
        if not word.isascii() and accents.fullmatch(word) and is_held_out(word) == (split == "held_out")
    ]


@lru_cache
def shown(path: Path, characters: str = ACCENTED + SIGNS) -> str:
    """Return those of `characters` that a font has a glyph of."""
    font = load_font(path, PROBE_SIZE)
    missing = bytes(font.getmask("\uffff"))
    return "".join(character for character in characters if bytes(font.getmask(character)) not in (missing, b""))


def prose(rng: random.Random, split: str, accented: str = "", case: Case = "sentence") -> Iterator[str]:
    """Yield words without end, punctuation at their ends.

    Args:
        accented: What may stand in a text beside ASCII, see `shown`; "" for none.
        case: One of CASES.
    """
    begins, most_accents = True, rng.choice((0.05, 0.3)) if accented else 0.0
    while True:
        text = _token(rng, split, accented, most_accents)
        if case == "upper":
            text = text.upper() if "ß" not in text else text
        elif case == "title" or (case == "sentence" and begins):
            text = text[0].upper() + text[1:]
        ending = rng.random()
        begins = ending < 0.1
        if ending < 0.1:
            text += rng.choice("....!?")
        elif ending < 0.2:
            text += rng.choice(",,,,;:")
        elif ending < 0.25:
            text = rng.choice(('"{}"', "({})", "'{}'", "[{}]", "{}'s", "{} -", "{}/")).format(text)
        yield from text.split()


def _token(rng: random.Random, split: str, accented: str, most_accents: float) -> str:
    """Return a word, a number, a date, a price, a code, ..."""
    kind = rng.random()
    if kind < 0.05:
        return rng.choice((date, clock, code, phone, person))(rng, split)
    if kind < 0.1:
        number = digits(rng, rng.randint(1, 4)).lstrip("0") or "0"
        form = rng.choice(("{}", "{}", "{}%", "#{}", "{}.{}", "{},{}", "+{}", "-{}", "{}-{}", "{}x{}", "= {}"))
        return form.format(number, digits(rng, 2))
    if kind < 0.12:
        signs = "$" + "".join(sign for sign in "€£" if sign in accented)
        return f"{rng.choice(signs)}{price(rng, 999):.2f}"
    if kind < 0.13 and set("§°") & set(accented):
        sign = rng.choice(sorted(set("§°") & set(accented)))
        return sign + digits(rng, 2) if sign == "§" else digits(rng, 2) + sign
    if kind < 0.16:
        return random_word(rng, split, 10)
    if rng.random() < most_accents:
        word = rng.choice(accented_words(split))
        if set(word + word.upper()) - set(accented) <= set(map(chr, range(128))):
            return word
    if rng.random() < 0.5:
        return rng.choices(used_words(split)[0], cum_weights=used_words(split)[1])[0]
    return lower_word(rng, split, LONGEST_WORD)


def wrapped(
    words: Iterable[str],
    font: ImageFont.FreeTypeFont,
    width: float,
    count: int,
    rng: random.Random,
    hyphenates: bool = False,
) -> list[str]:
    """Fill `count` lines at most `width` pixels long; words that alone are too long are left out, the last line may be short.

    Args:
        hyphenates: Divide words at the end of a line, anywhere in them.
    """
    lines, line, reach, space = [], "", 0.0, font.getlength(" ")
    is_cut = rng.random() < 0.6
    for word in words:
        length = font.getlength(word)
        if reach + length <= width:
            line, reach = line + " " + word if line else word, reach + length + space
        elif line:
            rest = word
            if hyphenates and word.isalpha() and rng.random() < 0.5:
                line, rest = _divided(line, word, font, width - reach)
            lines.append(line)
            fits = font.getlength(rest) <= width
            line, reach = (rest, font.getlength(rest) + space) if fits else ("", 0.0)
        if len(lines) == count - 1 and is_cut and line and rng.random() < 0.3:
            break
        if len(lines) == count:
            return lines
    return lines + [line] if line else lines


def _divided(line: str, word: str, font: ImageFont.FreeTypeFont, room: float) -> tuple[str, str]:
    """Return the line with the first part of a word, and what remains of the word."""
    for letters in range(len(word) - SHORTEST_PART, SHORTEST_PART - 1, -1):
        part = word[:letters] + "-"
        if font.getlength(part) <= room:
            return f"{line} {part}", word[letters:]
    return line, word
