"""What every published data set becomes: conversations in InternVL's form, each checked; or items of a benchmark.

A reader yields records, and refusals of what it cannot read. A record is checked as training will check it: its images open, it
has as many placeholders as images, its boxes are boxes. What is refused is listed with its reason, and never left out quietly.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from minimonkey.conversation import IMAGE_PLACEHOLDER
from minimonkey.grounding import parse_boxes
from minimonkey.scripts.training.data import parse_line, picture_size


@dataclass(frozen=True)
class Record:
    """One conversation about images.

    Args:
        id: Unique in its data set.
        images: Their files, in the order of the placeholders.
        turns: Questions and answers; in questions `<image>` stands where an image belongs.
        scoring: What a benchmark needs to know besides: `answers` if several are right, `metric`, `kind` ...
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    scoring: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Refusal:
    """Something of a data set that became no record, and why."""

    id: str
    reason: str


def with_image(question: str, images: int = 1) -> str:
    """Return a question with a placeholder for each image before it."""
    return f"{IMAGE_PLACEHOLDER}\n" * images + question


def fault(record: Record) -> str | None:
    """Return what keeps a record from being trained on or asked, if anything."""
    try:
        for image in record.images:
            picture_size(image, "The record")
        parse_line(json.dumps(as_line(record, Path())), "The record")
        for text in (text for turn in record.turns for text in turn):
            if "<box>" in text:
                parse_boxes(text)
    except ValueError as error:
        return str(error).removeprefix("The record: ")
    return None


def as_line(record: Record, root: Path) -> dict:
    """Return a record as a line of InternVL's JSONL, with image paths relative to `root` where they lie in it."""
    speakers = ("human", "gpt")
    messages = [{"from": who, "value": text} for turn in record.turns for who, text in zip(speakers, turn)]
    images = [relative(image, root) for image in record.images]
    line = {"id": record.id, "conversations": messages}
    return line if not images else line | {"image": images[0] if len(images) == 1 else images}


def as_item(record: Record, root: Path) -> dict:
    """Return the first turn of a record as an item of a benchmark, see evaluation/suites.py."""
    (question, answer), *_ = record.turns
    question = question.removeprefix(f"{IMAGE_PLACEHOLDER}\n" * len(record.images))
    images = [relative(image, root) for image in record.images]
    image = images[0] if len(images) == 1 else images
    return {"id": record.id, "image": image, "question": question, "answers": [answer], **record.scoring}


def relative(path: Path, root: Path) -> str:
    """Return a path relative to `root` if it lies in it, else as it is."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


class Writer:
    """Writes the records of one data set into a folder: NAME.jsonl, and NAME.refused.jsonl where something was refused.

    Args:
        out: The folder, which exists.
        name: Of the data set.
        root: Folder that the image paths start from.
        is_benchmark: Write items of a benchmark instead of conversations; their paths start from `out`.
    """

    def __init__(self, out: Path, name: str, root: Path, is_benchmark: bool):
        self.out, self.name, self.root, self.is_benchmark = out, name, root, is_benchmark
        self.path, self.refused_path = out / f"{name}.jsonl", out / f"{name}.refused.jsonl"
        self.written, self.refused = 0, Counter()

    def write(self, found: Iterable[Record | Refusal]) -> None:
        """Write all records, each whole or, with a reason, among the refused."""
        self.refused_path.unlink(missing_ok=True)
        ids: set[str] = set()
        begun = self.path.with_suffix(".partial")
        with begun.open("w", encoding="utf-8") as lines:
            for record in found:
                reason = record.reason if isinstance(record, Refusal) else fault(record)
                if reason is None and record.id in ids:
                    reason = "the id was used before"
                if reason is not None:
                    self._refuse(record.id, reason)
                    continue
                ids.add(record.id)
                line = as_item(record, self.out) if self.is_benchmark else as_line(record, self.root)
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                self.written += 1
        begun.replace(self.path)

    def _refuse(self, record_id: str, reason: str) -> None:
        self.refused[_kind(reason)] += 1
        with self.refused_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"id": record_id, "reason": reason}, ensure_ascii=False) + "\n")

    def report(self) -> str:
        """Say how many records were written and how many refused, by the kind of reason."""
        text = f"{self.name}: {self.written} records in {self.path}"
        if self.refused:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.refused.most_common(5))
            text += f"; {self.refused.total()} refused ({kinds}), see {self.refused_path}"
        return text


def _kind(reason: str) -> str:
    """Return a reason without what differs from record to record, so that equal ones are counted together."""
    words = [word for word in reason.split() if not any(mark in word for mark in '/0123456789[{"')]
    return " ".join(words[:8])
