"""Chat with scale compression: pictures, tiles that the caller cut, later turns, the pipeline."""

import copy
import threading

import pytest
import torch
from conftest import ROOT, synthetic_picture
from transformers import AutoTokenizer, TextIteratorStreamer, pipeline


TILES = {"min_tiles": 2, "max_tiles": 4, "adaptive_min_tiles": 2, "adaptive_max_tiles": 3}
CHAT = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "Read the text."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def pictures():
    return [synthetic_picture(300, 200, 1), synthetic_picture(150, 320, 2)]


@pytest.fixture(scope="module")
def cut(processor, pictures):
    """Tiles of each picture: pixel_values, tile_counts and tile_grids."""
    return [processor.image_processor(picture, return_tensors="pt", **TILES) for picture in pictures]


@pytest.fixture
def sent(nano, monkeypatch):
    """The arguments of each `generate`, and under "kept" the detailed tokens of each picture that stay."""
    generate, calls = nano.generate, []
    names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "tile_counts",
        "tile_order",
        "scm_query_ends",
        "scm_queries",
    )

    def record(**options):
        kept = nano.kept_positions(**{name: options[name] for name in names if options.get(name) is not None})
        calls.append({**options, "kept": [k for row in zip(options["input_ids"], kept) for k in kept_by_picture(*row)]})
        return generate(**options)

    monkeypatch.setattr(nano, "generate", record)
    return calls


def kept_by_picture(ids: torch.Tensor, kept: torch.Tensor) -> list[list[int]]:
    """For each picture of a prompt which of its image tokens stay, counted from its first."""
    stays, runs = set(kept.tolist()), []
    for position, index in enumerate(ids.tolist()):
        if index == 379:
            if not runs or runs[-1][1] != position - 1:
                runs.append([position, position])
            runs[-1][1] = position
    return [[p - start for p in range(start, stop + 1) if p in stays] for start, stop in runs]


def test_tiles_of_the_chat_tests(cut):
    assert all(counts.min() > 0 for one in cut for counts in one["tile_counts"])


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_compresses(nano, processor, pictures, cut, sent):
    nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, use_scm=True, **CHAT)
    detailed, adaptive, thumbnail = cut[0]["tile_counts"][0].tolist()
    (kept,) = sent[0]["kept"]
    assert len([k for k in kept if k < 49 * detailed]) == int(49 * detailed * 0.5)
    assert [k for k in kept if k >= 49 * detailed] == list(range(49 * detailed, 49 * (detailed + adaptive + thumbnail)))


def test_chat_passes_the_settings_of_compression(nano, processor, pictures, cut, sent):
    options = {"images_kwargs": TILES, "use_scm": True, "scm_queries": "visual", **CHAT}
    nano.chat(processor, pictures[0], QUESTION, scm_keep_ratio=0.2, scm_layer=2, **options)
    assert (sent[0]["scm_keep_ratio"], sent[0]["scm_layer"], sent[0]["scm_queries"]) == (0.2, 2, "visual")


def test_chat_without_pictures_compresses_nothing(nano, processor):
    assert nano.chat(processor, None, "Hello", use_scm=True, **CHAT) == nano.chat(processor, None, "Hello", **CHAT)
    questions = ["Hello", "And you?"]
    assert nano.batch_chat(processor, None, questions, use_scm=True, **CHAT) == nano.batch_chat(
        processor, None, questions, **CHAT
    )


