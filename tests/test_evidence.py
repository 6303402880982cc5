"""Ways to show a picture, side by side: what is compared with what, and the command that does it."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from minimonkey.scripts.evaluation.tables import Comparison, markdown
from minimonkey.scripts.evaluation.ways import droppings, tilings
from minimonkey.tiling import RANGE_NAMES, msac_grids, tile_counts


RANGES = (4, 12, 3, 7)


def predictions(scores: list[float], tokens: int = 100) -> list[dict]:
    return [
        {
            "id": str(number),
            "question": "What?",
            "answers": ["ab"],
            "metric": "exact_match",
            "score": score,
            "reference": "ab",
            "edits": int(not score),
            "image_tokens": 200,
            "image_tokens_read": tokens,
            "seconds": 0.5,
        }
        for number, score in enumerate(scores)
    ]


def test_tilings_differ_in_their_tiles():
    ranges = [tuple(way.images_kwargs[name] for name in RANGE_NAMES) for way in tilings(RANGES)]
    thumbnails = [way.images_kwargs.get("use_thumbnail", True) for way in tilings(RANGES)]
    counts = [tile_counts(*msac_grids(400, 300, *r, 112), use) for r, use in zip(ranges, thumbnails)]
    detailed, adaptive, _ = counts[-1]
    assert counts == [(0, 0, 1), (detailed, 0, 0), (detailed, 0, 1), (detailed, adaptive, 1)]
    assert detailed == 12 and adaptive > 1


def test_ways_have_files_of_their_own():
    slugs = [way.slug for way in (*tilings(RANGES), *droppings(RANGES))]
    assert len(set(slugs)) == len(slugs) == 13
    assert all(slug.replace("-", "").isalnum() for slug in slugs)


def test_a_tiling_is_compared_with_the_one_before():
    scores = ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
    shown = {way: predictions(values) for way, values in zip(tilings(RANGES), scores)}
    rows = Comparison("seams", "tilings", shown).rows()
    assert [row["score"] for row in rows] == [0, 0.25, 0.5, 0.75]
    assert [row.get("compared_with") for row in rows] == [None, "whole image", "detailed", "detailed + thumbnail"]
    assert all(row["difference"] == 0.25 and row["difference_low"] == 0 for row in rows[1:])
    assert all((row["better"], row["worse"]) == (1, 0) for row in rows[1:])
    assert rows[0]["character_error_rate"] == 0.5 and rows[0]["seconds"] == 0.5


def test_scm_is_compared_with_all_tokens_and_its_baselines_with_scm():
    full = tilings(RANGES)[-1]
    shown = {full: predictions([1, 1], 200)}
    shown |= {way: predictions([1, int(way.drop == "scm")]) for way in droppings(RANGES)}
    rows = {row["way"]: row for row in Comparison("receipts", "compression", shown).rows()}
    assert rows["scm 0.5"]["compared_with"] == "MSAC" and rows["scm 0.5"]["difference"] == 0
    assert rows["random 0.25"]["compared_with"] == "scm 0.25" and rows["random 0.25"]["difference"] == -0.5
    assert rows["MSAC"]["keep_ratio"] == 1 and rows["MSAC"]["image_tokens_read"] == 200
    (table,) = [text for text in markdown([*rows.values()]).split("\n\n") if text.strip()]
    assert "| receipts | random 0.25 | 50.0% |" in table and "-50.0 (-100.0 to +0.0) | scm 0.25 |" in table


def test_the_command_writes_tables_and_figure_and_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "evidence.py"), str(tmp_path), "--suites", "seams"]
    command += ["--items", "2", "--difficulty", "0"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "evidence.json").read_text())
    assert [row["subject"] for row in rows] == ["tilings"] * 4 + ["compression"] * 10
    kept = {row["way"]: row["image_tokens_read"] for row in rows if row["subject"] == "compression"}
    assert kept["MSAC"] > kept["scm 0.75"] == kept["random 0.75"] > kept["uniform 0.25"]
    assert (tmp_path / "evidence.md").read_text() in first.stdout
    with Image.open(tmp_path / "evidence.png") as figure:
        assert figure.width > 600
    answered = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert len(answered) == 13
    (tmp_path / "seams.msac.jsonl").write_text("")
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    again = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert {name for name in again if again[name] != answered[name]} <= {"seams.msac.jsonl"}
    assert [json.loads(line)["answer"] for line in again["seams.msac.jsonl"].splitlines()] == [
        json.loads(line)["answer"] for line in answered["seams.msac.jsonl"].splitlines()
    ]
    command[command.index("seams") : command.index("seams") + 1] = ["lines", "seams"]
    changed = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, timeout=300)
    assert changed.returncode == 1 and "seed was 0, is 5" in changed.stderr
    assert not (tmp_path / "lines.whole-image.jsonl").exists()  # said before anything is read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suites", "seams", "--compressed", "lines"], "not among --suites"),
        (["--items", "1"], "at least 2"),
        (["--keep-ratios", "0.5", "1"], "between 0 and 1"),
        (["--preset", "docqva"], "known are default"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    command = [sys.executable, str(ROOT / "scripts" / "evidence.py"), str(tmp_path), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr
