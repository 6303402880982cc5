"""Which detailed tokens an image loses: by the choices of scale compression, or as many at random or evenly spread.

The last two are the baselines that every choice has to beat: `model.generate(use_scm=True, scm_select=selection("random",
names))`; they close up as published does, or with "-original" keep their places.
"""

import random

from minimonkey.token_selection import SELECTIONS


KEEPS_PLACES = "-original"
BASELINES = ("random", "uniform", f"random{KEEPS_PLACES}", f"uniform{KEEPS_PLACES}")
CHOICES = tuple(name for name in SELECTIONS if name != "mass")  # which keeps as many tokens as it likes
DROPS = ("scm", *BASELINES, *CHOICES)


def selection(drop: str, row_names: list[str]) -> dict | str | None:
    """Return what `scm_select` of `generate` takes.

    Args:
        drop: "scm" is the published choice (None); "random" keeps a random set, "uniform" tokens at even distances; any
            other is a name of CHOICES, see `token_selection.SELECTIONS`.
        row_names: A name for each row of the next batch; it alone decides the random set of the row.

    Raises:
        ValueError: An unknown `drop`, or later a batch of more rows than names.
    """
    if drop not in DROPS:
        raise ValueError(f"drop is one of {', '.join(DROPS)}, got {drop!r}.")
    if drop not in BASELINES:
        return None if drop == "scm" else drop
    generators = [random.Random(name) for name in row_names]

    def select(row: int, tokens: int, count: int) -> list[int]:
        if row >= len(generators):
            raise ValueError(f"There are {len(generators)} names for more rows.")
        return choose(tokens, count, drop.removesuffix(KEEPS_PLACES), generators[row])

    return {"select": select, "positions": "original" if drop.endswith(KEEPS_PLACES) else "renumbered"}


def choose(tokens: int, count: int, drop: str, rng: random.Random) -> list[int]:
    """Choose `count` of `tokens` places, in ascending order: a random set, or evenly spread."""
    if drop == "random":
        return sorted(rng.sample(range(tokens), count))
    return [(2 * i + 1) * tokens // (2 * count) for i in range(count)]
