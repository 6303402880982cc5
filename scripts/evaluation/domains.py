"""Scores of driving clips, remote sensing, medical questions and yes-or-no benchmarks, from predictions and their items.

Each takes rows, an item of a benchmark with the prediction for it, and returns numbers by name.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from minimonkey.scripts.evaluation.captions import caption_scores, words
from minimonkey.scripts.evaluation.intervals import wilson_interval
from minimonkey.scripts.evaluation.metrics import box_overlap, chosen_yes_or_no, same_text


Rows = Sequence[dict]
"""Items of a benchmark, each with "answer", what was predicted, and "answers", what is right."""

TOLERANCES = (0.1, 0.5, 1.0, 5.0, 10.0)  # tau of BDD-X's A_tau
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SIGNALS = ("speed", "course")
COUNTED = ("count", "area")  # RSVQA's kinds that are compared in bins
BINS = (0, 100, 1000)
FOUR_NUMBERS = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


def share(successes: Sequence[bool | float], name: str) -> dict[str, float]:
    """Return a share of successes with its 95% interval and the number of items, under `name`."""
    right, items = sum(map(float, successes)), len(successes)
    low, high = wilson_interval(round(right), items)
    return {name: right / items, f"{name}_low": low, f"{name}_high": high, f"{name}_items": items}


# --- BDD-X -----------------------------------------------------------------------------------------------------------


def score_bdd(rows: Rows) -> dict[str, float]:
    """Return BLEU-4, ROUGE-L and CIDEr of descriptions and justifications, RMSE and A_tau of speed and course.

    Control signals are the first two numbers of an answer; an answer without them counts as wrong at every tolerance, and is
    counted apart, since it has no error to square. Source: DriveGPT4 (arXiv 2310.01412), section 5.
    """
    kinds = _by(rows, "kind")
    result: dict[str, float] = {}
    for kind in ("description", "justification"):
        if kind in kinds:
            chosen = kinds[kind]
            scores = caption_scores([row["answer"] for row in chosen], [row["answers"] for row in chosen])
            result |= {f"{kind}_{name}": scores[name] for name in ("BLEU-4", "ROUGE-L", "CIDEr")}
    return result | (score_control(kinds["control"]) if "control" in kinds else {})


def score_control(rows: Rows) -> dict[str, float]:
    """Return RMSE and the share within each tolerance, of speed and course; and how many answers had no two numbers."""
    errors: dict[str, list[float]] = {signal: [] for signal in SIGNALS}
    unread = 0
    for row in rows:
        given, right = (
            [float(number) for number in NUMBER.findall(text)[:2]] for text in (row["answer"], row["answers"][0])
        )
        if len(right) < 2:
            raise ValueError(f"Item {row['id']} has no two control signals: {row['answers'][0]!r}.")
        unread += len(given) < 2
        for signal, value, wanted in zip(SIGNALS, given if len(given) == 2 else (math.inf, math.inf), right):
            errors[signal].append(abs(value - wanted))
    result: dict[str, float] = {"control_items": len(rows), "control_unread": unread}
    for signal, values in errors.items():
        finite = [value for value in values if math.isfinite(value)]
        result[f"{signal}_RMSE"] = math.sqrt(sum(value**2 for value in finite) / len(finite)) if finite else math.nan
        result |= {f"{signal}_A_{tau:g}": sum(value < tau for value in values) / len(values) for tau in TOLERANCES}
    return result


# --- remote sensing --------------------------------------------------------------------------------------------------


def score_rsvqa(rows: Rows) -> dict[str, float]:
    """Return the accuracy of each kind of question, of all, and of those that are not counts or areas, as published."""
    right = {kind: [_rsvqa_right(kind, row) for row in chosen] for kind, chosen in _by(rows, "kind").items()}
    result: dict[str, float] = {}
    for kind, successes in right.items():
        result |= share(successes, kind)
    result |= share([value for successes in right.values() for value in successes], "all")
    useful = [value for kind, successes in right.items() if kind not in COUNTED for value in successes]
    return result | (share(useful, "useful") if useful else {})


def _rsvqa_right(kind: str, row: dict) -> bool:
    if kind not in COUNTED:
        return bool(same_text(row["answer"], row["answers"]))
    given, right = (NUMBER.search(text.replace(",", "")) for text in (row["answer"], row["answers"][0]))
    if given is None or right is None:
        return bool(same_text(row["answer"], row["answers"]))
    return count_bin(float(given[0])) == count_bin(float(right[0]))


def count_bin(value: float) -> int:
    """Return the bin of a count or an area: 0, up to 100, up to 1000, or more."""
    return sum(value > edge for edge in BINS)


def score_grounding(rows: Rows) -> dict[str, float]:
    """Return the share of answers whose first box overlaps the right one by more than half (Acc@0.5), in pixels.

    Rows have `box` (left, top, right, bottom) and `size` (width, height) in pixels; an answer without a box is wrong.
    """
    return share([_overlap(row) > 0.5 for row in rows], "Acc@0.5")


def _overlap(row: dict) -> float:
    found = FOUR_NUMBERS.search(row["answer"])
    if found is None:
        return 0.0
    width, height = row["size"]
    given = [
        min(max(float(value) / 1000 * side, 0), side)
        for value, side in zip(found.groups(), (width, height, width, height))
    ]
    return intersection_over_union(given, row["box"])


def intersection_over_union(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the IoU of two boxes (left, top, right, bottom) of pixels, with both edges in it: one pixel has area 1."""
    return box_overlap(first, second, edge=1)


