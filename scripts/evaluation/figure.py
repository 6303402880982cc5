"""The figure of a comparison: accuracy of each tiling, and what dropping tokens costs.

Its bars are intervals of each score by itself; whether two ways differ is shown by the paired differences.
"""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(rows: list[dict], path: Path) -> None:
    """Write a PNG of the rows of `tables.Comparison`: one panel for the tilings, one for each suite with fewer tokens."""
    tilings = [row for row in rows if row["subject"] == "tilings"]
    compressed = [row for row in rows if row["subject"] == "compression"]
    suites = list(dict.fromkeys(row["suite"] for row in compressed))
    widths = [2.2, *[1.4] * len(suites)]
    figure = Figure(figsize=(4 * sum(widths) / 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
    _draw_tilings(panels[0], tilings)
    for panel, suite in zip(panels[1:], suites):
        _draw_compression(panel, [row for row in compressed if row["suite"] == suite], suite)
    panels[0].set_ylabel("score (%)")
    panels[0].set_ylim(0, 100)
    figure.savefig(path, dpi=110)


def _draw_tilings(panel: Axes, rows: list[dict]) -> None:
    suites, ways = (list(dict.fromkeys(row[key] for row in rows)) for key in ("suite", "way"))
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        chosen = [row for row in rows if row["way"] == way]
        places = [suites.index(row["suite"]) + (number - (len(ways) - 1) / 2) * width for row in chosen]
        scores = [100 * row["score"] for row in chosen]
        panel.bar(places, scores, width * 0.92, yerr=_errors(chosen), label=way, capsize=2, error_kw={"lw": 0.8})
    panel.set_xticks(range(len(suites)), suites)
    panel.set_title("tilings")
    panel.legend(fontsize=7)


def _draw_compression(panel: Axes, rows: list[dict], suite: str) -> None:
    (full,) = [row for row in rows if row["compressor"] is None]
    names = list(dict.fromkeys(row["compressor"] for row in rows if row is not full))
    for number, name in enumerate(names):
        chosen = [full, *(row for row in rows if row["compressor"] == name)]
        tokens, scores = [row["image_tokens_read"] for row in chosen], [100 * row["score"] for row in chosen]
        colour = colormaps["tab20"](number % 20)
        panel.errorbar(tokens, scores, _errors(chosen), label=name, color=colour, marker="o", ms=3, capsize=2, lw=1)
    panel.invert_xaxis()
    panel.set_xlabel("image tokens that the language model reads")
    panel.set_title(f"compression: {suite}")
    panel.legend(fontsize=6, ncols=2)


def _errors(rows: list[dict]) -> list[list[float]]:
    """Return the distances of the 95% interval from the score, below and above, in points."""
    return [
        [100 * max(0.0, row["score"] - row["low"]) for row in rows],
        [100 * max(0.0, row["high"] - row["score"]) for row in rows],
    ]
