"""Which grids an image is cut in: multi-scale adaptive cropping (MSAC) as pure integers.

Deals with sizes and tile counts, not with pixels, so that a serving engine can ask how many tokens an image costs before
opening it. Standard library only.

    >>> msac_grids(1280, 720)
    ((4, 2), (3, 2))

Sources: Mini-Monkey (arXiv 2408.02034), section 3.1, and the published inference code; for other rules of the detailed
grid MiniCPM-V (2408.01800), section 3.2, and BlueLM-V-3B (2411.10640), algorithm 1.
"""

from functools import lru_cache
from math import ceil, isfinite, log


Grid = tuple[int, int]
"""(columns, rows)"""

TileRanges = tuple[int, int, int, int]
"""(min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles)"""

# Tile ranges of the published evaluation, by benchmark; "default" is that of the demo, "others" that of every
# benchmark without a row of its own. "multi_view" is ours, for images of `multi_view.py`: no adaptive tiles, which
# would mix cameras (a range of one tile holds no grid that does not divide the detailed one). The last three are those
# of other systems, which have no adaptive tiles.
PRESETS: dict[str, TileRanges] = {
    "default": (4, 12, 3, 7),
    "chartqa": (4, 12, 1, 3),
    "docvqa": (1, 24, 1, 8),
    "infovqa": (5, 24, 3, 8),
    "ocrbench": (8, 24, 3, 9),
    "ccbench": (3, 8, 1, 4),
    "realworldqa": (3, 12, 1, 4),
    "mme": (3, 9, 1, 4),
    "hallusionbench": (3, 9, 1, 4),
    "pope": (3, 9, 1, 4),
    "others": (12, 24, 3, 5),
    "vlmevalkit_ocrbench": (9, 24, 5, 8),
    "vlmevalkit_docvqa": (14, 23, 5, 15),
    "vlmevalkit_textvqa": (14, 23, 5, 15),
    "vlmevalkit_infovqa": (15, 23, 3, 5),
    "multi_view": (1, 12, 1, 1),
    "internvl": (1, 12, 1, 1),
    "minicpm_v": (1, 9, 1, 1),
    "bluelm_v": (1, 16, 1, 1),
}

# The tiling of presets that are not "msac", see `choose_grids`.
PRESET_TILINGS = {"internvl": "internvl", "minicpm_v": "logscore", "bluelm_v": "relaxed"}

TILINGS = ("msac", "internvl", "logscore", "relaxed", "msac-logscore", "msac-relaxed")  # into square tiles
SLICES = "slices"  # MiniCPM-V's grid, cut into slices of their own size, see `slice_sizes`

BUDGET_TILING = "internvl"  # of an image that is given so many tokens: what reads most, see docs/compression.md

SINGLE_TILE: Grid = (1, 1)

MOST_TILES = 1000  # of a grid; listing all grids of a million tiles takes minutes

RANGE_NAMES = ("min_tiles", "max_tiles", "adaptive_min_tiles", "adaptive_max_tiles")