def test_chat_streams_with_compression(nano, processor, pictures):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {"images_kwargs": TILES, "use_scm": True, **CHAT}
    call = {"target": nano.chat, "args": (processor, pictures[0], QUESTION)}
    thread = threading.Thread(**call, kwargs={**options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == nano.chat(processor, pictures[0], QUESTION, **options)


def test_the_pipeline_answers_as_generate(nano, processor, pictures):
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    fine = copy.deepcopy(processor)
    for name, value in TILES.items():
        setattr(fine.image_processor, name, value)
    inputs = fine.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["tile_counts"][0, 0] > 0
    output = nano.generate(**inputs, use_scm=True, scm_keep_ratio=0.3, **CHAT)
    expected = fine.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    reader = pipeline("image-text-to-text", model=nano, processor=fine)
    settings = {"use_scm": True, "scm_keep_ratio": 0.3, **CHAT}
    answers = reader(text=messages, return_full_text=False, generate_kwargs=settings)
    assert answers[0]["generated_text"].strip() == expected.strip()


# --- later turns -----------------------------------------------------------------------------------------------------


def test_a_later_turn_keeps_what_the_first_kept(nano, processor, pictures, sent):
    options = {"images_kwargs": TILES, "use_scm": True, "return_history": True, "remember": False, **CHAT}
    _, history = nano.chat(processor, pictures[0], QUESTION, **options)
    later = "What is the total, in which currency is it, and who wrote the words above it?"
    nano.chat(processor, pictures[0], later, history=history, **options)
    assert sent[1]["kept"] == sent[0]["kept"]
    _, history = nano.chat(processor, pictures, f"<image>\n{later}", history=history, **options)
    nano.chat(processor, pictures, "And?", history=history, **options)
    assert sent[2]["kept"][0] == sent[0]["kept"][0]
    assert sent[3]["kept"] == sent[2]["kept"]
    del sent[3]["scm_query_ends"]
    names = ("input_ids", "attention_mask", "pixel_values", "tile_counts")
    to_the_end = nano.kept_positions(**{name: sent[3][name] for name in names})
    assert kept_by_picture(sent[3]["input_ids"][0], to_the_end[0]) != sent[3]["kept"]


def test_later_turns_of_a_batch_keep_what_they_kept_alone(nano, processor, pictures, sent):
    options = {"images_kwargs": TILES, "use_scm": True, "return_history": True, **CHAT}
    answers, histories = nano.batch_chat(
        processor, [pictures[0], None, pictures[1]], [QUESTION, "Hello", "Say."], **options
    )
    questions = ["And what is below it?", "Well?", "Is it so? Say it in one word, or in two."]
    again, _ = nano.batch_chat(processor, [pictures[0], None, pictures[1]], questions, history=histories, **options)
    assert sent[1]["kept"] == sent[0]["kept"]
    for row, picture in ((0, pictures[0]), (2, pictures[1])):
        alone_answer, _ = nano.chat(processor, picture, questions[row], history=histories[row], **options)
        assert alone_answer == again[row]
    assert [sent[2]["kept"][0], sent[3]["kept"][0]] == sent[0]["kept"]


# --- tiles cut by the caller -----------------------------------------------------------------------------------------


def test_all_orders_of_tiles_compress_as_the_processor_does(nano, processor, tokenizer, pictures, cut, sent):
    tiles, grid = cut[0]["pixel_values"], cut[0]["tile_grids"][0, :2]
    ratio, config = tuple(grid.tolist()), dict(CHAT)
    answers = {
        nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, use_scm=True, **CHAT),
        nano.chat(tokenizer, tiles, ratio, QUESTION, config, True),
        nano.chat(tokenizer, tiles, list(ratio), QUESTION, config, use_scm=True),
        nano.chat(tokenizer, tiles, grid, QUESTION, config, True, None, False, [len(tiles)]),
        nano.chat(tokenizer, tiles, QUESTION, config, use_scm=True, target_aspect_ratio=ratio),
        nano.chat(processor, tiles, QUESTION, config, use_scm=True, target_aspect_ratio=[ratio]),
        nano.chat(
            tokenizer, pixel_values=tiles, target_aspect_ratio=grid[None], question=QUESTION, use_scm=True, **CHAT
        ),
        nano.batch_chat(tokenizer, tiles, [QUESTION], config, [len(tiles)], use_scm=True, target_aspect_ratio=[ratio])[
            0
        ],
    }
    assert len(answers) == 1
    assert config == CHAT
    assert all(call["kept"] == sent[0]["kept"] for call in sent)


def test_several_pictures_as_tiles(nano, processor, tokenizer, pictures, cut, sent):
    tiles = torch.cat([one["pixel_values"] for one in cut])
    grids = [tuple(one["tile_grids"][0, :2].tolist()) for one in cut]
    question, counts = "Image-1: <image>\nImage-2: <image>\nCompare.", [len(one["pixel_values"]) for one in cut]
    nano.chat(processor, pictures, "Compare.", images_kwargs=TILES, use_scm=True, **CHAT)
    nano.chat(tokenizer, tiles, grids, question, dict(CHAT), True, num_patches_list=counts)
    assert torch.equal(sent[0]["input_ids"], sent[1]["input_ids"])
    assert torch.equal(sent[0]["tile_counts"], sent[1]["tile_counts"])
    assert sent[0]["kept"] == sent[1]["kept"]


def test_adaptive_tiles_first(nano, tokenizer, cut, sent):
    detailed, adaptive, thumbnail = cut[0]["tile_counts"][0].tolist()
    tiles = cut[0]["pixel_values"]
    swapped = torch.cat([tiles[detailed : detailed + adaptive], tiles[:detailed], tiles[detailed + adaptive :]])
    ratio = tuple(cut[0]["tile_grids"][0, :2].tolist())
    nano.chat(tokenizer, swapped, ratio, QUESTION, dict(CHAT), True, tile_order="adaptive_first")
    (kept,) = sent[0]["kept"]
    lost = sorted(set(range(49 * len(tiles))) - set(kept))
    assert len(lost) == 49 * detailed - int(49 * detailed * 0.5)
    assert 49 * adaptive <= lost[0]
    assert lost[-1] < 49 * (adaptive + detailed)


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_grid_of_one_tile_means_no_detailed_tiles(nano, tokenizer, cut, tiles, sent, monkeypatch):
    some = cut[0]["pixel_values"][-tiles:]
    compressed = nano.chat(tokenizer, some, (1, 1), QUESTION, dict(CHAT), True)
    assert sent[0]["tile_counts"].tolist() == [[0, tiles - 1, 1]]
    assert sent[0]["kept"] == [list(range(49 * tiles))]
    monkeypatch.undo()
    assert compressed == nano.chat(tokenizer, some, (1, 1), QUESTION, dict(CHAT), False)


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pass target_aspect_ratio=\(columns, rows\)"),
        ({"target_aspect_ratio": (2,)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": (2, 1, 1)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": (0, 2)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": (1.5, 2.0)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": [(1, 2), (1, 2)]}, "for each of 1 pictures"),
        ({"target_aspect_ratio": (9, 9)}, "81 detailed tiles, but the picture has"),
        ({"target_aspect_ratio": (2, 1), "tile_order": "sideways"}, "'detailed_first' or 'adaptive_first'"),
    ],
)
def test_tiles_whose_detailed_grid_is_unclear(nano, tokenizer, cut, options, message):
    with pytest.raises(ValueError, match=message):
        nano.chat(tokenizer, cut[0]["pixel_values"], QUESTION, dict(CHAT), use_scm=True, **options)


