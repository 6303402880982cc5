"""Answers that arrive piece by piece, and what is known about an answer: its tokens, probabilities and confidence."""

import gc
import math
import random
import threading

import pytest
import torch
from chat_helpers import CHAT, QUESTION, SCM, TILES, forced, spelled, watch
from conftest import synthetic_picture
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from minimonkey.chat_answer import trim_pieces


END = 375


@pytest.fixture(scope="module")
def picture():
    return synthetic_picture(200, 150, 1)


@pytest.fixture(scope="module")
def model(nano):
    return nano


class Gate(LogitsProcessor):
    """Says "a" for ever; stops before token `closed_at` until it is opened, and counts the tokens."""

    def __init__(self, token: int, closed_at: int | None = None):
        self.token, self.closed_at, self.steps, self.opened = token, closed_at, 0, threading.Event()

    def __call__(self, input_ids, scores):
        if self.steps == self.closed_at:
            assert self.opened.wait(30)
        self.steps += 1
        forced_scores = torch.full_like(scores, -torch.inf)
        forced_scores[:, self.token] = 0
        return forced_scores

    def options(self) -> dict:
        return {"logits_processor": LogitsProcessorList([self]), "max_new_tokens": 100_000, "stream": True}


@pytest.fixture
def gate(processor):
    return lambda closed_at=None: Gate(spelled(processor.tokenizer, "a")[0], closed_at)


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (False, {}),
        (True, {}),
        (True, SCM),
        (True, {"do_sample": True, "temperature": 2.0}),
        (True, {"repetition_penalty": 1.3}),
        (True, {"cache_implementation": "static"}),
        (True, {"remember": False}),
    ],
)
def test_joined_pieces_are_the_answer(model, processor, picture, images, options):
    options = {**CHAT, "max_new_tokens": 20, **options}
    images = picture if images else None
    torch.manual_seed(0)
    expected = model.chat(processor, images, QUESTION, return_history=True, **options)
    torch.manual_seed(0)
    stream = model.chat(processor, images, QUESTION, stream=True, **options)
    pieces = list(stream)
    assert len(pieces) > 1
    assert all(pieces)
    assert ("".join(pieces), stream.history) == expected
    assert stream.answer == expected[0]
    assert list(stream) == []


