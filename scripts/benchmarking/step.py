"""Step: memory of real training steps of a recipe at reduced depth, extrapolated to as many layers as both stacks have.

A model of the recipe's published size, with random weights and few layers in tower and language model, takes two steps on the
CPU in a process of its own: a row as long as the recipe allows, with a picture of 8 + 3 + 1 tiles. What the process held before
it began is taken off its peak. The dry run's figures are those of one card, without what it adds for waste.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from minimonkey.scripts.benchmarking.measure import report, resident_bytes
from minimonkey.scripts.benchmarking.models import published_config, random_model
from minimonkey.scripts.importing.folder import save_processor
from minimonkey.scripts.repository import ROOT, load_processor, whole_number


GIB = 2**30
TALL = (896, 1792)  # a picture that 8 detailed tiles show as it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="of scripts/training/recipes")
    parser.add_argument("--size", default=None, help="dimensions (None: those that the recipe's model is named for)")
    parser.add_argument("--depths", type=whole_number(1), nargs=2, default=[1, 3], metavar=("FEW", "MORE"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change an option of the recipe"
    )
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> None:
    report("step", rows(args), torch.device("cpu"), args)


def rows(args: argparse.Namespace) -> list[dict]:
    from minimonkey.scripts.training.recipe import make_recipe, read_options, read_overrides  # the `training` extra

    few, more = args.depths
    options = read_options(args.recipe) | read_overrides(args.set)
    config = published_config(args.size or str(options.get("model")))
    layers = min(part.num_hidden_layers for part in (config.vision_config, config.text_config))
    if not few < more <= layers:
        raise ValueError(f"--depths are two different ones, the smaller first, of at most {layers}; got {few}, {more}.")
    found = []
    with tempfile.TemporaryDirectory() as name:
        write(config, more, Path(name))
        for depth in args.depths:
            path = Path(name, f"{depth}.yaml")
            path.write_text(json.dumps(options | steps(Path(name), depth, options.get("max_seq_length", 4096))))
            recipe = make_recipe(read_options(path), "")
            found.append(measured(path) | {"dry run GiB": estimated(config, depth, recipe)})
    each = {key: (found[1][key] - found[0][key]) / (more - few) for key in found[0]}
    whole = {key: found[1][key] + each[key] * (layers - more) for key in each}
    whole["dry run GiB"] = estimated(config, layers, recipe)
    names = (few, more, "each layer", f"{layers}, extrapolated")
    return [{"layers": name, **values} for name, values in zip(names, (*found, each, whole))]


def write(config, depth: int, folder: Path) -> None:
    """Write a model with random weights, its processor, and an example of a picture and a long answer."""
    from minimonkey.scripts.training.models import config_of_depth

    processor, token = load_processor(ROOT), published_config("Nano").image_token_id
    config = type(config)(**{**config_of_depth(config, depth).to_dict(), "image_token_id": token})
    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    model.save_pretrained(folder / "model")
    save_processor(folder / "model", model.config, processor.tokenizer, with_bos=True)
    Image.new("RGB", TALL, "gray").save(folder / "page.png")
    turns = [{"from": "human", "value": "<image>\nRead."}, {"from": "gpt", "value": "page " * 100}]
    (folder / "lines.jsonl").write_text(json.dumps({"image": "page.png", "conversations": turns}) + "\n")


def steps(folder: Path, depth: int, tokens: int) -> dict:
    """Return the options that let a recipe take two steps on this example, the second with AdamW's moments in memory."""
    data = {"page": {"root": str(folder), "annotation": str(folder / "lines.jsonl"), "repeat_time": 2}}
    row = {"batch_size": 1, "per_device_train_batch_size": 1, "pad_to_multiple_of": tokens, "dataloader_num_workers": 0}
    written = {"output_dir": str(folder / f"out-{depth}"), "report_to": "none", "disable_tqdm": True}
    model = {"model": str(folder / "model"), "depth": depth, "lora_merge": False}
    return {**model, "data": data, "max_steps": 2, "use_cpu": True, **row, **written}


def measured(recipe: Path) -> dict:
    """Return what a process of its own that takes these steps held before and at most, in GiB."""
    command = f"from minimonkey.scripts.benchmarking.step import child; child({str(recipe)!r})"
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT / "scripts")
    if found.returncode:
        raise ValueError(f"The steps failed: {(found.stderr.strip().splitlines() or ['no word'])[-1]}")
    before, peak = map(float, found.stdout.split()[-2:])
    return {"before GiB": before / GIB, "peak GiB": peak / GIB, "taken GiB": (peak - before) / GIB}


def child(recipe: str) -> None:
    """Train, and print the bytes that were resident before and at most."""
    from minimonkey.scripts import finetune

    before = resident_bytes("VmRSS")
    if finetune.main([recipe]):
        raise SystemExit(1)
    print(before, resident_bytes("VmHWM"))


def estimated(config, depth: int, recipe) -> float:
    """Return the GiB that the dry run says for so many layers."""
    from minimonkey.scripts.training.estimate import WASTE, Cards, Estimate
    from minimonkey.scripts.training.models import config_of_depth

    return Estimate.of(config_of_depth(config, depth), recipe, Cards(1), recipe.bf16).card_gib(0) / WASTE
