"""vLLM with our plugin: SCM as an option of a request, the same tokens kept, the same answers as in transformers."""

import pytest
from conftest import ROOT
from vllm_helpers import answers_of, expected_answers, nano_prompts, start_engine


pytestmark = pytest.mark.vllm
DEFAULT = {"preset": "default"}
OPTIONS = [{}, {"use_scm": True}, {"use_scm": True, "scm_keep_ratio": 0.25}]


@pytest.fixture(scope="module")
def expected():
    answers = []
    for scm in OPTIONS:
        generation = {**scm, "scm_queries": "visual"} if scm else {}
        answers.append(expected_answers(ROOT, nano_prompts(), DEFAULT, **generation))
    return answers


@pytest.fixture(scope="module")
def engine(expected):
    """Room for 512 tokens, and for the largest image with the options of the server, as the plugin tells them."""
    return start_engine(ROOT, max_num_batched_tokens=512, mm_processor_kwargs=DEFAULT)


def test_answers_are_those_of_transformers(engine, expected):
    """One after the other and again: what one request left in the caches does not reach one with another ratio."""
    for case in (0, 1, 2, 1, 0):
        assert answers_of(engine, nano_prompts(), OPTIONS[case]) == expected[case]


def test_fewer_tokens_reach_the_language_model(expected):
    all_tokens, half, quarter = (sum(length for length, _ in answers) for answers in expected)
    assert quarter < half < all_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scm_keep_ratio": 0.5}, "works only with use_scm=True"),
        ({"max_tile": 3}, "Unknown .*max_tile"),
        ({"use_scm": True, "scm_keep_ratio": 2}, "at most 1, got 2"),
        (
            {"use_scm": True, "use_thumbnail": False, "adaptive_min_tiles": 1, "adaptive_max_tiles": 1},
            "use_thumbnail=False left neither",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(engine, expected, options, message):
    with pytest.raises(ValueError, match=message):
        answers_of(engine, nano_prompts()[:1], options)
    assert answers_of(engine, nano_prompts()[:1], {}) == expected[0][:1]
