"""Language models of the published family in vLLM: small ones of their shapes, with random weights, imported or assembled."""

import pytest
import torch
from checkpoint_helpers import language_folder
from conftest import FIXTURES, ROOT, synthetic_picture
from model_helpers import tiny_mono
from vllm_helpers import SIZES, answers_of, expected_answers, start_engine, user

from minimonkey.scripts.assemble import assemble
from minimonkey.scripts.export_checkpoint import export_checkpoint
from minimonkey.scripts.import_checkpoint import import_checkpoint
from minimonkey.scripts.repository import load_processor


pytestmark = pytest.mark.vllm
FAMILIES = {"internlm2": ("llama", "internlm2-chat"), "qwen2": ("qwen2", "Hermes-2"), "phi3": ("phi3", "phi3-chat")}
RANGES = {"preset": "default"}
SCM = {"use_scm": True, "scm_keep_ratio": 0.5}


def prompts() -> list[list[dict]]:
    wide, tall = synthetic_picture(320, 200, 1), synthetic_picture(100, 300, 2)
    return [[user("Read the text.", wide)], [user("And these?", tall, wide)], [user("Hello")]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """The InternLM2 is imported from the published format; what vLLM serves is in all cases a folder of ours."""
    made = {"mono": tmp_path_factory.mktemp("mono")}
    tiny_mono().save_pretrained(made["mono"])
    load_processor(ROOT).save_pretrained(made["mono"])
    for name, (model_type, template) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        options = {"pad_token_id": 0, "eos_token_id": 1} if model_type == "phi3" else {}
        language = language_folder(folder / "language", model_type, **SIZES, **options)
        made[name] = folder / "model"
        assemble(str(FIXTURES / "models" / "internlm2"), str(language), made[name], template, torch.float32)
    export_checkpoint(str(made["internlm2"]), made["internlm2"].parent / "published", as_internlm2=True)
    made["internlm2"] = made["internlm2"].parent / "imported"
    import_checkpoint(str(made["internlm2"].parent / "published"), made["internlm2"])
    return made


@pytest.fixture(scope="module")
def expected(folders):
    """Of all families, before the first engine changes transformers' classes."""
    return {
        name: [
            expected_answers(folders[name], prompts(), RANGES),
            expected_answers(folders[name], prompts(), RANGES, **SCM, scm_queries="visual"),
        ]
        for name in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family, folders, expected):
    engine = start_engine(folders[family], max_model_len=2048)
    assert answers_of(engine, prompts(), RANGES) == expected[family][0]
    assert answers_of(engine, prompts(), {**RANGES, **SCM}) == expected[family][1]


def test_visual_experts_are_refused(folders, expected):
    with pytest.raises(ValueError, match="vLLM cannot run .* visual experts"):
        start_engine(folders["mono"], max_model_len=512)
