"""Tiles that show nothing but paper: which they are, exact counts, photographs, and prompts and answers without them."""

import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, synthetic_picture
from image_helpers import PUBLISHED, square
from PIL import Image, ImageDraw

from minimonkey.blank_tiles import blank_share, blank_tiles


BLANK = json.loads((FIXTURES / "selection" / "selection.json").read_text())["blank"]
SIDE = 56


def scan(width: int, height: int, box: tuple[int, int, int, int], paper=(247, 244, 238)) -> Image.Image:
    """A page with wide margins: black words in a box, the rest paper."""
    page = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = box
    for y in range(top, bottom, 12):
        for x in range(left, right, 9):
            draw.rectangle((x, y, x + 4, y + 6), fill=(20, 20, 30))
    return page


@pytest.mark.parametrize("recorded", BLANK, ids=["whole", "with_rest"])
def test_shares_of_cells_are_those_of_the_reference(recorded):
    grey = np.array(recorded["gray"], dtype=np.uint8)
    height, width = (side // 28 * 28 for side in grey.shape)
    shares, _ = blank_share(grey[:height, :width], 28)
    np.testing.assert_allclose(shares, recorded["share"], atol=1e-12)


def test_a_tile_is_blank_only_with_a_ring_around_it():
    grey = np.full((3 * 112, 3 * 112), 250, dtype=np.uint8)
    grey[5:9, 5:9] = 0  # in the first cell of the first tile: nothing touches the others
    assert blank_tiles(grey, 112).tolist() == [False] + [True] * 8
    grey[112 - 8 : 112 - 4, 112 - 8 : 112 - 4] = 0  # beside a corner: the tiles around it are protected
    assert blank_tiles(grey, 112).tolist() == [False, False, True, False, False, True, True, True, True]


def test_grain_is_paper_and_a_thin_line_is_not():
    grain = np.random.RandomState(1).randint(-8, 9, (224, 224))
    assert blank_tiles((240 + grain // 2).astype(np.uint8), 112).all()
    line = np.full((224, 224), 240, dtype=np.uint8)
    line[60, :] = 90
    assert blank_tiles(line, 112).tolist() == [False, False, True, True]


@pytest.mark.parametrize("tile_size", [28, 40, 56, 448])
def test_cells_of_tiles_that_are_no_multiple(tile_size):
    grey = np.full((2 * tile_size, 3 * tile_size), 200, dtype=np.uint8)
    assert blank_tiles(grey, tile_size).tolist() == [True] * 6
    grey[-6:, -6:] = 10
    assert not blank_tiles(grey, tile_size)[-1]


def test_photographs_lose_nothing(either):
    photograph = synthetic_picture(300, 200, 1)
    options = {**PUBLISHED, "size": square(SIDE)}
    plain, dropped = either(photograph, **options), either(photograph, drop_blank=True, **options)
    np.testing.assert_array_equal(plain["pixel_values"], dropped["pixel_values"])
    assert [*plain["tile_counts"]] == [*dropped["tile_counts"]]


def test_margins_are_left_out_and_counted(either):
    page, options = scan(800, 1000, (20, 20, 250, 200)), {"preset": "ocrbench", "size": square(SIDE)}
    whole = either(page, return_tensors="np", **options)
    inputs = either(page, drop_blank=True, return_tensors="np", **options)
    assert inputs["tile_counts"].sum() == len(inputs["pixel_values"])
    (before,), (after,) = whole["tile_counts"], inputs["tile_counts"]
    assert (after <= before).all() and after[0] < before[0] / 2 and after[2] == 1
    tiles = {tile.tobytes() for tile in whole["pixel_values"]}
    assert {tile.tobytes() for tile in inputs["pixel_values"]} <= tiles
    np.testing.assert_array_equal(inputs["pixel_values"][0], whole["pixel_values"][0])  # where the words are
    np.testing.assert_array_equal(inputs["pixel_values"][-1], whole["pixel_values"][-1])
    np.testing.assert_array_equal(inputs["tile_grids"], whole["tile_grids"])
    most = either.get_number_of_image_patches(1000, 800, {**options, "drop_blank": True})
    assert len(inputs["pixel_values"]) < most == len(whole["pixel_values"])


def test_both_back_ends_leave_out_the_same(pil, torchvision):
    for page in (scan(700, 900, (300, 400, 500, 500)), scan(900, 500, (10, 10, 60, 40), (90, 120, 200))):
        options = {"preset": "ocrbench", "size": square(SIDE), "drop_blank": True, "return_tensors": "np"}
        ours, theirs = pil(page, **options), torchvision(page, **options)
        np.testing.assert_array_equal(ours["tile_counts"], theirs["tile_counts"])
        np.testing.assert_allclose(ours["pixel_values"], theirs["pixel_values"], atol=0.02)


@pytest.mark.parametrize("use_thumbnail", [True, False])
def test_an_empty_page_keeps_something(either, use_thumbnail):
    options = {**PUBLISHED, "size": square(SIDE), "use_thumbnail": use_thumbnail, "drop_blank": True}
    inputs = either(Image.new("RGB", (300, 200), "white"), **options)
    counts = tuple(inputs["tile_counts"][0])
    assert counts == (0, 0, 1) if use_thumbnail else counts[0] >= 4
    assert len(inputs["pixel_values"]) == sum(counts)


def test_several_images_keep_their_own_counts(either):
    pages = [scan(600, 800, (20, 20, 120, 90)), Image.new("RGB", (300, 200), "white"), synthetic_picture(300, 200, 1)]
    options = {**PUBLISHED, "size": square(SIDE), "drop_blank": True}
    together = either(pages, **options)
    alone = [either(page, **options) for page in pages]
    assert [tuple(counts) for counts in together["tile_counts"]] == [tuple(one["tile_counts"][0]) for one in alone]
    np.testing.assert_array_equal(together["pixel_values"], np.concatenate([one["pixel_values"] for one in alone]))


def test_the_setting_is_saved(either, tmp_path):
    type(either)(drop_blank=True).save_pretrained(tmp_path)
    assert type(either).from_pretrained(tmp_path).drop_blank is True
    with pytest.raises(ValueError, match="drop_blank"):
        either(Image.new("RGB", (30, 20)), drop_blank="yes")


def test_prompts_are_as_long_as_the_tiles_that_stay(nano, processor):
    page, options = scan(800, 1000, (20, 20, 250, 200)), {"preset": "default", "drop_blank": True}
    inputs = processor(page, "<image>\nRead.", images_kwargs=options)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 49 * len(inputs["pixel_values"])
    assert len(inputs["pixel_values"]) < processor.image_processor.get_number_of_image_patches(1000, 800, options)
    kept = nano.kept_positions(**inputs)[0]
    detailed = 49 * int(inputs["tile_counts"][0, 0])
    assert len(kept) == inputs["input_ids"].shape[1] - detailed + detailed // 2
    assert isinstance(nano.generate(**inputs, max_new_tokens=2), torch.Tensor)
    with pytest.raises(ValueError, match="drop_blank=True leaves out tiles by their pixels"):
        processor._get_num_multimodal_tokens(image_sizes=[(1000, 800)], images_kwargs=options)


def test_later_turns_know_what_was_left_out(nano, processor):
    page = scan(800, 1000, (20, 20, 250, 200))
    options = {"images_kwargs": {"preset": "default", "drop_blank": True}, "max_new_tokens": 4, "return_history": True}
    _, history = nano.chat(processor, page, "Read.", **options)
    remembered, _ = nano.chat(processor, page, "Again.", history=history, **options)
    fresh, _ = nano.chat(processor, page, "Again.", history=list(history), remember=False, **options)
    assert remembered == fresh
