"""Ways to show a picture side by side, as rows of numbers and as Markdown."""

from dataclasses import dataclass

from evaluation.intervals import paired_difference
from evaluation.report import score
from evaluation.ways import Way


@dataclass(frozen=True)
class Comparison:
    """The predictions of several ways for the same items.

    Args:
        suite: Its name.
        subject: "tilings" or "compression".
        shown: Predictions by way; in a comparison of tilings each is compared with the one before, else as `rows` says.
    """

    suite: str
    subject: str
    shown: dict[Way, list[dict]]

    def rows(self) -> list[dict]:
        """One for each way: its score with a 95% interval, character error rate, tokens and seconds for an item, and how
        much better it is than `compared_with`: the tiling before it, or for a baseline SCM that keeps as many tokens, for
        SCM itself all tokens.
        """
        ways = {way.name: way for way in self.shown}
        rows = []
        for number, way in enumerate(self.shown):
            row = self._row(way)
            other = self._reference(number, way)
            if other is not None:
                pair = [[line["score"] for line in self.shown[w]] for w in (ways[other], way)]
                difference, low, high = paired_difference(*pair)
                row |= {
                    "compared_with": other,
                    "difference": difference,
                    "difference_low": low,
                    "difference_high": high,
                }
            rows.append(row)
        return rows

    def _reference(self, number: int, way: Way) -> str | None:
        names = [other.name for other in self.shown]
        if number == 0:
            return None
        if self.subject == "tilings":
            return names[number - 1]
        return names[0] if way.drop == "scm" else f"scm {way.keep_ratio}"

    def _row(self, way: Way) -> dict:
        result = score(self.shown[way])
        metric = self.shown[way][0]["metric"]
        return {
            "suite": self.suite,
            "subject": self.subject,
            "way": way.name,
            "keep_ratio": 1.0 if way.keep_ratio is None else way.keep_ratio,
            "drop": way.drop,
            "items": result["items"],
            "metric": metric,
            "score": result[metric],
            "low": result[f"{metric}_low"],
            "high": result[f"{metric}_high"],
            "character_error_rate": result["character_error_rate"],
            "image_tokens": result["image_tokens_per_item"],
            "image_tokens_read": result["image_tokens_read_per_item"],
            "seconds": result["seconds"] / result["items"],
        }


HEAD = "| suite | way | score | 95% interval | character errors | image tokens | seconds | difference | to |"
RULE = "|---|---|---:|---|---:|---:|---:|---|---|"


def markdown(comparisons: list[Comparison]) -> str:
    """Two tables: tilings, and compression."""
    tables = []
    for subject in ("tilings", "compression"):
        rows = [row for comparison in comparisons if comparison.subject == subject for row in comparison.rows()]
        if rows:
            tables.append("\n".join([HEAD, RULE, *map(_line, rows)]))
    return "\n\n".join(tables) + "\n"


def _line(row: dict) -> str:
    difference = ""
    if "difference" in row:
        low, high = 100 * row["difference_low"], 100 * row["difference_high"]
        difference = f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
    cells = [
        row["suite"],
        row["way"],
        f"{row['score']:.1%}",
        f"{row['low']:.1%} to {row['high']:.1%}",
        f"{row['character_error_rate']:.1%}",
        f"{row['image_tokens_read']:.0f}",
        f"{row['seconds']:.2f}",
        difference,
        row.get("compared_with", ""),
    ]
    return "| " + " | ".join(cells) + " |"
