"""Questions with results that can be checked: rendered bills and their like, or a benchmark's JSONL."""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minimonkey.scripts.evaluation.suites import read_benchmark
from minimonkey.scripts.selftraining.rewards import final_answer
from minimonkey.scripts.synthetic.documents import KINDS, document


SYNTHETIC_KEYS = {"synthetic", "length", "seed", "split", "difficulty"}


@dataclass(frozen=True)
class Query:
    """A question about images, its result, and where it is known a worked answer."""

    id: str
    images: list[Image.Image | str]
    question: str
    right: str
    worked: str | None = None


class Queries:
    """Questions that are drawn or opened when they are asked for.

    Args:
        source: {"synthetic": kind, "length": n, "seed", "split", "difficulty"}, or the path of a benchmark's JSONL file.

    Raises:
        ValueError: Neither, or wrong values.
    """

    def __init__(self, source: dict | str):
        self.source, self.suite = source, None
        if isinstance(source, str):
            self.suite = read_benchmark(Path(source))
            self.length = len(self.suite)
            return
        if not isinstance(source, dict) or not {"synthetic", "length"} <= source.keys() <= SYNTHETIC_KEYS:
            raise ValueError(
                f"Questions are a JSONL file, or {{synthetic, length, seed, split, difficulty}}; got {source!r}."
            )
        if source["synthetic"] not in KINDS or not isinstance(source["length"], int) or source["length"] < 1:
            raise ValueError(
                f"There are no {source['length']!r} documents {source['synthetic']!r}; known are {', '.join(KINDS)}."
            )
        self.length = source["length"]
        self[0]  # says now what else is wrong

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Query:
        if self.suite is not None:
            item = self.suite.item(index)
            return Query(item.id, item.images, item.question, item.answers[0])
        kind, seed = self.source["synthetic"], self.source.get("seed", 1)
        split, difficulty = self.source.get("split", "training"), self.source.get("difficulty", 0.0)
        drawn = document(kind, index, seed, split, difficulty)
        asked = random.Random(f"{seed}/self/{split}/{index}").choice(drawn.questions)
        return Query(
            f"{kind}-{seed}-{split}-{index}", [drawn.image], asked.text, final_answer(asked.answer), asked.answer
        )

    def slice(self, begin: int, count: int, seed: int) -> list[Query]:
        """Return `count` questions from place `begin` of an endless sequence: all of them shuffled, again and again."""
        found = []
        for epoch in range(begin // self.length, -(-(begin + count) // self.length)):
            order = random.Random(f"{seed}/order/{epoch}").sample(range(self.length), self.length)
            first = epoch * self.length
            found += [self[number] for number in order[max(begin - first, 0) : begin + count - first]]
        return found
