"""Measure speed and memory, always as a ratio to a named baseline of the same run.

    python scripts/benchmark.py compression                 SCM at the published 2B dimensions, random weights
    python scripts/benchmark.py preprocessing               a 12-megapixel JPEG to 12 + 6 + 1 tiles
    python scripts/benchmark.py load                        a published 2B checkpoint, written to disk first (9 GB)
    python scripts/benchmark.py conversation --use-scm      the second turn about one image
    python scripts/benchmark.py serving --without-vllm      64 receipts one by one and in batches
    python scripts/benchmark.py cpu --size 2B --depth 2     ways to store and compute weights, beside the machine's floor
    python scripts/benchmark.py process --preset int4       peak memory and times of a process of its own
    python scripts/benchmark.py engines --size 1B           torch, llama.cpp and onnxruntime in turns
    python scripts/benchmark.py step scripts/training/recipes/minimonkey-2b-lora.yaml    memory of a real training step
    python scripts/benchmark.py compression --size Nano --tiles 4+3+1 --repeats 1

Prints a table for people and one JSON line for machines. Runs anywhere: weights are random and nothing is downloaded.
"""

import argparse
import sys

from minimonkey.scripts.benchmarking import (
    blank,
    compression,
    conversation,
    cpu,
    decode,
    drift,
    engines,
    load,
    plain,
    preprocessing,
    process,
    serving,
    stages,
    step,
    vision,
)
from minimonkey.scripts.precision import choose_dtype
from minimonkey.scripts.repository import reports_errors


SUBJECTS = {
    "preprocessing": preprocessing,
    "load": load,
    "vision": vision,
    "compression": compression,
    "decode": decode,
    "engines": engines,
    "plain": plain,
    "conversation": conversation,
    "stages": stages,
    "serving": serving,
    "blank": blank,
    "cpu": cpu,
    "process": process,
    "drift": drift,
    "step": step,
}


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, module in SUBJECTS.items():
        subject = subjects.add_parser(
            name, help=module.__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(subject)
        subject.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    if "dtype" in args:
        args.dtype = str(choose_dtype(args.dtype, args.device)).removeprefix("torch.")
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
