"""What the tests of notebooks share: a copy of the repository to run them in, a kernel, and what a cell showed."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
from conftest import ROOT
from nbclient import NotebookClient


KERNEL = "python3"


def copy_repository(folder: Path) -> Path:
    """A copy of the files at the repository's root, with what notebooks use beside them."""
    (folder / "assets").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for path in (ROOT / "assets").glob("*.png"):
        shutil.copy(path, folder / "assets")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    shutil.copytree(ROOT / "cookbook", folder / "cookbook")
    return folder


def use_this_python(folder: Path, monkeypatch) -> None:
    """Let the kernel be this very interpreter, whatever kernels the machine has."""
    spec = folder / "jupyter" / "kernels" / KERNEL / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))


def run_notebook(path: Path) -> dict:
    """Run a notebook in its folder and return its code cells by their ids."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name=KERNEL, resources=resources, allow_errors=False).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def shown(cell) -> str:
    """What a cell printed and what its last expression is."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(texts).strip(" \n'\"[](),")


def assert_stored_clean(path: Path) -> None:
    """Raise unless a notebook is valid and has no outputs."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == KERNEL
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count]
