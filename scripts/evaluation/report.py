"""What predictions add up to: a line or table for a person, and a dict for programs."""

from minimonkey.scripts.evaluation.intervals import mean_interval, paired_difference


TITLES = {
    "exact_match": "read exactly",
    "same_text": "answered right",
    "choice": "of the options chosen right",
    "yes_no": "of yes and no right",
    "last_number": "of the values right",
    "word_accuracy": "of the words read",
    "anls": "ANLS",
    "relaxed_accuracy": "relaxed accuracy",
    "ocrbench": "OCRBench containment",
    "ocrbench_formula": "OCRBench containment (formulas)",
    "vqa_accuracy": "VQA accuracy",
    "box": "of the boxes found (IoU above 0.5)",
}


def score(predictions: list[dict]) -> dict:
    """Return each metric's mean over its items with a 95% interval, the character error rate, tokens and seconds.

    The character error rate is edits over characters of the closest right answers, over all items.
    """
    result: dict = {"items": len(predictions)}
    for metric in dict.fromkeys(line["metric"] for line in predictions):
        scores = [line["score"] for line in predictions if line["metric"] == metric]
        low, high = mean_interval(scores)
        result |= {metric: sum(scores) / len(scores), f"{metric}_low": low, f"{metric}_high": high}
        if len(scores) < len(predictions):
            result[f"{metric}_items"] = len(scores)
    characters = sum(len(line["reference"]) for line in predictions)
    result["character_error_rate"] = sum(line["edits"] for line in predictions) / max(1, characters)
    for name in ("image_tokens", "image_tokens_read"):
        result[f"{name}_per_item"] = sum(line[name] for line in predictions) / len(predictions)
    result["seconds"] = sum(line["seconds"] for line in predictions)
    return result


def describe(result: dict, subject: str) -> str:
    """Return one line for a person, or several lines where items are scored by several metrics."""
    metrics = [name for name in TITLES if name in result]
    parts = [
        f"{result[name]:.1%} {TITLES[name]} (95% interval {result[name + '_low']:.1%} to {result[name + '_high']:.1%})"
        + (f" of {result[name + '_items']} items" if name + "_items" in result else "")
        for name in metrics
    ]
    tokens = ""
    if result["image_tokens_read_per_item"] < result["image_tokens_per_item"]:
        tokens = f"image tokens {result['image_tokens_per_item']:.0f} -> {result['image_tokens_read_per_item']:.0f}, "
    rest = f"character error rate {result['character_error_rate']:.1%}, {tokens}{result['seconds']:.0f} s"
    separator = ", " if len(parts) == 1 else "\n  "
    return f"{subject}: " + separator.join([*parts, rest])


def compare(first: dict[str, dict], second: dict[str, dict]) -> dict:
    """Return how much better the second predictions are than the first, over the same items.

    Raises:
        ValueError: The items differ, or their questions or metrics do.
    """
    if first.keys() != second.keys() or not first:
        only = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"The files hold different items: {len(only)} are in one of them only, {', '.join(only[:5])} ..."
        )
    ids = list(first)
    for item in ids:
        for name in ("question", "answers", "metric"):
            if first[item].get(name) != second[item].get(name):
                raise ValueError(f"Item {item} has another {name} in the two files; compare runs of the same suite.")
    scores = [[lines[item]["score"] for item in ids] for lines in (first, second)]
    difference, low, high = paired_difference(*scores)
    return {
        "items": len(ids),
        "first": sum(scores[0]) / len(ids),
        "second": sum(scores[1]) / len(ids),
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "better": sum(b > a for a, b in zip(*scores)),
        "worse": sum(b < a for a, b in zip(*scores)),
    }


def describe_comparison(result: dict) -> str:
    return (
        f"{result['items']} items: {result['first']:.1%} -> {result['second']:.1%}, difference {result['difference']:+.1%} "
        f"(95% interval {result['difference_low']:+.1%} to {result['difference_high']:+.1%}, paired bootstrap), "
        f"{result['better']} better, {result['worse']} worse"
    )
