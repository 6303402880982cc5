"""Loading: `from_pretrained` of a published and of an imported checkpoint, compared with just reading the same files.

Every run reads from the disk, not from the system's cache, and ends when every weight is there.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.benchmarking.checkpoints import save_published
from minimonkey.scripts.benchmarking.measure import median_seconds, megabytes, peak_extra_bytes, report
from minimonkey.scripts.benchmarking.models import random_config, random_model
from minimonkey.scripts.exporting.config import published_config
from minimonkey.scripts.import_checkpoint import import_checkpoint
from minimonkey.scripts.repository import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=("2B", "Nano"), help="dimensions")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written (default: temporary)")
    parser.add_argument("--repeats", type=whole_number(1), default=5)


def run(args: argparse.Namespace) -> None:
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report("load", rows(args, Path(folder)), torch.device("cpu"), args)


def read_plain(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of every file, and do nothing else."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def evict(folder: Path) -> None:
    """Drop these files from the system's cache, as after a restart; only where the system allows it."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_use(loaded) -> None:
    """Touch every page, since mapped files are read only when their weights are used."""
    for tensor in loaded if isinstance(loaded, list) else loaded.parameters():
        tensor.detach().view(-1).view(torch.uint8)[::4096].sum()


def rows(args: argparse.Namespace, folder: Path) -> list[dict]:
    cpu = torch.device("cpu")
    published, imported = folder / "published", folder / "imported"
    published.mkdir()
    model = random_model(random_config(args.size), cpu, torch.bfloat16)
    save_published(model, published)
    (published / "config.json").write_text(json.dumps(published_config(model.config, as_internlm2=True)))
    image_token_id = model.config.image_token_id
    del model
    import_checkpoint(str(published), imported, image_token_id)
    options = {"dtype": torch.bfloat16, "image_token_id": image_token_id}
    ways = {
        "plain read": (published, lambda: list(read_plain(published).values())),
        "published": (published, lambda: MiniMonkeyForConditionalGeneration.from_pretrained(published, **options)),
        "imported": (
            imported,
            lambda: AutoModel.from_pretrained(imported, trust_remote_code=True, dtype=torch.bfloat16),
        ),
    }

    def load(source: Path, way) -> None:
        evict(source)
        in_use(way())

    seconds = median_seconds({name: partial(load, *way) for name, way in ways.items()}, cpu, args.repeats)
    size = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    results = []
    for name, (_, way) in ways.items():
        extra = peak_extra_bytes(lambda way=way: in_use(way()), cpu)
        row = {"way": name, "s": seconds[name], "time ratio": seconds[name] / seconds["plain read"]}
        row |= {"peak MB": megabytes(extra)}
        results.append({**row, "peak / file": None if extra is None else extra / size})
    return results
