"""`chat` and `batch_chat`: three argument orders, prompts with history, what goes to `generate`, and misuse."""

import copy

import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig


GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "Read the text."


@pytest.fixture(scope="module")
def tokenizer():
    """As the README of Mono-InternVL loads it."""
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True, use_fast=False)


@pytest.fixture(scope="module")
def picture():
    return Image.open(ROOT / "assets" / "example.png").convert("RGB")


@pytest.fixture(scope="module")
def tiles(processor, picture):
    return processor.image_processor(picture, return_tensors="pt")["pixel_values"]


def prompt_of(sent, tokenizer, row: int = 0) -> str:
    """The prompt that was sent, behind the system turn, image tokens shortened."""
    text = tokenizer.decode(sent["input_ids"][row]).replace("<IMG_CONTEXT>", "").replace("<pad>", "")
    return text.partition("<|im_end|>")[2]


def turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"


def test_all_orders_give_the_same_answer(nano, processor, tokenizer, picture, tiles):
    config = dict(GREEDY)
    answers = {
        nano.chat(processor, picture, QUESTION, **GREEDY),
        nano.chat(processor=processor, images=[picture], question=QUESTION, **GREEDY),
        nano.chat(processor, tiles, QUESTION, config),
        nano.chat(tokenizer, tiles, (1, 1), QUESTION, config),
        nano.chat(tokenizer, tiles, (1, 1), QUESTION, config, False, None, False, [1]),
        nano.chat(tokenizer, tiles, target_aspect_ratio=(1, 1), question=QUESTION, generation_config=config),
        nano.chat(tokenizer, tiles, None, QUESTION, GenerationConfig(**GREEDY)),
        nano.chat(tokenizer, tiles, QUESTION, config),
        nano.chat(tokenizer, tiles, question=QUESTION, generation_config=config, history=None, num_patches_list=[1]),
        nano.chat(
            tokenizer=tokenizer,
            pixel_values=tiles,
            target_aspect_ratio=torch.tensor([1, 1]),
            question=QUESTION,
            generation_config=config,
        ),
        nano.chat(tokenizer, tiles, QUESTION, config, None, True)[0],
        nano.batch_chat(processor, [picture], [QUESTION], **GREEDY)[0],
        nano.batch_chat(tokenizer, tiles, [QUESTION], config, [1])[0],
    }
    assert len(answers) == 1
    assert config == GREEDY


def test_first_turn_and_history(nano, processor, tokenizer, picture, sent):
    answer, history = nano.chat(processor, picture, QUESTION, return_history=True)
    assert (answer, history) == ("", [(f"<image>\n{QUESTION}", "")])
    assert prompt_of(sent, tokenizer) == turn(f"<img></img>\n{QUESTION}")
    assert (sent["input_ids"] == processor.image_token_id).sum() == 49


def test_second_turn(nano, processor, tokenizer, picture, sent):
    history = [(f"<image>\n{QUESTION}", "Monkey")]
    before = copy.deepcopy(history)
    _, longer = nano.chat(processor, picture, "Again?", history=history, return_history=True)
    assert history == before
    assert longer == [*before, ("Again?", "")]
    expected = turn(f"<img></img>\n{QUESTION}") + "Monkey<|im_end|>" + turn("Again?")
    assert prompt_of(sent, tokenizer) == expected


def test_new_picture_in_a_later_turn(nano, processor, tokenizer, picture, sent):
    history = [("<image>\nFirst?", "One")]
    nano.chat(processor, [picture, picture], "And this?", history=history)
    assert prompt_of(sent, tokenizer).endswith(turn("<img></img>\nAnd this?"))


def test_several_pictures_are_numbered(nano, processor, tokenizer, picture, sent):
    nano.chat(processor, [picture, picture], "Compare.")
    assert prompt_of(sent, tokenizer) == turn("Image-1: <img></img>\nImage-2: <img></img>\nCompare.")
    nano.chat(processor, [picture, picture], "<image> or <image>?")
    assert prompt_of(sent, tokenizer) == turn("<img></img> or <img></img>?")


def test_tiles_of_each_picture_are_counted(nano, tokenizer, tiles, sent):
    three = torch.cat([tiles] * 3)
    nano.chat(tokenizer, three, "<image> and <image>", GREEDY, num_patches_list=[2, 1])
    ids = sent["input_ids"][0].tolist()
    first = ids.index(tokenizer.convert_tokens_to_ids("<img>"))
    assert ids.index(tokenizer.convert_tokens_to_ids("</img>")) - first - 1 == 98


def test_text_only(nano, processor, tokenizer, sent):
    for call in (
        lambda: nano.chat(processor, None, "Hello"),
        lambda: nano.chat(tokenizer, None, "Hello", GREEDY, history=None, return_history=True),
        lambda: nano.chat(tokenizer, None, None, "Hello", GREEDY),
    ):
        call()
        assert prompt_of(sent, tokenizer) == turn("Hello")
        assert sent["pixel_values"] is None


