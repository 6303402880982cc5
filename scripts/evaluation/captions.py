"""BLEU, ROUGE-L and CIDEr of captions, as COCO's caption evaluation counts them, by its package pycocoevalcap.

    caption_scores(["the car stops"], [["the car is stopping", "it stops"]])

Published figures split sentences with Stanford's PTB tokenizer, a Java program; here a rule does (`words`), which does the same
to plain sentences: lower case, without punctuation. Its Java parts are not used, so that pip is enough.
"""

import re
from collections.abc import Sequence


WORD = re.compile(r"[^\W_]+(?:['.,:/-][^\W_]+)*")


def words(text: str) -> str:
    """Return the words of a sentence in lower case, with one space between them and without punctuation."""
    return " ".join(WORD.findall(text.lower()))


def caption_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4 and ROUGE-L (0 to 1), and CIDEr (0 to 10), over all answers together.

    Args:
        answers: One for each item.
        references: The right answers of each item, one or more.

    Raises:
        ValueError: No items, different numbers of them, or pycocoevalcap is not installed.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"Captions need right answers for each, got {len(answers)} answers and {len(references)}.")
    try:
        from pycocoevalcap.bleu.bleu import Bleu  # pyrefly: ignore[missing-import]
        from pycocoevalcap.cider.cider import Cider  # pyrefly: ignore[missing-import]
        from pycocoevalcap.rouge.rouge import Rouge  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ValueError("BLEU, ROUGE-L and CIDEr need pip install pycocoevalcap.") from error
    right = {number: [words(text) for text in texts] for number, texts in enumerate(references)}
    given = {number: [words(text)] for number, text in enumerate(answers)}
    bleu, _ = Bleu(4).compute_score(right, given, verbose=0)
    rouge, _ = Rouge().compute_score(right, given)
    cider, _ = Cider().compute_score(right, given)
    scores = {f"BLEU-{order}": value for order, value in enumerate(bleu, 1)}
    return {name: float(value) for name, value in (scores | {"ROUGE-L": rouge, "CIDEr": cider}).items()}
