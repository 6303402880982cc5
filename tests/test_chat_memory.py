"""What a `chat` history remembers: later turns cost only what is new, and answer as if all were computed anew."""

import copy

import pytest
import torch
from chat_helpers import (
    CHAT,
    QUESTION,
    SCM,
    SETTINGS,
    TILES,
    ask,
    assert_equal,
    new_tokens,
    remembers,
    tile_numbers,
    tiny,
    watch,
    work_of,
)
from conftest import ROOT


SHORT = {"system_message": ""}


# --- the cost of a later turn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_later_turn_reads_only_what_is_new(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = work_of(model, small, pictures[0], QUESTION, **options)
    second = work_of(model, small, pictures[0], "And below?", first.answer.history, **options)
    third = work_of(model, small, pictures[0], "Why?", second.answer.history, **options)
    tiles = tile_numbers(small, pictures[0], **options.get("images_kwargs", {}))
    assert [first.tiles, second.tiles, third.tiles] == [*tiles, 0, 0]
    assert [first.scored, second.scored, third.scored] == [int("scm" in settings), 0, 0]
    for work, before, question in ((second, first, "And below?"), (third, second, "Why?")):
        ended = before.answer.token_ids[-1] == 375
        assert work.read[0] <= new_tokens(small, question) + (0 if ended else 1) + 2
        assert work.read[1:] == [1] * (len(work.answer.token_ids) - 1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_new_pictures_in_later_turns(model, small, pictures, settings):
    options = SETTINGS[settings]
    history, tiles = None, []
    for count in (1, 2, 3):
        work = work_of(model, small, pictures[:count], "Read.", history, **options)
        history = work.answer.history
        tiles.append(work.tiles)
    assert tiles == tile_numbers(small, pictures, **options.get("images_kwargs", {}))
    last = work_of(model, small, pictures, "And?", history, **options)
    assert last.tiles == 0
    assert last.read[0] < 40


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_first_turn_without_a_picture(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = work_of(model, small, None, "Hello", **options)
    second = work_of(model, small, pictures[1], "<image>\nAnd this?", first.answer.history, **options)
    third = work_of(model, small, pictures[1:], "Or <image> this?", second.answer.history, **options)
    fourth = work_of(model, small, pictures[1:], "Which?", third.answer.history, **options)
    assert first.tiles == fourth.tiles == 0
    assert min(second.tiles, third.tiles) > 0
    assert fourth.read[0] < 40


@pytest.mark.parametrize("use_scm", [False, True])
def test_text_alone(model, small, use_scm):
    first = work_of(model, small, None, "Hello", use_scm=use_scm)
    second = work_of(model, small, None, "Well?", first.answer.history, use_scm=use_scm)
    assert second.read[0] <= new_tokens(small, "Well?") + 3


def test_several_pictures_in_one_turn_and_the_same_picture_again(model, small, pictures):
    first = work_of(model, small, [pictures[0], pictures[0], pictures[1]], "Compare.", **SCM)
    second = work_of(
        model,
        small,
        [pictures[0], pictures[0], pictures[1], pictures[0]],
        "Again <image>?",
        first.answer.history,
        **SCM,
    )
    assert first.tiles == sum(tile_numbers(small, pictures[:2], **TILES))
    assert second.tiles == 0


@pytest.mark.parametrize("order", ["mini_monkey", "internvl", "keyword"])
@pytest.mark.parametrize("use_scm", [False, True])
@pytest.mark.parametrize("tile_order", ["detailed_first", "adaptive_first"])
def test_tiles_in_the_published_orders(model, small, pictures, order, use_scm, tile_order):
    cut = [small.image_processor(picture, return_tensors="pt", **TILES) for picture in pictures[:2]]
    grids = [tuple(one["tile_grids"][0, :2].tolist()) for one in cut]
    config, tokenizer = dict(CHAT), small.tokenizer

    def chat(count, question, history, **options):
        tiles = torch.cat([one["pixel_values"] for one in cut[:count]])
        options |= {"num_patches_list": [len(one["pixel_values"]) for one in cut[:count]], "history": history}
        options |= {"use_scm": use_scm, "tile_order": tile_order, "return_dict": True}
        if order == "mini_monkey":
            use = options.pop("use_scm")
            return model.chat(tokenizer, tiles, grids[:count], question, config, use, **options)
        if order == "internvl":
            return model.chat(tokenizer, tiles, question, config, target_aspect_ratio=grids[:count], **options)
        options |= {"pixel_values": tiles, "target_aspect_ratio": torch.tensor(grids[:count])}
        return model.chat(tokenizer=tokenizer, question=question, generation_config=config, **options)

    history = None
    for count, question in ((1, "Read."), (1, "And?"), (2, "This: <image>"), (2, "Why?")):
        with watch(model) as work:
            answer = chat(count, question, history)
        expected = chat(count, question, None if history is None else list(history), remember=False)
        assert_equal(answer, expected)
        history = answer.history
        if question in ("And?", "Why?"):
            assert work.tiles == 0
            assert work.read[0] < 40
    assert remembers(history)


def test_return_history_by_position(model, small, pictures):
    cut = small.image_processor(pictures[0], return_tensors="pt", **TILES)
    tiles, grid, config = cut["pixel_values"], cut["tile_grids"][0, :2], dict(CHAT)
    answer, history = model.chat(small.tokenizer, tiles, grid, QUESTION, config, True, None, True)
    with watch(model) as work:
        again, longer = model.chat(small.tokenizer, tiles, grid, "And?", config, True, history, True)
    assert (work.tiles, len(longer)) == (0, 2)
    expected = model.chat(small.tokenizer, tiles, grid, "And?", config, True, list(history), remember=False)
    assert again == expected
    answer, history = model.chat(small.tokenizer, tiles, QUESTION, config, None, True)
    with watch(model) as work:
        again, longer = model.chat(small.tokenizer, tiles, "And?", config, history, True)
    assert (work.tiles, len(longer)) == (0, 2)
    assert again == model.chat(small.tokenizer, tiles, "And?", config, list(history), remember=False)


# --- other ways to generate ------------------------------------------------------------------------------------------


MODES = {
    "beams": {"num_beams": 3},
    "returned sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "beams and sequences": {"num_beams": 2, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "without cache": {"use_cache": False},
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "stop strings": {"stop_strings": ["e", "zz"]},
    "least length": {"min_new_tokens": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_other_decoding_in_a_middle_turn(model, small, pictures, mode, settings):
    options = SETTINGS[settings]
    first = ask(model, small, pictures[0], QUESTION, **options)
    second = ask(model, small, pictures[0], "And?", first.history, **options, **MODES[mode])
    third = ask(model, small, pictures[0], "Why?", second.history, **options)
    assert third.history.memory is not None
    work = work_of(model, small, pictures[0], "So?", third.history, **options)
    assert work.read[0] < 40
    start = ask(model, small, pictures[0], QUESTION, **options, **MODES[mode])
    ask(model, small, pictures[0], "Well?", start.history, **options, **MODES[mode])


def test_other_decoding_of_text_alone(model, small):
    history = None
    for mode in ({}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {}):
        options = {**CHAT, **mode}
        expected = model.chat(small, None, "Hello", history=history and list(history), remember=False, **options)
        answer, longer = model.chat(small, None, "Hello", history=history, return_history=True, **options)
        assert answer == expected
        history = longer


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_sampling_with_a_seed(model, small, pictures, settings):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 40, **SETTINGS[settings]}
    history = ask(model, small, pictures[0], QUESTION, **SETTINGS[settings]).history
    answers = []
    for given, remember in ((history, True), (list(history), False)):
        torch.manual_seed(3)
        answers.append(
            model.chat(
                small,
                pictures[0],
                "And?",
                history=given,
                remember=remember,
                return_dict=True,
                max_new_tokens=12,
                **options,
            )
        )
    assert_equal(*answers)


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_limits_of_the_whole_length(model, small, pictures, settings):
    options = {"max_new_tokens": None, **SETTINGS[settings]}
    first = ask(model, small, pictures[2], QUESTION, **{**options, "max_new_tokens": 5})
    ids = {}
    for name in ("max_length", "min_length"):
        prompt_length = len(model_prompt(model, small, pictures[2], "Why?", first.history, options))
        limit = {"max_length": prompt_length + 4}
        if name == "min_length":
            limit = {"max_length": prompt_length + 9, "min_length": prompt_length + 7}
        ids[name] = ask(model, small, pictures[2], "Why?", first.history, **options, **limit).token_ids
    assert len(ids["max_length"]) <= 4
    assert 7 <= len(ids["min_length"]) <= 9


def model_prompt(model, processor, images, question, history, options) -> list[int]:
    """The ids of a prompt, as the streamer sees them."""

    class Seen(Exception):  # noqa: N818
        pass

    class Streamer:
        def put(self, value):
            raise Seen(value)

        def end(self):
            pass

    with pytest.raises(Seen) as caught:
        model.chat(
            processor,
            images,
            question,
            history=list(history),
            remember=False,
            streamer=Streamer(),
            **{**CHAT, **options, "max_new_tokens": 1},
        )
    return caught.value.args[0][0].tolist()


def test_configurations_of_generation(model, small, pictures):
    history = None
    for question in (QUESTION, "And?", "Why?"):
        config = {"max_new_tokens": 4, "do_sample": False}
        answer = model.chat(small, pictures[2], question, history=history, generation_config=config, return_dict=True)
        plain = None if history is None else list(history)
        expected = model.chat(
            small, pictures[2], question, plain, generation_config=config, return_dict=True, remember=False
        )
        assert_equal(answer, expected)
        history = answer.history
        assert config == {"max_new_tokens": 4, "do_sample": False}


# --- language models -------------------------------------------------------------------------------------------------


TINY_TILES = {"images_kwargs": TILES, **SHORT}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "phi3": {"model_type": "phi3"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mono": {"model_type": "llama", "visual_experts": True},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "yarn": {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": 16},
    "mistral_wide": {"model_type": "mistral", "head_dim": 16, "sliding_window": 200},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_scm", [False, True])
def test_families_of_language_models(small, pictures, family, use_scm):
    model, options = tiny(**FAMILIES[family]), {**TINY_TILES, "use_scm": use_scm, "max_new_tokens": 6}
    first = ask(model, small, pictures[0], QUESTION, **options)
    second = work_of(model, small, pictures[0], "And?", first.history, **options)
    third = ask(model, small, pictures[:2], "Or <image>?", second.answer.history, **options)
    fourth = work_of(model, small, pictures[:2], "Why?", third.history, **options)
    assert second.tiles == fourth.tiles == 0
    has_small_windows = FAMILIES[family].get("sliding_window") == 16
    assert (fourth.read[0] < 50) == (not has_small_windows)


def test_a_window_that_fills_up_in_the_course_of_a_conversation(small):
    model = tiny(model_type="mistral", head_dim=16, sliding_window=96)
    history, read = None, []
    for question in ("Hi", "And?", "Why?", "So?", "Hm?", "Well then?"):
        work = work_of(model, small, None, question, history, **SHORT)
        history = work.answer.history
        read.append(work.read[0])
    assert max(read[1:3]) < 50
    assert min(read[4:]) > 96


DYNAMIC = {
    "model_type": "llama",
    "max_position_embeddings": 100,
    "rope_parameters": {"rope_type": "dynamic", "factor": 9.0, "rope_theta": 1e4},
}
LONG = {
    "model_type": "phi3",
    "max_position_embeddings": 1000,
    "original_max_position_embeddings": 100,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 100,
    },
}


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
@pytest.mark.parametrize("new", [4, 40])
@pytest.mark.parametrize("with_picture", [False, True])
def test_ropes_that_change_with_the_length(small, pictures, rope, new, with_picture):
    """Dynamic ropes remember the longest sequence, so that what is computed anew has a model of its own."""
    remembering, history, read, lengths = tiny(**rope), None, [], []
    images = pictures[2] if with_picture else None
    options = {**SHORT, "max_new_tokens": new}
    for question in ("Hi", "And?", "Why?", "So?", "Hm?"):
        fresh = tiny(**rope)
        plain = None if history is None else list(history)
        chat = {**CHAT, **options, "return_dict": True}
        expected = fresh.chat(small, images, question, history=plain, remember=False, **chat)
        with watch(remembering) as work:
            answer = remembering.chat(small, images, question, history=history, **chat)
        assert_equal(answer, expected)
        history = answer.history
        read.append(work.read[0])
        lengths.append(len(model_prompt(fresh, small, images, question, history[:-1], options)))
    assert lengths[-1] > 100
    for one, length in zip(read[1:], lengths[1:]):
        assert one == length if length > 100 else one < length
    short = [length for length in lengths[1:] if length <= 100]
    assert short or new == 40


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["tiles", "scm"])
def test_bfloat16(nano, processor, pictures, settings):
    own, options = copy.deepcopy(nano).to(torch.bfloat16), {**CHAT, **SETTINGS[settings], "return_dict": True}
    first = own.chat(processor, pictures[0], QUESTION, **options)
    second = own.chat(processor, pictures[:2], "And <image>?", history=first.history, **options)
    expected = own.chat(processor, pictures[:2], "And <image>?", list(first.history), remember=False, **options)
    assert second.token_ids[0] == expected.token_ids[0]
    assert abs(second.log_probabilities[0] - expected.log_probabilities[0]) < 0.5


def test_the_example_picture(nano, processor):
    """What a user does first."""
    path = str(ROOT / "assets" / "example.png")
    first = work_of(nano, processor, path, QUESTION, max_new_tokens=60)
    second = work_of(nano, processor, path, "What is the last word?", first.answer.history, max_new_tokens=20)
    assert first.answer.text
    assert second.tiles == 0
    assert second.read[0] == new_tokens(processor, "What is the last word?")
