"""The scripts by the commands in the README."""

import subprocess
import sys

import pytest
from conftest import ROOT


sys.path.insert(0, str(ROOT / "scripts"))
from evaluate import edit_distance, score, wilson_interval  # noqa: E402


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_chat_reads_the_example():
    result = run("scripts/chat.py", "assets/example.png", "Read the text.")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["Mini", "Monkey"]


def test_chat_goes_on_with_history_until_an_empty_line():
    result = run("scripts/chat.py", "assets/example.png", "--max-new-tokens", 4, input="Read the text.\nAgain?\n\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 3


def test_chat_says_what_is_wrong():
    result = run("scripts/chat.py", "missing.png", "Read the text.")
    assert result.returncode == 1
    assert "missing.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_training_and_evaluation_run(tmp_path):
    from synthetic.text_images import font_files, words

    try:
        font_files("training"), font_files("held_out"), words("training")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    steps = ["--letters-steps", 1, "--reading-steps", 2, "--batch-size", 2, "--workers", 0]
    result = run("scripts/train_nano.py", tmp_path / "nano", *steps)
    assert result.returncode == 0, result.stderr
    assert "reading 2/2" in result.stderr
    result = run("scripts/evaluate.py", "--model", tmp_path / "nano", "--items", 2, "--out", tmp_path / "out.jsonl")
    assert result.returncode == 0, result.stderr
    assert '"items": 2' in result.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_score():
    assert [edit_distance(*pair) for pair in (("", "ab"), ("abc", "abc"), ("kitten", "sitting"))] == [2, 0, 3]
    low, high = wilson_interval(60, 100)
    assert (round(low, 3), round(high, 3)) == (0.502, 0.691)
    result = score(["one", "two", "four"], ["one", "tow", ""])
    assert (result["exact_match"], result["character_error_rate"]) == (1 / 3, 6 / 10)
