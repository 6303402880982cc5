"""JSON files of a checkpoint, checked before they are used: they come from strangers."""

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError


# The most that any of these may be; models of this family are far below. Larger values would fill the memory.
LARGEST = {
    "num_hidden_layers": 2_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "head_dim": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
    "image_size": 10**5,
    "force_image_size": 10**5,
    "patch_size": 10**5,
    "num_channels": 10**3,
}
# What configuration classes raise for invalid values.
WRONG_VALUES = (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
SECTIONS = ("vision_config", "llm_config", "text_config")


def read_json(path: Path, unique: bool = False) -> dict:
    """Return the object that a JSON file of a checkpoint holds.

    Args:
        unique: Refuse a key that occurs twice, of which the last would win.

    Raises:
        ValueError: It cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_doubles if unique else None)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, {{...}}, but holds a {type(value).__name__}.")
    return value


def without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """Build the object for `json.loads` as its `object_pairs_hook`; raises `ValueError` for a key that is there twice."""
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.200} is there twice")
        found[key] = value
    return found


def one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_config(config: dict, path: Path) -> None:
    """Raise `ValueError` for sections of a `config.json` that are not objects, and sizes that are invalid or far too large."""
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"{path}: {name} must be an object, {{...}}, got {config[name]!r:.80}.")
    for part in (config, *(config.get(name, {}) for name in SECTIONS)):
        for name in LARGEST.keys() & part.keys():
            _check_size(part[name], name, path)


def _check_size(value, name: str, path: Path) -> None:
    if value is None:
        return
    sizes = value if isinstance(value, list) and "size" in name and len(value) == 2 else [value]
    for size in sizes:
        least = 0 if name == "num_hidden_layers" else 1
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= LARGEST[name]:
            raise ValueError(
                f"{path}: {name} must be a whole number from {least} to {LARGEST[name]:,}, got {value!r:.80}."
            )
