"""Results that are written as they come, so that a run that was killed goes on where it stopped: no page lost, none twice.

    with open_journal(Path("out.jsonl"), settings, resume=True) as journal:
        journal.add([{"file": "a.pdf", "page": 1, "answer": "..."}])
        (file, page) in journal.done

A page counts as done once its line, or its text file, is whole. What a kill tore is cut off at the next start. What decides the
answers is kept beside them in `<name>.settings.json`; to go on with other settings is refused. One process at a time may write.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from minimonkey.scripts.evaluation.predictions import check_same, settings_path


Key = tuple[str, int | None]
"""A file and the number of a page; None: the file itself, which could not be read."""


class Lines:
    """One line of JSON a page, in a file or, without one, on standard output."""

    def __init__(self, path: Path | None):
        self.path, self.done, self.errors = path, set(), 0
        if path is not None and path.exists():
            size = path.stat().st_size
            with path.open("r+b") as file:
                end = 0
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    entry = _parsed(line, path, number)
                    self.done.add((entry["file"], entry["page"]))
                    self.errors += "error" in entry
                if end < size:
                    file.truncate(end)

    def add(self, lines: list[dict]) -> None:
        """Write lines and return when they are on the disk."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            with self.path.open("ab") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        self.done |= {(line["file"], line["page"]) for line in lines}
        self.errors += sum("error" in line for line in lines)


class Texts:
    """The text of each page in a file of its own, `FOLDER/scans/a.pdf.0001.txt`; of one that failed, the error."""

    def __init__(self, folder: Path):
        self.folder, self.errors = folder, 0
        self.done = _NamesOfDone(self)

    def path(self, key: Key, failed: bool = False) -> Path:
        """Return where the text of a page is: by the file's path below the current folder, or by its whole path."""
        file, page = key
        path = os.path.abspath(file)
        below = os.path.relpath(path)
        inside = path.lstrip(os.sep) if below.startswith(os.pardir) or os.path.isabs(below) else below
        number = "" if page is None else f".{page:04}"
        return self.folder / f"{inside}{number}{'.error' if failed else ''}.txt"

    def add(self, lines: list[dict]) -> None:
        """Write the pages; each file appears whole or not at all."""
        for line in lines:
            failed = "error" in line
            path = self.path((line["file"], line["page"]), failed)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".part")
            with unfinished.open("wb") as file:
                file.write((line["error" if failed else "answer"] + "\n").encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            self.errors += failed


class _NamesOfDone:
    """Tells which pages have their file, without reading the folder."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def __contains__(self, key: Key) -> bool:
        return any(self.texts.path(key, failed).exists() for failed in (False, True))


@contextlib.contextmanager
def open_journal(
    out: Path | None, settings: dict, resume: bool = False, overwrite: bool = False, as_text: bool = False
) -> Iterator[Lines | Texts]:
    """Open results to be written.

    Args:
        out: A JSONL file, or with `as_text` a folder; None: standard output.
        settings: What decides the answers.
        resume: Go on with what is there, if there is something.
        overwrite: Begin anew, whatever is there.

    Raises:
        ValueError: It exists and neither `resume` nor `overwrite` is given, was made with other settings, is damaged before
            its last line, or another process is writing it.
    """
    if out is None:
        yield Lines(None)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(out.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out} is being written by another process.") from error
    try:
        about = settings_path(out)
        if out.exists() and resume:
            check_same(about, settings)
        else:
            if out.exists() and not overwrite:
                raise ValueError(f"{out} is there already. Go on with it (--resume), or begin anew (--overwrite).")
            _remove(out)
            unfinished = about.with_name(about.name + ".part")
            # Before the first line, so that lines never lack their settings.
            unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, about)
        yield Texts(out) if as_text else Lines(out)
    finally:
        lock.release()


def _remove(out: Path) -> None:
    """Remove a file of lines, or the texts in a folder and nothing else that may be there."""
    if out.is_file():
        out.unlink()
    for path in out.rglob("*.txt") if out.is_dir() else ():
        path.unlink()


def _parsed(line: bytes, path: Path, number: int) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error}). Mend the line or begin anew.") from error
    if not isinstance(entry, dict) or not {"file", "page"} <= entry.keys():
        raise ValueError(f"{path}, line {number}: a page has a file and a page, got {line[:120]!r}.")
    return entry
