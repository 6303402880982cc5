"""Average a run's last checkpoints into a model: what a falling learning rate would give, without ending the run.

    python scripts/average.py runs/nano-one --last 12 --output runs/nano-one-mean

Takes runs that train whole weights, not LoRA adapters. The recipe's save_total_limit says how many a run keeps.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.importing.folder import check_free, new_folder
from minimonkey.scripts.repository import load_processor, readable, reports_errors
from minimonkey.scripts.training.trainer import complete_checkpoints


def mean_model(folders: list[Path]) -> nn.Module:
    """Return the model whose weights are the mean of those in `folders`, in float32."""
    with readable(folders[0]):
        mean = MiniMonkeyForConditionalGeneration.from_pretrained(folders[0], dtype=torch.float32)
    with torch.no_grad():
        for count, folder in enumerate(folders[1:], start=2):
            with readable(folder):
                other = MiniMonkeyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            for parameter, value in zip(mean.parameters(), other.parameters(), strict=True):
                parameter.lerp_(value, 1 / count)
    mean.config.text_config.use_cache = True
    return mean


def average(run: Path, last: int, output: Path, dtype: str = "bfloat16") -> list[Path]:
    """Write the mean of the `last` newest complete checkpoints of `run` to `output`; return the checkpoints used.

    Raises:
        ValueError: Too few checkpoints, checkpoints of adapters, or something is in the way of `output`.
    """
    check_free(output)
    folders = complete_checkpoints(run)
    if last < 1 or len(folders) < last:
        raise ValueError(f"{run} has {len(folders)} complete checkpoints, --last {last} takes 1 to as many.")
    folders = folders[-last:]
    if any((folder / "adapter_config.json").exists() for folder in folders):
        raise ValueError(f"{run} trained LoRA adapters; average.py takes runs that trained whole weights.")
    with new_folder(output, f"the last {last} of {run}") as work:
        mean_model(folders).to(getattr(torch, dtype)).save_pretrained(work)
        load_processor(folders[-1]).save_pretrained(work)
    return folders


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a recipe")
    parser.add_argument("--last", type=int, default=12, help="how many checkpoints")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the written weights")
    args = parser.parse_args(arguments)
    taken = average(args.run, args.last, args.output, args.dtype)
    print(f"Wrote {args.output}: the mean of {', '.join(folder.name for folder in taken)}.")


if __name__ == "__main__":
    sys.exit(main())
