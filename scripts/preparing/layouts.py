"""The files that a download must have: which are there, and which are missing, by name."""

import json
from collections.abc import Mapping
from pathlib import Path


def find(root: Path, *names: str) -> Path | None:
    """Return the first of these paths below `root` that exists; a name may be a pattern."""
    for name in names:
        found = sorted(root.glob(name)) if any(mark in name for mark in "*?[") else [root / name]
        found = [path for path in found if path.exists()]
        if found:
            return found[0]
    return None


def require(root: Path, what: str, needed: Mapping[str, str | tuple[str, ...]]) -> dict[str, Path]:
    """Return where each of the needed files and folders is.

    Args:
        root: Folder of the download.
        what: The data set, for the message.
        needed: Paths below `root` by a short name; several where it may lie in different places.

    Raises:
        ValueError: Some are missing; all of them are named, with what was found instead.
    """
    if not root.is_dir():
        raise ValueError(f"There is no folder {root} with {what}.")
    places = {name: (paths,) if isinstance(paths, str) else paths for name, paths in needed.items()}
    found = {name: find(root, *paths) for name, paths in places.items()}
    missing = [f"{name} ({' or '.join(places[name])})" for name, path in found.items() if path is None]
    if missing:
        here = ", ".join(sorted(path.name for path in root.iterdir())[:12]) or "nothing"
        raise ValueError(f"{what} in {root} is not whole; missing: {'; '.join(missing)}. The folder holds {here}.")
    return {name: path for name, path in found.items() if path is not None}


def read_json(path: Path):
    """Read a JSON file; raises `ValueError` with its name where it is none (a download that was cut off, say)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, perhaps not wholly downloaded: {error}") from error
