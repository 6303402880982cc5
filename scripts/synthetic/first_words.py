"""Images from which a fresh Nano learns its letters and first words: for training only, ever harder to read.

drawn = KINDS["first-words"](index, seed, progress)      progress from 0, short and clean, to 1
"""

import random
from collections.abc import Callable

from minimonkey.scripts.synthetic.canvas import Document, Question
from minimonkey.scripts.synthetic.text_images import TextImage, training_page, training_sample


QUESTIONS = (
    "Read the text.",
    "Read all the text.",
    "Read the all text in the image.",
    "Read all the text in the image.",
    "What does it say?",
    "What does the image say?",
    "What is written here?",
    "What is written in the image?",
    "What text is in the image?",
    "What word is this?",
)


def letters(index: int, seed: int, progress: float) -> Document:
    """Draw pages of small text first, some black on white; later, more and more single words, large and stretched."""
    if random.Random(f"{seed}/letters/{index}").random() > min(0.6, 1.6 * progress):
        strength, plain_share = min(1.0, 1.07 * progress), max(0.15, 1 - 3.2 * progress)
        return _document(training_page(index, seed, strength, plain_share))
    return _document(training_sample(index, seed, 0.64 * progress))


def words(index: int, seed: int, progress: float) -> Document:
    """Draw mostly single words, ever longer and more damaged; one image in five or eight is a page."""
    rng = random.Random(f"{seed}/reading/{index}")
    if rng.random() < (0.12 if progress < 0.15 else 0.2):
        return _document(training_page(index, seed, strength=0.6))
    is_hard = progress >= 0.2 and rng.random() < 0.15
    return _document(training_sample(index, seed, 0.64 if is_hard else 0.05 + 0.25 * min(1.0, progress * 8)))


def _document(shown: TextImage) -> Document:
    return Document(shown.image, tuple(Question(asked, shown.text) for asked in QUESTIONS), shown.characters)


KINDS: dict[str, Callable[[int, int, float], Document]] = {"first-letters": letters, "first-words": words}
