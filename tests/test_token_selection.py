"""Ways to choose the tokens of an image that stay, against a recorded NumPy reference, and settings that cannot work."""

import json

import pytest
import torch
from conftest import FIXTURES

from minimonkey.token_selection import (
    SELECTIONS,
    Selection,
    TileMap,
    coordinate_tokens,
    count_for_mass,
    highest_by_tile,
    highest_with_markers,
    read_selection,
    tile_budgets,
)


CASES = json.loads((FIXTURES / "selection" / "selection.json").read_text())["cases"]
RATIOS = ("0.25", "0.5", "0.75")


def tile_map(case) -> TileMap:
    return TileMap(case["columns"], case["rows"], case["side"])


@pytest.fixture(params=CASES, ids=lambda case: f"{case['columns']}x{case['rows']}x{case['side']}")
def case(request):
    return request.param


@pytest.fixture
def scores(case):
    return torch.tensor(case["scores"], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token", "token"),
        ("smooth", "smooth"),
        ("dilated", "dilated"),
        ("even", {"shape": "smooth", "window": (2, 4)}),
        ("block", "block"),
        ("line", {"shape": "block", "window": (1, None)}),
        ("square", {"shape": "block", "window": (2, 2)}),
    ],
)
@pytest.mark.parametrize("ratio", RATIOS)
def test_shapes_keep_what_the_reference_keeps(case, scores, ratio, name, options):
    if name == "line":
        options = {**options, "window": (1, case["side"])}
    count = int(len(scores) * float(ratio))
    kept, runs = read_selection(options).choose(scores, tile_map(case), count)
    assert kept.tolist() == case["kept"][ratio][name]
    assert runs == [] and len(kept) == count


@pytest.mark.parametrize("temperature", [10.0, 0.01])
@pytest.mark.parametrize("ratio", RATIOS)
def test_budgets_of_tiles_are_those_of_the_reference(case, scores, ratio, temperature):
    recorded, per_tile = case["kept"][ratio][f"tile {temperature}"], case["side"] ** 2
    count = int(len(scores) * float(ratio))
    budgets = tile_budgets(case["importance"], per_tile, count, temperature)
    assert budgets == recorded["budgets"] and sum(budgets) == count
    assert highest_by_tile(scores, budgets, per_tile).tolist() == recorded["kept"]


@pytest.mark.parametrize("ratio", RATIOS)
def test_tile_budgets_follow_the_scores_and_starve_no_tile(case, scores, ratio):
    per_tile, tiles = case["side"] ** 2, case["columns"] * case["rows"]
    biased = scores.clone()
    biased[:per_tile] += 1  # the first tile gets all the attention
    count = int(len(scores) * float(ratio))
    plain, _ = read_selection("token").choose(biased, tile_map(case), count)
    kept, _ = read_selection("tile").choose(biased, tile_map(case), count)
    found = torch.bincount(kept // per_tile, minlength=tiles)
    assert len(kept) == count and found.min() >= int(0.1 * float(ratio) * per_tile)
    assert found[0] == found.max() and (found[1:] > 0).all()
    assert torch.bincount(plain // per_tile, minlength=tiles)[0] >= found[0]


@pytest.mark.parametrize(("name", "share"), [("markers", 0.1), ("many markers", 0.6)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_markers_stand_for_the_longest_runs(case, scores, ratio, name, share):
    recorded, count = case["kept"][ratio][name], int(len(scores) * float(ratio))
    kept, runs = highest_with_markers(scores, count, share)
    assert kept.tolist() == recorded["kept"]
    assert [list(run) for run in runs] == recorded["runs"]
    assert len(kept) + len(runs) == count and not {run[0] for run in runs} & set(kept.tolist())


def test_mass_takes_as_many_tokens_as_the_reference(case, scores):
    for mass, count in case["mass"].items():
        assert count_for_mass(scores, float(mass), 0.1, 0.9) == count
        selection = Selection(mass=float(mass), least=0.1, most=0.9)
        assert len(selection.choose(scores, tile_map(case), 5)[0]) == count


def test_stitched_tiles_lie_as_in_the_image(case, scores):
    places = torch.arange(len(scores))
    seen = tile_map(case).stitched(places)
    if case["seen"]:
        assert seen.tolist() == case["seen"]
    assert torch.equal(tile_map(case).in_sequence(seen), places)


@pytest.mark.parametrize("name", [name for name in SELECTIONS if name != "mass"])
@pytest.mark.parametrize("count", [0, 1, 13, None])
def test_every_choice_keeps_as_many_as_it_is_told(case, scores, name, count):
    count = len(scores) if count is None else count
    stays = torch.arange(len(scores)) % 5 == 0
    kept, runs = SELECTIONS[name].choose(scores.float(), tile_map(case), count, stays)
    assert len(kept) + len(runs) == count
    assert kept.tolist() == sorted(set(kept.tolist()))


@pytest.mark.parametrize("name", ["token", "smooth", "block"])
def test_what_must_stay_stays_first(case, scores, name):
    stays = torch.arange(len(scores)) % 5 == 0
    kept = set(SELECTIONS[name].choose(scores, tile_map(case), len(scores) // 2, stays)[0].tolist())
    must = set(stays.nonzero().squeeze(1).tolist())
    if name == "block":
        assert len(kept & must) > len(must) / 2
    else:
        assert must <= kept
        few, _ = SELECTIONS[name].choose(scores, tile_map(case), 3, stays)
        assert set(few.tolist()) <= must


def test_coordinates_are_the_highest_of_each_tile():
    cosines, sines = torch.tensor([1.0, 5, 3, 2, 9, 8, 7, 6]), torch.tensor([9.0, 1, 2, 3, 1, 2, 3, 4])
    assert coordinate_tokens(cosines, sines, 4, 0.25).tolist() == [True, True, False, False, True, False, False, True]
    assert not coordinate_tokens(cosines, sines, 4, 0.2).any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("best", "no 'best'; known are token, smooth"),
        (7, "a name, a dict or a function, got 7"),
        ({"select": "best"}, "select is a function"),
        ({"select": max, "shape": "block"}, "a function chooses by itself"),
        ({"form": "block"}, "has no form; known are name, select"),
        ({"shape": "round"}, "shape is one of token, smooth, block, got 'round'"),
        ({"budget": "page"}, "budget is one of image, tile"),
        ({"positions": "old"}, "positions is one of renumbered, original"),
        ({"floor": 1.5}, "floor is a share from 0 to 1, got 1.5"),
        ({"markers": True}, "markers is a share"),
        ({"mass": 0}, "mass is above 0"),
        ({"mass": 0.5, "least": 0.8, "most": 0.3}, "least at most most"),
        ({"temperature": 0}, "temperature is above 0"),
        ({"shape": "block", "window": (0, 2)}, r"window is \(height, width\)"),
        ({"shape": "block", "window": (1.5, 2)}, r"window is \(height, width\)"),
        ({"window": (1, 5)}, "belongs to shape 'smooth' or 'block'"),
        ({"shape": "block", "budget": "tile"}, "blocks are whole"),
        ({"shape": "block", "markers": 0.1, "positions": "original"}, "blocks are whole"),
        ({"markers": 0.1}, "add positions='original'"),
        ({"name": "markers", "budget": "tile"}, "markers go with a keep ratio"),
        ({"name": "markers", "mass": 0.5}, "markers go with a keep ratio"),
        ({"stage": "layer"}, "read every token in its place; add positions='original'"),
    ],
)
def test_selections_that_cannot_work_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_selection(value)
