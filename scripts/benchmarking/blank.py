"""Blank paper left out: scanned pages with wide margins, until the first token, beside all tiles.

A page is a rendered receipt on a sheet of grainy paper, of which it fills a part of the width and height. Times are of the
first page; answers of all of them.
"""

import argparse
from functools import partial

import numpy as np
import torch
from PIL import Image

from minimonkey.scripts.benchmarking.measure import median_seconds, report
from minimonkey.scripts.evaluation.flops import way_flops
from minimonkey.scripts.evaluation.suites import QUESTIONS
from minimonkey.scripts.evaluation.ways import Way
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    load_model,
    load_processor,
    whole_number,
)
from minimonkey.scripts.synthetic.canvas import Question
from minimonkey.scripts.synthetic.documents import document
from minimonkey.tiling import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--width", type=whole_number(300), default=3000)
    parser.add_argument("--height", type=whole_number(400), default=4000)
    parser.add_argument("--fill", type=float, default=0.5, help="share of width and height that shows something")
    parser.add_argument("--preset", choices=PRESETS, default="docvqa", help="tile ranges")
    parser.add_argument("--repeats", type=whole_number(1), default=5)
    parser.add_argument("--pages", type=whole_number(1), default=8, help="whose answers are compared")
    add_device_argument(parser)
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> None:
    report("blank", rows(args), torch.device(args.device), args)


def scan(width: int, height: int, fill: float, seed: int = 0) -> tuple[Image.Image, Question]:
    """Draw a page with wide margins, and say what can be asked about it."""
    drawn = document("receipt", seed, 0, "held_out", 0.0)
    grain = np.random.RandomState(seed).randint(-3, 4, (height, width, 1)) + np.array([244, 243, 240])
    page = Image.fromarray(grain.astype(np.uint8))
    shown = drawn.image.convert("RGB")
    scale = fill * min(width / shown.width, height / shown.height)
    page.paste(shown.resize((int(shown.width * scale), int(shown.height * scale))), (width // 20, height // 20))
    return page, next(asked for asked in drawn.questions if QUESTIONS["values"](asked))


def ways(preset: str) -> dict[str, dict]:
    """Return what `chat` is called with: whole tiles left out, blank tokens left out, and half of the tokens dropped."""
    compressed = {"images_kwargs": {"preset": preset}, "use_scm": True}
    saved = {"blank": "save"}
    return {
        "all tiles": {"images_kwargs": {"preset": preset}},
        "without blank tiles": {"images_kwargs": {"preset": preset, "drop_blank": True}},
        "without blank tokens": {**compressed, "scm_keep_ratio": 1.0, "scm_select": saved},
        "half, token": {**compressed, "scm_keep_ratio": 0.5},
        "half, blank last": {**compressed, "scm_keep_ratio": 0.5, "scm_select": "blank"},
    }


def rows(args: argparse.Namespace) -> list[dict]:
    if not 0 < args.fill <= 0.9:
        raise ValueError(f"--fill is a share of the page from 0 to 0.9, got {args.fill}.")
    processor = load_processor(args.model)
    model = load_model(args.model, subfolder=args.subfolder, dtype=args.dtype).to(args.device)
    config, options = model.config, {"do_sample": False}
    pages = [scan(args.width, args.height, args.fill, seed) for seed in range(args.pages)]
    page, question = pages[0]
    answers, first, results = {}, {}, []
    for name, way in ways(args.preset).items():
        first[name] = partial(model.chat, processor, page, question.text, max_new_tokens=1, **way, **options)
        answers[name] = [model.chat(processor, own, q.text, max_new_tokens=48, **way, **options) for own, q in pages]
    seconds = median_seconds(first, model.device, args.repeats)
    for name, way in ways(args.preset).items():
        inputs = processor(page, f"<image>\n{question.text}", images_kwargs=way["images_kwargs"])
        counts = inputs["tile_counts"][0].tolist()
        tokens = read = sum(counts) * config.image_seq_length
        if way.get("use_scm"):
            chosen = {key: value for key, value in way.items() if key.startswith("scm_")}
            (kept,) = model.kept_positions(**inputs.to(model.device, model.dtype), **chosen)
            read = tokens - inputs["input_ids"].shape[1] + len(kept)
        choice = Way(name, compressor="blank" if way.get("use_scm") else None)
        encoder, prefill = way_flops(config, choice, tokens, read, config.scm_layer)
        same = [own == whole for own, whole in zip(answers[name], answers["all tiles"])]
        right = [own.strip() == asked.answer for own, (_, asked) in zip(answers[name], pages)]
        results.append(
            {
                "way": name,
                "detailed + adaptive + thumbnail": "+".join(map(str, counts)),
                "image tokens": tokens,
                "read": read,
                "encoder GFLOP": encoder / 1e9,
                "prefill GFLOP": prefill / 1e9,
                "first token ms": 1000 * seconds[name],
                "ratio": seconds[name] / seconds["all tiles"],
                "same answers": f"{sum(same)} of {len(pages)}",
                "right": f"{sum(right)} of {len(pages)}",
            }
        )
    return results
