"""Where the repository is, and how scripts reach its code."""

from pathlib import Path

from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parents[1]


def root_class(name: str):
    """A class, function or constant of the repository's code, `"module.name"`, loaded as `trust_remote_code` loads it.

    Each call looks at the files again, so it belongs outside loops.
    """
    return get_class_from_dynamic_module(name, str(ROOT))
