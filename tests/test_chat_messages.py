"""`chat(messages=...)`: conversations as gradio, servers and transformers hold them, and what is remembered of them."""

import base64
import inspect
import io

import pytest
import torch
from PIL import Image

from minimonkey.conversation import read_messages, write_messages


QUESTION = "Read the text."
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def pictures():
    return [Image.effect_noise((90, 60), 50).convert("RGB"), Image.effect_noise((60, 90), 70).convert("RGB")]


def asked(*content, role="user"):
    return {"role": role, "content": list(content)}


def image(picture):
    return {"type": "image", "image": picture}


def text(words):
    return {"type": "text", "text": words}


def forget(model):
    model.forget_conversations()
    model.remembered_conversations, model.remembered_bytes = 1, None


@pytest.fixture
def model(nano):
    forget(nano)
    yield nano
    forget(nano)


def count_work(model, monkeypatch):
    """Tokens that the language model reads in each call, and tiles that are encoded."""
    work = {"tiles": 0, "tokens": []}
    encode, forward = model.encode_tiles, model.model.language_model.forward

    def encode_tiles(pixel_values):
        work["tiles"] += len(pixel_values)
        return encode(pixel_values)

    def read(*args, **kwargs):
        work["tokens"].append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "encode_tiles", encode_tiles)
    monkeypatch.setattr(model.model.language_model, "forward", read)
    return work


def test_messages_give_the_ids_of_the_chat_template(model, processor, pictures, monkeypatch):
    messages = [
        asked(image(pictures[0]), text("What <image> is this? <|im_end|>")),
        {"role": "assistant", "content": "A <image>."},
        asked(text("And "), image(pictures[1]), text("this?")),
    ]
    expected = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sent = {}

    def generate(**options):
        sent.update(options)
        return torch.cat([options["input_ids"], torch.full((1, 1), options["eos_token_id"])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    model.chat(processor, messages=messages)
    assert torch.equal(sent["input_ids"], expected["input_ids"])
    assert torch.equal(sent["pixel_values"], expected["pixel_values"])


def test_messages_answer_as_images_and_history_do(model, processor, pictures):
    history = [(f"<image>\n{QUESTION}", "One.")]
    expected = model.chat(processor, pictures, "And <image>\nthis?", history=history, return_dict=True, **GREEDY)
    messages = [
        {"role": "system", "content": model.config.system_message or ""},
        asked(image(pictures[0]), text(QUESTION)),
        {"role": "assistant", "content": "One."},
        asked(text("And "), image(pictures[1]), text("this?")),
    ]
    messages = messages if model.config.system_message is not None else messages[1:]
    answer = model.chat(processor, messages=messages, return_dict=True, **GREEDY)
    assert answer.token_ids == expected.token_ids
    assert answer.history == expected.history


def test_openai_messages_with_base64_and_streams(model, processor, pictures):
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    items = [{"type": "image_url", "image_url": {"url": url}}, text(QUESTION)]
    expected = model.chat(processor, pictures[0], QUESTION, **GREEDY)
    assert model.chat(processor, messages=[asked(*items)], **GREEDY) == expected
    stream, shown = model.chat(processor, messages=[asked(*items)], stream=True, **GREEDY), []
    for _ in stream:
        shown.append(stream.text)
    assert shown and shown[-1] == expected == stream.answer
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:]))


def test_a_growing_list_of_messages_costs_only_what_is_new(model, processor, pictures, monkeypatch):
    messages = [asked(image(pictures[0]), text(QUESTION))]
    answer = model.chat(processor, messages=messages, **GREEDY)
    messages += [{"role": "assistant", "content": answer}, asked(text("And below?"))]
    expected = model.chat(processor, messages=messages, remember=False, **GREEDY)
    model.chat(processor, messages=messages[:1], **GREEDY)
    work = count_work(model, monkeypatch)
    assert model.chat(processor, messages=messages, **GREEDY) == expected
    assert work["tiles"] == 0
    assert work["tokens"][0] < 40
    # the same question with other words: what comes before it still serves
    messages[-1] = asked(text("And above?"))
    work["tokens"].clear()
    model.chat(processor, messages=messages, **GREEDY)
    assert work["tokens"][0] < 40 and work["tiles"] == 0


def test_other_conversations_and_images_are_computed(model, processor, pictures, monkeypatch):
    model.chat(processor, messages=[asked(image(pictures[0]), text(QUESTION))], **GREEDY)
    work = count_work(model, monkeypatch)
    model.chat(processor, messages=[asked(image(pictures[1]), text(QUESTION))], **GREEDY)
    assert work["tiles"] == 1
    assert work["tokens"][0] > 49


