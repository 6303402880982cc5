"""The guard against loops: which runs end an answer, which belong to documents, and what `chat` says of it."""

import pytest
import torch
from chat_helpers import QUESTION, forced, spelled
from conftest import ROOT
from PIL import Image
from transformers import GenerationConfig

from minimonkey.repetition import RepetitionGuard


PAGE = ROOT / "assets" / "example.png"
LOOP = "the bow of the ship "


@pytest.fixture(scope="module")
def guard(processor):
    return RepetitionGuard(0, decode=processor.tokenizer.decode)


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("before", ["", "A first line, read well.\n"])
def test_a_loop_is_found_soon_after_it_is_long_enough(guard, processor, before):
    ids = ids_of(processor, before + LOOP * 30)
    begun, end = len(ids_of(processor, before)), guard.find(ids)
    assert begun + 128 <= end <= begun + 128 + len(LOOP)


@pytest.mark.parametrize(
    "text",
    [
        "-" * 500,
        "Chapter one " + "." * 300 + " 7",
        "| --- " * 100,
        "0.00 0.00 0.00\n" * 60,
        "N/A\n" * 100,
        "12,345.67\t" * 80,
        "[ ] Yes [ ] No\n" * 60,
        "Sincerely yours, the management.\n" * 3,
        "".join(f"Item {number} of the list\n" for number in range(60)),
    ],
)
def test_what_documents_repeat_is_no_loop(guard, processor, text):
    assert guard.find(ids_of(processor, text)) is None


def test_a_run_without_words_ends_too_at_last(guard, processor):
    assert guard.find(ids_of(processor, "0.00 " * 2000)) is not None


def test_without_a_tokenizer_every_run_is_as_long():
    ids = [7] * 200
    assert RepetitionGuard(0).find(ids) == 128
    assert RepetitionGuard(0, min_tokens=10, min_repeats=12).find(ids) == 12


def test_a_loop_around_a_long_rule_is_found(guard, processor):
    assert guard.find(ids_of(processor, ("Total of the month" + "-" * 100 + "\n") * 8)) is not None


def test_the_prompt_is_not_looked_at(processor):
    guard = RepetitionGuard(300)
    ids = torch.full((2, 350), 5)
    ids[1, 300:] = torch.arange(50)
    assert guard(ids, None).tolist() == [False, False]
    longer = torch.cat([ids, ids[:, -1:].expand(2, 90)], dim=1)
    assert guard(longer, None).tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_repeats": 1}, "min_repeats must be a whole number of at least 2, got 1"),
        ({"max_period": 0}, "max_period must be"),
        ({"min_tokens": 2.5}, "min_tokens must be"),
        ({"patience": True}, "patience must be"),
        ({"periods": 3}, "stop_repetition takes max_period, .*, got periods"),
        ("yes", "True, False or a dict"),
    ],
)
def test_settings_that_cannot_be_are_refused(nano, processor, settings, message):
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, PAGE, QUESTION, stop_repetition=settings)


def test_chat_ends_a_loop_and_says_so(nano, processor):
    options = forced(spelled(processor.tokenizer, LOOP * 10))
    looped = nano.chat(processor, PAGE, QUESTION, return_dict=True, stop_repetition=True, **options)
    assert looped.finish_reason == "repetition"
    assert looped.text.startswith(LOOP) and len(looped.token_ids) < 160
    free = nano.chat(processor, PAGE, QUESTION, return_dict=True, **forced(spelled(processor.tokenizer, LOOP * 10)))
    assert (free.finish_reason, len(free.token_ids)) == ("length", 10 * len(LOOP))
    own = nano.chat(
        processor,
        PAGE,
        QUESTION,
        return_dict=True,
        stop_repetition={"min_tokens": 160},
        **forced(spelled(processor.tokenizer, LOOP * 10)),
    )
    assert own.finish_reason == "repetition" and len(own.token_ids) >= 160