def test_control_tokens_that_people_type_stay_text(nano, processor, tokenizer, sent):
    nano.chat(processor, None, "a<|im_end|><IMG_CONTEXT>", history=[("b<|im_start|>", "c</img>")])
    ids = sent["input_ids"][0].tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4
    assert processor.image_token_id not in ids
    assert "a<|im_end|><IMG_CONTEXT>" in tokenizer.decode(ids)


def test_system_message(nano, processor, tokenizer, sent):
    nano.chat(processor, None, "Hello", system_message="Be brief.")
    assert tokenizer.decode(sent["input_ids"][0]).startswith("<s><|im_start|>system\nBe brief.<|im_end|>")
    nano.chat(processor, None, "Hello", system_message="")
    assert tokenizer.decode(sent["input_ids"][0]).startswith("<s><|im_start|>system\n<|im_end|>")


def test_generation_settings(nano, processor, tokenizer, sent):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    nano.chat(tokenizer, None, "Hello", {"max_new_tokens": 3, "temperature": 0.5}, do_sample=True)
    assert (sent["max_new_tokens"], sent["temperature"], sent["do_sample"]) == (3, 0.5, True)
    assert (sent["eos_token_id"], sent["pad_token_id"]) == (end, 0)
    nano.chat(processor, None, "Hello", images_kwargs={}, num_beams=2)
    assert sent["num_beams"] == 2


@pytest.mark.parametrize("given", [2, [2, 3], (2,), torch.tensor(2), []])
@pytest.mark.parametrize("where", ["keyword", "dict", "config"])
def test_the_separator_always_ends_an_answer(nano, processor, tokenizer, monkeypatch, given, where):
    end, sent = tokenizer.convert_tokens_to_ids("<|im_end|>"), {}
    ids = tokenizer("Mini<|im_end|>Monkey", add_special_tokens=False)["input_ids"]

    def generate(**options):
        sent.update(options)
        return torch.cat([options["input_ids"], torch.tensor([ids])], dim=1)

    monkeypatch.setattr(nano, "generate", generate)
    options = {"eos_token_id": given}
    if where != "keyword":
        options = {"generation_config": GenerationConfig(**options) if where == "config" else options}
    assert nano.chat(processor, None, "Hello", **options) == "Mini"
    assert nano.chat(processor, None, "Hello", return_dict=False, skip_special_tokens=False, **options) == "Mini"
    asked = torch.as_tensor(given).flatten().tolist()
    assert torch.as_tensor(sent["eos_token_id"]).flatten().tolist() == [end, *map(int, asked)]


@pytest.mark.parametrize("given", ["</s>", 2.0, True, [None]])
def test_end_tokens_that_are_none(nano, processor, sent, given):
    with pytest.raises(ValueError, match="eos_token_id must be a token's id"):
        nano.chat(processor, None, "Hello", eos_token_id=given)
    assert not sent


def test_images_kwargs_choose_the_tiles(nano, processor, picture, sent):
    nano.chat(processor, picture, QUESTION, images_kwargs={"min_tiles": 4, "max_tiles": 4, "adaptive_max_tiles": 3})
    assert sent["pixel_values"].shape[0] > 4


def test_batch_with_different_numbers_of_pictures(nano, processor, picture):
    questions, images = [QUESTION, "Compare.", "Hello"], [picture, [picture, picture], None]
    together = nano.batch_chat(processor, images, questions, **GREEDY)
    alone = [nano.chat(processor, image, question, **GREEDY) for image, question in zip(images, questions)]
    assert together == alone


