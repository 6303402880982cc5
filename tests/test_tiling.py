"""Grids of multi-scale adaptive cropping, against those recorded from the published code."""

import ast
import json
import sys

import pytest
from conftest import FIXTURES, ROOT

from minimonkey.tiling import (
    PRESETS,
    TILINGS,
    choose_grids,
    closest_grid,
    grids_in_range,
    layer_grids,
    msac_grids,
    tile_counts,
)


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


def test_presets_are_the_published_tile_ranges_those_of_other_systems_and_one_of_ours():
    others = {"internvl": (1, 12, 1, 1), "minicpm_v": (1, 9, 1, 1), "bluelm_v": (1, 16, 1, 1)}
    assert {**PUBLISHED_RANGES, "multi_view": (1, 12, 1, 1), **others} == PRESETS


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


# --- other rules -----------------------------------------------------------------------------------------------------

# Sizes, and what MiniCPM-V's published slicing gives with at most 9 slices of 448 px; None: the image is not cut.
LOGSCORE = [
    ((448, 448), None),
    ((449, 449), (1, 2)),
    ((640, 480), (2, 1)),
    ((1000, 1000), (2, 2)),
    ((1344, 1344), (3, 3)),
    ((1920, 1080), (4, 2)),
    ((1080, 1920), (2, 4)),
    ((2000, 200), (3, 1)),
    ((300, 100), None),
    ((4000, 3000), (3, 3)),
]
# Sizes, BlueLM-V-3B's grid (384 px, at most 3 x 3), LLaVA-NeXT's, and BlueLM-V-3B's of at most 4 x 4 where it is known.
RELAXED = [
    ((394, 390), (1, 1), (2, 2), None),
    ((380, 393), (1, 1), (1, 2), None),
    ((380, 76), (1, 1), (1, 1), None),
    ((500, 102), (2, 1), (2, 1), None),
    ((385, 385), (1, 1), (2, 2), None),
    ((640, 480), (2, 2), (2, 2), None),
    ((1920, 1080), (3, 2), (3, 2), (4, 3)),
    ((1080, 2400), (2, 3), (2, 3), (2, 4)),
    ((768, 1536), (2, 3), (2, 3), (2, 4)),
    ((400, 1200), (1, 3), (1, 3), None),
    ((2000, 2000), (3, 3), (3, 3), (4, 4)),
]
ODD_SIZES = [(w, h) for w in range(90, 3000, 217) for h in range(70, 3000, 193)]


@pytest.mark.parametrize(("size", "grid"), LOGSCORE)
def test_logscore_is_the_rule_of_minicpm_v(size, grid):
    assert choose_grids(*size, PRESETS["minicpm_v"], tiling="logscore") == (grid or (1, 1), (1, 1))


@pytest.mark.parametrize(("size", "grid", "llava_next", "larger"), RELAXED)
def test_relaxed_is_the_rule_of_bluelm_v(size, grid, llava_next, larger):
    assert choose_grids(*size, (1, 9, 1, 1), 384, "relaxed")[0] == grid
    assert choose_grids(*size, (1, 9, 1, 1), 384, "relaxed", relaxed_alpha=0)[0] == llava_next
    if larger:
        assert choose_grids(*size, PRESETS["bluelm_v"], 384, "relaxed")[0] == larger


@pytest.mark.parametrize("tiling", [name for name in TILINGS if name != "msac"])
@pytest.mark.parametrize("ranges", [(1, 9, 1, 1), (4, 12, 3, 7), (3, 3, 2, 5), (1, 1, 1, 1)], ids=str)
def test_every_tiling_keeps_its_ranges(tiling, ranges):
    for size in ODD_SIZES:
        detailed, adaptive = choose_grids(*size, ranges, tiling=tiling)
        assert ranges[0] <= detailed[0] * detailed[1] <= ranges[1], size
        assert adaptive == (1, 1) or tiling.startswith("msac"), size
        if adaptive != (1, 1):
            assert ranges[2] <= adaptive[0] * adaptive[1] <= ranges[3]
            assert detailed[0] % adaptive[0] or detailed[1] % adaptive[1], size


def test_logscore_takes_about_as_many_tiles_as_the_image_has_pixels_for():
    for width, height in ODD_SIZES:
        (columns, rows), _ = choose_grids(width, height, (1, 9, 1, 1), tiling="logscore")
        ideal = min(-(-width * height // 448**2), 9)
        assert abs(columns * rows - ideal) <= 1 and columns * rows <= 9


@pytest.mark.parametrize("tiling", ["logscore", "relaxed"])  # the published rule of "internvl" is not symmetric
@pytest.mark.parametrize("ranges", [(1, 9, 1, 1), (1, 12, 1, 1), (4, 12, 1, 1)], ids=str)
def test_a_transposed_image_has_the_transposed_grid(tiling, ranges):
    for width, height in ODD_SIZES:
        (columns, rows), _ = choose_grids(width, height, ranges, tiling=tiling)
        (other_columns, other_rows), _ = choose_grids(height, width, ranges, tiling=tiling)
        if tiling == "internvl":  # ratios are not symmetric about 1, as in the published rule
            assert abs(columns * rows - other_columns * other_rows) <= 4
        else:
            assert (other_columns, other_rows) == (rows, columns), (width, height)


def test_msac_takes_any_rule_for_its_detailed_grid():
    for size in ODD_SIZES:
        for rule in ("logscore", "relaxed"):
            alone, both = (choose_grids(*size, PRESETS["default"], tiling=t) for t in (rule, f"msac-{rule}"))
            assert alone[0] == both[0]
        assert choose_grids(*size, PRESETS["default"], tiling="internvl")[0] == msac_grids(*size)[0]
        assert choose_grids(*size) == msac_grids(*size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiling": "square"}, "tiling is one of msac, internvl.*got 'square'"),
        ({"tiling": None}, "tiling is one of"),
        ({"tiling": "relaxed", "relaxed_alpha": 1}, "from 0 to below 1.*got 1"),
        ({"tiling": "relaxed", "relaxed_alpha": -0.1}, "got -0.1"),
        ({"tiling": "relaxed", "relaxed_alpha": True}, "got True"),
    ],
)
def test_bad_tiling_raises(options, message):
    with pytest.raises(ValueError, match=message):
        choose_grids(300, 200, **options)


def test_imports_are_of_the_standard_library_alone():
    tree = ast.parse((ROOT / "tiling.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert getattr(node, "level", 0) == 0
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)