SAID = {
    "emoji": "a 🙈🙉 b 👨‍👩‍👧 🙊",
    "chinese": "总额是 42 元。你好",
    "white space": " \n  The total \n\n is  4 \n ",
    "nothing but white space": " \n ",
    "nothing": "",
    "spelled end": "before <|im_end|> behind",
    "begun end": "a <|im_e b <|im_",
    "begun end at the end": "a <|im_",
    "accents": "é à ü ñ",
    "space before an end": "so   <|im_end|>",
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("end", [[END], []], ids=["ended", "cut"])
@pytest.mark.parametrize("skip", [True, False])
def test_texts_of_many_bytes_and_ends(model, processor, said, end, skip):
    ids = [*spelled(processor.tokenizer, SAID[said]), *end]
    if not ids:
        return
    options = {"do_sample": False, "skip_special_tokens": skip}
    expected = model.chat(processor, None, "Hello", **options, **forced(ids))
    stream = model.chat(processor, None, "Hello", stream=True, **options, **forced(ids))
    pieces = list(stream)
    assert "".join(pieces) == expected == stream.answer
    assert expected == SAID[said].partition("<|im_end|>")[0].strip()
    assert len(pieces) > 1 or len(expected) < 2
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text(model, processor):
    tokenizer = processor.tokenizer
    half = ids_of(processor, "日")[:2]
    for ids in ([*half, *ids_of(processor, "a b")], [*ids_of(processor, "a"), *half], [*half, *half, END]):
        expected = model.chat(processor, None, "Hello", do_sample=False, **forced(ids))
        stream = model.chat(processor, None, "Hello", stream=True, do_sample=False, **forced(ids))
        assert "".join(stream) == expected
        assert "\ufffd" in expected
    assert tokenizer.decode(half) == "\ufffd"


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_trimmed_as_the_whole_is(seed):
    random.seed(seed)
    letters = "ab \n<|"
    for _ in range(1500):
        text = "".join(random.choices(letters, k=random.randint(0, 14)))
        ends = ["".join(random.choices(letters, k=random.randint(1, 4))) for _ in range(random.randint(0, 2))]
        pieces, left = [], text
        while left:
            size = random.randint(1, 4)
            pieces, left = [*pieces, left[:size]], left[size:]
            if any(end in text[: len(text) - len(left)] for end in ends):  # where generation ends
                break
        whole = "".join(pieces)
        given = list(trim_pieces(iter(pieces), ends))
        for end in ends:
            whole = whole.partition(end)[0]
        assert "".join(given) == whole.strip(), (pieces, ends)
        assert all(given)


def test_pieces_come_as_soon_as_they_are_certain():
    given = []
    for piece in trim_pieces(iter(["  a", "b", " ", "c", "<|", "x", "<|end|>", "d"]), ["<|end|>"]):
        given.append(piece)
    assert given == ["a", "b", " c", "<|x"]


def test_pieces_arrive_before_the_end(model, processor, picture, gate):
    closed = gate(closed_at=4)
    stream = model.chat(processor, picture, QUESTION, **closed.options())
    pieces = [next(stream) for _ in range(3)]
    assert pieces == ["a"] * 3
    assert closed.steps <= 4
    assert not closed.opened.is_set()
    closed.opened.set()
    stream.close()
    assert set(stream.answer) == {"a"}


# --- the end of a stream ---------------------------------------------------------------------------------------------


def thread_of(stream) -> threading.Thread:
    return stream._thread


def test_close_ends_the_generation(model, processor, picture, gate):
    endless = gate()
    stream = model.chat(processor, picture, QUESTION, **endless.options())
    first, thread = next(stream), thread_of(stream)
    stream.close()
    assert not thread.is_alive()
    assert endless.steps < 5_000
    assert stream.answer == "a" * endless.steps
    assert first + "".join(stream) == stream.answer
    assert stream.history == [(f"<image>\n{QUESTION}", stream.answer)]
    stream.close()


def test_close_before_the_first_piece(model, processor, gate):
    endless = gate(closed_at=0)
    stream = model.chat(processor, None, "Hello", **endless.options())
    threading.Timer(0.1, endless.opened.set).start()
    stream.close()
    assert endless.steps == 1
    assert stream.answer == "a"


def test_with_ends_the_generation(model, processor, gate):
    endless = gate()
    with model.chat(processor, None, "Hello", **endless.options()) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                break
    assert not thread_of(stream).is_alive()
    assert 4 <= len(stream.answer) == endless.steps
    with pytest.raises(KeyError), model.chat(processor, None, "Hello", **gate().options()) as stream:
        raise KeyError
    assert not thread_of(stream).is_alive()


def test_an_abandoned_stream_ends(model, processor, gate):
    threads = []
    for read in (0, 2):
        stream = model.chat(processor, None, "Hello", **gate().options())
        for _ in range(read):
            next(stream)
        threads.append(thread_of(stream))
        del stream
    before = set(threading.enumerate())
    for _ in model.chat(processor, None, "Hello", **gate().options()):
        threads += set(threading.enumerate()) - before
        break
    assert len(threads) == 3
    gc.collect()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_an_error_is_raised_to_the_reader(model, processor, picture):
    class Failing(LogitsProcessor):
        def __init__(self, after):
            self.after = after

        def __call__(self, input_ids, scores):
            self.after -= 1
            if self.after < 0:
                raise RuntimeError("stopped here")
            scores = torch.full_like(scores, -torch.inf)
            scores[:, spelled(processor.tokenizer, "a")[0]] = 0
            return scores

    for after in (0, 3):
        stream = model.chat(
            processor, picture, QUESTION, stream=True, logits_processor=LogitsProcessorList([Failing(after)])
        )
        given = []
        with pytest.raises(RuntimeError, match="stopped here"):
            for piece in stream:
                given.append(piece)
        assert given == ["a"] * after
        for name in ("answer", "history", "result"):
            with pytest.raises(RuntimeError, match="stopped here"):
                getattr(stream, name)
        assert not thread_of(stream).is_alive()


def test_errors_before_the_generation_are_raised_at_once(model, processor, picture):
    for options, message in (
        ({"history": ["ab"]}, "history"),
        ({"max_prompt_tokens": 3}, "max_prompt_tokens"),
        ({"streamer": TextIteratorStreamer(processor.tokenizer)}, "leave out streamer"),
    ):
        with pytest.raises(ValueError, match=message):
            model.chat(processor, picture, QUESTION, stream=True, **options)
    for name in ("stream", "messages"):
        with pytest.raises(ValueError, match=f"{name} works with chat"):
            model.batch_chat(processor, [picture], [QUESTION], **{name: True})


def test_beams_cannot_be_streamed(model, processor):
    stream = model.chat(processor, None, "Hello", stream=True, num_beams=2, **CHAT)
    with pytest.raises(ValueError, match="beam"):
        list(stream)


def test_several_sequences_are_never_mixed(model, processor):
    """Either refused, or the pieces of the one that is the answer."""
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2, "max_new_tokens": 12}
    torch.manual_seed(0)
    try:
        stream = model.chat(processor, None, "Hello", stream=True, **options)
        joined = "".join(stream)
    except ValueError:
        return
    assert joined == stream.answer


