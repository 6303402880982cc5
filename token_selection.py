"""Which of an image's detailed tokens stay, given a score of each: the choices beside those of the published SCM.

    selection = read_selection("smooth")                       or {"shape": "block", "window": (2, 4)}, see `Selection`
    kept, runs = selection.choose(scores, TileMap(columns=4, rows=3, side=16), count=1536)

Numbers and places in, places out; no model. Every choice but "mass" keeps exactly `count` tokens, so that they compare fairly.

Shapes: n tokens of the detailed tiles of one image, in the order of the prompt: tile by tile, row by row in a tile.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn import functional


CHOICES = {
    "shape": ("token", "smooth", "block"),
    "how": ("mean", "max"),
    "budget": ("image", "tile"),
    "positions": ("renumbered", "original"),
    "score": ("attention", "features"),
    "stage": ("embeddings", "layer"),
    "blank": ("scored", "last", "save"),
}
SHARES = ("floor", "markers", "coordinates", "least", "most")

# (row, detailed tokens, how many stay) -> which stay; called for the images of a row in their order.
Select = Callable[[int, int, int], Sequence[int]]

Run = tuple[int, int, int]
"""Dropped tokens in a row that one token stands for: (index of the last, first, stop)."""


@dataclass(frozen=True)
class TileMap:
    """Where tokens are seen in an image: `columns` x `rows` tiles of `side` x `side` tokens."""

    columns: int
    rows: int
    side: int

    def stitched(self, values: torch.Tensor) -> torch.Tensor:
        """Return values (n,) as they are seen, (rows * side, columns * side)."""
        tiles = values.reshape(self.rows, self.columns, self.side, self.side)
        return tiles.transpose(1, 2).reshape(self.rows * self.side, self.columns * self.side)

    def in_sequence(self, seen: torch.Tensor) -> torch.Tensor:
        """Return values (rows * side, columns * side) in the order of the tokens, (n,)."""
        return seen.reshape(self.rows, self.side, self.columns, self.side).transpose(1, 2).flatten()


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of the `count` highest scores, ascending; of equal ones the earlier."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


# --- shapes ----------------------------------------------------------------------------------------------------------


def smoothed(scores: torch.Tensor, tile_map: TileMap, window: Sequence[int], how: str = "mean") -> torch.Tensor:
    """Return for each token (n,) the mean or the highest score in a window (height, width) around it, edges repeated.

    Tiles are stitched first, so that a word across a seam is one word.
    """
    height, width = window
    seen = tile_map.stitched(scores)[None, None]
    padding = (width // 2, width - 1 - width // 2, height // 2, height - 1 - height // 2)
    seen = functional.pad(seen, padding, mode="replicate")
    pool = functional.max_pool2d if how == "max" else functional.avg_pool2d
    return tile_map.in_sequence(pool(seen, (height, width), stride=1)[0, 0])


def best_blocks(scores: torch.Tensor, tile_map: TileMap, window: Sequence[int], count: int) -> torch.Tensor:
    """Return the places of whole blocks (height, width) of the stitched tiles, by their mean score; the last one is cut."""
    height, width = window
    down, across = tile_map.rows * tile_map.side, tile_map.columns * tile_map.side
    y = torch.arange(down, device=scores.device)[:, None] // height
    x = torch.arange(across, device=scores.device)[None] // width
    block = tile_map.in_sequence(y * -(-across // width) + x)
    sizes = torch.bincount(block)
    means = scores.new_zeros(len(sizes)).index_add_(0, block, scores) / sizes.clamp(min=1)
    order = scores.argsort(descending=True, stable=True)
    order = order[block[order].argsort(stable=True)]
    order = order[means[block[order]].argsort(descending=True, stable=True)]  # block by block, within one by score
    return order[:count].sort().values


# --- budgets ---------------------------------------------------------------------------------------------------------


def largest_remainder(shares: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """Return whole numbers that add up to `total`, each from `low` to `high`, as near to the shares as that allows."""
    positive = [share for share in shares if share > 0]
    below, above = 0.0, total / max(min(positive, default=1), 1e-12) + 1 if positive else 1.0
    for _ in range(80):  # the factor of all shares at which what they are cut to adds up to the total
        middle = (below + above) / 2
        is_less = sum(min(max(share * middle, low), high) for share in shares) < total
        below, above = (middle, above) if is_less else (below, middle)
    wanted = [min(max(share * above, low), high) for share in shares]
    counts = [math.floor(value + 1e-9) for value in wanted]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - wanted[i])
    turn = 0
    while sum(counts) < total:
        i = order[turn % len(order)]
        counts[i] += counts[i] < high
        turn += 1
    return counts


def tile_budgets(
    importance: Sequence[float], per_tile: int, count: int, temperature: float | None = None, floor: float = 0.1
) -> list[int]:
    """Share `count` tokens out to tiles by their importance (GlobalCom2, arXiv 2501.05179).

    Args:
        importance: Of each tile.
        per_tile: Tokens of a tile.
        temperature: Of the softmax over the importance; None: its standard deviation, which makes it independent of the
            scale of attention weights.
        floor: Share of an even budget that every tile keeps at least.
    """
    ratio = count / (per_tile * len(importance))
    if temperature is None:
        mean = sum(importance) / len(importance)
        temperature = (sum((value - mean) ** 2 for value in importance) / len(importance)) ** 0.5 or 1.0
    weights = [math.exp((value - max(importance)) / temperature) for value in importance]
    weights = [weight / sum(weights) for weight in weights]
    shares = [min(max(ratio * (1 + weight - 1 / len(weights)), 0), 1) for weight in weights]
    total = sum(shares) or 1.0
    return largest_remainder([share / total for share in shares], count, int(floor * ratio * per_tile), per_tile)


def highest_by_tile(scores: torch.Tensor, budgets: Sequence[int], per_tile: int) -> torch.Tensor:
    """Return the places of the highest scores within each tile, as many as its budget."""
    tiles = enumerate(zip(scores.split(per_tile), budgets))
    return torch.cat([i * per_tile + highest(tile, budget) for i, (tile, budget) in tiles])


def count_for_mass(scores: torch.Tensor, mass: float, least: float, most: float) -> int:
    """Count the fewest tokens whose scores add up to `mass` of all, within `least` and `most` shares of the tokens."""
    reached = scores.sort(descending=True).values.cumsum(0) / scores.sum()
    count = int((reached < mass).sum()) + 1
    return min(max(count, int(least * len(scores))), int(most * len(scores)))


# --- what stays in any case, and what stands for the rest ------------------------------------------------------------


def coordinate_tokens(cosines: torch.Tensor, sines: torch.Tensor, per_tile: int, share: float) -> torch.Tensor:
    """Return which tokens (n,) serve as coordinates: in each tile those of the highest mean cosine, and sine, of their
    rotary angles (IVC-Prune, arXiv 2602.03060).

    Args:
        cosines, sines: (n,) means over the angles of a position.
        share: Of the tokens of a tile, for each of the two.
    """
    chosen = torch.zeros(len(cosines), dtype=torch.bool, device=cosines.device)
    budgets = [int(share * per_tile)] * (len(cosines) // per_tile)
    for values in (cosines, sines):
        chosen[highest_by_tile(values, budgets, per_tile)] = True
    return chosen


def longest_runs(kept: torch.Tensor, tokens: int, most: int) -> list[Run]:
    """Return the longest runs of dropped tokens, at most `most` of them, in the order of the tokens."""
    stays = torch.ones(tokens + 2, dtype=torch.long, device=kept.device)
    stays[1:-1] = 0
    stays[kept + 1] = 1
    first, stop = stays.diff().nonzero().squeeze(1).reshape(-1, 2).unbind(1)
    runs = [(b - 1, a, b) for a, b in zip(first.tolist(), stop.tolist())]
    return sorted(sorted(runs, key=lambda run: (run[1] - run[2], run[1]))[:most])


def highest_with_markers(scores: torch.Tensor, count: int, share: float) -> tuple[torch.Tensor, list[Run]]:
    """Return as many places as `count` in two parts: high scores, and the longest runs between them that one token marks.

    Args:
        share: Of `count` that marks runs (FocusUI, arXiv 2601.03928).
    """
    spare = int(count * share)
    kept = highest(scores, count - spare)
    runs = longest_runs(kept, len(scores), spare)
    if len(runs) == spare:
        return kept, runs
    # Fewer runs than markers: what is left over keeps tokens.
    kept = highest(scores, count - len(runs))
    runs = longest_runs(kept, len(scores), len(runs))
    taken = {*kept.tolist(), *(run[0] for run in runs)}
    left = [place for place in scores.argsort(descending=True, stable=True).tolist() if place not in taken]
    more = torch.tensor(left[: count - len(kept) - len(runs)], dtype=torch.long, device=kept.device)
    return torch.cat([kept, more]).sort().values, runs


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """How the detailed tokens that stay are chosen; raises `ValueError` for values that cannot work, or not together.

    Args:
        select: Chooses them without scores, for comparisons; goes with `positions` alone.
        shape: "token": one by one, as published. "smooth": by the scores in a `window` around each. "block": whole windows.
        window: (height, width) in tokens; by default (1, 5) for "smooth" and (2, 4) for "block".
        how: Whether "smooth" takes the "mean" or the "max" of a window.
        budget: "image": the best of the whole image. "tile": each tile has a budget by the mean of its scores, of which
            `floor` is the least share and `temperature` the softness, see `tile_budgets`.
        mass: Keep the fewest tokens that have this share of all scores, between the shares `least` and `most` of the tokens;
            instead of a keep ratio.
        markers: Share of the kept tokens that stand for the longest dropped runs, each by the mean of their embeddings.
        coordinates: Share of each tile that stays for its rotary angles, twice, see `coordinate_tokens`.
        positions: "renumbered" as published: what stays closes up. "original": every token keeps its place in the prompt.
        score: "attention" of the language model; "features": how far a token's feature is from zero, which depends on the
            image alone and needs no pass of the language model.
        blank: Tokens of blank cells (blank_tiles.py) are "scored" as any other; come "last", so that the budget goes to what
            shows something; or go in any case and "save" their part of it: the keep ratio is then of the others.
        stage: "embeddings": what is dropped is never read. "layer": the prompt is read as a whole up to the scoring layer;
            then the rest, and the cache of the layers before, are of what stays. The prompt's last token and all after it
            see what stays alone.
    """

    select: Select | None = None
    shape: str = "token"
    window: tuple[int, int] | None = None
    how: str = "mean"
    budget: str = "image"
    floor: float = 0.1
    temperature: float | None = None
    mass: float | None = None
    least: float = 0.1
    most: float = 1.0
    markers: float = 0.0
    coordinates: float = 0.0
    positions: str = "renumbered"
    score: str = "attention"
    stage: str = "embeddings"
    blank: str = "scored"

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"scm_select: {name} is one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in SHARES:
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"scm_select: {name} is a share from 0 to 1, got {getattr(self, name)!r}.")
        if self.mass is not None and (not _is_number(self.mass) or not 0 < self.mass <= 1 or self.least > self.most):
            raise ValueError(
                f"scm_select: mass is above 0 and at most 1, and least at most most; got {self.mass!r}, {self.least}, "
                f"{self.most}."
            )
        if self.temperature is not None and (not _is_number(self.temperature) or self.temperature <= 0):
            raise ValueError(f"scm_select: temperature is above 0, got {self.temperature!r}.")
        window = self.window
        if window is not None and not (len(window) == 2 and all(type(side) is int and side > 0 for side in window)):
            raise ValueError(f"scm_select: window is (height, width) in tokens, both at least 1, got {window!r}.")
        if self.select is not None and not callable(self.select):
            raise ValueError(f"scm_select: select is a function (row, tokens, count) -> indices, got {self.select!r}.")
        if self.select is not None and replace(self, select=None, positions="renumbered") != PUBLISHED:
            raise ValueError(
                "scm_select: a function chooses by itself; beside it there can be positions, and nothing else."
            )
        if self.window is not None and self.shape == "token":
            raise ValueError("scm_select: a window belongs to shape 'smooth' or 'block'; name one of them.")
        if self.shape == "block" and (self.budget == "tile" or self.markers):
            raise ValueError(
                "scm_select: blocks are whole and are kept for the whole image, without tile budgets or markers."
            )
        if self.markers and (self.budget == "tile" or self.mass is not None or self.stage == "layer"):
            raise ValueError(
                "scm_select: markers go with a keep ratio for the whole image, dropped before the first layer."
            )
        if self.markers and self.positions != "original":
            raise ValueError("scm_select: a marker stands where the run it stands for ends; add positions='original'.")
        if self.blank != "scored" and (self.shape == "block" or self.budget == "tile" or self.mass is not None):
            raise ValueError(
                f"scm_select: blank={self.blank!r} goes by tokens of the whole image with a keep ratio, without blocks, tile "
                "budgets and mass."
            )
        if self.stage == "layer" and self.positions != "original":
            raise ValueError("scm_select: the lower layers read every token in its place; add positions='original'.")

    @property
    def needs_places(self) -> bool:
        """Whether it asks where in its tile a token is seen."""
        return self.needs_grid or self.budget == "tile" or bool(self.coordinates)

    @property
    def needs_grid(self) -> bool:
        """Whether it asks how tiles lie side by side."""
        return self.shape != "token" or self.blank != "scored"

    def choose(
        self,
        scores: torch.Tensor,
        tile_map: TileMap,
        count: int,
        stays: torch.Tensor | None = None,
        blank: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[Run]]:
        """Choose `count` tokens, or with `mass` as many as it takes.

        Args:
            scores: (n,)
            stays: (n,) bool: which stay before all others.
            blank: (n,) bool: which come after all others.

        Returns:
            Ascending places, and the runs that one more token each stands for; both together are `count`.
        """
        if self.mass is not None:
            count = count_for_mass(scores, self.mass, self.least, self.most)
        per_tile = tile_map.side**2
        if self.shape == "smooth":
            scores = smoothed(scores, tile_map, self.window or (1, 5), self.how)
        if blank is not None:
            scores = torch.where(blank, scores - (scores.max() - scores.min() + 1), scores)
        if stays is not None:
            scores = torch.where(stays, scores + (scores.max() - scores.min() + 1), scores)
        if self.shape == "block":
            return best_blocks(scores, tile_map, self.window or (2, 4), count), []
        if self.budget == "tile":
            importance = scores.reshape(-1, per_tile).mean(dim=1).tolist()
            budgets = tile_budgets(importance, per_tile, count, self.temperature, self.floor)
            return highest_by_tile(scores, budgets, per_tile), []
        if self.markers:
            return highest_with_markers(scores, count, self.markers)
        return highest(scores, count), []


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


PUBLISHED = Selection()
SELECTIONS = {
    "token": PUBLISHED,
    "smooth": Selection(shape="smooth"),
    "dilated": Selection(shape="smooth", window=(3, 3), how="max"),
    "block": Selection(shape="block"),
    "tile": Selection(budget="tile"),
    "original": Selection(positions="original"),
    "markers": Selection(markers=0.1, positions="original"),
    "coordinates": Selection(coordinates=0.1, positions="original"),
    "mass": Selection(mass=0.9),
    "blank": Selection(blank="last"),
    "features": Selection(score="features"),
    "layer": Selection(stage="layer", positions="original"),
}


def read_selection(value: "str | Mapping[str, Any] | Select | Selection | None") -> Selection:
    """Return a selection from a name of SELECTIONS, a dict of the fields of `Selection` ("name" among them: on top of it) or
    its `select` alone; None is the published one.

    Raises:
        ValueError: An unknown name or field, or values that cannot work.
    """
    if value is None or isinstance(value, Selection):
        return value or PUBLISHED
    options = {"name": value} if isinstance(value, str) else {"select": value} if callable(value) else value
    if not isinstance(options, Mapping):
        raise ValueError(f"scm_select is a name, a dict or a function, got {value!r}.")
    options = dict(options)
    name = options.pop("name", "token")
    if name not in SELECTIONS:
        raise ValueError(f"scm_select: there is no {name!r}; known are {', '.join(SELECTIONS)}.")
    known = [field.name for field in fields(Selection)]
    unknown = sorted(map(str, options.keys() - set(known)))
    if unknown:
        raise ValueError(f"scm_select has no {', '.join(unknown)}; known are name, {', '.join(known)}.")
    if options.get("window") is not None:
        options["window"] = tuple(options["window"])
    return replace(SELECTIONS[name], **options)


def asks_for_blank(value: "str | Mapping[str, Any] | Select | Selection | None") -> bool:
    """Tell whether what `scm_select` takes needs to know which tokens are blank; raises as `read_selection` does."""
    return read_selection(value).blank != "scored"
