"""Grids of multi-scale adaptive cropping, against those recorded from the published code."""

import ast
import json
import sys

import pytest
from conftest import FIXTURES, ROOT

from minimonkey.tiling import PRESETS, closest_grid, grids_in_range, layer_grids, msac_grids, tile_counts


RECORDED = json.loads((FIXTURES / "preprocess" / "grids.json").read_text())
SIZES = RECORDED["sizes (width, height)"]

# The tile ranges that the published evaluation scripts set.
PUBLISHED_RANGES = {
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
}


def group_name(group) -> str:
    return f"{group['tile_size']}-" + "-".join(map(str, group["ranges"]))


@pytest.mark.parametrize("group", RECORDED["groups"], ids=group_name)
def test_grids_and_tile_counts_equal_the_recorded_ones(group):
    for size, (*grids, tiles) in zip(SIZES, group["grids"], strict=True):
        detailed, adaptive = msac_grids(*size, *group["ranges"], group["tile_size"])
        assert [*detailed, *adaptive] == grids, size
        assert sum(tile_counts(detailed, adaptive)) == tiles, size


def test_grids_without_arguments_are_those_of_the_published_demo():
    (group,) = (g for g in RECORDED["groups"] if g["ranges"] == [4, 12, 3, 7] and g["tile_size"] == 448)
    for size, (*grids, _) in zip(SIZES, group["grids"], strict=True):
        detailed, adaptive = msac_grids(*size)
        assert [*detailed, *adaptive] == grids, size


def test_presets_are_the_published_tile_ranges_and_one_of_ours():
    assert PRESETS == {**PUBLISHED_RANGES, "multi_view": (1, 12, 1, 1)}  # that one is ours


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(1, 1), (1280, 720), (720, 1280), (30, 3000), (448, 448)])
def test_grids_of_a_preset_keep_its_ranges(name, size):
    least, most, adaptive_least, adaptive_most = PRESETS[name]
    (columns, rows), adaptive = msac_grids(*size, *PRESETS[name])
    assert least <= columns * rows <= most
    # (1, 1) stands for "no candidate left" too
    assert adaptive == (1, 1) or adaptive_least <= adaptive[0] * adaptive[1] <= adaptive_most


def test_range_holds_every_grid_once_in_order_of_tiles():
    grids = grids_in_range(4, 12)
    areas = [columns * rows for columns, rows in grids]
    assert areas == sorted(areas)
    assert set(grids) == {(c, r) for c in range(1, 13) for r in range(1, 13) if 4 <= c * r <= 12}
    assert len(set(grids)) == len(grids)


def test_adaptive_grid_never_divides_the_detailed_one():
    for width in range(50, 2000, 130):
        for height in range(50, 2000, 130):
            detailed, adaptive = msac_grids(width, height)
            assert detailed[0] % adaptive[0] or detailed[1] % adaptive[1], (width, height)


@pytest.mark.parametrize("width", [1, 4, 100, 633])
def test_square_tie_takes_the_smaller_grid_for_small_pictures(width):
    assert msac_grids(width, width)[0] == (2, 2)


@pytest.mark.parametrize(
    ("side", "grid"),
    [(950, (2, 2)), (951, (3, 3))],  # 0.5 * 448^2 * 9 = 950.4^2 pixels
)
def test_square_tie_takes_the_larger_grid_above_half_its_pixels(side, grid):
    assert msac_grids(side, side)[0] == grid


def test_tie_at_exactly_half_the_pixels_takes_the_smaller_grid():
    assert closest_grid(4, 2, ((1, 1), (2, 2)), 2) == (1, 1)  # not larger than 0.5 * 2 * 2 * 4 = 8 pixels
    assert closest_grid(3, 3, ((1, 1), (2, 2)), 2) == (2, 2)


def test_tie_depends_on_the_tile_size():
    assert msac_grids(500, 500, tile_size=448)[0] == (2, 2)
    assert msac_grids(500, 500, tile_size=112)[0] == (3, 3)


def test_no_candidate_gives_the_single_tile():
    assert closest_grid(300, 200, (), 448) == (1, 1)
    assert msac_grids(300, 300, 4, 4, 1, 2) == ((2, 2), (1, 1))


@pytest.mark.parametrize(
    ("detailed", "adaptive", "counts"),
    [
        ((4, 3), (3, 2), (12, 6, 1)),
        ((1, 1), (2, 2), (0, 4, 1)),
        ((2, 2), (1, 1), (4, 0, 1)),
        ((1, 1), (1, 1), (0, 0, 1)),
        ((1, 2), (3, 1), (2, 3, 1)),
    ],
)
def test_single_tile_grid_adds_no_tiles_beside_the_thumbnail(detailed, adaptive, counts):
    assert tile_counts(detailed, adaptive) == counts
    assert layer_grids(detailed, adaptive)[-1] == (1, 1)


def test_without_thumbnail_a_picture_of_one_tile_is_still_shown():
    assert layer_grids((4, 3), (3, 2), use_thumbnail=False) == [(4, 3), (3, 2)]
    assert tile_counts((4, 3), (1, 1), use_thumbnail=False) == (12, 0, 0)
    assert tile_counts((1, 1), (1, 1), use_thumbnail=False) == (0, 0, 1)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 10), (10, -5)])
def test_empty_picture_raises(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        msac_grids(*size)


@pytest.mark.parametrize("tile_size", [0, -448])
def test_empty_tile_raises(tile_size):
    with pytest.raises(ValueError, match=f"tile size {tile_size}"):
        msac_grids(10, 10, tile_size=tile_size)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((5, 4, 3, 7), "detailed tile range 5 to 4"),
        ((0, 4, 3, 7), "detailed tile range 0 to 4"),
        ((-2, -1, 3, 7), "detailed tile range"),
        ((4, 12, 7, 3), "adaptive tile range 7 to 3"),
        ((4, 12, 0, 0), "adaptive tile range 0 to 0"),
        ((4.5, 12, 3, 7), "two integers, got 4.5 to 12"),
        ((4, None, 3, 7), "two integers, got 4 to None"),
        (("4", 12, 3, 7), "two integers"),
        ((4, 12, 3, True), "two integers"),
    ],
)
def test_bad_range_raises(ranges, message):
    with pytest.raises(ValueError, match=message):
        msac_grids(300, 200, *ranges)


def test_imports_are_of_the_standard_library_alone():
    tree = ast.parse((ROOT / "tiling.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert getattr(node, "level", 0) == 0
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)
