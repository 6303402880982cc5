"""`minimonkey read`: lines that are written as they come, runs that are killed and go on, text, fields, bad input."""

import importlib
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from reading_helpers import Looping, spoil, write_pages

from minimonkey.scripts.reading.engines import ENGINES
from minimonkey.scripts.reading.journal import open_journal


EXAMPLE, RECEIPT = ROOT / "assets" / "example.png", ROOT / "assets" / "receipt.png"
NEEDS_FIELDS = "llguidance, which holds answers to a schema, is not installed"
DOCUMENTS = ("--dtype", "float32")


@pytest.fixture
def read(monkeypatch, capsys):
    """Run the command in this process; return its exit status, its lines on standard output, and what it said."""

    def run(*arguments) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["minimonkey"])
        try:
            status = importlib.import_module("minimonkey.scripts.command").main(["read", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out.splitlines(), captured.err

    return run


def entries(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(lines: list[dict]) -> list[tuple]:
    return [(line["file"].split("/")[-1], line["page"]) for line in lines]


# --- lines -----------------------------------------------------------------------------------------------------------


def test_a_page_is_a_line_with_all_that_is_known_of_it(read, nano, shipped_processor):
    status, out, said = read(EXAMPLE, RECEIPT, "--dtype", "float32", "--max-new-tokens", 24, "--words")
    first, second = map(json.loads, out)
    assert status == 0 and (first["file"], first["page"]) == (str(EXAMPLE), 1)
    expected = nano.chat(shipped_processor, EXAMPLE, "Read the text.", return_dict=True)
    assert first["answer"] == expected.text == "Mini Monkey"
    assert first["confidence"] == pytest.approx(expected.confidence, abs=1e-3)
    assert [word for word, _ in first["words"]] == ["Mini", "Monkey"]
    probabilities = torch.tensor(expected.log_probabilities[:-1]).exp()  # without the end of the answer
    probabilities[len("Mini")] = 1  # nor what lies between the words
    product = first["words"][0][1] * first["words"][1][1]
    assert product == pytest.approx(float(probabilities.prod()), rel=0.02)
    assert (first["finish_reason"], second["finish_reason"]) == ("stop", "length")
    assert first["tokens"] == len(expected.token_ids) and second["tokens"] == 24
    assert first["seconds"] > 0 and first["image_tokens"] == 392
    assert "2 pages in" in said and "pages/s; 0 failed" in said


def test_a_folder_with_broken_files_loses_nothing(read, tmp_path):
    pytest.importorskip("pypdfium2", reason="pypdfium2, which reads PDF, is not installed")
    folder = tmp_path / "scans"
    folder.mkdir()
    messages = spoil(folder)
    write_pages(folder / "two.pdf", ["one", "two"])
    write_pages(folder / "three.tif", ["one", "two", "three"])
    out = tmp_path / "out.jsonl"
    status, _, said = read(folder, "--out", out, "--max-new-tokens", 4, "--dpi", 72)
    lines = entries(out)
    assert status == 1 and f"{len(messages)} failed" in said
    read_pages = [line for line in lines if "error" not in line]
    assert keys(read_pages) == [("three.tif", 1), ("three.tif", 2), ("three.tif", 3), ("two.pdf", 1), ("two.pdf", 2)]
    assert {name for name, _ in keys([line for line in lines if "error" in line])} == messages.keys()
    # Nothing is read again, and the status still says that something failed.
    status, _, said = read(folder, "--out", out, "--max-new-tokens", 4, "--dpi", 72, "--resume")
    assert status == 1 and "10 of 10 pages are done already" in said and entries(out) == lines


def test_a_file_of_results_is_not_overwritten_unasked(read, tmp_path):
    out = tmp_path / "out.jsonl"
    assert read(EXAMPLE, "--out", out)[0] == 0
    before = out.read_text()
    status, _, said = read(RECEIPT, "--out", out)
    assert status == 1 and "--resume" in said and "--overwrite" in said and out.read_text() == before
    status, _, said = read(EXAMPLE, "--out", out, "--resume", "--max-new-tokens", 7)
    assert status == 1 and "other settings: question" in said and out.read_text() == before
    assert read(RECEIPT, "--out", out, "--overwrite", "--max-new-tokens", 4)[0] == 0
    assert keys(entries(out)) == [("receipt.png", 1)]


def test_a_torn_last_line_is_cut_off(read, tmp_path):
    write_pages(tmp_path / "scan.tif", ["one", "two", "three"])
    out = tmp_path / "out.jsonl"
    assert read(tmp_path / "scan.tif", "--out", out, "--max-new-tokens", 4)[0] == 0
    whole = out.read_bytes()
    for length in (len(whole) - 1, len(whole) - 30, whole.index(b"\n") + 1, 5):
        out.write_bytes(whole[:length])
        assert read(tmp_path / "scan.tif", "--out", out, "--max-new-tokens", 4, "--resume")[0] == 0
        assert keys(entries(out)) == [("scan.tif", page) for page in (1, 2, 3)]


def test_a_damaged_line_is_no_reason_to_read_everything_again(tmp_path):
    out = tmp_path / "out.jsonl"
    with open_journal(out, {}) as journal:
        journal.add([{"file": "a", "page": 1, "answer": "\ud800"}])  # which UTF-8 cannot hold
    out.write_bytes(out.read_bytes() + b"no json\n")
    with pytest.raises(ValueError, match="line 2: no JSON"), open_journal(out, {}, resume=True):
        pass


def test_one_process_at_a_time_writes(tmp_path):
    out = tmp_path / "out.jsonl"
    with open_journal(out, {}), pytest.raises(ValueError, match="written by another process"):
        open_journal(out, {}, resume=True).__enter__()


def test_a_run_that_is_killed_goes_on_where_it_stopped(read, tmp_path):
    """Killed with SIGKILL while it writes; every page is there once, with the answer of a run that was not killed."""
    path, out = write_pages(tmp_path / "scan.tif", [f"word {number}" for number in range(40)]), tmp_path / "out.jsonl"
    options = [path, "--max-batch-tokens", 300, "--max-new-tokens", 12, "--dtype", "float32"]
    command = [sys.executable, "scripts/read.py", *map(str, options), "--out", str(out)]
    program = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert program.poll() is None
        time.sleep(0.002)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    before = out.read_bytes()
    assert 3 <= before.count(b"\n") < 40
    assert read(*options, "--out", out, "--resume")[0] == 0
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    lines = entries(out)
    assert keys(lines) == [("scan.tif", page) for page in range(1, 41)]
    assert read(*options, "--out", tmp_path / "whole.jsonl")[0] == 0
    assert [line["answer"] for line in lines] == [line["answer"] for line in entries(tmp_path / "whole.jsonl")]


# --- text ------------------------------------------------------------------------------------------------------------


def test_texts_are_files_of_their_own(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    write_pages(tmp_path / "scans" / "two.tif", ["one", "two"])
    (tmp_path / "scans" / "empty.png").write_bytes(b"")
    arguments = ("scans", EXAMPLE, "--format", "text", "--out", tmp_path / "texts", "--max-new-tokens", 12)
    assert read(*arguments)[0] == 1
    texts = tmp_path / "texts"
    assert (texts / str(EXAMPLE).lstrip("/")).with_name("example.png.0001.txt").read_text() == "Mini Monkey\n"
    assert (texts / "scans" / "empty.png.error.txt").read_text() == "scans/empty.png is empty.\n"
    second = texts / "scans" / "two.tif.0002.txt"
    assert second.exists()
    (texts / "scans" / "two.tif.0001.txt").write_text("kept")
    second.rename(second.with_name(second.name + ".part"))  # as a kill leaves it
    assert "3 of 4 pages are done already" in read(*arguments, "--resume")[2]
    assert second.exists() and (texts / "scans" / "two.tif.0001.txt").read_text() == "kept"
    assert not [*texts.rglob("*.part")]


# --- fields ----------------------------------------------------------------------------------------------------------


def test_fields_by_questions_have_their_own_confidence(read):
    fields = ("--fields", "total,date", "--field-question", "What is the {field}?")
    status, (line,), _ = read(RECEIPT, *DOCUMENTS, *fields)
    line = json.loads(line)
    assert status == 0 and line["fields"] == {"total": "$2.38", "date": "1991-09-18"}
    assert line["field_confidence"].keys() == line["fields"].keys()
    assert all(0.5 < value <= 1 for value in line["field_confidence"].values())


def test_fields_are_held_to_their_schema(read):
    pytest.importorskip("llguidance", reason=NEEDS_FIELDS)
    status, out, _ = read(EXAMPLE, "--fields", "total,invoice_number", "--max-new-tokens", 200)
    assert status == 0
    for line in map(json.loads, out):
        assert json.loads(line["answer"]) == line["fields"]
        assert [*line["fields"]] == ["total", "invoice_number"] == [*line["field_confidence"]]
        assert line["finish_reason"] == "stop"


SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "price": {"type": "integer", "minimum": 0, "maximum": 99},
                    "kind": {"enum": ["food", "other"]},
                },
                "required": ["price", "kind"],
                "additionalProperties": False,
            },
        },
        "paid": {"type": "boolean"},
    },
    "required": ["items", "paid"],
    "additionalProperties": False,
}


