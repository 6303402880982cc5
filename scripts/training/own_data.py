"""Data of your own as a meta JSON: a table of images with questions and answers, or a folder with one, taken as it is.

    own_data(Path("photos"), Path("runs/photos"), "What is on the label?")

Taken are a meta JSON (see data.py), a JSONL file of conversations, a list of such conversations in a JSON file, and tables:
CSV, TSV or JSONL with a column for the image (IMAGE_COLUMNS), one for the answer (ANSWER_COLUMNS) and perhaps one for the
question (QUESTION_COLUMNS). In a folder it is the one such file; Hugging Face's ImageFolder (metadata.csv) is such a folder.
"""

import csv
import hashlib
import json
import os
from pathlib import Path

from minimonkey.conversation import IMAGE_PLACEHOLDER
from minimonkey.scripts.training.data import parse_json


IMAGE_COLUMNS = ("image", "file_name", "filename", "file", "image_path", "path")
QUESTION_COLUMNS = ("question", "prompt", "instruction", "query")
ANSWER_COLUMNS = ("answer", "answers", "text", "label", "caption", "response")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
METADATA = "metadata"  # the table of an ImageFolder


def own_data(path: Path, output: Path, question: str | None = None) -> str | dict:
    """Return what `data` of a recipe takes; tables are written as conversations into `output`, which is made.

    Args:
        path: A file or folder, see above.
        question: What is asked about every image of a table without questions.

    Raises:
        ValueError: There is no such data, or something in it cannot be understood; file, line and columns are said.
    """
    table = _find_table(path) if path.is_dir() else path
    if not table.is_file():
        raise ValueError(f"There is no data {table}: give a folder of images with a CSV or JSONL file, or such a file.")
    if table.suffix.lower() == ".json":
        content = parse_json(table.read_text(encoding="utf-8-sig"), str(table))
        if isinstance(content, dict):
            return str(table)
        rows = content
    else:
        rows = read_rows(table)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{table} must hold one or more rows with names and values.")
    if table.suffix.lower() == ".jsonl" and all("conversations" in row for row in rows):
        return {table.stem: {"root": str(table.parent), "annotation": str(table)}}
    lines = [_as_line(row, f"{table}, row {number}", question) for number, row in enumerate(rows, 1)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # Named by content, so that a resumed run finds its own data and no other.
    written = output / f"data-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    if not written.exists():
        begun = written.with_suffix(f".{os.getpid()}")  # whole at once: other processes of the run look for it
        begun.write_text(text, encoding="utf-8")
        begun.replace(written)
    return {table.stem: {"root": str(table.parent), "annotation": str(written)}}


def _find_table(folder: Path) -> Path:
    """Return the one table of a folder; metadata.* goes before others."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
    found = [path for path in found if path.stem == METADATA] or found
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"The folder {folder} must hold one CSV, TSV or JSONL file with an image and an answer in each row, "
            f"found {names}. Name the file instead of the folder, or write one."
        )
    return found[0]


def read_rows(table: Path) -> list[dict]:
    """Read a CSV, TSV (with a header) or JSONL file as a list of rows by column.

    Raises:
        ValueError: Another kind of file, or a line that is none, with its number.
    """
    suffix = table.suffix.lower()
    text = table.read_text(encoding="utf-8-sig")  # as spreadsheets write it
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [parse_json(line, f"{table}, line {number}") for number, line in lines]
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{table} is no table: take {', '.join(TABLE_SUFFIXES)} or a meta JSON.")
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if suffix == ".tsv" else ",")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(
                f"{table}, row {number}: {len(reader.fieldnames or ())} columns are named, the row has others."
            )
    return rows


def _as_line(row: dict, where: str, question: str | None) -> dict:
    """Return a row as a conversation in InternVL's form."""
    if "conversations" in row:
        return row
    image = _column(row, IMAGE_COLUMNS, where)
    answer = _column(row, ANSWER_COLUMNS, where)
    asked = next((row[name] for name in QUESTION_COLUMNS if row.get(name)), question)
    if not asked:
        raise ValueError(
            f"{where}: there is no question ({', '.join(QUESTION_COLUMNS)}); add the column, or --question 'Read the text.'"
        )
    images = image if isinstance(image, list) else [image]
    answer = answer[0] if isinstance(answer, list) and answer else answer
    missing = "" if IMAGE_PLACEHOLDER in asked else f"{IMAGE_PLACEHOLDER}\n" * len(images)
    turns = [{"from": "human", "value": missing + asked}, {"from": "gpt", "value": str(answer)}]
    return {"image": image, "conversations": turns}


def _column(row: dict, names: tuple[str, ...], where: str):
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise ValueError(
        f"{where}: there is none of the columns {', '.join(names)}; the row has {', '.join(map(str, row))}."
    )


def count_examples(data: str | dict) -> int:
    """Count the lines, and the documents made on demand, of a meta JSON (path or content), each once.

    Raises:
        ValueError: A file is missing or empty.
    """
    folder = Path(data).parent if isinstance(data, str) else Path()
    meta = parse_json(Path(data).read_text(encoding="utf-8"), data) if isinstance(data, str) else data
    count = 0
    for name, entry in meta.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{data}: dataset {name} must be an object, see scripts/training/data.py.")
        if "synthetic" in entry or "pdf" in entry:
            count += int(entry.get("length", 0))
            continue
        annotation = folder / entry.get("annotation", "")
        if not annotation.is_file():
            raise ValueError(f"Dataset {name}: there is no annotation file {annotation}.")
        with annotation.open(encoding="utf-8") as lines:
            count += sum(1 for line in lines if line.strip())
    if not count:
        raise ValueError("The data holds no example.")
    return count
