"""Make this folder's repository importable as the package `minimonkey`, for scripts that are run as files.

Python looks for imports beside a script first, so a clone or a downloaded copy runs its own code, installed or not.
"""

from pathlib import Path


__path__ = [str(Path(__file__).resolve().parents[1])]