def test_a_schema_of_any_depth_has_a_confidence_for_each_value(read, tmp_path):
    pytest.importorskip("llguidance", reason=NEEDS_FIELDS)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    _, (line,), _ = read(RECEIPT, "--schema", tmp_path / "schema.json", "--max-new-tokens", 200)
    line = json.loads(line)
    assert json.loads(line["answer"]) == line["fields"] and len(line["fields"]["items"]) == 2
    paths = ["items[0].price", "items[0].kind", "items[1].price", "items[1].kind", "paid"]
    assert [*line["field_confidence"]] == paths


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "properties": {"a": {"type": "strin"}}, "required": ["a"]}, "strin"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["a"]},
            "required property 'a' is unsatisfiable",
        ),
        (
            {"type": "object", "required": ["a"], "additionalProperties": False},
            "required property 'a' is unsatisfiable",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "#/none"}}, "required": ["a"]}, "none"),
        ({"type": "array", "items": {"type": "string"}}, "must be of an object"),
    ],
)
def test_a_schema_that_cannot_be_is_refused_before_the_work(read, tmp_path, schema, message, monkeypatch):
    pytest.importorskip("llguidance", reason=NEEDS_FIELDS)
    monkeypatch.setattr("minimonkey.scripts.read.load_reader", lambda *arguments: pytest.fail("the model was loaded"))
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    status, _, said = read(EXAMPLE, "--schema", tmp_path / "schema.json")
    assert status == 1 and message in said and "schema" in said


