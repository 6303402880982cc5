"""The notebooks of the cookbook run from top to bottom in their folder, and show what their words say."""

import importlib.util

import pytest
from conftest import ROOT
from notebook_helpers import assert_stored_clean, copy_repository, run_notebook, shown, use_this_python


NOTEBOOKS = sorted(path.name for path in (ROOT / "cookbook").glob("*.ipynb"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a notebook of the cookbook where its packages are."""

    def run(name: str, *packages: str) -> dict[str, str]:
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not installed; make test-demo has all")
        use_this_python(tmp_path, monkeypatch)
        cells = run_notebook(copy_repository(tmp_path / "minimonkey") / "cookbook" / name)
        return {name: shown(cell) for name, cell in cells.items()}

    return run


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_without_outputs(name):
    assert_stored_clean(ROOT / "cookbook" / name)


def test_every_notebook_has_its_test():
    assert NOTEBOOKS == ["another_checkpoint.ipynb", "pdf.ipynb", "receipts.ipynb", "server.ipynb"]


def test_receipts_become_a_table(run):
    cells = run("receipts.ipynb", "pandas")
    assert all(shop in cells["table"] for shop in ("SLOWING", "LYCAON SAFETY", "SHOEHORN FREEWAY"))
    accepted = [int(line.split(": ")[1].split()[0]) for line in cells["check"].splitlines()]
    assert accepted == sorted(accepted, reverse=True) and accepted[0] > 3
    assert cells["check"].endswith("0 of them wrong")
    assert cells["look"]


def test_a_pdf_is_asked(run):
    cells = run("pdf.ipynb", "pypdfium2")
    assert cells["ask"] == "LYCAON SAFETY\n$22.79"
    assert cells["every"] == "{1: '189.20', 2: '$22.79', 3: '70.41'}"
    assert cells["find"].endswith("3")
    assert cells["together"]


def test_a_server_is_asked_by_its_client(run):
    cells = run("server.ipynb", "openai", "fastapi", "uvicorn")
    assert cells["ask"].split() == ["Mini", "Monkey"]
    assert "".join(cells["stream"].split("|")).split() == ["Mini", "Monkey"] and cells["stream"].count("|") > 3
    assert cells["again"]


def test_another_checkpoint_gets_two_grids_and_compression(run):
    cells = run("another_checkpoint.ipynb")
    assert cells["import"].endswith("Qwen3Model', 'chatml")
    assert float(cells["same"].rsplit(" ", 1)[1]) < 1e-4
    assert cells["msac"].startswith("12 detailed + 4 adaptive + 1 thumbnail tiles")
    before, after = (int(word) for word in cells["scm"].replace(",", "").split() if word.isdigit())
    assert before - after == 12 * 256 // 2
    assert cells["answer"]
