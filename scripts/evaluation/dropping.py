"""Which detailed tokens an image loses: those that scale compression scores lowest, or as many at random or evenly spread.

The other two are the baselines that SCM has to beat: `model.generate(use_scm=True, scm_select=selection("random", names))`.
"""

import random
from collections.abc import Callable


DROPS = ("scm", "random", "uniform")


def selection(drop: str, row_names: list[str]) -> Callable[[int, int, int], list[int]] | None:
    """Return what `scm_select` of `generate` takes.

    Args:
        drop: "scm" leaves the choice to attention (None); "random" keeps a random set, "uniform" tokens at even distances.
        row_names: A name for each row of the next batch; it alone decides the random set of the row.

    Raises:
        ValueError: An unknown `drop`, or later a batch of more rows than names.
    """
    if drop not in DROPS:
        raise ValueError(f"drop is one of {', '.join(DROPS)}, got {drop!r}.")
    if drop == "scm":
        return None
    generators = [random.Random(name) for name in row_names]

    def select(row: int, tokens: int, count: int) -> list[int]:
        if row >= len(generators):
            raise ValueError(f"There are {len(generators)} names for more rows.")
        return choose(tokens, count, drop, generators[row])

    return select


def choose(tokens: int, count: int, drop: str, rng: random.Random) -> list[int]:
    """Choose `count` of `tokens` places, in ascending order: a random set, or evenly spread."""
    if drop == "random":
        return sorted(rng.sample(range(tokens), count))
    return [(2 * i + 1) * tokens // (2 * count) for i in range(count)]
