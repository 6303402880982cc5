"""Tiles that show nothing but paper: which they are, exact counts, photographs, and prompts and answers without them."""

import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, synthetic_picture
from image_helpers import PUBLISHED, square
from PIL import Image, ImageDraw

from minimonkey.blank_tiles import blank_share, blank_tiles, blank_tokens, shown_tiles
from minimonkey.token_selection import TileMap, read_selection


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


def test_grey_is_that_of_pillow():
    page = synthetic_picture(112, 112, 3)
    tiles = np.asarray(page).transpose(2, 0, 1)[None]
    sheet = np.concatenate([tiles, np.full_like(tiles, 240)])
    grey = np.concatenate([np.asarray(page.convert("L")), np.full((112, 112), 240, dtype=np.uint8)], axis=1)
    assert shown_tiles(sheet, (2, 1)) == (~blank_tiles(grey, 112)).tolist() == [True, True]  # the ring
    assert shown_tiles(np.full_like(tiles, 240), (1, 1)) == [True]


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


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_told_in_the_order_of_the_prompt():
    grey = np.full((28, 56), 240, dtype=np.uint8)  # two tiles of 4 x 4 tokens, 7 px each
    grey[24:28, 0:3] = 0  # the last row of tokens, first of the first tile
    tiles = np.stack([np.stack([grey[:, x : x + 28]] * 3) for x in (0, 28)])
    blank = blank_tokens(tiles, (2, 1), 4).reshape(2, 4, 4)
    assert (~blank).nonzero()[0].tolist() == [0] * 4  # with its ring
    assert (~blank[0]).nonzero()[0].tolist() == [2, 2, 3, 3] and (~blank[0]).nonzero()[1].tolist() == [0, 1, 0, 1]
    assert not blank_tokens(np.asarray(synthetic_picture(28, 28, 1)).transpose(2, 0, 1)[None], (1, 1), 4).any()


def test_blank_tokens_come_last_or_save_their_part():
    scores, blank = torch.arange(16.0), torch.tensor([False] * 6 + [True] * 10)
    tiles = TileMap(1, 1, 4)
    for count in (4, 8):
        kept, _ = read_selection("blank").choose(scores, tiles, count, blank=blank)
        best = [*range(max(0, 6 - count), 6), *range(16 - max(0, count - 6), 16)]
        assert kept.tolist() == best
    assert read_selection("token").choose(scores, tiles, 4)[0].tolist() == [12, 13, 14, 15]
    smooth, _ = read_selection({"name": "smooth", "blank": "last"}).choose(scores, tiles, 6, blank=blank)
    assert smooth.tolist() == [*range(6)]


@pytest.mark.parametrize("other", [{"name": "block"}, {"name": "tile"}, {"name": "mass"}])
def test_what_blank_tokens_do_not_go_with_is_named(other):
    with pytest.raises(ValueError, match="without blocks, tile budgets and mass"):
        read_selection({**other, "blank": "save"})


@pytest.fixture(scope="module")
def asked(processor):
    """A page with margins, what shows something of it, and its prompt."""
    page = scan(800, 1000, (20, 20, 500, 400))
    inputs = processor(page, "<image>\nRead.", images_kwargs={"preset": "default"})
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    cut = processor.image_processor(page, preset="default", **raw)
    columns, rows = cut["tile_grids"][0][:2]
    blank = blank_tokens(cut["pixel_values"][: columns * rows], (columns, rows), 7)
    start = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
    return page, inputs, blank, start


def kept_of(nano, asked, **options) -> list[int]:
    """Numbers of the detailed tokens that stay."""
    _, inputs, blank, start = asked
    (kept,) = nano.kept_positions(**inputs, **options)
    return [place - start for place in kept.tolist() if start <= place < start + len(blank)]


def test_the_budget_goes_to_what_shows_something(nano, asked):
    _, _, blank, _ = asked
    assert 0.3 < blank.mean() < 0.9
    for ratio in (0.1, 0.25):
        kept = kept_of(nano, asked, scm_select="blank", scm_keep_ratio=ratio)
        assert len(kept) == int(ratio * len(blank)) and not blank[kept].any()
    shown = int((~blank).sum())
    assert len(kept_of(nano, asked, scm_select={"blank": "save"}, scm_keep_ratio=0.5)) == shown // 2
    everything = kept_of(nano, asked, scm_select={"blank": "save"}, scm_keep_ratio=1.0)
    assert everything == (~blank).nonzero()[0].tolist()
    assert len(kept_of(nano, asked, scm_select="blank", scm_keep_ratio=1.0)) == len(blank)


def test_bytes_and_batches_know_the_same_blank_tokens(nano, processor, asked):
    page, inputs, _, _ = asked
    raw = processor(
        page, "<image>\nRead.", images_kwargs={"preset": "default", "do_rescale": False, "do_normalize": False}
    )
    options = {"scm_select": {"blank": "save"}, "scm_keep_ratio": 1.0}
    (alone,) = nano.kept_positions(**inputs, **options)
    assert torch.equal(alone, nano.kept_positions(**raw, **options)[0])
    photograph = synthetic_picture(300, 200, 1)
    both = processor(
        [[photograph], [page]], ["<image>\nRead."] * 2, images_kwargs={"preset": "default"}, padding_side="left"
    )
    kept = nano.kept_positions(**both, **options)
    assert len(kept[0]) == int(both["attention_mask"][0].sum())  # nothing of a photograph is blank
    assert ((both["attention_mask"][1].cumsum(0) - 1)[kept[1]]).tolist() == alone.tolist()


def test_later_turns_remember_what_is_blank(nano, processor, asked):
    page, *_ = asked
    options = {"images_kwargs": {"preset": "default"}, "use_scm": True, "scm_select": "blank", "max_new_tokens": 4}
    options |= {"return_history": True, "do_sample": False}
    _, history = nano.chat(processor, page, "Read.", **options)
    assert history.memory.blank
    second, _ = nano.chat(processor, page, "And?", history, **options)
    history.memory._state = None  # the cache is lost, the images are not
    third, _ = nano.chat(processor, page, "And?", history, **options)
    again, _ = nano.chat(processor, page, "And?", list(history), **{**options, "remember": False})
    assert second == third == again


def test_grids_without_geometry_are_refused(nano, processor, asked):
    page, inputs, _, _ = asked
    few = processor(page, "<image>\nRead.", images_kwargs={"preset": "default", "drop_blank": True})
    with pytest.raises(ValueError, match="needs all tiles of a grid"):
        nano.kept_positions(**few, scm_select="blank")
    inputs = {name: value for name, value in inputs.items() if name != "tile_grids"}
    with pytest.raises(ValueError, match="tile_grids"):
        nano.kept_positions(**inputs, scm_select="blank")