def test_chat_refuses_settings_without_compression(nano, processor, pictures):
    with pytest.raises(ValueError, match="scm_keep_ratio works only with use_scm=True"):
        nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, scm_keep_ratio=0.5)
    with pytest.raises(ValueError, match="belongs to tiles that you cut yourself"):
        nano.chat(processor, pictures[0], QUESTION, use_scm=True, tile_order="adaptive_first")


def test_chat_sets_the_query_ends_itself(nano, processor, pictures):
    with pytest.raises(ValueError, match="sets scm_query_ends itself"):
        nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, use_scm=True, scm_query_ends=[40], **CHAT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_scm": True, "scm_keep_ratio": 1.5}, "scm_keep_ratio must be above 0 and at most 1"),
        ({"use_scm": True, "scm_keep_ratio": 0}, "scm_keep_ratio must be above 0"),
        ({"use_scm": True, "scm_select": "best"}, "there is no 'best'"),
        ({"use_scm": True, "scm_select": {"name": "block", "budget": "tile"}}, "blocks are whole"),
        ({"use_scm": True, "scm_select": "mass", "scm_keep_ratio": 0.5}, "decides itself how many"),
        ({"scm_select": "token"}, "works only with use_scm=True"),
        ({"use_scm": True, "scm_select": "blank", "images_kwargs": {"drop_blank": True}}, "needs all tiles of a grid"),
        ({"use_scm": True, "images_kwargs": {"tiling": "slices"}}, "slices of their own size"),
    ],
)
def test_what_cannot_work_is_named_before_an_image_is_opened(nano, processor, options, said):
    for call, images, questions in ((nano.chat, "missing.png", "Read."), (nano.batch_chat, ["missing.png"], ["Read."])):
        with pytest.raises(ValueError, match=said):
            call(processor, images, questions, **options)
