"""Pictures in `chat` and the processor: tile budgets, prompts that are too long, numbering, lists that hold none."""

import re

import numpy as np
import pytest
import torch
from chat_helpers import CHAT, QUESTION, TILES, prompt_of, tile_numbers, turn, watch
from conftest import synthetic_picture

from minimonkey.tiling import PRESETS, msac_grids, share_tile_budget, tile_counts


SIZES = [(300, 200), (200, 300), (500, 40), (64, 64), (40, 400), (333, 111)]


@pytest.fixture(scope="module")
def picture():
    return synthetic_picture(90, 80, 1)


# --- tile budgets ----------------------------------------------------------------------------------------------------


RANGES = [*PRESETS.values(), (1, 1, 1, 1), (2, 2, 2, 2), (1, 40, 1, 1), (1, 1, 1, 40), (6, 6, 1, 1), (1, 2, 9, 9)]


@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_shares_keep_the_budget(ranges):
    sizes = [(1000, 700), (100, 1000), (37, 37), (4000, 300), (448, 449)]
    largest = max(sum(tile_counts(*msac_grids(*size, *ranges))) for size in sizes)
    for images in range(1, 6):
        before = 0
        for budget in range(images, 60):
            shared = share_tile_budget(budget, images, ranges)
            assert 1 <= shared[0] <= shared[1] <= ranges[1]
            assert 1 <= shared[2] <= shared[3] <= ranges[3]
            tiles = [sum(tile_counts(*msac_grids(*size, *shared))) for size in sizes]
            assert images * max(tiles) <= budget
            assert shared[1] + shared[3] >= before  # a larger budget never gives less
            before = shared[1] + shared[3]
        assert share_tile_budget(10_000, images, ranges) == ranges
    assert share_tile_budget(sum(ranges[1::2]) + 1, 1, ranges) == ranges
    assert share_tile_budget(sum(ranges[1::2]), 1, ranges, use_thumbnail=False) == ranges
    assert largest <= sum(ranges[1::2]) + 1


@pytest.mark.parametrize(("budget", "images"), [(0, 1), (-3, 1), (1, 2), (4, 5)])
def test_a_budget_that_gives_pictures_nothing(budget, images):
    with pytest.raises(ValueError, match=f"tile_budget of {budget} .* each of {images} pictures .*at least {images}"):
        share_tile_budget(budget, images, (1, 12, 1, 7))


@pytest.mark.parametrize("budget", [3, 5, 8, 20, 200])
def test_a_budget_without_thumbnails(nano, processor, sent, budget):
    options = {**TILES, "use_thumbnail": False}
    for count in (1, 3):
        pictures = [synthetic_picture(*size, 1) for size in SIZES[:count]]
        nano.chat(processor, pictures, QUESTION, images_kwargs=options, tile_budget=budget)
        assert count <= sent["pixel_values"].shape[0] <= budget
    assert budget < 200 or sent["pixel_values"].shape[0] == sum(tile_numbers(processor, pictures, **options))


@pytest.mark.parametrize("images_kwargs", [{}, TILES, {"preset": "docvqa"}, {"preset": "default", "max_tiles": 20}])
@pytest.mark.parametrize("budget", [3, 5, 8, 20, 200])
def test_a_budget_of_pictures(nano, processor, sent, images_kwargs, budget):
    for count in (1, 3):
        pictures = [synthetic_picture(*size, 1) for size in SIZES[:count]]
        nano.chat(processor, pictures, QUESTION, images_kwargs=images_kwargs, tile_budget=budget)
        tiles = sent["pixel_values"].shape[0]
        assert count <= tiles <= budget
        whole = sum(tile_numbers(processor, pictures, **images_kwargs))
        assert tiles <= whole or images_kwargs == {}
        if budget == 200:
            assert tiles == whole
        assert (sent["input_ids"] == processor.image_token_id).sum() == 49 * tiles