@lru_cache
def grids_in_range(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Return every grid of `min_tiles` to `max_tiles` tiles, in order of its number of tiles (then of its columns)."""
    grids = (
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    )
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def closest_grid(width: int, height: int, grids: tuple[Grid, ...], tile_size: int) -> Grid:
    """Return the grid whose aspect ratio is nearest to that of the image; `(1, 1)` if there are none.

    On a tie the later (larger) grid wins if the image has more than half as many pixels as that grid.
    """
    best, best_difference = SINGLE_TILE, float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        is_large_tie = difference == best_difference and width * height > 0.5 * tile_size**2 * columns * rows
        if difference < best_difference or is_large_tie:
            best, best_difference = (columns, rows), difference
    return best


def check_tiling(
    *ranges: int, tiling: str = "msac", relaxed_alpha: float = 0.1, max_scale: float | None = None
) -> None:
    """Raise `ValueError` for what `choose_grids` cannot work with.

    Args:
        ranges: As `TileRanges`, 1 <= minimum <= maximum <= `MOST_TILES`.
        tiling: Of TILINGS, or SLICES.
        relaxed_alpha: From 0 to below 1.
        max_scale: None, or at least 1.
    """
    for name, least, most in (("detailed tile", *ranges[:2]), ("adaptive tile", *ranges[2:])):
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in (least, most)):
            raise ValueError(f"The {name} range must be two integers, got {least!r} to {most!r}.")
        if not 1 <= least <= most:
            raise ValueError(f"The {name} range {least} to {most} holds no grid; it needs 1 <= minimum <= maximum.")
        if most > MOST_TILES:
            raise ValueError(f"The {name} range {least} to {most} is too wide: a grid has at most {MOST_TILES} tiles.")
    if tiling not in (*TILINGS, SLICES):
        raise ValueError(f"tiling is one of {', '.join((*TILINGS, SLICES))}, got {tiling!r}.")
    if isinstance(relaxed_alpha, bool) or not isinstance(relaxed_alpha, (int, float)) or not 0 <= relaxed_alpha < 1:
        raise ValueError(f"relaxed_alpha is a share from 0 to below 1 (0.1 in BlueLM-V-3B), got {relaxed_alpha!r}.")
    is_scale = isinstance(max_scale, (int, float)) and not isinstance(max_scale, bool) and max_scale >= 1
    if max_scale is not None and not (is_scale and isfinite(max_scale)):
        raise ValueError(f"max_scale is how much tiles may enlarge an image, at least 1, or None; got {max_scale!r}.")


def grids_within(
    width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int, max_scale: float
) -> tuple[Grid, ...]:
    """Return the grids of a range that enlarge an image at most `max_scale` times, or as much as fills one tile.

    The longer side may grow as much as the shorter one must, so that a line of text keeps its shape. Where a small image leaves
    no grid of `min_tiles`, it has all the smaller.
    """
    scale = max(max_scale, tile_size / min(width, height))
    columns, rows = (max(1, int(scale * side / tile_size + 1e-6)) for side in (width, height))
    fitting = tuple(grid for grid in grids_in_range(min_tiles, max_tiles) if grid[0] <= columns and grid[1] <= rows)
    if fitting or min_tiles == 1:
        return fitting
    return tuple(grid for grid in grids_in_range(1, max_tiles) if grid[0] <= columns and grid[1] <= rows)


def logscore_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> Grid:
    """Return MiniCPM-V's grid: about as many tiles as the image has tiles' worth of pixels, and its shape on a log scale.

    The number of tiles is that of the image's area, one more or one less; on a tie the grid of fewer tiles, then of fewer
    columns wins, so that a square is not transposed onto itself.
    """
    ideal = min(max(ceil(width * height / tile_size**2), min_tiles), max_tiles)
    if ideal == 1:
        return SINGLE_TILE
    candidates = grids_in_range(max(ideal - 1, min_tiles, 2), min(ideal + 1, max_tiles))
    return min(candidates, key=lambda grid: abs(log(width / height) - log(grid[0] / grid[1])))


def relaxed_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int, alpha: float = 0.1) -> Grid:
    """Return BlueLM-V-3B's grid: as many useful pixels as any other, within a share `alpha`, and few wasted ones.

    Useful are the pixels of the image, fitted into the grid with its aspect ratio and not counted beyond its own size.
    A grid has at most as many columns and rows as the smallest square of `max_tiles` tiles, where the range has such.
    `alpha` 0 is the rule of LLaVA-NeXT.
    """
    grids, longest = grids_in_range(min_tiles, max_tiles), ceil(max_tiles**0.5)
    grids = [grid for grid in grids if max(grid) <= longest] or list(grids)
    # From large to small, as published; of as many tiles the closest in shape first, which matters to tiny images alone.
    grids.sort(key=lambda grid: (-grid[0] * grid[1], abs(log(width / height) - log(grid[0] / grid[1]))))
    most_useful, least_waste, best = 0, float("inf"), SINGLE_TILE
    for columns, rows in grids:
        grid_width, grid_height = tile_size * columns, tile_size * rows
        scale = min(grid_width / width, grid_height / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        waste, less = grid_width * grid_height - useful, most_useful - useful
        is_as_useful = less < alpha * most_useful or less == 0
        if -less > alpha * most_useful or (is_as_useful and waste < least_waste):
            most_useful, least_waste, best = useful, waste, (columns, rows)
    return best


@lru_cache(maxsize=4096)
def choose_grids(
    width: int,
    height: int,
    ranges: TileRanges = PRESETS["default"],
    tile_size: int = 448,
    tiling: str = "msac",
    relaxed_alpha: float = 0.1,
    max_scale: float | None = None,
) -> tuple[Grid, Grid]:
    """Return the detailed and the adaptive grid of an image, as ((columns, rows), (columns, rows)).

    A grid of (1, 1) means that this layer has no tiles: the thumbnail already shows the whole image.

    Args:
        width, height: Image size in pixels.
        ranges: Least and most tiles of the detailed grid, then of the adaptive one.
        tile_size: Side of a square tile in pixels.
        tiling: Of TILINGS. "msac" takes the detailed grid that is closest in shape, and among those that do not divide it in
            both directions the closest adaptive one, so that its seams fall elsewhere. "internvl" has the same detailed
            grid and no adaptive one; "logscore" (MiniCPM-V) and "relaxed" (BlueLM-V-3B) choose the detailed grid by their
            own rules, and "msac-logscore" and "msac-relaxed" add the adaptive grid to these. "slices" has the grid of
            "logscore".
        relaxed_alpha: Share of useful pixels that "relaxed" gives up for less waste.
        max_scale: How many times tiles may enlarge an image whose sides are longer than a tile, so that a small one has few;
            None: however much it takes, as published. "logscore" and "relaxed" have rules of their own for small images.

    Raises:
        ValueError: A size below 1, an empty range, an unknown tiling, an alpha that is no share, or a scale below 1.
    """
    if width < 1 or height < 1 or tile_size < 1:
        raise ValueError(f"Sizes must be at least 1 pixel, got a {width} x {height} image, tile size {tile_size}.")
    check_tiling(*ranges, tiling=tiling, relaxed_alpha=relaxed_alpha, max_scale=max_scale)
    rule, grids = tiling.removeprefix("msac-"), [grids_in_range(*ranges[:2]), grids_in_range(*ranges[2:])]
    if max_scale is not None:
        grids = [grids_within(width, height, *own, tile_size, max_scale) for own in (ranges[:2], ranges[2:])]
    if rule in ("logscore", SLICES):
        detailed = logscore_grid(width, height, *ranges[:2], tile_size)
    elif rule == "relaxed":
        detailed = relaxed_grid(width, height, *ranges[:2], tile_size, relaxed_alpha)
    else:
        detailed = closest_grid(width, height, grids[0], tile_size)
    if not tiling.startswith("msac"):
        return detailed, SINGLE_TILE
    candidates = tuple(grid for grid in grids[1] if detailed[0] % grid[0] or detailed[1] % grid[1])
    return detailed, closest_grid(width, height, candidates, tile_size)


def msac_grids(
    width: int,
    height: int,
    min_tiles: int = 4,
    max_tiles: int = 12,
    adaptive_min_tiles: int = 3,
    adaptive_max_tiles: int = 7,
    tile_size: int = 448,
) -> tuple[Grid, Grid]:
    """Return the two grids of Mini-Monkey, see `choose_grids`."""
    return choose_grids(width, height, (min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles), tile_size)


def _to_multiple(length: float, multiple: int) -> int:
    return max(round(length / multiple) * multiple, multiple)


def fitted_size(width: float, height: float, side: int, multiple: int, enlarge: bool) -> tuple[int, int]:
    """Return the (width, height) of an image with the area of a square of this `side`, in whole multiples of some pixels.

    Args:
        enlarge: Whether an image that has fewer pixels gets that area too, instead of the multiples next to its own sides.
    """
    if enlarge or width * height > side**2:
        shape = width / height
        height = int(side / shape**0.5)
        width = int(height * shape)
    return _to_multiple(width, multiple), _to_multiple(height, multiple)


def slice_sizes(
    width: int, height: int, grid: Grid, side: int = 448, multiple: int = 14
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (width, height) of an image's overview and of each of its slices in a grid, MiniCPM-V's.

    Both have about the area of a square tile and the shape of the image and its parts, so that nothing is stretched but to
    whole multiples. Slices of the grid (1, 1) are none, and (0, 0).

    Args:
        width, height: Of the image in pixels.
        side: Of the square in pixels.
        multiple: What the sides are multiples of: the vision tower's patch, 14, as published.

    Source: MiniCPM-V (arXiv 2408.01800), section 3.2, and its published code.
    """
    if grid == SINGLE_TILE:
        return fitted_size(width, height, side, multiple, enlarge=True), (0, 0)
    overview = fitted_size(width, height, side, multiple, enlarge=False)
    columns, rows = grid
    part = (_to_multiple(width, columns) / columns, _to_multiple(height, rows) / rows)
    return overview, fitted_size(*part, side, multiple, enlarge=True)


def tile_counts(detailed: Grid, adaptive: Grid, use_thumbnail: bool = True) -> tuple[int, int, int]:
    """Count the detailed, adaptive and thumbnail tiles that the two grids give; a one-tile grid gives none.

    Args:
        use_thumbnail: Whether the whole image comes last as one tile. An image without other tiles is one in any case.
    """
    cut = [0 if grid == SINGLE_TILE else grid[0] * grid[1] for grid in (detailed, adaptive)]
    return cut[0], cut[1], int(use_thumbnail or not any(cut))


def layer_grids(detailed: Grid, adaptive: Grid, use_thumbnail: bool = True) -> list[Grid]:
    """Return the grids whose tiles make up an image, in order: detailed, adaptive, thumbnail; see `tile_counts`."""
    counts = tile_counts(detailed, adaptive, use_thumbnail)
    return [grid for grid, count in zip((detailed, adaptive, SINGLE_TILE), counts) if count]


@lru_cache
def largest_image(
    ranges: TileRanges,
    tile_size: int = 448,
    use_thumbnail: bool = True,
    tiling: str = "msac",
    relaxed_alpha: float = 0.1,
    max_scale: float | None = None,
) -> tuple[int, int]:
    """Return a (width, height) that gives as many tiles as any image can, for engines that reserve room for images.

    It is seldom a square: with the default ranges 1:1 gives 14 tiles, 4:3 gives 19 and 1:12 gives 20.
    """
    grids = {*grids_in_range(*ranges[:2]), *grids_in_range(*ranges[2:])}
    shapes = sorted({columns / rows for columns, rows in grids})
    borders = sorted({(one + other) / 2 for one in shapes for other in shapes})  # the nearest grid changes only there
    between = [(one + other) / 2 for one, other in zip(borders, borders[1:])]
    side = tile_size if max_scale is None else max(ranges) * tile_size  # no grid enlarges images of such tiles
    area = side**2 * max(ranges)
    sizes = [(columns * side, rows * side) for columns, rows in sorted(grids)]
    sizes += [(max(1, round((area * shape) ** 0.5)), max(1, round((area / shape) ** 0.5))) for shape in between]
    return max(
        sizes,
        key=lambda size: sum(
            tile_counts(
                *choose_grids.__wrapped__(*size, ranges, tile_size, tiling, relaxed_alpha, max_scale), use_thumbnail
            )
        ),
    )


def share_tile_budget(tile_budget: int, images: int, ranges: TileRanges, use_thumbnail: bool = True) -> TileRanges:
    """Return tile ranges for each of `images` images that together give at most `tile_budget` tiles, thumbnails counted.

    Every image gets the same share; within it detailed and adaptive tiles keep their proportion.

    Raises:
        ValueError: Less than one tile for each image.
    """
    share = tile_budget // images
    if share < 1:
        raise ValueError(
            f"A tile_budget of {tile_budget} does not give each of {images} pictures its one tile; raise it to at least "
            f"{images}, or pass fewer pictures."
        )
    min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles = ranges
    parts = share - int(use_thumbnail)  # what is left for detailed and adaptive tiles
    if max_tiles + adaptive_max_tiles <= parts:
        return ranges
    detailed = max(1, -(-parts * max_tiles // (max_tiles + adaptive_max_tiles)))
    adaptive = max(1, parts - detailed)
    return min(min_tiles, detailed), detailed, min(adaptive_min_tiles, adaptive), adaptive
