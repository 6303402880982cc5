"""Words and fonts of rendered documents: from packages alone, the same everywhere, split without overlap."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT

from minimonkey.scripts.synthetic import materials
from minimonkey.scripts.synthetic.text_images import CHARACTERS


SPLITS = ("training", "held_out")


@pytest.mark.parametrize("split", SPLITS)
def test_every_character_of_every_font_is_drawn(split):
    for path in materials.font_files(split):
        font = materials.load_font(path, 24)
        missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
        for character in CHARACTERS:
            mask = font.getmask(character)
            assert mask.getbbox() is not None and (mask.getbbox(), bytes(mask)) != missing, (path.name, character)


@pytest.mark.parametrize("split", SPLITS)
def test_there_are_fonts_of_all_kinds(split):
    names = [path.stem for path in materials.font_files(split)]
    assert len(names) == len(set(names)) > 20
    assert any("Bold" in name for name in names) and any("It" in name for name in names)
    assert materials.monospaced_fonts(split)
    assert len(materials.font_families(split)) >= 7
    words = materials.words(split)
    assert set(words) == set(range(2, 15)) and sum(map(len, words.values())) > 10_000


def test_splits_share_nothing():
    training, held_out = ({path.stem for path in materials.font_files(split)} for split in SPLITS)
    assert not training & held_out
    training, held_out = ({w for same in materials.words(split).values() for w in same} for split in SPLITS)
    assert not training & held_out and "monkey" in training | held_out


def test_a_machine_without_packages_says_what_to_install(monkeypatch):
    monkeypatch.setattr(materials.importlib.util, "find_spec", lambda name: None)
    for missing in (materials.words.__wrapped__, materials.font_families.__wrapped__):
        with pytest.raises(FileNotFoundError, match="pip install pyspellchecker matplotlib rendercv-fonts"):
            missing("training")


def test_fonts_of_the_system_come_in_only_where_they_are_wanted(monkeypatch, tmp_path):
    dejavu = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    for name in ("Hack-Regular.ttf", "Lato-Regular.ttf", "Unknown.ttf"):
        (tmp_path / name).write_bytes(dejavu.read_bytes())
    families = materials.font_families.__wrapped__
    packaged = {split: families(split) for split in SPLITS}
    record = materials.materials()
    monkeypatch.setattr(materials, "SYSTEM_FOLDERS", (tmp_path, tmp_path / "missing"))
    assert {split: families(split) for split in SPLITS} == packaged
    monkeypatch.setenv(materials.SYSTEM_FONTS, "1")
    monkeypatch.setattr(materials, "font_families", families)
    assert set(families("training")) - set(packaged["training"]) == {(tmp_path / "Hack-Regular.ttf",)}
    assert families("held_out") == packaged["held_out"]  # its Lato is the package's
    assert materials.materials()["digest"] != record["digest"] and materials.materials()["system_fonts"]
    assert record["packages"]["matplotlib"] == matplotlib.__version__ and not record["system_fonts"]


def test_the_record_is_printed_by_the_command():
    result = subprocess.run(
        [sys.executable, "scripts/synthetic/materials.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert materials.materials()["digest"] in result.stdout
