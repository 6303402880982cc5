"""Blank tiles left out: a scanned page with wide margins, until its first token, beside all tiles.

The page is a rendered receipt on a sheet of grainy paper, of which it fills a part of the width and height.
"""

import argparse
from functools import partial

import numpy as np
import torch
from PIL import Image

from minimonkey.scripts.benchmarking.measure import median_seconds, report
from minimonkey.scripts.evaluation.flops import encoder_flops, prefill_flops
from minimonkey.scripts.evaluation.suites import QUESTIONS
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    load_model,
    load_processor,
    whole_number,
)
from minimonkey.scripts.synthetic.documents import document
from minimonkey.tiling import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--width", type=whole_number(300), default=3000)
    parser.add_argument("--height", type=whole_number(400), default=4000)
    parser.add_argument("--fill", type=float, default=0.5, help="share of width and height that shows something")
    parser.add_argument("--preset", choices=PRESETS, default="docvqa", help="tile ranges")
    parser.add_argument("--repeats", type=whole_number(1), default=5)
    add_device_argument(parser)
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> None:
    report("blank", rows(args), torch.device(args.device), args)


def scan(width: int, height: int, fill: float, seed: int = 0) -> tuple[Image.Image, str]:
    """Draw a page with wide margins, and say what can be asked about it."""
    drawn = document("receipt", seed, 0, "held_out", 0.0)
    grain = np.random.RandomState(seed).randint(-3, 4, (height, width, 1)) + np.array([244, 243, 240])
    page = Image.fromarray(grain.astype(np.uint8))
    shown = drawn.image.convert("RGB")
    scale = fill * min(width / shown.width, height / shown.height)
    page.paste(shown.resize((int(shown.width * scale), int(shown.height * scale))), (width // 20, height // 20))
    return page, next(asked.text for asked in drawn.questions if QUESTIONS["values"](asked))


def rows(args: argparse.Namespace) -> list[dict]:
    processor = load_processor(args.model)
    model = load_model(args.model, subfolder=args.subfolder, dtype=args.dtype).to(args.device)
    if not 0 < args.fill <= 0.9:
        raise ValueError(f"--fill is a share of the page from 0 to 0.9, got {args.fill}.")
    page, question = scan(args.width, args.height, args.fill)
    ways, cuts, counted, answers = {}, {}, {}, {}
    for name, drops in (("all tiles", False), ("without blank tiles", True)):
        options = {"images_kwargs": {"preset": args.preset, "drop_blank": drops}, "do_sample": False}
        cuts[name] = partial(processor.image_processor, page, **options["images_kwargs"], return_tensors="pt")
        counted[name] = cuts[name]()["tile_counts"][0].tolist()
        ways[name] = partial(model.chat, processor, page, question, max_new_tokens=1, **options)
        answers[name] = model.chat(processor, page, question, max_new_tokens=48, **options)
    seconds, results = median_seconds(ways, model.device, args.repeats), []
    preprocessing = median_seconds(cuts, torch.device("cpu"), args.repeats)
    for name, counts in counted.items():
        tokens = sum(counts) * model.config.image_seq_length
        results.append(
            {
                "way": name,
                "detailed + adaptive + thumbnail": "+".join(map(str, counts)),
                "image tokens": tokens,
                "preprocessing ms": 1000 * preprocessing[name],
                "encoder GFLOP": encoder_flops(model.config, sum(counts)) / 1e9,
                "prefill GFLOP": prefill_flops(model.config, tokens) / 1e9,
                "first token ms": 1000 * seconds[name],
                "ratio": seconds[name] / seconds["all tiles"],
                "answer": answers[name],
            }
        )
    return results
