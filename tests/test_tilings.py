"""Other rules than Mini-Monkey's for the grids of an image, as users choose them: image processor, processor, chat."""

import numpy as np
import pytest
import torch
from conftest import synthetic_picture
from image_helpers import PUBLISHED, SIDE, square
from PIL import Image

from minimonkey.tiling import PRESETS, TILINGS, choose_grids


SIZES = [(640, 480), (480, 640), (20, 800), (61, 59), (33, 70)]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("size", SIZES)
def test_both_back_ends_cut_by_the_rule_and_count_without_pixels(either, tiling, size):
    options = {**PUBLISHED, "min_tiles": 1, "tiling": tiling, "size": square(SIDE)}
    inputs = either(Image.new("RGB", size), **options)
    detailed, adaptive = choose_grids(*size, (1, 12, 3, 7), SIDE, tiling)
    assert tuple(inputs["tile_grids"][0]) == (*detailed, *adaptive)
    assert either.get_number_of_image_patches(size[1], size[0], options) == len(inputs["pixel_values"])


@pytest.mark.parametrize("preset", ["internvl", "minicpm_v", "bluelm_v", "docvqa"])
def test_a_preset_brings_its_tiling(either, preset):
    tilings = {"internvl": "internvl", "minicpm_v": "logscore", "bluelm_v": "relaxed", "docvqa": "msac"}
    for size in SIZES:
        (grids,) = either(Image.new("RGB", size), preset=preset, size=square(SIDE))["tile_grids"]
        expected = choose_grids(*size, PRESETS[preset], SIDE, tilings[preset])
        assert tuple(grids) == tuple(sum(expected, ()))
    (grids,) = either(Image.new("RGB", (61, 59)), preset=preset, tiling="logscore", size=square(SIDE))["tile_grids"]
    assert tuple(grids[:2]) == choose_grids(61, 59, PRESETS[preset], SIDE, "logscore")[0]


def test_alpha_reaches_the_rule(either):
    options = {"preset": "bluelm_v", "size": square(384)}
    grids = [
        tuple(either(Image.new("RGB", (385, 385)), relaxed_alpha=alpha, **options)["tile_grids"][0])
        for alpha in (0.1, 0)
    ]
    assert grids == [(1, 1, 1, 1), (2, 2, 1, 1)]


def test_a_tiling_is_saved_and_loaded(either, tmp_path):
    processor_class = type(either)
    processor_class(tiling="relaxed", relaxed_alpha=0.2).save_pretrained(tmp_path)
    again = processor_class.from_pretrained(tmp_path)
    assert (again.tiling, again.relaxed_alpha) == ("relaxed", 0.2)
    by_preset = processor_class(preset="minicpm_v")
    assert (by_preset.tiling, by_preset.max_tiles) == ("logscore", 9)


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_prompt_has_as_many_image_tokens_as_its_tiles(processor, tiling):
    options = {"preset": "default", "tiling": tiling}
    inputs = processor(synthetic_picture(300, 200, 1), "<image>\nRead.", images_kwargs=options)
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert tokens == 49 * len(inputs["pixel_values"])
    data = processor._get_num_multimodal_tokens(image_sizes=[(200, 300)], images_kwargs=options)
    assert data.num_image_tokens == [tokens + 2]


def test_tilings_of_a_tile_budget(nano, processor, sent):
    picture = synthetic_picture(300, 200, 1)
    for preset, budget in (("minicpm_v", 4), ("bluelm_v", 3), ("default", 5)):
        nano.chat(processor, picture, "Read.", images_kwargs={"preset": preset}, tile_budget=budget)
        assert len(sent["pixel_values"]) <= budget
        detailed, _ = choose_grids(300, 200, (1, budget - 1, 1, 1), 112, "logscore")
        if preset == "minicpm_v":
            assert len(sent["pixel_values"]) == detailed[0] * detailed[1] + 1


@pytest.mark.parametrize("budget", [49, 120, 49 * 5, 49 * 13, 49 * 60])
def test_a_token_budget_is_filled_with_tiles_and_not_exceeded(nano, processor, sent, budget):
    images = [synthetic_picture(300, 200, 1), synthetic_picture(90, 500, 2)]
    for count in (1, 2) if budget >= 98 else (1,):
        nano.chat(processor, images[:count], "Read.", token_budget=budget)
        tokens = int((sent["input_ids"] == processor.image_token_id).sum())
        assert tokens == 49 * len(sent["pixel_values"]) <= budget
        if count == 1 and 49 * 5 <= budget <= 49 * 13:
            assert tokens > budget / 3
    nano.batch_chat(processor, images, ["Read."] * 2, token_budget=budget)
    assert ((sent["input_ids"] == processor.image_token_id).sum(dim=1) <= budget).all()
    nano.chat(processor, images[0], "Read.", token_budget=49 * 9, images_kwargs={"preset": "default", "tiling": "msac"})
    assert len(sent["pixel_values"]) <= 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 48}, "A token_budget of 48 holds no tile; one has 49 tokens"),
        ({"token_budget": 0}, "token_budget must be a whole number"),
        ({"token_budget": 490, "tile_budget": 3}, "neither with tile_budget"),
        ({"token_budget": 490, "images_kwargs": {"size": square(56)}}, "nor with a tile size"),
    ],
)
def test_token_budgets_that_cannot_work(nano, processor, options, message):
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, synthetic_picture(90, 80, 1), "Read.", **options)


