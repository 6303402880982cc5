"""The card and its pages: every snippet runs, every command parses, every link leads somewhere.

Python snippets are executed from top to bottom of a page, after the first one of the README, in a folder with the files that
they name. Nano stands in for other weights (STAND_INS). Commands are parsed by the parser of the script or program that they
name. A kind of snippet or a program that is not known here fails.
"""

import argparse
import copy
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from clips import write_clip
from conftest import ROOT
from packaging.requirements import Requirement
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor

from minimonkey.scripts.command import COMMANDS
from minimonkey.scripts.evaluation.suites import read_benchmark
from minimonkey.scripts.training.data import read_sources
from minimonkey.scripts.training.encode import Encoder
from minimonkey.scripts.training.recipe import read_recipe


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LONGEST_README = 150  # lines

# What the tests put in the place of what they do not have: the Hub, other weights, a GPU.
STAND_INS = {
    "https://huggingface.co/OWNER/MiniMonkey/resolve/main/": f"{ROOT}/",
    "OWNER/MiniMonkey": str(ROOT),
    "MiniMonkey-2B": str(ROOT),
    "torch.bfloat16": "torch.float32",
    "flash_attention_2": "sdpa",
    '"cuda"': '"cpu"',
}
# What is done with a function that a page only defines.
AFTERWARDS = {"conversations.md": "assert ''.join([*respond('Read the text.', [])][-1:]).strip()"}
NEW_TOKENS = 12
SNIPPET = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INLINE_COMMAND = re.compile(r"`((?:python scripts/|make |minimonkey |pip install )[^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Packages that a page names and pyproject.toml does not.
OTHER_PACKAGES = {"deepspeed", "pillow-heif", "pycocoevalcap"}
LAUNCHERS = ("torchrun", "accelerate")
# Their commands and snippets are tried where they are installed, in tests/engines, or not at all, as the page then says.
ENGINES = ("vllm", "lmdeploy", "sglang", "openvino")
SLURM = "scripts/training/launch/slurm.sh"  # hands its arguments to finetune.py


def snippets(page: Path, language: str) -> list[str]:
    """The snippets of one language, without the indentation that they have in a list."""
    found = [match.groups() for match in SNIPPET.finditer(page.read_text())]
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, kind, text in found if kind == language]


