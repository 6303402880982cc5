"""The notebooks of the root run from top to bottom, and are stored without outputs."""

import ast

import pytest
from conftest import ROOT
from notebook_helpers import assert_stored_clean, copy_repository, run_notebook, shown, use_this_python


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


@pytest.mark.parametrize("name", ANSWERING)
def test_notebook_is_stored_without_outputs(name):
    assert_stored_clean(ROOT / name)


@pytest.mark.parametrize("name", ANSWERING)
def test_notebook_runs(name, tmp_path, monkeypatch):
    use_this_python(tmp_path, monkeypatch)
    cells = run_notebook(copy_repository(tmp_path / "minimonkey") / name)
    assert not [cell for cell in ANSWERING[name] if not shown(cells[cell])]
    assert any("image/png" in output.get("data", {}) for output in cells[PICTURES[name]].outputs)
    if name == "conversation.ipynb":
        assert "'same answer': True" in shown(cells["history"])
    if name == "finetune.ipynb":
        score = ast.literal_eval("{" + shown(cells["after"]).rpartition("{")[2].rstrip("} \n") + "}")
        assert score["before"] == 0 and score["after"] >= 5
