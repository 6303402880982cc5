"""DriveLM's score: accuracy, language, match, and a part that a large language model judges, off by default.

    result = score_drivelm(items, judge=None)

Points are compared in pixels of the cameras. Of a frame, the first question asks for all important objects; later questions are
scored only if all points that they name were found there. Without a judge the final score is given as the range in which it
lies: a judge gives 0 to 100.

Source: OpenDriveLab's challenge/evaluation.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minimonkey.scripts.evaluation.captions import caption_scores
from minimonkey.scripts.preparing.drivelm import to_cameras


Judge = Callable[[str, str], float]
"""Takes an answer and the right one, and returns 0 to 100."""

Point = tuple[float, float]
DECIMAL = re.compile(r"\d+\.\d+")
NEAR = 16  # pixels, |dx| + |dy|
WEIGHTS = {"gpt": 0.4, "language": 0.2, "match": 0.2, "accuracy": 0.2}
ACCURACY, GPT, LANGUAGE, MATCH = range(4)  # tags


@dataclass(frozen=True)
class Item:
    """A question that is scored; `question` and `right` as published, with points in pixels."""

    frame: str
    tag: int
    question: str
    right: str
    answer: str


def items_of(benchmark: dict[str, dict], predictions: dict[str, dict]) -> list[Item]:
    """Join the items of `minimonkey prepare drivelm --split eval` with predictions; answers get their points in pixels back."""
    items = []
    for name, line in benchmark.items():
        question, right = line["original"]
        answer = to_cameras(predictions[name]["answer"], tuple(line["camera_size"]))
        is_option = line["tag"] == ACCURACY and len(line["answers"][0]) == 1
        items.append(Item(line["frame"], line["tag"], question, line["answers"][0] if is_option else right, answer))
    return items


def points(text: str) -> list[Point]:
    """Return the points of a text: its decimal numbers in pairs; a last one without a partner is left."""
    numbers = [float(number) for number in DECIMAL.findall(text)]
    return list(zip(numbers[0::2], numbers[1::2]))


def match(answer: str, right: str) -> tuple[list[Point], float]:
    """Return the right points that an answer comes near to, and the F1 score, 0 to 1; each point is matched once, in order."""
    left, found = points(right), []
    given, length = points(answer), len(left)
    for x, y in given:
        nearest = min(left, key=lambda point: abs(point[0] - x) + abs(point[1] - y), default=None)
        if nearest is not None and abs(nearest[0] - x) + abs(nearest[1] - y) < NEAR:
            found.append(nearest)
            left.remove(nearest)
    precision, recall = len(found) / (len(given) + 1e-8), len(found) / (length + 1e-8)
    return found, 2 * precision * recall / (precision + recall + 1e-8)


def scored(items: Sequence[Item]) -> list[Item]:
    """Return the items that count: the first of each frame, and those whose points were all found by its answer."""
    kept, graphs = [], {}
    for item in items:
        if item.frame not in graphs:
            graphs[item.frame], _ = match(item.answer, item.right)
            kept.append(item)
        elif all(point in graphs[item.frame] for point in points(item.question)):
            kept.append(item)
    return kept


def score_drivelm(items: Sequence[Item], judge: Judge | None = None) -> dict:
    """Return the four parts, the final score or its range, and how many items counted.

    Args:
        judge: Asks a large language model how good an answer is; None leaves out what depends on it.

    Raises:
        ValueError: One of the parts has no item, as the published script would divide by zero.
    """
    kept = scored(items)
    by_tag = {tag: [item for item in kept if item.tag == tag] for tag in (ACCURACY, GPT, LANGUAGE, MATCH)}
    empty = [str(tag) for tag, chosen in by_tag.items() if not chosen]
    if empty:
        raise ValueError(f"No item with tag {', '.join(empty)} counts; DriveLM's score needs all four.")
    language = caption_scores([item.answer for item in by_tag[LANGUAGE]], [[item.right] for item in by_tag[LANGUAGE]])
    result = {
        "items": len(items),
        "counted": len(kept),
        "accuracy": _mean([float(item.answer == item.right) for item in by_tag[ACCURACY]]),
        "match_f1": 100 * _mean([match(item.answer, item.right)[1] for item in by_tag[MATCH]]),
        **language,
    }
    low, high = (_final(result, value, value) for value in (0.0, 100.0))
    if judge is None:
        return result | {"final_low": low, "final_high": high}
    gpt, match_gpt = (_mean([judge(item.answer, item.right) for item in by_tag[tag]]) for tag in (GPT, MATCH))
    return result | {"gpt": gpt, "match": (result["match_f1"] + match_gpt) / 2, "final": _final(result, gpt, match_gpt)}


def _final(result: dict, gpt: float, match_gpt: float) -> float:
    parts = {
        "gpt": gpt / 100,
        "language": language_score(result),
        "match": (result["match_f1"] + match_gpt) / 200,
        "accuracy": result["accuracy"],
    }
    return sum(weight * parts[name] for name, weight in WEIGHTS.items())


def language_score(scores: dict[str, float]) -> float:
    """Return a third each of the mean BLEU, ROUGE-L, and CIDEr over ten."""
    bleu = _mean([scores[f"BLEU-{order}"] for order in range(1, 5)])
    return (bleu + scores["ROUGE-L"] + scores["CIDEr"] / 10) / 3


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
