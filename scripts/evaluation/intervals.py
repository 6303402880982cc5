"""How sure a result is: confidence intervals over the items of a benchmark."""

import math

import numpy as np


RESAMPLES = 2000


def wilson_interval(successes: int, items: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion (Wilson's score interval)."""
    share, spread = successes / items, z * z / items
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / items + spread / (4 * items)) / (1 + spread)
    return centre - half, centre + half


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95% confidence interval of a mean: percentiles of resampled means (Efron's percentile bootstrap)."""
    means = _resampled_means(np.asarray(values, dtype=float), seed)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean: Wilson's where every value is 0 or 1, else by bootstrap."""
    if set(values) <= {0, 1}:
        return wilson_interval(round(sum(values)), len(values))
    return bootstrap_interval(values)


def paired_difference(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Return the mean of second - first over the same items, and its 95% interval, resampling items and not scores.

    Raises:
        ValueError: Different numbers of items, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"A paired comparison needs the same items, got {len(first)} and {len(second)}.")
    differences = np.subtract(second, first)
    return float(differences.mean()), *bootstrap_interval(differences.tolist())


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)])
