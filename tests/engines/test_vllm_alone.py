"""vLLM's transformers backend without our plugin: MSAC gives transformers' answers token for token."""

import os

import pytest


os.environ["VLLM_PLUGINS"] = ""

from conftest import ROOT  # noqa: E402
from vllm_helpers import answers_of, expected_answers, nano_prompts, start_engine  # noqa: E402


pytestmark = pytest.mark.vllm
# Of the whole model, of a preset, and by hand; each is an option of a request.
OPTIONS = [{}, {"preset": "default"}, {"min_tiles": 1, "max_tiles": 6, "adaptive_max_tiles": 4}]


@pytest.fixture(scope="module")
def expected():
    return [expected_answers(ROOT, nano_prompts(), options) for options in OPTIONS]


@pytest.fixture(scope="module")
def engine(expected):
    """Without the plugin vLLM knows square images alone: the room for the largest one has to be asked for."""
    return start_engine(ROOT, max_num_batched_tokens=4096)


@pytest.mark.parametrize("case", range(len(OPTIONS)))
def test_answers_are_those_of_transformers(engine, expected, case):
    assert answers_of(engine, nano_prompts(), OPTIONS[case]) == expected[case]


@pytest.mark.parametrize("case", [1, 2])
def test_what_is_remembered_gives_the_same(engine, expected, case):
    """The same images again, from vLLM's caches of tiles, features and prefixes, and in another order."""
    prompts = nano_prompts()
    for _ in range(2):
        assert answers_of(engine, prompts[::-1], OPTIONS[case]) == expected[case][::-1]
    engine.reset_prefix_cache()
    engine.reset_mm_cache()
    assert answers_of(engine, prompts, OPTIONS[case]) == expected[case]


def test_options_that_cannot_work_are_refused(engine, expected):
    for options, message in (({"max_tiles": 0}, "range 4 to 0|range 1 to 0"), ({"preset": "none"}, "Unknown preset")):
        with pytest.raises(ValueError) as error:
            answers_of(engine, nano_prompts()[:1], options)
        assert any(word in f"{error.value} {error.value.__cause__}" for word in message.split("|"))
    assert answers_of(engine, nano_prompts()[:1], {}) == expected[0][:1]
