"""Exports in vLLM's own InternVL class, which knows neither this package nor MSAC: what one tile shows, it answers alike."""

import pytest
import torch
from checkpoint_helpers import language_folder
from conftest import FIXTURES, synthetic_picture
from vllm_helpers import SIZES, answers_of, expected_answers, start_engine, user

from minimonkey.scripts.assemble import assemble
from minimonkey.scripts.export_checkpoint import export_checkpoint


pytestmark = pytest.mark.vllm
LAYOUTS = {"llama": ("llama", False), "internlm2": ("llama", True), "qwen2": ("qwen2", False)}
ONE_TILE = {"min_tiles": 1, "max_tiles": 1, "adaptive_min_tiles": 1, "adaptive_max_tiles": 1}


def prompts() -> list[list[dict]]:
    """An image that is one tile already: both resize it to nothing else."""
    return [[user("Read the text.", synthetic_picture(112, 112, 1))], [user("Hello")]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """For each layout the exported folder and what transformers answers with the model it was made of."""
    made = {}
    for name, (model_type, as_internlm2) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        language = language_folder(folder / "language", model_type, **SIZES)
        assemble(str(FIXTURES / "models" / "internlm2"), str(language), folder / "ours", "Hermes-2", torch.float32)
        export_checkpoint(str(folder / "ours"), folder / "out", as_internlm2)
        made[name] = folder / "out", expected_answers(folder / "ours", prompts(), ONE_TILE)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_the_model_it_was_made_of(layout, made):
    folder, expected = made[layout]
    engine = start_engine(folder, max_model_len=1024)
    assert answers_of(engine, prompts(), {"max_dynamic_patch": 1}) == expected
