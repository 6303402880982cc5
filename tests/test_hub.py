"""What a stranger gets from the Hub: `hf download`, loading by name, saving what was loaded, the pipeline.

The Hub is a server on 127.0.0.1. Each part runs in a process of its own, because huggingface_hub and transformers read
the endpoint and their cache folders when they are imported.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import HubServer
from PIL import Image, ImageDraw, ImageFont


REPO_ID = "minimonkey/MiniMonkey-Nano"
MODEL_FILES = ("*.py", "*.json", "*.jinja", "*.safetensors", "README.md")
QUESTION = "Read the text."

COMMON = """
import hashlib, json, sys
import torch
from transformers import AutoModel, AutoProcessor, pipeline

def digest(model):
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

source, picture, question, report, saved = sys.argv[1:]
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModel.from_pretrained(source, trust_remote_code=True)
result = {"answer": model.chat(processor, picture, question, max_new_tokens=24), "digest": digest(model)}
"""

FROM_HUB = """
result["module"] = type(model).__module__
model.save_pretrained(saved)
processor.save_pretrained(saved)
reader = pipeline("image-text-to-text", model=source, trust_remote_code=True)
content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
answers = reader(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=24)
result["pipeline"] = answers[0]["generated_text"].strip()
"""

REPORT = """
json.dump(result, open(report, "w"))
"""


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """The environment of a process that never used the Hub before; `folder` becomes its home there."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {
        **inherited,
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **settings,
    }


def run(command: list, env: dict[str, str], cwd: Path) -> None:
    """Run to the end in `cwd`, where no code of this repository is; show what it wrote if it fails."""
    done = subprocess.run([str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def ask(script: str, source, picture: Path, saved: Path, folder: Path, **settings: str) -> dict:
    """Run `script` on the model at `source`; what it found out."""
    folder.mkdir()
    report = folder / "report.json"
    command = [sys.executable, "-c", COMMON + script + REPORT, source, picture, QUESTION, report, saved]
    run(command, environment(folder, **settings), folder)
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A folder with the files that the Hub shows of this repository and a model needs."""
    folder = tmp_path_factory.mktemp("repository")
    for path in (path for pattern in MODEL_FILES for path in ROOT.glob(pattern)):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def hub(repository):
    with HubServer(repository, REPO_ID) as server:
        yield server


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "word.png"
    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).text((12, 42), "monkey", font=ImageFont.load_default(size=24), fill="black")
    image.save(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Where `from_hub` saves its model and processor."""
    return tmp_path_factory.mktemp("saved") / "model"


@pytest.fixture(scope="module")
def from_hub(hub, picture, saved, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("from_hub") / "work"
    return ask(FROM_HUB, REPO_ID, picture, saved, folder, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")


def auto_map_values(settings) -> list[str]:
    """Every class that an `auto_map` in `settings` names, at any depth."""
    if not isinstance(settings, dict):
        return []
    found = [name for value in settings.values() for name in auto_map_values(value)]
    for entry in settings.get("auto_map", {}).values():
        entries = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]
        found += [name for name in entries if name]
    return found


def test_hf_download_gets_every_file(hub, repository, tmp_path):
    program = Path(sys.executable).with_name("hf")
    env = environment(tmp_path, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
    run([program, "download", REPO_ID, "--local-dir", tmp_path / "nano"], env, tmp_path)
    downloaded = {path.name: path.read_bytes() for path in (tmp_path / "nano").iterdir() if path.is_file()}
    assert downloaded == {path.name: path.read_bytes() for path in repository.iterdir()}


def test_model_files_are_complete(repository):
    """Every code file that `auto_map` names is among the served ones."""
    named = [name for path in repository.glob("*.json") for name in auto_map_values(json.loads(path.read_text()))]
    assert named
    assert all((repository / f"{name.split('.')[0]}.py").is_file() for name in named)


def test_model_of_the_hub_answers(hub, from_hub):
    """The weights and the code came from the served commit, and from nowhere else."""
    assert f".{hub.commit}." in from_hub["module"]
    places = [f"/{REPO_ID}/resolve/{revision}/model.safetensors" for revision in (hub.commit, "main")]
    assert any(("GET", place, 200) in hub.requests for place in places)
    assert from_hub["answer"].strip()


def test_pipeline_of_the_hub_answers_as_chat(from_hub):
    assert from_hub["pipeline"] == from_hub["answer"]


def test_saved_model_of_the_hub_loads_offline(from_hub, picture, saved, tmp_path):
    again = ask("", saved, picture, tmp_path / "unused", tmp_path / "work", HF_HUB_OFFLINE="1")
    assert again == {"answer": from_hub["answer"], "digest": from_hub["digest"]}


def test_saved_files_name_their_own_code(from_hub, saved):
    settings = {path.name: json.loads(path.read_text()) for path in saved.glob("*.json")}
    named = [name for content in settings.values() for name in auto_map_values(content)]
    assert {"config.json", "processor_config.json"} <= settings.keys() and named
    assert not [name for name in named if "--" in name]
    assert all((saved / f"{name.split('.')[0]}.py").is_file() for name in named)