def test_a_budget_of_a_batch_and_of_later_turns(nano, processor, sent):
    pictures = [synthetic_picture(*size, 1) for size in SIZES]
    options = {"images_kwargs": TILES, "tile_budget": 6}
    nano.batch_chat(processor, [pictures[0], pictures[:2], None], ["a", "b", "c"], **options)
    per_row = (sent["input_ids"] == processor.image_token_id).sum(dim=1) // 49
    assert all(0 < tiles <= 6 for tiles in per_row.tolist()[:2])
    assert per_row[2] == 0
    history = [("<image>\nRead.", "Yes")]
    nano.chat(processor, pictures[:2], "<image> And?", history=history, **options)
    assert (sent["input_ids"] == processor.image_token_id).sum() // 49 <= 6


def test_a_budget_with_scm_and_other_options(nano, processor, sent):
    picture = synthetic_picture(300, 200, 1)
    images_kwargs = {"size": {"height": 32, "width": 32}, "do_normalize": False}
    nano.chat(processor, picture, QUESTION, tile_budget=7, images_kwargs={**TILES, **images_kwargs}, use_scm=True)
    assert sent["pixel_values"].shape[1:] == (3, 32, 32)
    assert sent["tile_counts"].sum() <= 7
    assert images_kwargs == {"size": {"height": 32, "width": 32}, "do_normalize": False}


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (None, {}, "there are none"),
        ("tiles", {}, "there are none"),
        (2, {"tile_budget": 1}, "tile_budget of 1 .*each of 2 pictures"),
        (1, {"tile_budget": 0}, "tile_budget must be a whole number of at least 1"),
        (1, {"tile_budget": 2.5}, "tile_budget|integer"),
        (1, {"tile_budget": 7.0}, "tile_budget|integer"),
    ],
)
def test_budgets_that_cannot_work(nano, processor, picture, images, options, message):
    images = torch.zeros(1, 3, 112, 112) if images == "tiles" else images and [picture] * images
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, images, QUESTION, **{"tile_budget": 4, **CHAT, **options})


# --- prompts that are too long ---------------------------------------------------------------------------------------


def length_of(nano, processor, images, **options) -> int:
    with pytest.raises(ValueError, match=r"The prompt has \d+ tokens") as caught:
        nano.chat(processor, images, QUESTION, max_prompt_tokens=1, **options)
    return int(re.search(r"has (\d+) tokens", str(caught.value))[1])


def test_prompts_that_are_too_long_are_refused_before_the_vision_tower(nano, processor, sent):
    picture = synthetic_picture(300, 200, 1)
    options = {"images_kwargs": TILES, **CHAT}
    (tiles,) = tile_numbers(processor, picture, **TILES)
    with watch(nano) as work:
        length = length_of(nano, processor, picture, **options)
        with pytest.raises(ValueError, match=rf"{tiles} tiles of pictures take {49 * tiles}.*tile_budget={tiles - 1}"):
            nano.chat(processor, picture, QUESTION, max_prompt_tokens=length - 1, return_history=True, **options)
        with pytest.raises(ValueError, match=f"limit is {length - 1} .max_prompt_tokens"):
            nano.batch_chat(processor, [picture, None], [QUESTION, "a"], max_prompt_tokens=length - 1, **options)
    assert (work.read, work.tiles) == ([], 0)
    assert not sent
    nano.chat(processor, picture, QUESTION, max_prompt_tokens=length, **options)
    assert sent["input_ids"].shape[1] == length


def test_the_advice_to_cut_less_works(nano, processor, sent):
    pictures = [synthetic_picture(*size, 1) for size in SIZES[:2]]
    for limit in (250, 400, 600):
        with pytest.raises(ValueError, match="tile_budget=") as caught:
            nano.chat(processor, pictures, QUESTION, images_kwargs=TILES, max_prompt_tokens=limit, **CHAT)
        budget = int(re.search(r"tile_budget=(\d+)", str(caught.value))[1])
        options = {"images_kwargs": TILES, "max_prompt_tokens": limit, "tile_budget": budget}
        nano.chat(processor, pictures, QUESTION, **options)
        assert sent["input_ids"].shape[1] <= limit


