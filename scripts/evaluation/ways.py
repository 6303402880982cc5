"""The ways to show an image that are compared: rules for its grids, and which of its detailed tokens are dropped.

A compressor is written "CHOICE" or "CHOICE@QUERIES": a name of `token_selection.SELECTIONS`, and whose attention it goes
by. Beside them stand the baselines at as many tokens: "random", "uniform", and "smaller-TILING", a grid of so few tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minimonkey.compression import QUERY_SETS
from minimonkey.scripts.evaluation.dropping import BASELINES, CHOICES
from minimonkey.tiling import RANGE_NAMES, SLICES, TILINGS, TileRanges


KEEP_RATIOS = (0.75, 0.5, 0.25)
TILING_WAYS = ("whole", "detailed", "blank", *TILINGS, SLICES)
SMALLER = "smaller-"
DEFAULT_TILINGS = ("msac", "whole", "detailed", "internvl", "logscore", "relaxed", "blank")
DEFAULT_COMPRESSORS = (
    *("random", "uniform", f"{SMALLER}internvl", f"{SMALLER}msac"),
    *CHOICES,
    *(f"token@{queries}" for queries in QUERY_SETS if queries != "all"),
)


@dataclass(frozen=True)
class Way:
    """How an image reaches the language model."""

    name: str
    images_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    keep_ratio: float | None = None
    """Share of the detailed tokens that is kept; None: all."""
    compressor: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return "".join(character if character.isalnum() else "-" for character in self.name.lower())


def tilings(ranges: TileRanges, names: Sequence[str] = DEFAULT_TILINGS) -> list[Way]:
    """Return a way for each name: "whole" is one tile, "detailed" the tiles of InternVL without the thumbnail, "blank"
    multi-scale cropping without blank tiles, any other a tiling of `tiling.TILINGS`.

    Raises:
        ValueError: An unknown name.
    """
    unknown = [name for name in names if name not in TILING_WAYS]
    if unknown:
        raise ValueError(f"There is no tiling {unknown[0]!r}; known are {', '.join(TILING_WAYS)}.")
    ways = []
    for name in names:
        options = dict(zip(RANGE_NAMES, (1, 1, 1, 1) if name == "whole" else ranges))
        options |= {"tiling": name if name in (*TILINGS, SLICES) else "internvl" if name == "detailed" else "msac"}
        ways.append(Way(name, {**options, "use_thumbnail": name != "detailed", "drop_blank": name == "blank"}))
    return ways


def compressions(
    ranges: TileRanges, names: Sequence[str] = DEFAULT_COMPRESSORS, keep_ratios: Sequence[float] = KEEP_RATIOS
) -> list[Way]:
    """Return multi-scale cropping with fewer and fewer detailed tokens, by each compressor.

    Raises:
        ValueError: An unknown compressor.
    """
    for name in names:
        check_compressor(name)
    (msac,) = tilings(ranges, ["msac"])
    return [Way(f"{name} {ratio}", msac.images_kwargs, ratio, name) for ratio in keep_ratios for name in names]


def check_compressor(name: str) -> None:
    """Raise `ValueError` for a compressor that there is not."""
    choice, _, queries = name.partition("@")
    is_smaller = name.startswith(SMALLER) and name.removeprefix(SMALLER) in TILINGS
    is_choice = choice in CHOICES and (queries in QUERY_SETS if "@" in name else True)
    if not (name in BASELINES or is_smaller or is_choice):
        raise ValueError(
            f"There is no compressor {name!r}; known are {', '.join(BASELINES)}, {SMALLER}TILING, and {', '.join(CHOICES)}, "
            f"each of these also with @{', @'.join(QUERY_SETS)}."
        )
