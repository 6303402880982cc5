"""docs/serving.md where vLLM is: its commands are taken by vLLM's own parser, its script runs."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from vllm_helpers import start_engine  # noqa: F401 - which skips where vLLM is not installed


pytestmark = pytest.mark.vllm
PAGE = (ROOT / "docs" / "serving.md").read_text()


def snippets(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_commands_are_taken():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    lines = [
        line
        for text in snippets("bash")
        for line in text.splitlines()
        if re.match(r"vllm serve|python -m vllm\.", line)
    ]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        options = words[words.index("serve") + 2 :] if "serve" in words else words[3:]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
        assert args.trust_remote_code


def test_the_script_runs(tmp_path):
    (code,) = [text for text in snippets("python") if "vllm" in text]
    (tmp_path / "batch.py").write_text(code.replace("OWNER/MiniMonkey", str(ROOT)))
    done = subprocess.run(
        [sys.executable, tmp_path / "batch.py"], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['Mini Monkey', 'Mini Monkey']"
