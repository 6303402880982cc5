"""Crops of PDF documents: their text is that of the page, and every character stands where it is said to be."""

import json
import random

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from training_helpers import ONE_TILE

from minimonkey.scripts import crop_documents
from minimonkey.scripts.evaluation.suites import read_benchmark
from minimonkey.scripts.synthetic.typeset import typeset
from minimonkey.scripts.training.data import read_sources
from minimonkey.scripts.training.encode import Encoder


pytest.importorskip("pypdfium2", reason="pypdfium2, which reads PDF, is not installed")

TEXT = ["The first line has words", "and the second some more", "while the third says 42%"]
ALONE = "far below stands another"


@pytest.fixture
def manual(tmp_path):
    """A page with three lines below each other, two words on one line far apart, and one line with other letters than ASCII."""
    figure = Figure(figsize=(6, 8))
    for number, line in enumerate(TEXT):
        figure.text(0.1, 0.9 - 0.03 * number, line, fontsize=12)
    figure.text(0.1, 0.6, "left", fontsize=12)
    figure.text(0.8, 0.6, "right", fontsize=12)
    figure.text(0.1, 0.5, "\u03b1\u03b2\u03b3 and so on", fontsize=12)
    figure.text(0.1, 0.2, ALONE, fontsize=12)
    path = tmp_path / "manual.pdf"
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path)
    return path


def test_a_crop_is_whole_lines_of_plain_text(manual):
    rng = random.Random(1)
    answers = {typeset([manual], rng, (1, 3), 0.0).questions[0].answer for _ in range(60)}
    assert "\n".join(TEXT) in answers
    assert {*TEXT, ALONE, "left", "right"} >= {answer for answer in answers if "\n" not in answer}
    assert not any("so on" in answer for answer in answers)
    assert not any(ALONE in answer and "\n" in answer for answer in answers)  # too far from the others for a block


def test_characters_stand_where_there_is_ink(manual):
    rng = random.Random(2)
    for _ in range(10):
        document = typeset([manual], rng, (1, 3), 0.0)
        text = document.questions[0].answer
        assert "".join(item.character for item in document.characters) == "".join(text.split())
        ink = np.asarray(document.image.convert("L")) < 128
        covered = np.zeros_like(ink)
        for item in document.characters:
            x0, y0, x1, y1 = item.box
            inside = ink[max(0, int(y0)) : int(y1) + 2, max(0, int(x0)) : int(x1) + 2]
            assert inside.any(), item
            covered[max(0, int(y0) - 1) : int(y1) + 3, max(0, int(x0) - 1) : int(x1) + 3] = True
        assert not (ink & ~covered).any()


def test_a_crop_depends_on_the_seed_alone(manual):
    first, again = (typeset([manual], random.Random(3), (1, 3), 1.0) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.questions == again.questions


@pytest.fixture
def encoder(processor, nano):
    return Encoder(processor, nano.config)


def test_training_cuts_pdf_documents(manual, tmp_path, encoder):
    entry = {"pdf": "*.pdf", "length": 4, "lines": [2, 3], "turns": 2, "difficulty": 0.5}
    (source,) = read_sources({"manuals": entry}, tmp_path, ONE_TILE, encoder)
    example = source.example(0, 0)
    assert example.conversation.turns[-1][1].count("\n") >= 1
    assert example.characters
    assert source.example(0, 1).pictures[0].tobytes() != example.pictures[0].tobytes()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pdf": "none/*.pdf"}, "no file fits"),
        ({"pdf": 3}, "a path, a pattern or a list"),
        ({"pdf": "*.pdf", "lines": [3, 1]}, "fewest, most"),
        ({"pdf": "*.pdf", "lines": [20, 20]}, "hold no 20 to 20 lines"),
        ({"pdf": "*.txt"}, "cannot be opened as a PDF"),
    ],
)
def test_what_cannot_be_cut_is_said_before_training(manual, tmp_path, encoder, entry, message):
    (tmp_path / "broken.txt").write_text("no PDF")
    with pytest.raises(ValueError, match=f"Dataset manuals: .*{message}"):
        read_sources({"manuals": {"length": 4, **entry}}, tmp_path, ONE_TILE, encoder)


def test_crops_become_a_benchmark(manual, tmp_path, capsys):
    out = tmp_path / "crops"
    assert crop_documents.main([str(manual), "--items", "5", "--lines", "1", "2", "--out", str(out)]) == 0
    suite = read_benchmark(out / "benchmark.jsonl")
    assert len(suite) == 5
    assert all(line in [*TEXT, ALONE, "left", "right"] for line in suite.item(0).answers[0].split("\n"))
    assert json.loads((out / "benchmark.jsonl").read_text().splitlines()[0])["image"] == "images/00000.png"
    assert crop_documents.main([str(manual), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
