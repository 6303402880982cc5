"""What multi-scale cropping and scale compression are worth to a model: the same items, shown in different ways.

    python scripts/evidence.py runs/evidence                                          all of it; hours on a CPU, and goes on
    python scripts/evidence.py runs/evidence --suites seam --items 100                  a first look

Held-out documents (evaluation/suites.py) are read as one whole image, as detailed tiles, as these and a thumbnail, and with
multi-scale cropping; then with fewer detailed tokens, chosen by scale compression, at random and evenly. Writes to the folder:
predictions of every way, evidence.json, the tables as evidence.md and the figure evidence.png. Differences are paired, their
95% intervals bootstrapped. What is there already is not asked again. Needs the `training` extra.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from repository import ROOT, root_class
from transformers import AutoModel, AutoProcessor

from evaluation.figure import draw
from evaluation.predictions import Predictions
from evaluation.runner import Answering, answer_suite
from evaluation.suites import Suite, synthetic_suite
from evaluation.tables import Comparison, markdown
from evaluation.ways import Way, droppings, tilings


# Kind of document, its questions, the metric that ways are compared by.
SUITES = {
    "lines": ("line", "text", "word_accuracy"),
    "pages": ("page", "text", "word_accuracy"),
    "receipts": ("receipt", "values", "exact_match"),
    "forms": ("form", "values", "exact_match"),
    "seams": ("seam", "text", "word_accuracy"),
}
COMPRESSED = ("receipts", "seams")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for predictions, tables and figure")
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: this repository)")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument(
        "--compressed", nargs="*", choices=SUITES, default=None, help=f"default: {' '.join(COMPRESSED)}"
    )
    parser.add_argument("--preset", default="default", help="tile ranges of multi-scale cropping")
    parser.add_argument("--items", type=int, default=1000, help="of each suite")
    parser.add_argument("--difficulty", type=float, default=1.0, help="of the documents, 0 to 1 (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    if args.compressed is None:
        args.compressed = [name for name in args.suites if name in COMPRESSED]
    if args.items < 2 or args.batch_size < 1:
        parser.error("--items must be at least 2, --batch-size at least 1")
    if args.preset not in root_class("tiling.PRESETS"):
        parser.error(f"there is no preset {args.preset!r}; known are {', '.join(root_class('tiling.PRESETS'))}")
    if set(args.compressed) - set(args.suites):
        parser.error("--compressed names suites that are not among --suites")
    return args


class Reader:
    """Answers a suite in one way after another, with the same model."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
        self.model = model.to(args.device).eval()

    def __call__(self, suite: Suite, name: str, way: Way) -> list[dict]:
        """The predictions of a way, those of an earlier run among them."""
        print(f"{name}, {way.name}", file=sys.stderr)
        names = ("model", "difficulty", "seed", "batch_size", "dtype")
        settings = {key: getattr(self.args, key) for key in names} | {
            "suite": suite.name,
            "items": len(suite),
            "tiles": way.images_kwargs,
            "keep_ratio": way.keep_ratio,
            "drop": way.drop,
        }
        predictions = Predictions(self.args.out / f"{name}.{way.slug}.jsonl", settings, resume=True)
        answering = Answering(
            self.model, self.processor, suite.max_new_tokens, way.images_kwargs, way.keep_ratio, way.drop
        )
        return answer_suite(suite, answering, predictions, self.args.batch_size)


def compare_ways(args: argparse.Namespace) -> list[Comparison]:
    """Every suite of `args` in every way."""
    ranges = root_class("tiling.PRESETS")[args.preset]
    suites = {
        name: synthetic_suite(kind, args.items, args.seed, args.difficulty, metric, questions)
        for name, (kind, questions, metric) in SUITES.items()
        if name in args.suites
    }
    read, comparisons = Reader(args), []
    for name, suite in suites.items():
        shown = {way: read(suite, name, way) for way in tilings(ranges)}
        comparisons.append(Comparison(name, "tilings", shown))
    for name in args.compressed:
        whole = tilings(ranges)[-1]
        shown = {way: read(suites[name], name, way) for way in (whole, *droppings(ranges))}
        comparisons.append(Comparison(name, "compression", shown))
    return comparisons


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        comparisons = compare_ways(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [row for comparison in comparisons for row in comparison.rows()]
    (args.out / "evidence.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = markdown(comparisons)
    (args.out / "evidence.md").write_text(text)
    draw(rows, args.out / "evidence.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
