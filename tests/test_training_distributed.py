"""Training in two processes on a CPU: DDP by the command, FSDP2 and DeepSpeed ZeRO natively, see distributed/steps.py."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from training_helpers import draw, finetune, line, metrics, write_lines, write_recipe

from minimonkey.scripts import finetune as script


LAUNCH = ROOT / "scripts" / "training" / "launch"
# What distributed/steps.py imports is found where it is found here.
WITH_PACKAGE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def in_two_processes(*arguments) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**WITH_PACKAGE, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*torchrun, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def steps(kind: str) -> dict:
    """What distributed/steps.py reports."""
    arguments = [ROOT / "tests" / "distributed" / "steps.py", kind, ROOT]
    if kind == "plain":
        command = [sys.executable, *map(str, arguments)]
        result = subprocess.run(command, cwd=ROOT, env=WITH_PACKAGE, capture_output=True, text=True, timeout=300)
    else:
        result = in_two_processes(*arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(next(text for text in result.stdout.splitlines() if text.startswith("{")))


@pytest.fixture(scope="module")
def plain():
    return steps("plain")


@pytest.mark.parametrize(
    "layout", [{}, {"pack_tokens": 300, "pack_buffer": 1, "loss_reduction": "square"}], ids=["", "packed"]
)
def test_two_processes_train_as_one(tmp_path, layout):
    """DDP, with batches of text alone in one process while the other has pictures."""
    lines = [line("<image>\nRead.", f"word{i}", draw(tmp_path / f"{i}.png", f"word{i}")) for i in range(4)]
    lines = [entry for picture in lines for entry in (picture, line("Who are you?", "A monkey."))]
    data = {"mixed": {"root": str(tmp_path), "annotation": str(tmp_path / write_lines(tmp_path, lines))}}
    options = {"data": data, "order": "curriculum", "per_device_train_batch_size": 1, "batch_size": 2, "max_steps": 4}
    options |= layout
    parts = {"train": ["language_model", "projector", "vision"], "gradient_checkpointing": True}
    recipe = write_recipe(tmp_path, **options, **parts, muon_learning_rate=1e-4, learning_rate=1e-4)
    result = in_two_processes(ROOT / "scripts" / "finetune.py", recipe, "--set", f"output_dir={tmp_path}/two")
    assert result.returncode == 0, result.stderr
    report = metrics(tmp_path / "two")
    assert (report["wrapper"], report["world_size"], report["steps"]) == ("DistributedDataParallel", 2, 4)
    script.main([str(recipe), "--set", f"output_dir={tmp_path}/one"])
    one = metrics(tmp_path / "one")
    assert one["world_size"] == 1
    assert list(report["losses"].values()) == pytest.approx(list(one["losses"].values()), rel=1e-4)


def test_fsdp2_shards(plain):
    report = steps("fsdp2")
    assert (report["wrapper"], report["world_size"]) == ("FSDPMiniMonkeyForConditionalGeneration", 2)
    assert {"FSDPInternVLVisionLayer", "FSDPLlamaDecoderLayer"} <= set(report["units"])
    assert report["share"] == pytest.approx(0.5, abs=0.02)
    assert report["losses"] == pytest.approx(plain["losses"], rel=1e-5)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed"
)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_by_the_command(tmp_path, monkeypatch, stage):
    recipe = write_recipe(tmp_path, max_steps=3, learning_rate=1e-4)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch = ["-m", "accelerate.commands.launch", "--config_file", LAUNCH / f"zero{stage}.yaml"]
    command = [*launch, "--mixed_precision", "no", ROOT / "scripts" / "finetune.py", recipe]
    command = [sys.executable, *map(str, command), "--set", f"output_dir={tmp_path}/two"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = metrics(tmp_path / "two")
    assert (report["wrapper"], report["world_size"]) == ("DeepSpeedEngine", 2)
    result = finetune(recipe, "--set", f"output_dir={tmp_path}/one")
    assert result.returncode == 0, result.stderr
    one = metrics(tmp_path / "one")["losses"]
    assert list(report["losses"].values()) == pytest.approx(list(one.values()), rel=1e-3)
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_shards(plain, stage):
    report = steps(f"zero{stage}")
    assert (report["wrapper"], report["world_size"], report["stage"]) == ("DeepSpeedEngine", 2, stage)
    assert report["losses"] == pytest.approx(plain["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("fsdp2", "FSDP"), ("zero1", "DEEPSPEED"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_launch_files_are_accelerates(name, kind):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # refuses keys that accelerate does not know
    assert config.distributed_type == kind
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
