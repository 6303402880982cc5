"""Ways to show an image compared side by side, as rows of numbers and as Markdown."""

from dataclasses import dataclass

from minimonkey.scripts.evaluation.report import compare, score
from minimonkey.scripts.evaluation.ways import Way


DIFFERENCE = ("difference", "difference_low", "difference_high", "better", "worse")


@dataclass(frozen=True)
class Comparison:
    """The predictions of several ways for the same items.

    Args:
        suite: Its name.
        subject: "tilings" or "compression".
        shown: Predictions by way, including those that the others are compared with; see `rows`.
    """

    suite: str
    subject: str
    shown: dict[Way, list[dict]]

    def rows(self) -> list[dict]:
        """Return one row for each way, with what it is compared with.

        A row has the score with a 95% interval, character error rate, tokens and seconds for an item, and how much better
        the way is than `compared_with`: the tiling before it; for a baseline, SCM that keeps as many tokens; for SCM
        itself, all tokens.

        Raises:
            ValueError: Ways that were not asked the same questions.
        """
        rows = []
        for number, way in enumerate(self.shown):
            row = self._row(way)
            other = self._reference(number, way)
            if other is not None:
                result = compare(*({line["id"]: line for line in self.shown[w]} for w in (other, way)))
                row |= {name: result[name] for name in DIFFERENCE} | {"compared_with": other.name}
            rows.append(row)
        return rows

    def _reference(self, number: int, way: Way) -> Way | None:
        ways = list(self.shown)
        if number == 0:
            return None
        if self.subject == "tilings":
            return ways[number - 1]
        if way.drop == "scm":
            return ways[0]
        (scm,) = [other for other in ways if (other.drop, other.keep_ratio) == ("scm", way.keep_ratio)]
        return scm

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


def markdown(rows: list[dict]) -> str:
    """Render two tables of the rows of all comparisons: tilings, and compression."""
    tables = []
    for subject in ("tilings", "compression"):
        chosen = [row for row in rows if row["subject"] == subject]
        if chosen:
            tables.append("\n".join([HEAD, RULE, *map(_line, chosen)]))
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
