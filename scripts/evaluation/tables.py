"""Ways to show an image compared side by side, as rows of numbers and as Markdown."""

from dataclasses import dataclass

from minimonkey.scripts.evaluation.report import compare, score
from minimonkey.scripts.evaluation.ways import SMALLER, Way


DIFFERENCE = ("difference", "difference_low", "difference_high", "better", "worse")


@dataclass(frozen=True)
class Comparison:
    """The predictions of several ways for the same items.

    Args:
        suite: Its name.
        subject: "tilings" or "compression".
        shown: Predictions by way; the first is what the others are compared with.
    """

    suite: str
    subject: str
    shown: dict[Way, list[dict]]

    def rows(self) -> list[dict]:
        """Return one row for each way.

        A row has the score with a 95% interval, character error rate, tokens, seconds and memory for an item, and how much
        better the way is than the first; with compression also (`to_smaller`) than the first smaller grid of as many tokens.

        Raises:
            ValueError: Ways that were not asked the same questions.
        """
        rows = []
        for number, (way, predictions) in enumerate(self.shown.items()):
            result, metric = score(predictions), predictions[0]["metric"]
            row = {
                "suite": self.suite,
                "subject": self.subject,
                "way": way.name,
                "keep_ratio": 1.0 if way.keep_ratio is None else way.keep_ratio,
                "compressor": way.compressor,
                "items": result["items"],
                "metric": metric,
                "score": result[metric],
                "low": result[f"{metric}_low"],
                "high": result[f"{metric}_high"],
                "character_error_rate": result["character_error_rate"],
                "image_tokens": result["image_tokens_per_item"],
                "image_tokens_read": result["image_tokens_read_per_item"],
                "seconds": result["seconds"] / result["items"],
                "peak_bytes": predictions[0].get("peak_bytes"),
            }
            first, smaller = next(iter(self.shown)), self._smaller(way)
            if number:
                row |= self._difference(first, way) | {"compared_with": first.name}
            if smaller is not None and smaller is not way:
                row["to_smaller"] = self._difference(smaller, way) | {"compared_with": smaller.name}
            rows.append(row)
        return rows

    def _smaller(self, way: Way) -> Way | None:
        """Return the first of the smaller grids that have as many tokens as a compressed way."""
        fitting = [
            other
            for other in self.shown
            if other.keep_ratio == way.keep_ratio and (other.compressor or "").startswith(SMALLER)
        ]
        return fitting[0] if way.keep_ratio is not None and fitting else None

    def _difference(self, one: Way, other: Way) -> dict:
        result = compare(*({line["id"]: line for line in self.shown[way]} for way in (one, other)))
        return {name: result[name] for name in DIFFERENCE}


COMMON = ("suite", "way", "score", "95% interval", "image tokens", "encoder GFLOP", "prefill GFLOP", "seconds", "MiB")


def markdown(rows: list[dict]) -> str:
    """Render two tables of the rows of all comparisons: tilings, and compression.

    Memory is the peak of two items at once, beyond what was held before.
    """
    tables = []
    for subject in ("tilings", "compression"):
        chosen = [row for row in rows if row["subject"] == subject]
        if not chosen:
            continue
        head = [*COMMON, f"to {chosen[0]['way']}", *(["to the smaller grid"] if subject == "compression" else [])]
        lines = [head, ["---", "---", "---:", "---", *["---:"] * 5, *["---"] * (len(head) - 9)]]
        lines += [_cells(row)[: len(head)] for row in chosen]
        tables.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(tables) + "\n"


def _cells(row: dict) -> list[str]:
    memory = row.get("peak_bytes")
    return [
        row["suite"],
        row["way"],
        f"{row['score']:.1%}",
        f"{row['low']:.1%} to {row['high']:.1%}",
        f"{row['image_tokens_read']:.0f}",
        f"{row['encoder_flops'] / 1e9:.3g}",
        f"{row['prefill_flops'] / 1e9:.3g}",
        f"{row['seconds']:.2f}",
        "" if memory is None else f"{memory / 2**20:.0f}",
        _shown(row),
        _shown(row.get("to_smaller", {})),
    ]


def _shown(difference: dict) -> str:
    if "difference" not in difference:
        return ""
    low, high = 100 * difference["difference_low"], 100 * difference["difference_high"]
    text = f"{100 * difference['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text
