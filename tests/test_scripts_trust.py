"""Scripts run no code of the model that they are given."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from minimonkey.scripts import chat, evaluate, visualize
from minimonkey.scripts.repository import load_model, load_processor


MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "processor_config.json")
TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
MEMBERS = {
    "configuration": "MiniMonkeyConfig",
    "modeling": "MiniMonkeyForConditionalGeneration",
    "processing": "MiniMonkeyProcessor",
    "image_processing": "MiniMonkeyImageProcessor",
    "tokenization": "MiniMonkeyTokenizer",
}


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A model folder each of whose Python files leaves a mark when it is executed."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in (*MODEL_FILES, *TOKENIZER_FILES):
        shutil.copy(ROOT / name, folder)
    for part, name in MEMBERS.items():
        code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\nclass {name}: pass\n"
        (folder / f"{part}_minimonkey.py").write_text(code)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "tokenization_minimonkey.py", folder / "custom_generate" / "generate.py")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_minimonkey.MiniMonkeyTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run_main(script, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    return script.main()


def test_chat_answers_by_the_code_of_this_repository(foreign, tmp_path, monkeypatch, capsys):
    question = [ROOT / "assets" / "example.png", "Read the text.", "--model", foreign, "--dtype", "float32"]
    assert run_main(chat, monkeypatch, *question) == 0
    assert capsys.readouterr().out.split() == ["Mini", "Monkey"]
    assert not (tmp_path / "executed").exists()


def test_other_scripts_execute_nothing_of_a_model(foreign, tmp_path, monkeypatch):
    picture = [ROOT / "assets" / "example.png", "Read.", "--model", foreign, "--out", tmp_path / "seen.png"]
    assert run_main(visualize, monkeypatch, *picture, "--dtype", "float32") == 0
    options = ["--model", foreign, "--items", 1, "--max-new-tokens", 1, "--dtype", "float32"]
    assert run_main(evaluate, monkeypatch, *options) == 0
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(foreign, tmp_path):
    settings = json.loads((foreign / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "MiniMonkeyTokenizer"
    (foreign / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="custom code"):
        load_processor(foreign)
    assert not (tmp_path / "executed").exists()


def test_a_model_of_another_kind_is_refused(foreign):
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(ValueError, match="model of type 'llava'"):
        load_model(foreign)


def test_the_processor_is_that_of_auto_classes(shipped_processor):
    ours = load_processor(ROOT)
    assert ours.to_dict() == shipped_processor.to_dict()
    assert ours.chat_template == shipped_processor.chat_template
    assert type(ours.tokenizer) is type(shipped_processor.tokenizer)
    picture = torch.zeros(3, 40, 60, dtype=torch.uint8)
    inputs, expected = (one(images=picture, text="<image> Read.") for one in (ours, shipped_processor))
    assert all(torch.equal(expected[name], inputs[name]) for name in expected)