# --- later turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SCM])
def test_a_turn_after_a_stream_costs_only_what_is_new(model, processor, picture, options):
    options = {**CHAT, **options}
    stream = model.chat(processor, picture, QUESTION, stream=True, **options)
    assert "".join(stream) == stream.answer
    with watch(model) as work:
        second = model.chat(processor, picture, "And?", history=stream.history, stream=True, **options)
        joined = "".join(second)
    assert work.tiles == 0
    assert work.read[0] < 40
    assert second.history == [*stream.history, ("And?", joined)]
    plain = list(stream.history)
    assert joined == model.chat(processor, picture, "And?", history=plain, remember=False, **options)


def test_a_turn_after_a_closed_stream(model, processor, picture, gate):
    with model.chat(processor, picture, QUESTION, **gate().options()) as stream:
        next(stream)
    history = stream.history
    options = {**CHAT, "return_dict": True}
    answer = model.chat(processor, picture, "And?", history=history, **options)
    expected = model.chat(processor, picture, "And?", history=list(history), remember=False, **options)
    assert answer.token_ids == expected.token_ids
    assert answer.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)


def test_two_streams_at_the_same_time(model, processor, picture):
    streams = [model.chat(processor, picture, q, stream=True, **CHAT) for q in (QUESTION, "And?", QUESTION)]
    texts = ["".join(stream) for stream in streams]
    assert texts == [model.chat(processor, picture, q, **CHAT) for q in (QUESTION, "And?", QUESTION)]


def test_a_stream_with_probabilities(model, processor, picture):
    stream = model.chat(processor, picture, QUESTION, stream=True, return_dict=True, **CHAT)
    list(stream)
    expected = model.chat(processor, picture, QUESTION, return_dict=True, **CHAT)
    assert stream.result.token_ids == expected.token_ids
    assert stream.result.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-5)


# --- tokens and probabilities ----------------------------------------------------------------------------------------