def test_frames_of_videos_follow_the_tiling(processor):
    frames = [np.asarray(synthetic_picture(300, 200, seed)) for seed in (1, 2)]
    inputs = processor(
        text="<video>\nSay.", videos=[frames], images_kwargs={"preset": "minicpm_v"}, videos_kwargs={"frame_tiles": 4}
    )
    expected = choose_grids(300, 200, (1, 4, 1, 1), 112, "logscore")
    assert inputs["tile_grids"].tolist() == [[*expected[0], *expected[1]]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiling": "square"}, "tiling is one of"),
        ({"relaxed_alpha": 2.0}, "relaxed_alpha is a share"),
        ({"max_scale": 0.5}, "max_scale is how much"),
    ],
)
def test_options_that_cannot_work_are_refused(either, nano, processor, options, message):
    with pytest.raises(ValueError, match=message):
        either(Image.new("RGB", (90, 90)), **options)
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, synthetic_picture(90, 80, 1), "Read.", images_kwargs=options)


def test_a_tiling_goes_into_images_kwargs(nano, processor):
    with pytest.raises(ValueError, match="tiling goes into images_kwargs"):
        nano.chat(processor, synthetic_picture(90, 80, 1), "Read.", tiling="logscore")


def test_compression_takes_the_detailed_tiles_of_any_tiling(nano, processor):
    inputs = processor(
        synthetic_picture(300, 200, 1), "<image>\nRead.", images_kwargs={"preset": "minicpm_v", "max_tiles": 4}
    )
    kept = nano.kept_positions(**inputs, scm_keep_ratio=0.5)[0]
    detailed = 49 * int(inputs["tile_counts"][0, 0])
    assert detailed and len(kept) == inputs["input_ids"].shape[1] - detailed + detailed // 2
    assert isinstance(kept, torch.Tensor)


# --- small images ----------------------------------------------------------------------------------------------------


def test_a_small_image_has_few_tiles():
    """By hand, in tiles of 112 px: what is lower than a tile is enlarged to one, and as much across."""
    ranges = PRESETS["default"]

    def grids(width: int, height: int, max_scale: float | None = 1.5):
        return choose_grids(width, height, ranges, 112, max_scale=max_scale)

    assert grids(100, 80) == ((1, 1), (1, 1))  # 1.4 times: 1.25 tiles across
    assert grids(100, 50) == ((2, 1), (1, 1))  # 2.24 times: two across
    assert grids(250, 60) == ((4, 1), (3, 1))  # 1.87 times: 4.2 across; published (5, 1)
    assert grids(448, 30) == ((12, 1), (7, 1)) == grids(448, 30, None)  # a line has as many as it is long
    assert grids(100, 50, None) == ((4, 2), (3, 2))  # published: four at least
    assert grids(160, 160) == ((2, 2), (1, 1)) and grids(300, 290) == grids(300, 290, None)


@pytest.mark.parametrize("tiling", ["msac", "internvl"])
def test_a_scale_bounds_both_grids_and_changes_no_large_image(tiling):
    for width in range(20, 900, 37):
        for height in range(20, 900, 41):
            grids = choose_grids(width, height, PRESETS["default"], 112, tiling, max_scale=1.5)
            scale = max(1.5, 112 / min(width, height))
            for columns, rows in grids:
                assert columns == 1 or columns * 112 <= scale * width + 1
                assert rows == 1 or rows * 112 <= scale * height + 1
            if min(width, height) >= 12 * 112 / 1.5:
                assert grids == choose_grids(width, height, PRESETS["default"], 112, tiling)


def test_a_scale_is_an_option_like_any_other(either, tmp_path):
    options = {"preset": "default", "size": square(112), "max_scale": 1.5}
    inputs = either(Image.new("RGB", (250, 60)), **options)
    assert [*inputs["tile_grids"][0]] == [4, 1, 3, 1] and len(inputs["pixel_values"]) == 8
    assert either.get_number_of_image_patches(60, 250, options) == 8
    height, width = either.largest_image(**options)
    unbounded = either.largest_image(**{**options, "max_scale": None})
    counts = either.get_number_of_image_patches
    assert counts(height, width, options) == counts(*unbounded, {**options, "max_scale": None})
    type(either)(max_scale=2).save_pretrained(tmp_path)
    assert type(either).from_pretrained(tmp_path).max_scale == 2
    assert type(either)().max_scale is None  # as published


def test_what_nano_ships_gives_a_word_fewer_tiles_than_a_page(shipped_processor):
    count = shipped_processor.image_processor.get_number_of_image_patches
    assert count(80, 100) == 1 < count(50, 100) < count(60, 250) < count(400, 300)
    assert count(60, 250) == count(60, 250, {"preset": "default"})
