"""The ways to show an image that are compared: four tilings, and which detailed tokens are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minimonkey.scripts.evaluation.dropping import DROPS
from minimonkey.tiling import RANGE_NAMES


KEEP_RATIOS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Way:
    """How an image reaches the language model."""

    name: str
    images_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    keep_ratio: float | None = None
    """Share of the detailed tokens that is kept; None: all."""
    drop: str = "scm"

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return "".join(character if character.isalnum() else "-" for character in self.name.lower())


def tilings(ranges: tuple[int, int, int, int]) -> list[Way]:
    """Return four ways: the whole image as one tile, its detailed tiles, these and the whole, and MSAC with `ranges`."""
    detailed = dict(zip(RANGE_NAMES, (*ranges[:2], 1, 1)))
    return [
        Way("whole image", dict(zip(RANGE_NAMES, (1, 1, 1, 1)))),
        Way("detailed", {**detailed, "use_thumbnail": False}),
        Way("detailed + thumbnail", {**detailed, "use_thumbnail": True}),
        _msac("MSAC", ranges),
    ]


def droppings(ranges: tuple[int, int, int, int], keep_ratios: Sequence[float] = KEEP_RATIOS) -> list[Way]:
    """Return multi-scale cropping with fewer and fewer detailed tokens, dropped by scale compression and by its baselines."""
    return [_msac(f"{drop} {ratio}", ranges, ratio, drop) for ratio in keep_ratios for drop in DROPS]


def _msac(name: str, ranges: tuple[int, int, int, int], keep_ratio: float | None = None, drop: str = "scm") -> Way:
    return Way(name, {**dict(zip(RANGE_NAMES, ranges)), "use_thumbnail": True}, keep_ratio, drop)
