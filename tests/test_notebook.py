"""The notebooks run from top to bottom, and are stored without outputs."""

import ast
import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image, ImageDraw, ImageFont


# The cells of each notebook that must show something.
ANSWERING = {
    "quickstart.ipynb": ("ask", "history", "batch", "transformers", "stream", "pipeline"),
    "conversation.ipynb": (
        *("history", "memory", "messages", "new-picture", "stream", "confidence", "batch", "many", "too-long"),
        *("video", "boxes", "cameras", "scm"),
    ),
    "finetune.ipynb": ("table", "before", "train", "after"),
}
PICTURES = {"quickstart.ipynb": "picture", "conversation.ipynb": "boxes", "finetune.ipynb": "table"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the files at the repository's root, with its picture."""
    copy = tmp_path / "minimonkey"
    (copy / "assets").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    (copy / "scripts").symlink_to(ROOT / "scripts")
    picture = ROOT / "assets" / "example.png"
    if picture.exists():
        shutil.copy(picture, copy / "assets")
    else:
        draw_words(copy / "assets" / "example.png")
    return copy


def draw_words(path: Path) -> None:
    """A stand-in for the picture of the notebook."""
    image = Image.new("RGB", (224, 112), "white")
    ImageDraw.Draw(image).text((12, 36), "tiny monkey", font=ImageFont.load_default(size=32), fill="black")
    image.save(path)


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """The name of a kernel that runs this very interpreter, whatever kernels the machine has."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return "python3"


def shown(cell) -> str:
    """What a cell printed and what its last expression is."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(texts).strip(" \n'\"[](),")


@pytest.mark.parametrize("name", ANSWERING)
def test_notebook_is_stored_without_outputs(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.parametrize("name", ANSWERING)
def test_notebook_runs(name, folder, kernel):
    notebook = nbformat.read(folder / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}, allow_errors=False
    )
    client.execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not [cell for cell in ANSWERING[name] if not shown(cells[cell])]
    assert any("image/png" in output.get("data", {}) for output in cells[PICTURES[name]].outputs)
    if name == "conversation.ipynb":
        assert "'same answer': True" in shown(cells["history"])
    if name == "finetune.ipynb":
        score = ast.literal_eval("{" + shown(cells["after"]).rpartition("{")[2].rstrip("} \n") + "}")
        assert score["before"] == 0 and score["after"] >= 5