def commands(page: Path) -> list[str]:
    """The shell commands of a page, those within its sentences among them, each on one line."""
    lines = [line for text in snippets(page, "bash") for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    prose = SNIPPET.sub("", page.read_text())
    return lines + [" ".join(command.split()) for command in INLINE_COMMAND.findall(prose)]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- python ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the snippets name, as the current one."""
    for name, text in (("page.png", "total 42"), ("back.png", "thanks")):
        image = Image.new("RGB", (240, 120), "white")
        ImageDraw.Draw(image).text((12, 36), text, font=ImageFont.load_default(size=40), fill="black")
        image.save(tmp_path / name)
    write_clip(tmp_path / "clip.mp4", step=5)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def loaded() -> dict:
    """What was loaded for an earlier page."""
    return {}


@pytest.fixture
def loaded_once(loaded, monkeypatch) -> None:
    """Let each set of weights be read once, and answer briefly; every page gets a copy."""
    for auto in (AutoModel, AutoProcessor):

        def load(source, *, load=auto.from_pretrained, kind=auto.__name__, **options):
            key = (kind, source, *sorted(options.items()))
            if key not in loaded:
                loaded[key] = load(source, **options)
                if kind == "AutoModel":
                    loaded[key].generation_config.max_new_tokens = NEW_TOKENS
            return copy.deepcopy(loaded[key])

        monkeypatch.setattr(auto, "from_pretrained", load)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))


def run_python(code: str, page: Path, namespace: dict) -> None:
    for written, used in STAND_INS.items():
        code = code.replace(written, used)
    exec(compile(code, named(page), "exec"), namespace)


@pytest.mark.usefixtures("folder", "loaded_once")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_snippets_run(page, capsys):
    codes = snippets(page, "python")
    namespace = {}
    run_python(snippets(README, "python")[0], README, namespace)
    assert capsys.readouterr().out.split() == ["Mini", "Monkey"]
    for code in codes[page == README :]:
        if code.startswith(tuple(f"from {engine} import" for engine in ENGINES)):
            continue
        run_python(code, page, namespace)
    if page.name in AFTERWARDS:
        run_python(AFTERWARDS[page.name], page, namespace)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_data_snippets_are_read(page, folder, processor, nano):
    texts = snippets(page, "json")
    (folder / "images").mkdir()
    for path in ("0001.png", "images/0001.png"):
        (folder / path).write_bytes((folder / "page.png").read_bytes())
    lines = [text for text in texts if "conversations" in text]
    (folder / "receipts.jsonl").write_text("".join(lines))
    for text in texts:
        if text in lines:
            continue
        if "answers" in text:
            (folder / "benchmark.jsonl").write_text(text)
            assert len(read_benchmark(folder / "benchmark.jsonl")) == 1
        else:
            (folder / "meta.json").write_text(text)
            sources = read_sources("meta.json", folder, [[1, 1, 1, 1]], Encoder(processor, nano.config))
            assert len(sources) == len(json.loads(text))


def test_the_head_of_a_space_names_what_is_here():
    (head,) = map(yaml.safe_load, snippets(ROOT / "docs" / "demo.md", "yaml"))
    requirement = next(
        text
        for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["demo"]
        if text.startswith("gradio")
    )
    assert (ROOT / head["app_file"]).is_file() and head["sdk_version"] in Requirement(requirement).specifier


# --- commands --------------------------------------------------------------------------------------------------------


class ParsedError(Exception):
    """Ends a script when its arguments are parsed, with what they gave."""


def parse_script(words: list[str], monkeypatch) -> argparse.Namespace:
    """What the script `words[0]` makes of its arguments; it does no more."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        raise ParsedError(parse_args(self, args, namespace))

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        patched.setattr(sys, "argv", words)
        with pytest.raises(ParsedError) as parsed:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return parsed.value.args[0]


def check_script(words: list[str], monkeypatch) -> None:
    """A script of this repository exists, takes these arguments, and finds the files of the repository that they name."""
    args = parse_script(words, monkeypatch)
    given = [word for word in words if word.startswith(("scripts/", "assets/"))]
    assert not [path for path in given if not (ROOT / path).exists()]
    if words[0] == "scripts/finetune.py" and args.recipe is not None:
        read_recipe(ROOT / args.recipe, [*args.set, "use_cpu=true"])  # which asks for no GPU


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [word for word in words if "=" not in word and word not in targets] == []


def check_pip(words: list[str]) -> None:
    """What is installed is this repository with an extra that it has, or a package as pyproject.toml asks for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = [Requirement(text) for texts in (project["dependencies"], *extras.values()) for text in texts]
    for word in words:
        if word == "-e":
            continue
        if word.startswith("."):
            assert set(re.findall(r"[\w-]+", word)) <= set(extras), word
            continue
        asked = Requirement(word)
        specifiers = [requirement.specifier for requirement in known if requirement.name == asked.name]
        assert specifiers or asked.name in OTHER_PACKAGES, word
        assert not asked.specifier or asked.specifier in specifiers, word


def check_transformers(words: list[str]) -> None:
    """A sub-command of transformers' program has these options; read in its code, which not every installation can import."""
    code = (Path(transformers.__file__).parent / "cli" / f"{words[0]}.py").read_text()
    options = [word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    assert [name for name in options if not re.search(rf"\b{name}: ", code)] == []


def check_docker(words: list[str]) -> None:
    """What is built or started is there."""
    file = ROOT / words[words.index("-f") + 1]
    assert words[0] in ("build", "compose") and file.is_file()
    if words[0] == "compose":
        assert words[-2] == "up" and words[-1] in yaml.safe_load(file.read_text())["services"]


def check_command(command: str, monkeypatch) -> None:
    """Raise if a command names a program, script, target or option that there is not."""
    words = shlex.split(command, comments=True)
    if words[0] in ENGINES or (words[:2] == ["python", "-m"] and words[2].split(".")[0] in ENGINES):
        return
    if words[0] == "python" or words[0] in LAUNCHERS:
        start = next(i for i, word in enumerate(words) if word.startswith("scripts/") and word.endswith(".py"))
        check_script(words[start:], monkeypatch)
        assert all((ROOT / word).exists() for word in words[:start] if word.startswith("scripts/"))
    elif words[0] == "minimonkey":
        script = f"scripts/{COMMANDS[words[1]][0].replace('.', '/')}.py"
        assert (ROOT / script).exists()
        check_script([script, *words[2:]], monkeypatch) if words[2:] else None
    elif words[:2] == ["sbatch", SLURM]:
        check_script(["scripts/finetune.py", *words[2:]], monkeypatch)
    elif words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[:2] == ["git", "clone"]:
        assert words[2].endswith("/OWNER/MiniMonkey")
    elif words[0] == "transformers":
        check_transformers(words[1:])
    elif words[0] == "docker":
        check_docker(words[1:])
    else:
        raise AssertionError(f"{words[0]} is a program that tests/test_docs.py does not know: {command}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=named)
def test_commands_parse(page, monkeypatch):
    for command in commands(page):
        try:
            check_command(command, monkeypatch)
        except SystemExit as error:
            raise AssertionError(f"{named(page)}: the arguments of this command are refused: {command}") from error


@pytest.mark.parametrize(
    "command",
    [
        'python scripts/chat.py assets/example.png "Read the text." --no-such-option',
        "python scripts/no_such_script.py",
        "python scripts/finetune.py scripts/training/recipes/nano-smoke.yaml --set no_such_key=1",
        "make no-such-target",
        'pip install ".[no-such-extra]"',
        'pip install "transformers>=4"',
        "transformers serve . --no-such-option",
        "docker build -f containers/no-such.Dockerfile .",
        "docker compose -f containers/compose.yaml up no-such-service",
        "no-such-program",
    ],
)
def test_a_command_that_cannot_run_is_noticed(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, ValueError, OSError)):
        check_command(command, monkeypatch)


# --- text ------------------------------------------------------------------------------------------------------------


def test_every_snippet_is_of_a_kind_that_is_tried():
    kinds = {kind for page in DOCUMENTS for _, kind, _ in SNIPPET.findall(page.read_text())}
    assert kinds <= {"python", "bash", "json", "yaml", "bibtex"}
    assert all(page.read_text().count("```") % 2 == 0 for page in DOCUMENTS)


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) < LONGEST_README
    assert [named(page) for page in PAGES[1:] if f"({named(page)}" not in text] == []
    assert "@@" not in "".join(page.read_text() for page in DOCUMENTS)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.+)$", SNIPPET.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=named)
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(SNIPPET.sub("", page.read_text())) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), link  # the Hub has no page for a link to a folder
        assert not anchor or anchor in anchors(target), link


# --- release ---------------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version


def test_the_public_workflow_runs_what_ci_runs():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.13"]


def test_pre_commit_has_the_locked_ruff():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"\nruff=={hooks['rev'].removeprefix('v')}\n" in (ROOT / "requirements" / "lock.txt").read_text()


def test_no_test_module_imports_another():
    """What tests share is in conftest.py and the helper modules."""
    imports = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)
    files = (ROOT / "tests").glob("*.py")
    assert [(path.name, found) for path in files for found in imports.findall(path.read_text())] == []


def test_the_map_of_files_is_whole():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in text] == []
    named_files = re.findall(r"`(\w+\.py)`", text[text.index("## What is where") :])
    assert [
        name for name in named_files if not any((ROOT / folder / name).exists() for folder in (".", "scripts"))
    ] == []