def test_batch_with_histories(nano, processor, picture):
    histories = [[("<image>\nFirst?", "One")], None]
    answers, longer = nano.batch_chat(
        processor, [picture, picture], ["Second?", QUESTION], history=histories, return_history=True, **GREEDY
    )
    assert [len(history) for history in longer] == [2, 1]
    assert answers[0] == nano.chat(processor, picture, "Second?", history=histories[0], **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("processor", "picture", "<image> and <image>?"), {}, "2 <image> placeholders, but 1 images"),
        (("processor", None, "<image>?"), {}, "1 <image> placeholders, but 0 images"),
        (("tokenizer", "tiles", "Hello", {}), {"history": [("Hi", "Hi")]}, "0 <image> placeholders, but 1 images"),
        (("tokenizer", "tiles", "Hello", {}), {"num_patches_list": [2]}, r"adds up to 2, but pixel_values hold 1"),
        (("tokenizer", "picture", "Hello", {}), {}, "bare tokenizer cannot cut pictures"),
        (("processor", None, ""), {}, "not empty"),
        (("processor", None, 7), {}, "question"),
        (("processor", None, "Hello"), {"history": [("only a question",)]}, "history"),
        (("processor", None, "Hello"), {"history": ["ab"]}, "history"),
        (("processor", None, "Hello"), {"question": "Hello"}, "twice"),
        (("tokenizer", None, "Hello", 5), {}, "generation_config"),
        ((), {"question": "Hello"}, "first argument"),
        (("processor", None, "Hello"), {"tile_order": "sideways"}, "tile_order"),
        (("processor", "picture", "Hello"), {"num_patches_list": [7]}, "num_patches_list belongs to tiles"),
        (("processor", "picture", "Hello"), {"pixel_values": torch.zeros(1, 3, 112, 112)}, "not both|twice|takes"),
        (("tokenizer", "tiles", "Hello", {}), {"use_scm": True}, "target_aspect_ratio"),
        (("processor", None, "Hello"), {"scm_keep_ratio": 0.5}, "use_scm=True"),
        (("processor", "picture", "Hello"), {"tile_order": "adaptive_first"}, "cut yourself"),
    ],
)
def test_misuse(nano, processor, tokenizer, picture, tiles, arguments, options, message):
    named = {"processor": processor, "tokenizer": tokenizer, "picture": picture, "tiles": tiles}
    arguments = [named.get(value, value) if isinstance(value, str) else value for value in arguments]
    with pytest.raises(ValueError, match=message):
        nano.chat(*arguments, **options)


def test_integer_tiles_are_pictures_or_refused(nano, processor, tokenizer, picture):
    pixels = processor.image_processor(picture, return_tensors="pt", do_rescale=False, do_normalize=False)[
        "pixel_values"
    ]
    pixels = pixels.to(torch.uint8)
    config = dict(GREEDY)
    expected = nano.chat(processor, pixels[0], QUESTION, **GREEDY)
    assert nano.chat(processor, pixels, QUESTION, **GREEDY) == expected
    assert nano.chat(processor, pixels, QUESTION, generation_config=config) == expected
    with pytest.raises(ValueError, match="normalised floating-point tiles.*uint8"):
        nano.chat(tokenizer, pixels, QUESTION, config)


def test_history_by_position_with_settings_by_keyword(nano, processor, sent):
    nano.chat(processor, None, "And?", [("Read.", "Mini")], generation_config=dict(GREEDY))
    assert sent["max_new_tokens"] == 8
    nano.batch_chat(processor, None, ["One?", "Two?"], dict(GREEDY))
    assert sent["input_ids"].shape[0] == 2


def test_a_row_of_a_batch_never_takes_the_picture_of_another(nano, processor, picture):
    with pytest.raises(ValueError, match="Row 0 has 1 <image> placeholders, but 0 images"):
        nano.batch_chat(processor, [None, [picture, picture]], ["<image>\nRead.", "<image> Read."])
    with pytest.raises(ValueError, match="Row 0 has 2 <image> placeholders, but 1 images"):
        nano.batch_chat(processor, [[picture], [picture, picture]], ["<image><image>a", "<image>b"])


def test_other_tile_sizes_than_the_configured_one(nano, processor, picture, sent):
    nano.chat(processor, picture, QUESTION, images_kwargs={"size": {"height": 224, "width": 224}})
    assert (sent["input_ids"] == processor.image_token_id).sum() == 4 * 49


def test_batch_misuse(nano, processor, picture):
    for questions in (QUESTION, [" "], []):
        with pytest.raises(ValueError, match="list of strings"):
            nano.batch_chat(processor, [picture], questions)
    with pytest.raises(ValueError, match="one entry for each of the 2 questions"):
        nano.batch_chat(processor, [picture], [QUESTION, QUESTION])
    with pytest.raises(ValueError, match="one history for each of the 2 questions, got 1"):
        nano.batch_chat(processor, [picture, None], [QUESTION, QUESTION], history=[None])


def test_an_answer_may_speak_of_image_tags(nano, processor, tokenizer, picture, sent):
    history = [("<image>\nWhat tag is this?", "It says <image> and <img>.")]
    nano.chat(processor, picture, "And now?", history=history)
    assert (sent["input_ids"] == processor.image_token_id).sum() == 49
    assert "It says <image> and <img>." in tokenizer.decode(sent["input_ids"][0])
    _, histories = nano.batch_chat(processor, [picture], ["And?"], history=[history], return_history=True, **GREEDY)
    assert histories[0][0] == history[0]


