"""Measure what rules for the grids of an image and compressors of its tokens are worth: an ablation over the same items.

    python scripts/ablate.py runs/ablation                                             all of it; hours on a CPU, and resumes
    python scripts/ablate.py runs/ablation --suites receipts --items 100 --keep-ratios 0.5             a first look
    python scripts/ablate.py runs/ablation --compressors smaller-internvl token tile@question --tilings msac logscore

Held-out documents (evaluation/suites.py) are read by each tiling; then, by multi-scale cropping, with fewer detailed tokens, as
each compressor chooses them, and at as many tokens by a smaller grid (evaluation/ways.py lists all). Writes to the folder:
predictions of every way, ablation.json, the tables as ablation.md and the figure ablation.png. Differences are paired, their
95% intervals are bootstrapped, not corrected for their number. What is there already is not asked again. Needs the
`training` extra.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import transformers

from minimonkey.scripts.benchmarking.measure import peak_extra_bytes
from minimonkey.scripts.evaluation.figure import draw
from minimonkey.scripts.evaluation.flops import way_flops
from minimonkey.scripts.evaluation.predictions import Predictions, weights_digest
from minimonkey.scripts.evaluation.runner import Answering, Asked, answer_suite
from minimonkey.scripts.evaluation.suites import Suite, synthetic_suite
from minimonkey.scripts.evaluation.tables import Comparison, markdown
from minimonkey.scripts.evaluation.ways import (
    DEFAULT_COMPRESSORS,
    DEFAULT_TILINGS,
    KEEP_RATIOS,
    TILING_WAYS,
    Way,
    check_compressor,
    compressions,
    tilings,
)
from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    load_model,
    load_processor,
    prepared,
    reports_errors,
)
from minimonkey.scripts.synthetic.materials import materials
from minimonkey.tiling import PRESETS


# Kind of document, its questions, and the metric by which ways are compared.
SUITES = {
    "lines": ("line", "text", "word_accuracy"),
    "pages": ("page", "text", "word_accuracy"),
    "receipts": ("receipt", "values", "exact_match"),
    "forms": ("form", "values", "exact_match"),
    "seams": ("seam", "text", "word_accuracy"),
    "scenes": ("scene", "text", "exact_match"),
}
COMPRESSED = ("receipts", "seams")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for predictions, tables and figure")
    add_model_arguments(parser)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument(
        "--compressed", nargs="*", choices=SUITES, default=None, help=f"default: {' '.join(COMPRESSED)}"
    )
    parser.add_argument("--tilings", nargs="+", choices=TILING_WAYS, default=list(DEFAULT_TILINGS))
    parser.add_argument(
        "--compressors", nargs="+", default=list(DEFAULT_COMPRESSORS), help="see scripts/evaluation/ways.py"
    )
    parser.add_argument("--scm-layer", type=int, default=None, help="whose attention decides")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=KEEP_RATIOS, help="of compression")
    parser.add_argument("--preset", default="default", help="tile ranges of multi-scale cropping")
    parser.add_argument("--items", type=int, default=1000, help="of each suite")
    parser.add_argument("--difficulty", type=float, default=0.5, help="of the documents, 0 to 1 (default 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    add_device_argument(parser)
    add_dtype_argument(parser)
    args = parser.parse_args(arguments)
    if args.compressed is None:
        args.compressed = [name for name in args.suites if name in COMPRESSED]
    args.suites, args.compressors = (list(dict.fromkeys(names)) for names in (args.suites, args.compressors))
    args.tilings = list(dict.fromkeys(["msac", *args.tilings]))  # what all others are compared with
    for name in args.compressors:
        try:
            check_compressor(name)
        except ValueError as error:
            parser.error(str(error))
    if args.items < 2 or args.batch_size < 1:
        parser.error("--items must be at least 2, --batch-size at least 1")
    if not all(0 < ratio < 1 for ratio in args.keep_ratios):
        parser.error("--keep-ratios must be between 0 and 1")
    if args.preset not in PRESETS:
        parser.error(f"there is no preset {args.preset!r}; known are {', '.join(PRESETS)}")
    if set(args.compressed) - set(args.suites):
        parser.error("--compressed names suites that are not among --suites")
    args.dtype = str(choose_dtype(args.dtype, args.device)).removeprefix("torch.")
    return args


@dataclass(frozen=True)
class Reading:
    """One suite that is to be read in several ways, by subject; the first of a subject is what its others are compared with."""

    name: str
    suite: Suite
    predictions: dict[Way, Predictions]
    subjects: dict[str, list[Way]]


def plan(args: argparse.Namespace) -> list[Reading]:
    """Plan what is read, with the predictions of an earlier run.

    Raises:
        ValueError: Predictions in the folder that were made with other weights or settings, or no fonts.
    """
    ranges = PRESETS[args.preset]
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("model", "subfolder", "difficulty", "seed", "batch_size", "device", "dtype", "scm_layer")
    shared = {name: getattr(args, name) for name in names}
    shared |= {"weights": weights_digest(args.model, args.subfolder), "materials": materials()}
    readings = []
    for name in args.suites:
        kind, questions, metric = SUITES[name]
        suite = synthetic_suite(kind, args.items, args.seed, args.difficulty, metric, questions)
        settings = {**shared, "suite": suite.name, "questions": questions, "metric": metric, "items": len(suite)}
        tiled = tilings(ranges, args.tilings)
        dropped = compressions(ranges, args.compressors, args.keep_ratios) if name in args.compressed else []
        predictions = {way: _predictions(args.out, name, way, settings) for way in tiled + dropped}
        readings.append(
            Reading(name, suite, predictions, {"tilings": tiled, "compression": dropped and [tiled[0], *dropped]})
        )
    return readings


def _predictions(folder: Path, name: str, way: Way, settings: dict) -> Predictions:
    shown = {"tiles": way.images_kwargs, "keep_ratio": way.keep_ratio, "compressor": way.compressor}
    return Predictions(folder / f"{name}.{way.slug}.jsonl", settings | shown, resume=True)


class Reader:
    """Answers a suite in one way after another, with the same model."""

    def __init__(self, args: argparse.Namespace):
        self.batch_size, self.layer = args.batch_size, args.scm_layer
        self.processor = load_processor(args.model)
        self.model = prepared(load_model(args.model, subfolder=args.subfolder, dtype=args.dtype).to(args.device))

    def __call__(self, reading: Reading) -> dict[Way, list[dict]]:
        """Return the predictions of every way, including those of an earlier run."""
        print(f"{reading.name}: {', '.join(way.name for way in reading.predictions)}", file=sys.stderr)
        ways = [self._asked(reading.suite, way, predictions) for way, predictions in reading.predictions.items()]
        return dict(zip(reading.predictions, answer_suite(reading.suite, ways, self.batch_size)))

    def _asked(self, suite: Suite, way: Way, predictions: Predictions) -> Asked:
        answering = Answering(
            self.model,
            self.processor,
            suite.max_new_tokens,
            way.images_kwargs,
            way.keep_ratio,
            way.compressor,
            self.layer,
        )
        peak = None
        if len(predictions.lines) < len(suite):  # warm-up: a first pass takes longer, and seconds are compared
            items = [suite.item(index) for index in range(2)]
            images = [answering.open(item) for item in items]
            peak = peak_extra_bytes(lambda: answering(items, images), self.model.device)
        return Asked(answering, predictions, {"peak_bytes": peak})

    def flops(self, row: dict, way: Way) -> dict:
        """Return what an item of a row takes, in the encoder and until the first new token."""
        layer = self.model.config.scm_layer if self.layer is None else self.layer
        encoder, prefill = way_flops(self.model.config, way, row["image_tokens"], row["image_tokens_read"], layer)
        return {**row, "encoder_flops": encoder, "prefill_flops": prefill}


def compare_ways(args: argparse.Namespace) -> list[dict]:
    """Compare every suite of `args` in every way; return a row for each, first the tilings of all, then compression."""
    readings, read = plan(args), Reader(args)
    lines = [read(reading) for reading in readings]
    rows = []
    for subject in ("tilings", "compression"):
        for reading, shown in zip(readings, lines):
            ways = reading.subjects[subject]
            comparison = Comparison(reading.name, subject, {way: shown[way] for way in ways}).rows()
            rows += [read.flops(row, way) for row, way in zip(comparison, ways)]
    return rows


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = compare_ways(args)
    (args.out / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = markdown(rows)
    (args.out / "ablation.md").write_text(text)
    draw(rows, args.out / "ablation.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