# --- medical ---------------------------------------------------------------------------------------------------------


def score_medical(rows: Rows) -> dict[str, float]:
    """Return the accuracy of closed questions; of open ones exact matches, and the share of the right answer's words (recall).

    Closed answers of yes or no may stand in a sentence. Source: LLaVA-Med (arXiv 2306.00890), section 4.
    """
    kinds = _by(rows, "kind")
    result: dict[str, float] = {}
    if "closed" in kinds:
        result |= share([_closed_right(row) for row in kinds["closed"]], "closed")
    if "open" in kinds:
        result |= share([same_text(row["answer"], row["answers"]) for row in kinds["open"]], "open_exact")
        recalls = [max(_recall(row["answer"], right) for right in row["answers"]) for row in kinds["open"]]
        result["open_recall"] = sum(recalls) / len(recalls)
    return result


def _closed_right(row: dict) -> bool:
    right = chosen_yes_or_no(row["answers"][0])
    return chosen_yes_or_no(row["answer"]) == right if right else bool(same_text(row["answer"], row["answers"]))


def _recall(answer: str, right: str) -> float:
    wanted = words(right).split()
    given = set(words(answer).split())
    return sum(word in given for word in wanted) / len(wanted) if wanted else float(not given)


# --- yes or no -------------------------------------------------------------------------------------------------------


def score_mme(rows: Rows) -> dict[str, float]:
    """Return MME's scores: of each category accuracy plus accuracy+ (both questions of an image right) in percent, and sums.

    Rows have `category` and `group`, the image. Source: MME (arXiv 2306.13394).
    """
    result: dict[str, float] = {}
    for category, chosen in _by(rows, "category").items():
        right = {name: [_says_right(row) for row in pair] for name, pair in _by(chosen, "group").items()}
        singles = [value for values in right.values() for value in values]
        result[category] = 100 * sum(singles) / len(singles) + 100 * sum(map(all, right.values())) / len(right)
    cognition = sum(result.get(name, 0.0) for name in MME_COGNITION)
    total = sum(result.values())
    return result | {"perception": total - cognition, "cognition": cognition, "total": total}


MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def score_hallusionbench(rows: Rows) -> dict[str, float]:
    """Return HallusionBench's accuracy over questions (aAcc), figures (fAcc) and question pairs (qAcc), and their mean.

    Rows have `group`, the figure, and `pair`, the question asked about several figures. Source: arXiv 2310.14566.
    """
    result = share([_says_right(row) for row in rows], "aAcc")
    for name, key in (("fAcc", "group"), ("qAcc", "pair")):
        result |= share([all(map(_says_right, chosen)) for chosen in _by(rows, key).values()], name)
    return result | {"mean": (result["aAcc"] + result["fAcc"] + result["qAcc"]) / 3}


def score_mmbench(rows: Rows) -> dict[str, float]:
    """Return MMBench's accuracy: a question counts if it is answered right in every order of its options.

    Rows have `group`, the question. Source: MMBench's circular evaluation (arXiv 2307.06281).
    """
    return share([all(row["score"] for row in turned) for turned in _by(rows, "group").values()], "circular") | share(
        [bool(row["score"]) for row in rows], "vanilla"
    )


def score_pope(rows: Rows) -> dict[str, float]:
    """Return POPE's accuracy, precision, recall and F1 of saying yes, in each category and over all.

    Source: POPE (arXiv 2305.10355).
    """
    result = _pope(rows, "all")
    for category, chosen in _by(rows, "category").items():
        result |= _pope(chosen, category)
    return result


def _pope(rows: Rows, name: str) -> dict[str, float]:
    pairs = [(chosen_yes_or_no(row["answer"]) == "yes", chosen_yes_or_no(row["answers"][0]) == "yes") for row in rows]
    hits, said, true = (sum(values) for values in zip(*((said and true, said, true) for said, true in pairs)))
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    scores = share([_says_right(row) for row in rows], f"{name}_accuracy")
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return scores | {f"{name}_precision": precision, f"{name}_recall": recall, f"{name}_F1": f1}


def _says_right(row: dict) -> bool:
    return chosen_yes_or_no(row["answer"]) == chosen_yes_or_no(row["answers"][0])


def _by(rows: Rows, key: str) -> dict[str, list[dict]]:
    """Return rows by one of their fields, in order.

    Raises:
        ValueError: A row lacks it.
    """
    found: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if key not in row:
            raise ValueError(f"Item {row['id']} has no {key}; was the benchmark written by minimonkey prepare?")
        found[row[key]].append(row)
    return found