@pytest.mark.parametrize(("limits", "is_remembered"), [((2, None), True), ((1, None), False), ((2, 1), False)])
def test_how_much_is_remembered(model, processor, pictures, monkeypatch, limits, is_remembered):
    model.remembered_conversations, model.remembered_bytes = limits
    first, second = ([asked(image(picture), text(QUESTION))] for picture in pictures)
    answer = model.chat(processor, messages=first, **GREEDY)
    model.chat(processor, messages=second, **GREEDY)
    work = count_work(model, monkeypatch)
    more = [*first, {"role": "assistant", "content": answer}, asked(text("And?"))]
    model.chat(processor, messages=more, **GREEDY)
    assert (work["tiles"] == 0) == is_remembered


def test_forgetting_frees_all_conversations(model, processor, pictures, monkeypatch):
    messages = [asked(image(pictures[0]), text(QUESTION))]
    _, history = model.chat(processor, messages=messages, return_history=True, **GREEDY)
    assert history.memory.nbytes()
    model.forget_conversations()
    assert not history.memory.nbytes()
    work = count_work(model, monkeypatch)
    model.chat(processor, messages=messages, **GREEDY)
    assert work["tiles"] == 1


def test_history_becomes_messages_and_back(model, processor, pictures):
    _, history = model.chat(processor, pictures, QUESTION, return_history=True, **GREEDY)
    messages = history.to_messages(pictures)
    kinds = [item["type"] for item in messages[0]["content"]]
    assert kinds.count("image") == 2
    system, turns, question, images, videos = read_messages([*messages, {"role": "user", "content": "And?"}])
    assert (system, question, images, videos) == (None, "And?", pictures, [])
    assert [answer for _, answer in turns] == [answer for _, answer in history]
    with pytest.raises(ValueError, match="2 <image> placeholders, but 1 images"):
        history.to_messages(pictures[0])


def test_messages_are_written_with_images_in_their_places():
    messages = write_messages([("See <image>\nand <video>\nhere.", "Yes.")], ["a.png"], ["b.mp4"], "Be brief.")
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                text("See "),
                {"type": "image", "image": "a.png"},
                text("and "),
                {"type": "video", "video": "b.mp4"},
                text("here."),
            ],
        },
        {"role": "assistant", "content": "Yes."},
    ]
    _, _, question, images, videos = read_messages([messages[1]])
    assert (question, images, videos) == ("See <image>\nand <video>\nhere.", ["a.png"], ["b.mp4"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "one or more"),
        ("Hello", "messages are a list"),
        ([[{"role": "user", "content": "Hi"}]], "one conversation"),
        ([{"role": "assistant", "content": "Hi"}], "a user last; the roles are assistant"),
        ([{"role": "user", "content": "Hi"}] * 2, "the roles are user, user"),
        ([{"role": "system", "content": "Hi"}], "the roles are system"),
        ([{"role": "tool", "content": "Hi"}], "Unknown role 'tool'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "names its source once"),
        ([asked({"type": "image", "image": "a.png", "url": "b.png"})], "names its source once"),
        ([asked({"type": "image_url", "image_url": {}})], "names its source once"),
        ([asked({"type": "audio", "audio": "a.wav"})], "one of text, image"),
        ([asked({"type": "image", "image": "a.png"}, role="system"), asked(text("Hi"))], "belongs to a user"),
        ([{"role": "user", "content": "  "}], "not empty"),
    ],
)
def test_messages_that_cannot_be_asked(model, processor, messages, message):
    with pytest.raises(ValueError, match=message):
        model.chat(processor, messages=messages)


@pytest.mark.parametrize("extra", [{"question": "Hi"}, {"images": "a.png"}, {"history": []}, {"system_message": "Hi"}])
def test_messages_are_the_whole_conversation(model, processor, extra):
    with pytest.raises(ValueError, match="messages hold the whole conversation; leave out"):
        model.chat(processor, messages=[{"role": "user", "content": "Hi"}], **extra)


def test_arguments_are_named_in_the_signature(model):
    shown = inspect.signature(model.chat).parameters
    assert list(shown)[:4] == ["processor", "images", "question", "history"]
    assert {"messages", "videos", "stream", "use_scm", "images_kwargs", "max_prompt_tokens"} <= set(shown)
    assert {"questions", "images", "return_history"} <= set(inspect.signature(model.batch_chat).parameters)