def test_the_context_length(nano, processor, sent):
    assert nano.config.context_length == 4096
    with pytest.raises(ValueError, match="limit is 4096 .the context length"):
        nano.chat(processor, None, "word 12 " * 2000)
    nano.chat(processor, None, "word 12 " * 2000, max_prompt_tokens=100_000)
    assert sent["input_ids"].shape[1] > 4096


# --- numbering -------------------------------------------------------------------------------------------------------


def test_new_pictures_are_numbered_on(nano, processor, picture, sent):
    nano.chat(processor, [picture] * 2, "Compare.")
    assert prompt_of(sent, processor) == turn("Image-1: [49]\nImage-2: [49]\nCompare.")
    history = [("Image-1: <image>\nImage-2: <image>\nCompare.", "Same.")]
    nano.chat(processor, [picture] * 4, "And?", history=history)
    assert prompt_of(sent, processor).endswith(turn("Image-3: [49]\nImage-4: [49]\nAnd?"))
    _, longer = nano.chat(processor, [picture] * 3, "And?", history=history, return_history=True)
    assert longer == [*history, ("<image>\nAnd?", "")]
    nano.chat(processor, [picture] * 3, "And <image> here?", history=history)
    assert prompt_of(sent, processor).endswith(turn("And [49] here?"))


# --- no pictures -----------------------------------------------------------------------------------------------------


NOTHING = [[None], [[]], [[None]], [(), ()], np.empty((0, 28, 28, 3), np.uint8), torch.empty(0, 3, 112, 112)]


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
@pytest.mark.parametrize("name", ["images", "videos"])
def test_what_holds_no_picture_is_refused(nano, processor, sent, nothing, name):
    given = {"images": None, name: nothing}
    with pytest.raises(ValueError, match="shows nothing|at least one tile"):
        nano.chat(processor, question="Read.", **given)
    if name == "videos" or not isinstance(nothing, torch.Tensor):
        with pytest.raises(ValueError, match="shows nothing"):
            nano.batch_chat(processor, questions=["Read."], **(given | {name: [nothing]}))
    with pytest.raises(ValueError, match="shows nothing|2 lists of images were given for 1 texts"):
        processor(text="Read.", **given)
    assert not sent


def test_a_missing_picture_among_others_is_refused(nano, processor, sent):
    picture = synthetic_picture(40, 40, 0)
    for images in ([picture, None], [picture, []], [[picture], [None]]):
        with pytest.raises(ValueError, match="shows nothing"):
            nano.chat(processor, images, "Read.")
        with pytest.raises(ValueError, match="shows nothing|2 lists of images were given for 1 texts"):
            processor(images=images, text="<image>")
    assert not sent


def test_an_empty_list_means_no_pictures(nano, processor, sent):
    for nothing in (None, [], ()):
        nano.chat(processor, nothing, "Read.", videos=nothing)
        assert sent["pixel_values"] is None
        assert "pixel_values" not in processor(images=nothing, text="Read.", videos=nothing)
        for placeholder in ("<image>", "<video>"):
            with pytest.raises(ValueError, match=f"1 {placeholder} placeholders, but 0"):
                nano.chat(processor, nothing, f"{placeholder} Read.", videos=nothing)
    nano.batch_chat(processor, [None, []], ["One?", "Two?"], videos=[[], None])
    assert sent["pixel_values"] is None
    with pytest.raises(ValueError, match="one entry for each of the 2 questions"):
        nano.batch_chat(processor, [], ["One?", "Two?"])


def test_texts_of_a_batch_may_have_no_pictures(processor):
    picture, video = synthetic_picture(40, 40, 0), np.zeros((2, 30, 30, 3), np.uint8)
    assert len(processor(images=[[picture], []], text=["<image>", "Read."])["tile_counts"]) == 1
    assert len(processor(videos=[[], [video]], text=["Read.", "<video>"])["tile_counts"]) == 2


@pytest.mark.parametrize("counts", [[], [0], [1, 0], [-1, 2]])
def test_a_picture_of_no_tiles_is_refused(nano, processor, sent, counts):
    with pytest.raises(ValueError, match="at least one tile"):
        nano.chat(processor.tokenizer, torch.zeros(1, 3, 112, 112), "Read.", {}, num_patches_list=counts)
    assert not sent
