"""The command `minimonkey`: its list, its sub-commands, and the package that brings it."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from minimonkey.scripts import command
from minimonkey.scripts.repository import load_model, load_processor


def test_help_lists_every_sub_command_in_one_line(capsys):
    assert command.main(["--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert [line[0] for line in lines] == list(command.COMMANDS)
    assert all(len(line) > 3 for line in lines)


def test_an_unknown_command_is_said_in_one_line(capsys):
    assert command.main(["chatt"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "'chatt'" in captured.err


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_names_the_program_as_it_was_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minimonkey", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minimonkey {name} ")


def test_the_list_imports_no_script():
    code = "import sys; from minimonkey.scripts.command import main; main(['--help']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "False"


def test_arguments_reach_the_script(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minimonkey"])
    assert command.main(["average", str(tmp_path / "no-run"), "--output", str(tmp_path / "mean")]) == 1
    assert "no-run" in capsys.readouterr().err


def test_a_model_of_the_package_saves_its_code(tmp_path):
    """Loaded by the package's classes, saved, and loaded again by the Auto classes in a process that knows no package."""
    load_model(ROOT).save_pretrained(tmp_path / "model")
    load_processor(ROOT).save_pretrained(tmp_path / "model")
    code = """import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert "minimonkey" not in sys.modules
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for settings in (tmp_path / "model").glob("*.json"):
        assert '"minimonkey.' not in settings.read_text(), settings.name