@torch.no_grad()
def judged(model, processor, picture, answer, **images_kwargs) -> list[float]:
    """Log-probabilities of an answer's tokens, by one pass over prompt and answer."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **images_kwargs,
    )
    ids = torch.cat([prompt["input_ids"], torch.tensor([answer.token_ids])], dim=1)
    logits = model(input_ids=ids, pixel_values=prompt["pixel_values"].to(model.dtype)).logits
    scores = logits[0, prompt["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(answer.token_ids)[:, None]).squeeze(1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 3.0, "top_k": 20},
        {"repetition_penalty": 2.0},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"stop_strings": ["e"]},
        {"remember": False},
        {"images_kwargs": TILES},
    ],
    ids=str,
)
def test_probabilities_are_those_of_a_direct_pass(model, processor, picture, options):
    torch.manual_seed(1)
    answer = model.chat(processor, picture, QUESTION, return_dict=True, **{**CHAT, "max_new_tokens": 7, **options})
    assert 0 < len(answer.token_ids) <= 7
    expected = judged(model, processor, picture, answer, **options.get("images_kwargs", {}))
    assert answer.log_probabilities == pytest.approx(expected, abs=1e-4)
    assert answer.confidence == pytest.approx(math.exp(sum(expected) / len(expected)), abs=1e-4)
    assert 0 < answer.confidence <= 1
    assert answer.history[-1] == (f"<image>\n{QUESTION}", answer.text)


def test_the_end_token_is_one_of_the_tokens(model, processor, picture):
    ids = [*ids_of(processor, "Total"), END]
    answer = model.chat(processor, picture, QUESTION, return_dict=True, do_sample=False, **forced(ids))
    assert answer.token_ids == ids
    assert len(answer.log_probabilities) == len(ids)
    assert answer.log_probabilities == pytest.approx(judged(model, processor, picture, answer), abs=1e-4)
    assert answer.text == "Total"


def test_answers_of_beams_that_end_early(model, processor, picture):
    options = {"num_beams": 3, "max_new_tokens": 30, "do_sample": False, "early_stopping": True}
    answer = model.chat(processor, picture, QUESTION, return_dict=True, **options)
    assert answer.text == model.chat(processor, picture, QUESTION, **options)
    assert len(answer.token_ids) == len(answer.log_probabilities)
    assert answer.log_probabilities == pytest.approx(judged(model, processor, picture, answer), abs=1e-4)


def test_answers_without_probabilities(model, processor, picture):
    stream = model.chat(processor, picture, QUESTION, stream=True, **CHAT)
    assert stream.result.log_probabilities is None
    assert stream.result.confidence is None
    assert stream.result.token_ids


def test_return_dict_with_return_history_and_configurations(model, processor, picture):
    expected = model.chat(processor, picture, QUESTION, return_dict=True, **CHAT)
    config = GenerationConfig(**CHAT)
    before = config.to_dict()
    answer = model.chat(processor, picture, QUESTION, return_dict=True, return_history=True, generation_config=config)
    assert (answer.text, answer.history) == (expected.text, expected.history)
    assert config.to_dict() == before
    assert model.chat(processor, picture, QUESTION, return_dict_in_generate=True, **CHAT) == expected.text


# --- stop strings and special tokens ---------------------------------------------------------------------------------


STOPS = [
    ("Total: 42. Thanks", ".", "Total: 42"),
    ("Total: 42. Thanks", [".", "Th"], "Total: 42"),
    ("one\n\ntwo", "\n\n", "one"),
    ("one STOP", ["STOP"], "one"),
    ("one STOP", ["none of it"], "one STOP"),
    ("STOP one", ["STOP"], ""),
    ("  \n one\ntwo", ["\ntwo"], "one"),
    ("你好。再见", "。", "你好"),
]


@pytest.mark.parametrize(("said", "stops", "expected"), STOPS)
def test_answers_end_before_a_stop_string(model, processor, said, stops, expected):
    ids = [*spelled(processor.tokenizer, said), END]
    options = {"stop_strings": stops, "do_sample": False}
    answer = model.chat(processor, None, "Hello", return_dict=True, **options, **forced(ids))
    assert answer.text == expected
    assert answer.history == [("Hello", expected)]
    stream = model.chat(processor, None, "Hello", stream=True, **options, **forced(ids))
    assert "".join(stream) == expected == stream.answer
    config = {**options, "max_new_tokens": len(ids)}
    processors = forced(ids)["logits_processor"]
    assert (
        model.chat(processor, None, "Hello", generation_config=config, logits_processor=processors, stream=False)
        == expected
    )


def test_stop_strings_of_a_batch(model, processor):
    ids = [*spelled(processor.tokenizer, "one. two"), END]
    answers = model.batch_chat(processor, None, ["a", "b"], stop_strings=".", do_sample=False, **forced(ids))
    assert answers == ["one", "one"]


def test_special_tokens_in_the_answer(model, processor):
    tokenizer = processor.tokenizer
    names = ["<ref>", "</ref>", "<box>", "</box>"]
    ref, ref_end, box, box_end = tokenizer.convert_tokens_to_ids(names)
    ids = [ref, *spelled(tokenizer, "cat"), ref_end, box, *spelled(tokenizer, "[[1, 2, 3, 4]]"), box_end, END]
    expected = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"
    assert model.chat(processor, None, "Hello", do_sample=False, **forced(ids)) == "cat[[1, 2, 3, 4]]"
    options = {"do_sample": False, "skip_special_tokens": False}
    assert model.chat(processor, None, "Hello", **options, **forced(ids)) == expected
    stream = model.chat(processor, None, "Hello", stream=True, **options, **forced(ids))
    assert "".join(stream) == expected
    assert model.batch_chat(processor, None, ["a", "b"], **options, **forced(ids)) == [expected] * 2
    history = stream.history
    answer = model.chat(processor, None, "And?", history=history, return_dict=True, **CHAT)
    plain = model.chat(processor, None, "And?", list(history), return_dict=True, remember=False, **CHAT)
    assert answer.token_ids == plain.token_ids
    assert answer.log_probabilities == pytest.approx(plain.log_probabilities, abs=1e-4)


def test_other_end_tokens(model, processor):
    tokenizer = processor.tokenizer
    other = tokenizer.convert_tokens_to_ids("</quad>")
    ids = [*spelled(tokenizer, "so"), other, *spelled(tokenizer, "no")]
    for skip in (True, False):
        options = {"eos_token_id": [END, other], "do_sample": False, "skip_special_tokens": skip}
        answer = model.chat(processor, None, "Hello", return_dict=True, **options, **forced(ids))
        assert (answer.text, answer.token_ids) == ("so", ids[:3])
        stream = model.chat(processor, None, "Hello", stream=True, **options, **forced(ids))
        assert "".join(stream) == "so"
