"""Which detailed tokens an image loses: those that scale compression scores lowest, or as many by chance or evenly.

The two others are what SCM has to beat. They take the place of the function that chooses for it, so that everything else
about a run is the same.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


DROPS = ("scm", "random", "uniform")


@contextmanager
def dropping(model, drop: str, row_names: list[str]) -> Iterator[None]:
    """While this lasts, `model.generate(use_scm=True)` keeps other tokens, but as many of each image.

    Args:
        drop: "scm" changes nothing; "random" keeps a random set, "uniform" tokens at even distances.
        row_names: A name for each row of the batch to come; the random set of a row depends on it alone.

    Raises:
        ValueError: An unknown `drop`.
    """
    if drop not in DROPS:
        raise ValueError(f"drop is one of {', '.join(DROPS)}, got {drop!r}.")
    if drop == "scm":
        yield
        return
    module = sys.modules[type(model).generate.__module__]  # where generate looks the function up
    original = module.kept_positions

    def kept_positions(embeddings, attention_mask, images, settings, probe) -> list[torch.Tensor]:
        if len(row_names) != len(images):
            raise ValueError(f"There are {len(row_names)} names for {len(images)} rows.")
        rows = zip(row_names, attention_mask, images)
        return [_kept(name, mask, row_images, settings.keep_ratio, drop) for name, mask, row_images in rows]

    module.kept_positions = kept_positions
    try:
        yield
    finally:
        module.kept_positions = original


def _kept(name: str, mask: torch.Tensor, images: list, keep_ratio: float, drop: str) -> torch.Tensor:
    """As `compression.kept_positions`, of one row."""
    positions = mask.nonzero().squeeze(1)
    stays = torch.ones_like(positions, dtype=torch.bool)
    rng = random.Random(name)
    for image in images:
        count = int(image.detailed_tokens * keep_ratio)
        stays[image.detailed_start : image.detailed_stop] = False
        chosen = choose(image.detailed_tokens, count, drop, rng)
        stays[[image.detailed_start + token for token in chosen]] = True
    return positions[stays]


def choose(tokens: int, count: int, drop: str, rng: random.Random) -> list[int]:
    """`count` of `tokens` places in ascending order: a random set, or evenly spread."""
    if drop == "random":
        return sorted(rng.sample(range(tokens), count))
    return [(2 * i + 1) * tokens // (2 * count) for i in range(count)]
