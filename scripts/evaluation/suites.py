"""What is asked: the synthetic suites, and benchmarks in a JSONL file.

A line of a benchmark is {"id": ..., "image": path or [paths], "question": ..., "answers": [...], "metric": ...}, paths counted
from the folder of the file, `metric` only where it is not that of the others.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minimonkey.scripts.evaluation.metrics import METRICS
from minimonkey.scripts.synthetic.documents import document
from minimonkey.scripts.synthetic.text_images import held_out_word
from minimonkey.scripts.synthetic.vocabulary import READ_ALL


PRESET_METRICS = {"docvqa": "anls", "infovqa": "anls", "chartqa": "relaxed_accuracy", "ocrbench": "ocrbench"}
DEFAULT_METRIC = "anls"


@dataclass(frozen=True)
class Item:
    """A question about images (or paths of them), its right answers, and how answers are scored."""

    id: str
    images: list[Image.Image | str]
    question: str
    answers: list[str]
    metric: str


@dataclass(frozen=True)
class Suite:
    """Items that are made or opened only when needed."""

    name: str
    ids: list[str]
    item: Callable[[int], Item]
    max_new_tokens: int

    def __len__(self) -> int:
        return len(self.ids)


# --- synthetic -------------------------------------------------------------------------------------------------------

WORD_QUESTION = "Read the text."
# The metric of each kind, and enough new tokens (bytes, for Nano) for its longest answers.
SYNTHETIC = {
    "word": ("exact_match", 32),
    "line": ("exact_match", 96),
    "page": ("anls", 900),
    "receipt": ("anls", 400),
    "form": ("anls", 320),
    "table": ("anls", 400),
    "chart": ("relaxed_accuracy", 48),
    "scene": ("exact_match", 96),
    "seam": ("exact_match", 128),
    "bill": ("exact_match", 96),
    "layout": ("anls", 1200),
    "find": ("box", 48),
    "count": ("exact_match", 8),
    "shape": ("exact_match", 16),
    "views": ("exact_match", 24),
}


MOST_REDRAWS, REDRAWN_SEED = 20, 1_000_003  # of documents without a question of the kind asked for
QUESTIONS = {
    "any": lambda question: True,
    "text": lambda question: question.text in READ_ALL,
    "values": lambda question: question.text not in READ_ALL,
}


def synthetic_suite(
    name: str,
    items: int,
    seed: int = 0,
    difficulty: float | None = None,
    metric: str | None = None,
    questions: str = "any",
) -> Suite:
    """Make a suite of unseen words in unseen fonts: "word" as held_out_word of text_images.py, or documents of a kind.

    Args:
        difficulty: 0 to 1 (None: 1). For "word" it is only the amount of damage.
        questions: "any" of a document's questions, those for its whole "text", or those for "values" in it.

    Raises:
        ValueError: An unknown suite, metric or kind of question, or one that these documents do not have.
        FileNotFoundError: Words or fonts are missing, with the packages to install.
    """
    if name not in SYNTHETIC:
        raise ValueError(f"There is no suite {name!r}; known are {', '.join(SYNTHETIC)}.")
    if questions not in QUESTIONS:
        raise ValueError(f"There are no questions for {questions!r}; known are {', '.join(QUESTIONS)}.")
    own_metric, max_new_tokens = SYNTHETIC[name]
    metric, difficulty = check_metric(metric or own_metric), 1.0 if difficulty is None else difficulty

    ids = [f"{name}-{seed}-{index}" for index in range(items)]

    def word(index: int) -> Item:
        sample = held_out_word(index, seed, difficulty)
        return Item(ids[index], [sample.image], WORD_QUESTION, [sample.text], metric)

    def asked(index: int) -> Item:
        """Choose one of the questions of a document, so that items are independent of each other."""
        for redraw in range(MOST_REDRAWS):
            drawn = document(name, index, seed + redraw * REDRAWN_SEED, "held_out", difficulty)
            fitting = [question for question in drawn.questions if QUESTIONS[questions](question)]
            if fitting:
                question = random.Random(f"{seed}/asked/{name}/{index}").choice(fitting)
                return Item(ids[index], [drawn.image], question.text, [question.answer], metric)
        raise ValueError(f"Documents of kind {name!r} have no questions for {questions}.")

    make = word if name == "word" and questions != "values" else asked
    make(0)  # says now what is missing
    return Suite(name, ids, make, max_new_tokens)


# --- JSONL -----------------------------------------------------------------------------------------------------------


def read_benchmark(path: Path, items: int | None = None, metric: str = DEFAULT_METRIC) -> Suite:
    """Read the first `items` lines of a benchmark, checking all of it before anything is asked.

    Raises:
        ValueError: A line that is not an item, an id used twice or a missing image, with the number of the line.
    """
    if not path.is_file():
        raise ValueError(f"There is no benchmark {path}.")
    lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    found: list[Item] = []
    seen: set[str] = set()
    for number, line in lines[:items]:
        item = _read_item(line, f"{path}, line {number}", path.parent, check_metric(metric))
        if item.id in seen:
            raise ValueError(f"{path}, line {number}: the id {item.id!r} was used before.")
        seen.add(item.id)
        found.append(item)
    if not found:
        raise ValueError(f"The benchmark {path} has no lines.")
    return Suite(path.stem, [item.id for item in found], found.__getitem__, max_new_tokens=128)


def _read_item(line: str, where: str, folder: Path, metric: str) -> Item:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}).") from error
    if not isinstance(entry, dict) or not {"id", "image", "question", "answers"} <= entry.keys():
        raise ValueError(f'{where}: an item is {{"id", "image", "question", "answers"}}, got {line[:120]}')
    paths = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
    for name, texts in (("image", paths), ("answers", entry["answers"])):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: {name} must be a list of texts that is not empty, got {entry[name]!r}.")
    if not isinstance(entry["question"], str) or not entry["question"].strip():
        raise ValueError(f"{where}: the question must be a text that is not empty, got {entry['question']!r}.")
    missing = [name for name in paths if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{where}: there is no picture {folder / missing[0]}.")
    images = [str(folder / name) for name in paths]
    return Item(
        str(entry["id"]), images, entry["question"], entry["answers"], check_metric(entry.get("metric", metric), where)
    )


def check_metric(name: str, where: str = "") -> str:
    """Return `name` if there is such a metric; raises `ValueError` otherwise."""
    if name not in METRICS:
        raise ValueError(f"{where + ': ' if where else ''}There is no metric {name!r}; known are {', '.join(METRICS)}.")
    return name
