"""Predictions in a file that grows while a model answers, so that a run that was killed resumes where it stopped.

Each item is one line of JSON; what was asked of which model is kept next to it in `<file>.settings.json`.
"""

import hashlib
import json
from pathlib import Path


class Predictions:
    """The predictions of a run, by the id of their item.

    Args:
        path: The JSONL file; None keeps them in memory alone.
        settings: What decides the answers; a file can only be continued with the same settings.
        resume: Continue the file if it is there; otherwise it is written anew.

    Raises:
        ValueError: A file to continue that was made with other settings, or is damaged before its last line.
    """

    def __init__(self, path: Path | None, settings: dict, resume: bool = False):
        self.path, self.settings = path, settings
        self.lines: dict[str, dict] = {}
        self._is_begun = False
        if path is not None and resume and path.exists():
            check_same(settings_path(path), settings)
            whole = _whole_lines(path)
            self.lines = {line["id"]: line for line in parse_predictions(whole, path)}
            path.write_text(whole, encoding="utf-8")
            self._is_begun = True

    def add(self, lines: list[dict]) -> None:
        """Keep predictions, and write them to the file before returning."""
        self.lines |= {line["id"]: line for line in lines}
        if self.path is None:
            return
        if not self._is_begun:  # only once there is an answer: if the model cannot be loaded, the old file is kept
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")
            settings_path(self.path).write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
            self._is_begun = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def weights_digest(model: str, subfolder: str = "") -> str | None:
    """Return a digest of the weights of a folder; None for a Hub id, whose revision stands for its weights."""
    files = sorted(Path(model, subfolder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def settings_path(path: Path) -> Path:
    """Return where the settings are kept that a file of predictions was made with."""
    return path.with_name(path.name + ".settings.json")


def read_predictions(path: Path) -> dict[str, dict]:
    """Read the predictions of a file, by id.

    Raises:
        ValueError: There is no such file, or a line is not a prediction.
    """
    if not path.is_file():
        raise ValueError(f"There is no predictions file {path}.")
    return {line["id"]: line for line in parse_predictions(_whole_lines(path), path)}


def _whole_lines(path: Path) -> str:
    """Return the text of a file without a last line that was cut off."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1]


def parse_predictions(text: str, path: Path) -> list[dict]:
    """Parse predictions, one for each line of `text`."""
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}). Mend the line or start anew.") from error
        if not isinstance(entry, dict) or not {"id", "metric", "score"} <= entry.keys():
            raise ValueError(f"{path}, line {number}: a prediction has an id, a metric and a score, got {line[:120]}")
        lines.append(entry)
    return lines


def check_same(path: Path, settings: dict) -> None:
    """Raise `ValueError` unless the settings at `path` are these."""
    if not path.exists():
        raise ValueError(f"{path} is missing, which says how the predictions were made; start without --resume.")
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
        raise ValueError(
            f"The predictions to continue were made with other settings: {differences}. Use the same, or another --out."
        )
