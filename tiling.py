"""Which grids an image is cut in: multi-scale adaptive cropping (MSAC) as pure integers.

Deals with sizes and tile counts, not with pixels, so that a serving engine can ask how many tokens an image costs before
opening it. Standard library only.

    >>> msac_grids(1280, 720)
    ((4, 2), (3, 2))

Source: Mini-Monkey (arXiv 2408.02034), section 3.1, and the published inference code.
"""

from functools import lru_cache


Grid = tuple[int, int]
"""(columns, rows)"""

TileRanges = tuple[int, int, int, int]
"""(min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles)"""

# Tile ranges of the published evaluation, by benchmark; "default" is that of the demo, "others" that of every
# benchmark without a row of its own. "multi_view" is ours, for images of `multi_view.py`: no adaptive tiles, which
# would mix cameras (a range of one tile holds no grid that does not divide the detailed one).
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
}

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


def check_tile_range(min_tiles: int, max_tiles: int, name: str = "tile") -> None:
    """Raise `ValueError` unless 1 <= `min_tiles` <= `max_tiles` <= `MOST_TILES`, both integers."""
    for value in (min_tiles, max_tiles):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"The {name} range must be two integers, got {min_tiles!r} to {max_tiles!r}.")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"The {name} range {min_tiles} to {max_tiles} holds no grid; it needs 1 <= minimum <= maximum."
        )
    if max_tiles > MOST_TILES:
        raise ValueError(
            f"The {name} range {min_tiles} to {max_tiles} is too wide: a grid has at most {MOST_TILES} tiles."
        )


@lru_cache(maxsize=4096)
def msac_grids(
    width: int,
    height: int,
    min_tiles: int = 4,
    max_tiles: int = 12,
    adaptive_min_tiles: int = 3,
    adaptive_max_tiles: int = 7,
    tile_size: int = 448,
) -> tuple[Grid, Grid]:
    """Return the detailed and the adaptive grid of an image, as ((columns, rows), (columns, rows)).

    The adaptive grid is chosen among those that do not divide the detailed grid in both directions, so that its seams
    fall elsewhere. A grid of (1, 1) means that this layer has no tiles: the thumbnail already shows the whole image.

    Args:
        width, height: Image size in pixels.
        min_tiles, max_tiles: Number of tiles of the detailed grid.
        adaptive_min_tiles, adaptive_max_tiles: Number of tiles of the adaptive grid.
        tile_size: Side of a square tile in pixels.

    Raises:
        ValueError: A size below 1 or an empty range.
    """
    if width < 1 or height < 1 or tile_size < 1:
        raise ValueError(f"Sizes must be at least 1 pixel, got a {width} x {height} image, tile size {tile_size}.")
    check_tile_range(min_tiles, max_tiles, "detailed tile")
    check_tile_range(adaptive_min_tiles, adaptive_max_tiles, "adaptive tile")
    detailed = closest_grid(width, height, grids_in_range(min_tiles, max_tiles), tile_size)
    candidates = tuple(
        grid
        for grid in grids_in_range(adaptive_min_tiles, adaptive_max_tiles)
        if detailed[0] % grid[0] or detailed[1] % grid[1]
    )
    return detailed, closest_grid(width, height, candidates, tile_size)


def layer_grids(detailed: Grid, adaptive: Grid, use_thumbnail: bool = True) -> list[Grid]:
    """Return the grids whose tiles make up an image, in order: detailed, adaptive, thumbnail; a one-tile grid gives none.

    Args:
        use_thumbnail: Whether the whole image comes last as one tile. An image without other tiles is one in any case.
    """
    cut = [grid for grid in (detailed, adaptive) if grid != SINGLE_TILE]
    return cut + [SINGLE_TILE] if use_thumbnail or not cut else cut


def tile_counts(detailed: Grid, adaptive: Grid, use_thumbnail: bool = True) -> tuple[int, int, int]:
    """Count the detailed, adaptive and thumbnail tiles that the two grids give; a one-tile grid gives none."""
    grids = layer_grids(detailed, adaptive, use_thumbnail)
    cut = [0 if grid == SINGLE_TILE else grid[0] * grid[1] for grid in (detailed, adaptive)]
    return cut[0], cut[1], int(SINGLE_TILE in grids)


@lru_cache
def largest_image(ranges: TileRanges, tile_size: int = 448, use_thumbnail: bool = True) -> tuple[int, int]:
    """Return a (width, height) that gives as many tiles as any image can, for engines that reserve room for images.

    It is seldom a square: with the default ranges 1:1 gives 14 tiles, 4:3 gives 19 and 1:12 gives 20.
    """
    grids = {*grids_in_range(*ranges[:2]), *grids_in_range(*ranges[2:])}
    shapes = sorted({columns / rows for columns, rows in grids})
    borders = sorted({(one + other) / 2 for one in shapes for other in shapes})  # the nearest grid changes only there
    between = [(one + other) / 2 for one, other in zip(borders, borders[1:])]
    area = tile_size**2 * max(ranges)
    sizes = [(columns * tile_size, rows * tile_size) for columns, rows in sorted(grids)]
    sizes += [(max(1, round((area * shape) ** 0.5)), max(1, round((area / shape) ** 0.5))) for shape in between]

    def tiles(size: tuple[int, int]) -> int:
        return sum(tile_counts(*msac_grids.__wrapped__(*size, *ranges, tile_size), use_thumbnail))

    return max(sizes, key=tiles)


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