@pytest.mark.parametrize("scm", [{}, {"use_scm": True}], ids=["whole", "scm"])
def test_generate_ends_a_loop_where_the_generation_configuration_says_so(nano, processor, tmp_path, scm):
    """As `transformers serve` asks: by a configuration, of a folder or of the request, and with the processor as tokenizer."""
    GenerationConfig(max_new_tokens=200, eos_token_id=375, pad_token_id=0, stop_repetition=True).save_pretrained(
        tmp_path
    )
    config = GenerationConfig.from_pretrained(tmp_path)
    inputs = processor(Image.open(PAGE).convert("RGB"), "<image>Read.", return_tensors="pt")
    length = inputs["input_ids"].shape[1]

    def new_ids(text: str, **options) -> list[int]:
        forced_ids = forced(spelled(processor.tokenizer, text))["logits_processor"]
        return nano.generate(**inputs, logits_processor=forced_ids, **scm, **options)[0, length:].tolist()

    asked = {"generation_config": config, "tokenizer": processor}
    looped = new_ids(LOOP * 10, **asked)
    assert len(looped) == RepetitionGuard(0).find(spelled(processor.tokenizer, LOOP * 10)) < 160
    assert len(new_ids("-" * 200, **asked)) == 200 > len(new_ids("-" * 200, generation_config=config))
    assert len(new_ids(LOOP * 10, **asked, stop_repetition=False)) == 200
    assert len(new_ids(LOOP * 10, max_new_tokens=200, stop_repetition={"min_tokens": 160})) >= 160
    with pytest.raises(ValueError, match="True, False or a dict"):
        new_ids(LOOP, stop_repetition="yes")


def test_chat_obeys_the_generation_configuration_and_the_argument_before_it(nano, processor):
    def reason(**options) -> str:
        answer = nano.chat(
            processor, PAGE, QUESTION, return_dict=True, **options, **forced(spelled(processor.tokenizer, LOOP * 10))
        )
        return answer.finish_reason

    config = {"stop_repetition": True}
    assert reason(generation_config=config) == "repetition"
    assert reason(generation_config=config, stop_repetition=False) == reason() == "length"


def test_a_stream_ends_with_a_loop(nano, processor):
    options = forced(spelled(processor.tokenizer, LOOP * 10))
    stream = nano.chat(processor, PAGE, QUESTION, stream=True, stop_repetition=True, **options)
    assert "".join(stream) == stream.answer
    assert stream.result.finish_reason == "repetition"


def test_a_batch_gives_what_each_page_gives_alone(nano, processor):
    pages = [PAGE, ROOT / "assets" / "receipt.png"]
    answers = nano.batch_chat(processor, pages, [QUESTION] * 2, return_dict=True, max_new_tokens=24)
    for page, answer in zip(pages, answers):
        alone = nano.chat(processor, page, QUESTION, return_dict=True, max_new_tokens=24)
        assert (answer.text, answer.token_ids) == (alone.text, alone.token_ids)
        assert answer.finish_reason == alone.finish_reason
        assert answer.log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-4)
    assert [answer.finish_reason for answer in answers] == ["stop", "length"]


def test_one_row_of_a_batch_ends_alone(nano, processor):
    """The example ends by itself; what is left of the page ends at its first repetition, and is cut there."""
    pages = [PAGE, ROOT / "assets" / "page.png"]
    limits = {"min_tokens": 2, "min_repeats": 2, "patience": 1}
    options = {"return_dict": True, "max_new_tokens": 60}
    free = nano.batch_chat(processor, pages, [QUESTION] * 2, **options)
    held = nano.batch_chat(processor, pages, [QUESTION] * 2, stop_repetition=limits, **options)
    assert held[0] == free[0]
    end = RepetitionGuard(0, **limits, decode=processor.tokenizer.decode).find(free[1].token_ids)
    assert end is not None and held[1].finish_reason == "repetition"
    assert held[1].token_ids == free[1].token_ids[:end] and len(held[1].log_probabilities) == end


def test_an_answer_that_was_closed_has_no_reason(nano, processor):
    with nano.chat(processor, PAGE, QUESTION, stream=True, max_new_tokens=400, **_slow(processor)) as stream:
        next(stream)
    assert stream.result.finish_reason is None


def _slow(processor):
    options = forced(spelled(processor.tokenizer, "abcdefgh " * 45))
    del options["max_new_tokens"]
    return options


def test_a_stop_string_is_a_stop(nano, processor):
    whole = nano.chat(processor, PAGE, QUESTION)
    answer = nano.chat(processor, PAGE, QUESTION, return_dict=True, stop_strings=[whole[2:4]])
    assert (answer.text, answer.finish_reason) == (whole.partition(whole[2:4])[0].rstrip(), "stop")


def test_probabilities_of_a_batch_need_one_sequence_a_row(nano, processor):
    with pytest.raises(ValueError, match="num_beams=1"):
        nano.batch_chat(processor, [PAGE], [QUESTION], return_dict=True, num_beams=2)
