"""Loading: `from_pretrained` of a published checkpoint, and of an imported one, beside reading the same files plain."""

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from import_checkpoint import import_checkpoint
from repository import root_class
from safetensors.torch import load_file
from transformers import AutoModel

from benchmarking.checkpoints import published_config, save_published
from benchmarking.measure import median_seconds, peak_extra_bytes, report
from benchmarking.models import random_config, random_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=("2B", "Nano"), help="dimensions")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written (default: temporary)")
    parser.add_argument("--repeats", type=int, default=5)


def run(args: argparse.Namespace) -> None:
    transformers.logging.disable_progress_bar()
    settings = {name: str(value) for name, value in vars(args).items() if name != "run"}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report("load", rows(args, Path(folder)), torch.device("cpu"), settings)


def read_plain(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, nothing else."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def copy_each(tensors: Iterable[torch.Tensor]) -> None:
    """Files are mapped into memory and read when they are used; so each weight is copied once, as moving it to a GPU does."""
    for tensor in tensors:
        tensor.detach().clone()


def rows(args: argparse.Namespace, folder: Path) -> list[dict]:
    cpu = torch.device("cpu")
    published, imported = folder / "published", folder / "imported"
    published.mkdir()
    model = random_model(random_config(args.size), cpu, torch.bfloat16)
    save_published(model, published)
    (published / "config.json").write_text(json.dumps(published_config(model)))
    image_token_id = model.config.image_token_id
    del model
    import_checkpoint(str(published), imported, image_token_id)
    model_class = root_class("modeling_minimonkey.MiniMonkeyForConditionalGeneration")
    options = {"dtype": torch.bfloat16, "image_token_id": image_token_id}
    functions = {
        "plain read": lambda: copy_each(read_plain(published).values()),
        "published": lambda: copy_each(model_class.from_pretrained(published, **options).parameters()),
        "imported": lambda: copy_each(
            AutoModel.from_pretrained(imported, trust_remote_code=True, dtype=torch.bfloat16).parameters()
        ),
    }
    seconds = median_seconds(functions, cpu, args.repeats)
    size = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    results = []
    for name, function in functions.items():
        extra = peak_extra_bytes(function, cpu)
        row = {"way": name, "s": seconds[name], "time ratio": seconds[name] / seconds["plain read"]}
        row |= {"peak MB": None if extra is None else round(extra / 2**20)}
        results.append({**row, "peak / file": None if extra is None else extra / size})
    return results
