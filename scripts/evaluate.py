"""Measure how well a model reads words and documents it never saw, in fonts it never saw, or a benchmark of your own.

    python scripts/evaluate.py --items 1000
    python scripts/evaluate.py --suite receipt --items 200 --max-tiles 12 --adaptive-max-tiles 6 --out receipts.jsonl
    python scripts/evaluate.py --benchmark docvqa/val.jsonl --preset docvqa --model MiniMonkey-2B --out docvqa.jsonl --resume
    python scripts/evaluate.py --suite page --max-tiles 12 --use-scm --scm-keep-ratio 0.5 --drop random --out random.jsonl
    python scripts/evaluate.py compare scm.jsonl random.jsonl

Prints scores with their 95% intervals and the character error rate, and one JSON line. --out keeps every prediction, written
as it is made; --resume continues such a file; --sheet draws the first items. The suites are rendered on the spot from words
and fonts that training leaves out (synthetic/documents.py); see synthetic/text_images.py for the Debian packages they come
from. The form of a benchmark is in evaluation/suites.py, the metrics are in evaluation/metrics.py.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers

from minimonkey.scripts.engines.options import add_engine_arguments, check_engine_arguments, load_engine
from minimonkey.scripts.evaluation.dropping import DROPS
from minimonkey.scripts.evaluation.metrics import METRICS
from minimonkey.scripts.evaluation.predictions import Predictions, read_predictions, weights_digest
from minimonkey.scripts.evaluation.report import compare, describe, describe_comparison, score
from minimonkey.scripts.evaluation.runner import Answering, Asked, answer_suite
from minimonkey.scripts.evaluation.suites import (
    DEFAULT_METRIC,
    PRESET_METRICS,
    QUESTIONS,
    SYNTHETIC,
    Suite,
    read_benchmark,
    synthetic_suite,
)
from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.quantize import load_quantized, weights_config
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    add_tile_arguments,
    load_model,
    load_processor,
    prepared,
    reports_errors,
    tile_options,
)
from minimonkey.scripts.synthetic.materials import materials
from minimonkey.scripts.synthetic.sheet import sheet


DEFAULT_ITEMS = 1000
SHEET_ITEMS, SHEET_COLUMNS = 9, 3


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=SYNTHETIC, default="word", help="what to render")
    what.add_argument("--benchmark", type=Path, default=None, help="JSONL file of items")
    parser.add_argument("--items", type=int, default=None, help="rendered items (1000), or lines of a benchmark (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", action="store_true", help="words without blur, noise, tilt or JPEG artefacts")
    parser.add_argument("--difficulty", type=float, default=None, help="of rendered documents, 0 to 1 (default)")
    parser.add_argument("--questions", choices=QUESTIONS, default="any", help="for the whole text, or for values in it")
    parser.add_argument("--metric", choices=METRICS, default=None, help="instead of the suite's or preset's")
    add_tile_arguments(parser)
    parser.add_argument("--no-thumbnail", action="store_true", help="leave out the tile that shows the whole image")
    parser.add_argument("--use-scm", action="store_true", help="compress the tokens of the detailed tiles")
    parser.add_argument("--scm-keep-ratio", type=float, default=None, help="share of them that stays (with --use-scm)")
    parser.add_argument("--scm-layer", type=int, default=None, help="whose attention decides (with --use-scm)")
    parser.add_argument(
        "--drop", choices=DROPS, default=None, help="which of them go (with --use-scm): the baselines of scm"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=None, help="default: enough for the suite; 128 of a benchmark"
    )
    parser.add_argument("--stop-repetition", action="store_true", help="end answers that repeat themselves")
    parser.add_argument("--batch-size", type=int, default=None, help="32, or 1 with an --engine")
    add_engine_arguments(parser)
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.add_argument(
        "--quantize",
        action="append",
        default=None,
        metavar="PRESET",
        help="or REGEX=FORMAT; as quantize.py stores weights",
    )
    parser.add_argument("--out", type=Path, default=None, help="JSONL file for the predictions")
    parser.add_argument("--resume", action="store_true", help="go on with the predictions in --out")
    parser.add_argument("--sheet", type=Path, default=None, help="PNG of the first items with question and answers")
    args = parser.parse_args(arguments)
    check_engine_arguments(parser, args)
    if args.batch_size is None:
        args.batch_size = 32 if args.engine == "torch" else 1
    _check(parser, args)
    args.dtype = str(choose_dtype(args.dtype, args.device)).removeprefix("torch.")
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("items", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.engine != "torch" and args.batch_size != 1:
        parser.error(f"--engine {args.engine} reads one prompt at a time: --batch-size 1")
    if args.quantize is not None and args.engine != "torch":
        parser.error("--quantize goes with --engine torch")
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the predictions to go on with")
    if not args.use_scm and any(value is not None for value in (args.scm_keep_ratio, args.scm_layer, args.drop)):
        parser.error("--scm-keep-ratio, --scm-layer and --drop need --use-scm")
    if args.scm_keep_ratio is not None and not 0 < args.scm_keep_ratio <= 1:
        parser.error("--scm-keep-ratio must be above 0 and at most 1")
    is_word = args.suite == "word" and args.benchmark is None
    if args.clean and not is_word:
        parser.error("--clean belongs to the suite word; use --difficulty")
    if args.sheet is not None and (args.sheet.suffix != ".png" or not args.sheet.parent.is_dir()):
        parser.error(f"--sheet must be a .png in a folder that exists, got {args.sheet}")
    if args.questions != "any" and args.benchmark is not None:
        parser.error("--questions belongs to rendered documents")
    if args.difficulty is not None and (is_word or args.benchmark is not None):
        parser.error("--difficulty belongs to rendered documents; words have --clean")


def open_suite(args: argparse.Namespace) -> Suite:
    if args.benchmark is not None:
        return read_benchmark(
            args.benchmark, args.items, args.metric or PRESET_METRICS.get(args.preset, DEFAULT_METRIC)
        )
    difficulty = 0.0 if args.clean else args.difficulty
    items = args.items or DEFAULT_ITEMS
    return synthetic_suite(args.suite, items, args.seed, difficulty, args.metric, args.questions)


def image_options(args: argparse.Namespace) -> dict:
    return tile_options(args) | ({"use_thumbnail": False} if args.no_thumbnail else {})


def load(args: argparse.Namespace, max_new_tokens: int) -> Answering:
    """Load the model and how it is asked; raises `ValueError` for impossible tile ranges before the weights are read."""
    tiles = image_options(args)
    processor = load_processor(args.model)
    processor.image_processor.get_number_of_image_patches(100, 100, tiles)
    options = {"subfolder": args.subfolder, "dtype": args.dtype}
    if args.engine != "torch":
        model = load_engine(args, getattr(torch, args.dtype))
    else:
        quantised = args.quantize and weights_config(args.quantize)
        model = load_quantized(args.model, quantised, **options) if quantised else load_model(args.model, **options)
        model = prepared(model.to(args.device))
    keep_ratio = (args.scm_keep_ratio or model.config.scm_keep_ratio) if args.use_scm else None
    compression = (keep_ratio, args.drop, args.scm_layer)
    return Answering(model, processor, max_new_tokens, tiles, *compression, stop_repetition=args.stop_repetition)


def settings_of(args: argparse.Namespace, suite: Suite, max_new_tokens: int) -> dict:
    """Return the settings that decide the answers of a run."""
    names = (
        "model",
        "subfolder",
        "seed",
        "clean",
        "difficulty",
        "metric",
        "use_scm",
        "scm_keep_ratio",
        "scm_layer",
        "drop",
        "batch_size",
        "dtype",
    )
    settings = {name: getattr(args, name) for name in names} | {"suite": suite.name, "items": len(suite)}
    settings["weights"] = weights_digest(args.model, args.subfolder)
    if args.benchmark is None:
        settings["materials"] = materials()
    if args.quantize is not None:
        settings["quantize"] = args.quantize
    if args.questions != "any":
        settings["questions"] = args.questions
    if args.engine != "torch":
        settings["engine"] = [
            args.engine,
            None if args.gguf is None else hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
        ]
    if args.stop_repetition:
        settings["stop_repetition"] = True
    if args.benchmark is not None:
        settings["benchmark"] = hashlib.sha256(args.benchmark.read_bytes()).hexdigest()
    return settings | {"tiles": image_options(args), "max_new_tokens": max_new_tokens}


def draw_sheet(suite: Suite, predictions: list[dict], answering: Answering, path: Path) -> None:
    """Write the first image of each of the first items, with the question, the right answer, and the model's."""
    captioned = []
    for number, line in enumerate(predictions[:SHEET_ITEMS]):
        (image, *_) = answering.open(suite.item(number))
        texts = [line["question"], f"right: {line['reference']!r}", f"read:  {line['answer']!r}"]
        captioned.append((image, texts))
    sheet(captioned, SHEET_COLUMNS).save(path)


def evaluate(args: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    suite = open_suite(args)
    max_new_tokens = args.max_new_tokens or suite.max_new_tokens
    settings = settings_of(args, suite, max_new_tokens)
    predictions = Predictions(args.out, settings, args.resume)
    answering = load(args, max_new_tokens)
    (lines,) = answer_suite(suite, [Asked(answering, predictions)], args.batch_size)
    result = score(lines) | {name: value for name, value in settings.items() if value is not None}
    is_word = args.benchmark is None and args.suite == "word"
    print(describe(result, f"{len(lines)} {'unseen words in unseen fonts' if is_word else 'items of ' + suite.name}"))
    print(json.dumps(result))
    if args.sheet is not None:
        draw_sheet(suite, lines, answering, args.sheet)


def compare_files(arguments: list[str]) -> None:
    program = f"{Path(sys.argv[0]).name} compare"
    parser = argparse.ArgumentParser(prog=program, description="Two predictions files, item by item.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args(arguments)
    result = compare(read_predictions(args.first), read_predictions(args.second))
    print(describe_comparison(result))
    print(json.dumps(result))


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        compare_files(arguments[1:])
    else:
        evaluate(parse_arguments(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
