"""The scripts by the commands in the README."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from minimonkey.packed_weights import can_pack
from minimonkey.scripts import visualize


LORA = "scripts/training/recipes/minimonkey-2b-lora.yaml"


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_chat_reads_the_example():
    result = run("scripts/chat.py", "assets/example.png", "Read the text.")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["Mini", "Monkey"]


def test_chat_reads_a_receipt():
    result = run("scripts/chat.py", "assets/receipt.png", "What is the total?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "$2.38"


def test_weights_load_from_a_subfolder_with_an_empty_cache(tmp_path):
    (tmp_path / "whole").mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / "whole" / path.name).symlink_to(path)
    (tmp_path / "whole" / "weights").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "whole" / "weights" / name).symlink_to(ROOT / name)
    code = """
import sys
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], subfolder="weights", trust_remote_code=True)
questions = ["Read the date.", "What is the total?"]
pictures = ["assets/receipt.png"] * 2
print(*model.batch_chat(processor, pictures, questions), sep="|")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run("-c", code, tmp_path / "whole", env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1991-09-18|$2.38"


def test_chat_goes_on_with_history_until_an_empty_line():
    result = run("scripts/chat.py", "assets/example.png", "--max-new-tokens", 4, input="Read the text.\nAgain?\n\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 3


def test_chat_says_what_is_wrong():
    result = run("scripts/chat.py", "missing.png", "Read the text.")
    assert result.returncode == 1
    assert "missing.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_chat_compresses():
    ranges = ["--max-tiles", 4, "--adaptive-max-tiles", 3, "--max-new-tokens", 4]
    scm = ["--use-scm", "--scm-keep-ratio", 0.25]
    result = run("scripts/chat.py", "assets/example.png", "Read the text.", *ranges, *scm)
    assert result.returncode == 0, result.stderr
    result = run("scripts/chat.py", "assets/example.png", "Read the text.", *ranges, "--scm-keep-ratio", 0.25)
    assert result.returncode == 1
    assert "use_scm=True" in result.stderr


def test_visualize_shows_seams_and_kept_tokens(tmp_path):
    out = tmp_path / "seen.png"
    command = ["scripts/visualize.py", "assets/example.png", "Read the text."]
    result = run(*command, "--out", out, "--keep-ratio", 0.25)
    assert result.returncode == 0, result.stderr
    assert "4 detailed (4x1), 3 adaptive (3x1), 1 thumbnail" in result.stdout
    assert "tokens of the detailed tiles: 196 before, 49 after" in result.stdout
    pixels = {colour for _, colour in Image.open(out).getcolors(2**20)}
    assert {visualize.DETAILED_COLOUR, visualize.ADAPTIVE_COLOUR} <= pixels
    result = run(*command, "--out", out, "--max-tiles", 1, "--min-tiles", 1)
    assert result.returncode == 1
    assert "--max-tiles" in result.stderr


def test_lit_tokens_are_where_their_tile_is():
    kept = torch.tensor([0, 10, 11, 10 + 4 * 3 + 2])  # of 3x2 tiles of four tokens, the first at 10
    lit = visualize.lit_tokens(kept, 10, (3, 2), 4, transposed=False)
    assert [(y, x) for y, row in enumerate(lit) for x, kept in enumerate(row) if kept] == [(0, 0), (0, 1), (3, 0)]
    lit = visualize.lit_tokens(kept, 10, (3, 2), 4, transposed=True)
    assert [(y, x) for y, row in enumerate(lit) for x, kept in enumerate(row) if kept] == [(0, 0), (1, 0), (2, 1)]


def test_benchmark_of_compression():
    result = run("scripts/benchmark.py", "compression", "--size", "Nano", "--tiles", "4+3+1", "--repeats", 1)
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [report["benchmark"] for report in reports] == [
        f"compression/{part}" for part in ("scoring", "prefill", "generate")
    ]
    assert reports[0]["rows"][0]["same kept"] is True
    assert reports[1]["rows"][0]["kept"] == 462 - 2 * 49


@pytest.mark.parametrize(
    "arguments",
    [
        ["preprocessing", "--width", 400, "--height", 300, "--repeats", 1],
        ["vision", "--size", "Nano", "--tiles", 4, "--chunks", 2, "--repeats", 1],
        ["decode", "--size", "Nano", "--tokens", 2, "--repeats", 1],
        ["load", "--size", "Nano", "--repeats", 1],
        ["step", LORA, "--size", "Nano", "--depths", 1, 2, "--set", "max_seq_length=1536"],
        ["blank", "--width", 300, "--height", 400, "--repeats", 1, "--pages", 1],
        [
            "cpu",
            "--size",
            "Nano",
            "--tiles",
            "0+0+1",
            "--depth",
            1,
            "--repeats",
            1,
            "--ways",
            "float32",
            "float32, int8",
            *(["float32, prepared"] if can_pack(torch.float32) else []),
        ],
        ["process", "--size", "Nano", "--preset", "bluelm", "--tiles", "2+2+1", "--tokens", 2, "--offload-vision"],
        ["drift", "--size", "Nano", "--depth", 1],
        ["stages", "--size", "Nano", "--width", 400, "--height", 300, "--picture", "stages.png"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_benchmarks_report(arguments, tmp_path):
    arguments = [tmp_path / argument if argument == "stages.png" else argument for argument in arguments]
    result = run("scripts/benchmark.py", *arguments)
    assert result.returncode == 0, result.stderr
    (report,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert report["benchmark"].split("/")[0] == arguments[0]
    assert report["rows"]
    assert "--picture" not in arguments or Image.open(tmp_path / "stages.png").size[0] > 0


def test_benchmark_names_the_form_of_tiles():
    result = run("scripts/benchmark.py", "compression", "--tiles", "4x3")
    assert result.returncode == 2
    assert "'4x3' is not of the form 12+6+1" in result.stderr


def test_the_readme_has_no_placeholders():
    assert "@@" not in (ROOT / "README.md").read_text()


def test_training_and_evaluation_run(tmp_path):
    recipes, letters, words = "scripts/training/recipes", tmp_path / "letters", tmp_path / "words"
    few = {"use_cpu": "true", "batch_size": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    few |= {"max_steps": 2, "warmup_steps": 0}
    for name, options in (
        ("nano-words-letters", {"output_dir": letters}),
        ("nano-words", {"output_dir": words, "model": letters / "checkpoint-2"}),
    ):
        options = [part for key, value in (few | options).items() for part in ("--set", f"{key}={value}")]
        result = run("scripts/finetune.py", f"{recipes}/{name}.yaml", *options)
        assert result.returncode == 0, result.stderr
        begins_with_new_head = re.search(r"letters_head.weight\s*\| MISSING", result.stderr) is not None
        assert begins_with_new_head == (name == "nano-words-letters")  # the other goes on with this one's
    result = run("scripts/evaluate.py", "--model", words / "model", "--items", 2, "--out", tmp_path / "out.jsonl")
    assert result.returncode == 0, result.stderr
    assert '"items": 2' in result.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune.py", "pyproject.toml"),
        ("finetune.py", "scripts/training/recipes/nano-smoke.yaml", "--set", "seed={"),
        ("average.py", "nowhere", "--output", "out"),
        ("synthetic/documents.py", "assets/LICENSE/page.txt"),
        ("evaluate.py", "--items", "2", "--benchmark", "nowhere.jsonl"),
    ],
)
def test_scripts_say_in_one_line_what_is_wrong(arguments):
    result = run(f"scripts/{arguments[0]}", *arguments[1:])
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1]
