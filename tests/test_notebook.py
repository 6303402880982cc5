"""quickstart.ipynb runs from top to bottom, and is stored without outputs."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image, ImageDraw, ImageFont


NOTEBOOK = ROOT / "quickstart.ipynb"
ANSWERING = ("ask", "history", "batch", "transformers", "stream", "pipeline")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the files at the repository's root, with its picture."""
    copy = tmp_path / "minimonkey"
    (copy / "assets").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
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


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count]


def test_notebook_runs(folder, kernel):
    notebook = nbformat.read(folder / NOTEBOOK.name, as_version=4)
    client = NotebookClient(
        notebook, timeout=100, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}, allow_errors=False
    )
    client.execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not [name for name in ANSWERING if not shown(cells[name])]
    assert "image/png" in cells["picture"].outputs[0].data