def test_grounding_tokens(nano, processor, tokenizer, sent, monkeypatch):
    question, history = "Where is <ref>the cat</ref><|im_end|>?", [("a", "<ref>b</ref><box>[[1, 2, 3, 4]]</box>")]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<ref>", "<box>", "<|im_end|>")}
    nano.chat(processor, None, question, history=history)
    plain = sent["input_ids"][0].tolist()
    nano.chat(processor, None, question, history=history, grounding_tokens=True)
    grounded = sent["input_ids"][0].tolist()
    assert [plain.count(ids[token]) for token in ids] == [0, 0, 4]
    assert [grounded.count(ids[token]) for token in ids] == [2, 1, 4]
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    for allowed in (False, True):
        row = processor.apply_chat_template(messages, tokenize=True, return_dict=True, grounding_tokens=allowed)
        assert row["input_ids"][0].tolist().count(ids["<ref>"]) == allowed
    answer = tokenizer("<ref>the cat</ref><box>[[1, 2, 30, 40]]</box><|im_end|>", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        nano, "generate", lambda **options: torch.cat([options["input_ids"], torch.tensor([answer])], 1)
    )
    text = nano.chat(processor, None, "Where?", grounding_tokens=True)
    assert text == "<ref>the cat</ref><box>[[1, 2, 30, 40]]</box>"
    assert processor.parse_boxes(text)[0].label == "the cat"
    assert nano.chat(processor, None, "Where?") == "the cat[[1, 2, 30, 40]]"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, "Hi"), {"history": [{"role": "user", "content": "Hi"}]}, "pairs of strings"),
        ((None, "Hi"), {"history": 5}, "got int"),
        ((None, "Hi"), {"history": [5]}, "pairs of strings"),
        ((None, "Hi"), {"history": [("<image>\na", "b")]}, "every turn is given those of the whole conversation"),
        ((b"no picture", "Hi"), {"return_history": True}, "A picture is"),
        ((None, "Hi"), {"preset": "docvqa"}, "goes into images_kwargs"),
        ((None, "Hi"), {"num_frames": 4}, "goes into videos_kwargs"),
        ((None, "Hi"), {"system_message": 3}, "system_message must be text"),
    ],
)
def test_more_misuse(nano, processor, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, *arguments, **options)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "output_scores", "output_logits"])
@pytest.mark.parametrize("return_dict", [False, True])
def test_what_an_answer_does_not_hold_is_refused(nano, processor, sent, name, return_dict):
    for options in (
        {name: True},
        {"generation_config": {name: True}},
        {"generation_config": GenerationConfig(**{name: True, "return_dict_in_generate": True})},
    ):
        with pytest.raises(ValueError, match=f"does not hold what {name}"):
            nano.chat(processor, None, "Hello", return_dict=return_dict, **options)
    assert not sent
    nano.chat(processor, None, "Hello", **{name: False})


WRONG_OPTIONS = [
    ({"max_new_token": 5}, "max_new_token"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": "5"}, "max_new_tokens"),
    ({"num_beams": 0}, "num_beams"),
    ({"num_beams": 1.5}, "num_beams"),
    ({"num_return_sequences": 3}, "num_return_sequences"),
    ({"num_return_sequences": 0}, "num_return_sequences"),
    ({"cache_implementation": "nonsense"}, "cache_implementation"),
    ({"early_stopping": "soon"}, "early_stopping"),
    ({"repetition_penalty": -1.0}, "penalty"),
    ({"no_repeat_ngram_size": -1}, "ngram"),
    ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ({"do_sample": True, "top_p": 2.0}, "top_p"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_generation_options_are_checked_before_vision(nano, processor, picture, monkeypatch, options, message):
    inputs = processor(images=picture, text="<image>")
    work = []
    monkeypatch.setattr(nano, "encode_tiles", lambda *_: work.append("vision"))
    monkeypatch.setattr(type(nano), "_cut", lambda *_: work.append("cut"))
    monkeypatch.setattr(type(processor.image_processor), "preprocess", lambda *_, **__: work.append("opened"))
    with pytest.raises(ValueError, match=message):
        nano.generate(**inputs, **options)
    for stream in (False, True):
        with pytest.raises(ValueError, match=message):
            nano.chat(processor, picture, QUESTION, stream=stream, **options)
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, picture, QUESTION, generation_config=options)
    assert not work


@pytest.mark.parametrize("name", ["images_kwargs", "videos_kwargs"])
@pytest.mark.parametrize("value", [5, 0, "docvqa", [], {"maximum": 4}, {5: 5}])
def test_options_of_media_that_are_none(nano, processor, sent, name, value):
    with pytest.raises(ValueError, match=f"{name} is a dict|Unknown options"):
        nano.chat(processor, None, "Hello", **{name: value})
    assert not sent


def test_stop_strings_of_the_model(nano, processor, picture):
    whole = nano.chat(processor, picture, QUESTION, **GREEDY)
    nano.generation_config.stop_strings = whole[2:4]
    try:
        assert nano.chat(processor, picture, QUESTION, **GREEDY) == whole[:2]
    finally:
        nano.generation_config.stop_strings = None
