"""scripts/average.py: the mean of the last checkpoints of a run."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoModel, AutoProcessor

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts import average as script


@pytest.fixture
def run(tmp_path):
    """Checkpoints 2, 9 and 10, whose output layers are 2, 9 and 10 everywhere, and 11, which was not finished."""
    model = MiniMonkeyForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32)
    for step in (2, 9, 10, 11):
        model.lm_head.weight.data.fill_(step)
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model.save_pretrained(folder)
        AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)
        if step != 11:
            (folder / "trainer_state.json").write_text("{}")
    return tmp_path / "run"


def test_the_newest_complete_checkpoints_are_averaged(run, tmp_path):
    taken = script.average(run, 2, tmp_path / "mean", dtype="float32")
    assert [folder.name for folder in taken] == ["checkpoint-9", "checkpoint-10"]
    model = AutoModel.from_pretrained(tmp_path / "mean", trust_remote_code=True)
    assert torch.all(model.lm_head.weight == 9.5) and model.dtype == torch.float32
    assert model.config.text_config.use_cache
    AutoProcessor.from_pretrained(tmp_path / "mean", trust_remote_code=True)


@pytest.mark.parametrize("last", [0, 4])
def test_too_few_checkpoints(run, tmp_path, last):
    with pytest.raises(ValueError, match="3 complete checkpoints"):
        script.average(run, last, tmp_path / "mean")


def test_adapters_are_refused(run, tmp_path):
    (run / "checkpoint-10" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA"):
        script.average(run, 2, tmp_path / "mean")


def test_an_output_in_the_way(run, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        script.average(run, 2, run)
