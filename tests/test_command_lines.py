"""Wrong command lines of the scripts: one line that says what is wrong, before heavy work, and no traceback."""

import importlib
import json
import shutil
import sys

import pytest
from conftest import ROOT

from minimonkey.scripts.repository import reports_errors


PICTURE = ROOT / "assets" / "example.png"
RECIPE = ROOT / "scripts" / "training" / "recipes" / "nano-smoke.yaml"
MODEL_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def said(monkeypatch, capsys):
    """Run a script's main in this process; what it said last, after a check that it failed in one line.

    `minimonkey NAME` in place of a script's name runs the command.
    """

    def run(script: str, *arguments) -> str:
        program, *name = script.split()
        module = "command" if name else program
        monkeypatch.setattr(sys, "argv", [program])  # what is given has to reach the parser
        try:
            status = importlib.import_module(f"minimonkey.scripts.{module}").main([*name, *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        assert status in (1, 2)
        captured = capsys.readouterr().err
        assert "Traceback" not in captured
        lines = [line for line in captured.splitlines() if "error: " in line]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def model(tmp_path):
    """A model folder whose weights are cut off."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in MODEL_FILES:
        shutil.copy(ROOT / name, folder)
    (folder / "model.safetensors").write_bytes((ROOT / "model.safetensors").read_bytes()[:5000])
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("chat", [PICTURE, "Q", "--device", "abacus"], "'abacus' is no device"),
        ("chat", [PICTURE, "Q", "--device", "cuda:77"], "there is no device 'cuda:77' here"),
        ("chat", [PICTURE, "Q", "--device", "meta"], "there is no device 'meta' here"),
        ("chat", [PICTURE, "Q", "--temperature", "nan"], "must be from 0 to 1000, got nan"),
        ("chat", [PICTURE, "Q", "--max-new-tokens", "0"], "must be at least 1"),
        ("chat", [PICTURE, "Q", "--num-frames", "9" * 30], "below 2**63"),
        ("chat", [PICTURE, "Q", "--attn-implementation", "someone/kernel"], "code from the Hub is not run"),
        ("evaluate", ["--items", "1", "--device", "abacus"], "'abacus' is no device"),
        ("ablate", ["out", "--device", "abacus"], "'abacus' is no device"),
        ("visualize", [PICTURE, "Q", "--device", "abacus"], "'abacus' is no device"),
        ("benchmark", ["decode", "--size", "Nano", "--prompt", "0"], "must be at least 1"),
        ("benchmark", ["vision", "--size", "Nano", "--device", "abacus"], "'abacus' is no device"),
        ("benchmark", ["load", "--size", "Nano", "--folder", "/nowhere"], "/nowhere"),
        ("benchmark", ["preprocessing", "--width", "40", "--height", "30", "--preset", "x"], "no preset 'x'"),
        ("average", ["nowhere", "--output", "out"], "0 complete checkpoints"),
        ("evaluate", ["compare", "nowhere.jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
        ("minimonkey average", ["nowhere", "--output", "out"], "0 complete checkpoints"),
        ("minimonkey benchmark", ["vision", "--tiles", "0"], "minimonkey benchmark vision: error: argument --tiles"),
        ("minimonkey chat", [PICTURE, "Q", "--device", "abacus"], "minimonkey chat: error: argument --device"),
        ("minimonkey documents", ["/nowhere/sheet.png", "--items", "1"], "/nowhere/sheet.png"),
        ("minimonkey evaluate", ["compare", "nowhere.jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
        ("minimonkey import", ["", "out"], "SRC is empty"),
        ("minimonkey train", ["nowhere.yaml"], "There is no recipe"),
        ("finetune", ["nowhere.yaml"], "There is no recipe"),
        ("finetune", [RECIPE, "--set", "learning_rate=nan"], "learning_rate must be a finite number"),
        ("finetune", [RECIPE, "--set", "dtype=[float32]"], "dtype must be"),
        ("finetune", [RECIPE, "--set", "adam_beta2=5"], "adam_beta2 must be"),
        ("finetune", [RECIPE, "--set", "seed=-1"], "seed must be"),
        ("import_checkpoint", ["", "out"], "SRC is empty"),
        ("synthetic.text_images", ["out.png", "--progress", "7"], "must be from 0 to 1"),
    ],
)
def test_wrong_arguments(said, script, arguments, message):
    assert message in said(script, *arguments)


@pytest.mark.parametrize(
    "content", [b"1: 2\n", b"\xff\xfe\x00", b"[" * 50_000, b"a: !!python/name:os.system x\n", b"- 1\n"]
)
def test_recipes_that_are_none(said, tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert "recipe.yaml" in said("finetune", tmp_path / "recipe.yaml")


@pytest.mark.parametrize("script", ["evaluate", "compare"])
def test_lines_that_are_nested_too_deeply(said, tmp_path, script):
    path = tmp_path / "lines.jsonl"
    path.write_text("[" * 100_000 + "\n")
    arguments = ["compare", path, path] if script == "compare" else ["--benchmark", path]
    assert "lines.jsonl, line 1: no JSON" in said("evaluate", *arguments)


def test_a_model_whose_weights_are_cut_off(said, model):
    assert "cannot be loaded: SafetensorError" in said("chat", PICTURE, "Q", "--model", model, "--dtype", "float32")


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"text_config": {"num_hidden_layers": "24"}}'])
def test_a_model_whose_configuration_is_none(said, model, content):
    (model / "config.json").write_text(content)
    assert "config" in said("chat", PICTURE, "Q", "--model", model, "--dtype", "float32")


def test_a_model_whose_tokenizer_has_settings_of_wrong_types(said, model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": 5}))
    assert "processor" in said("chat", PICTURE, "Q", "--model", model, "--dtype", "float32")


def test_what_files_name_cannot_break_the_line_or_the_terminal(capsys):
    def main(arguments):
        raise ValueError("one\ntwo \x1b[31m" + "x" * 10_000)

    assert reports_errors(main)() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: one two ?[31mxxx")
    assert len(line) < 3000


def test_a_full_disk_says_what_to_do(capsys):
    def main(arguments):
        raise OSError(28, "No space left on device", "out")

    assert reports_errors(main)() == 1
    assert "Make room on that disk" in capsys.readouterr().err


def test_faults_of_ours_keep_their_traceback():
    def main(arguments):
        raise KeyError("ours")

    with pytest.raises(KeyError):
        reports_errors(main)()
