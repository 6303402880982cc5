"""A long conversation: what each turn costs with its history cached, and computed from the start.

The second turn about one image is the case that users notice most:

    python scripts/benchmark.py conversation --turns 2 --size 2B --use-scm      a 12-megapixel JPEG, 12 + 6 + 1 tiles
    python scripts/benchmark.py conversation --turns 20 --pictures-at 1 5 12 --size Nano --dtype float32

Both ways get the same prompts and give the same first token; the table shows how far apart their logits are.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoProcessor, LogitsProcessor, LogitsProcessorList

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.benchmarking.measure import megabytes, report, synchronize
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model
from minimonkey.scripts.benchmarking.preprocessing import photograph
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import ROOT, add_device_argument, whole_number


QUESTIONS = ("What is the total?", "Who wrote it?", "And the date?", "Read the second line.", "Is it signed?")


class FirstLogits(LogitsProcessor):
    """Remembers the logits of the first new token (minus infinity for the end token) and when they were there."""

    def __init__(self):
        self.logits, self.seconds = None, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.logits is None:
            self.logits, self.seconds = scores.float().cpu(), time.perf_counter()
        return scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano"), help="dimensions; Nano has its own weights")
    parser.add_argument("--turns", type=whole_number(1), default=2)
    parser.add_argument(
        "--pictures-at", type=whole_number(1), nargs="+", default=[1], metavar="TURN", help="turns with a new picture"
    )
    parser.add_argument("--width", type=whole_number(1), default=4000, help="of the pictures, pixels")
    parser.add_argument("--height", type=whole_number(1), default=3000)
    parser.add_argument("--preset", default="default", help="tile ranges")
    parser.add_argument("--new-tokens", type=whole_number(1), default=8, help="of every answer")
    parser.add_argument("--use-scm", action="store_true")
    add_dtype_argument(parser)
    parser.add_argument("--layers", type=whole_number(1), default=None, help="fewer layers of the language model")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    if args.turns < 2 or min(args.pictures_at) < 1:
        raise ValueError("A conversation has at least 2 turns, counted from 1.")
    report("conversation", rows(args), torch.device(args.device), args)


def load(args: argparse.Namespace):
    """Load a model of the requested size, and Nano's processor at its tile size."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    if args.size == "Nano" and args.layers is None:
        return processor, MiniMonkeyForConditionalGeneration.from_pretrained(ROOT, dtype=dtype).to(device).eval()
    config = random_config(args.size, args.layers)
    config.image_token_id = processor.image_token_id
    processor.image_processor.size = {"height": config.tile_size, "width": config.tile_size}
    return processor, random_model(config, device, dtype)


def rows(args: argparse.Namespace) -> list[dict]:
    processor, model = load(args)
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for number in range(len(args.pictures_at)):
            pictures.append(Path(folder) / f"{number}.jpg")
            photograph(args.width, args.height, number).save(pictures[-1], quality=90)
        _ask(processor, model, args, pictures[:1], QUESTIONS[0], None, remember=False)  # warm-up
        history, results = None, []
        for turn in range(1, args.turns + 1):
            shown = pictures[: sum(at <= turn for at in args.pictures_at)]
            question = QUESTIONS[turn % len(QUESTIONS)]
            again, recomputed, _ = _ask(processor, model, args, shown, question, history, remember=False)
            first, seconds, answer = _ask(processor, model, args, shown, question, history, remember=True)
            history = answer.history
            results.append(
                {
                    "turn": turn,
                    "pictures": len(shown),
                    "first token, s": seconds,
                    "recomputed, s": recomputed,
                    "ratio": seconds / recomputed,
                    "logits apart": float((first - again)[first.isfinite()].abs().max()),
                    "remembered MiB": megabytes(history.memory.nbytes()),
                }
            )
    return results


def _ask(processor, model, args, pictures, question, history, remember):
    """Return the first token's logits, the seconds until they were there, and the whole answer."""
    first = FirstLogits()
    synchronize(model.device)
    start = time.perf_counter()
    answer = model.chat(
        processor,
        pictures or None,
        question,
        history=history,
        remember=remember,
        return_dict=True,
        images_kwargs={"preset": args.preset},
        use_scm=args.use_scm,
        do_sample=False,
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        logits_processor=LogitsProcessorList([first]),
    )
    return first.logits, first.seconds - start, answer