# --- loops -----------------------------------------------------------------------------------------------------------


def test_a_page_that_loops_is_asked_once_more(read, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "transformers", Looping)
    _, out, _ = read(EXAMPLE, RECEIPT, "--retry-preset", "docvqa")
    first, second = map(json.loads, out)
    assert (second["answer"], second["finish_reason"], second["retried"]) == ("docvqa", "stop", True)
    assert (first["finish_reason"], "retried" in first) == ("stop", False)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "There is no file or folder nowhere.png"),
        ([EXAMPLE, "--pages", "3-1"], "numbers and ranges"),
        ([EXAMPLE, "--resume"], "need --out"),
        ([EXAMPLE, "--out", "x", "--resume", "--overwrite"], "choose one"),
        ([EXAMPLE, "--format", "text"], "needs --out"),
        ([EXAMPLE, "--fields", "a,,b"], "different names"),
        ([EXAMPLE, "--fields", "a", "--words"], "--words belongs to text"),
        ([EXAMPLE, "--fields", "a", "--field-question", "What?"], "{field}"),
        ([EXAMPLE, "--schema", "nowhere.json"], "cannot be read"),
        ([EXAMPLE, "--question", " "], "--question is empty"),
        ([EXAMPLE, "--preset", "none"], "Unknown preset 'none'"),
        ([EXAMPLE, "--retry-preset", "none"], "Unknown preset 'none'"),
        ([EXAMPLE, "--model", "/nowhere"], "holds no MiniMonkey processor"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(read, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, said = read(*arguments)
    assert status in (1, 2) and out == []
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert message in line
    assert [*tmp_path.iterdir()] == []
