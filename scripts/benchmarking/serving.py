"""Many images: one by one, in batches, and in vLLM (in its environment: make benchmark-vllm).

Rendered receipts, other ones in every round, so that no cache knows them; every answer has the same number of tokens. The ways
take turns, so their ratio holds on a machine that does other things too.
"""

import argparse
import os
from collections.abc import Callable

import torch
from PIL import Image

from minimonkey.scripts.benchmarking.measure import median_seconds, report
from minimonkey.scripts.repository import ROOT, load_model, load_processor, whole_number


QUESTION = "Read the text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=whole_number(1), default=64, help="in a round")
    parser.add_argument("--batch", type=whole_number(1), default=16, help="images in a batch of batch_chat")
    parser.add_argument("--new-tokens", type=whole_number(1), default=32, help="of every answer")
    parser.add_argument("--preset", default="default", help="tile ranges")
    parser.add_argument("--repeats", type=whole_number(1), default=1, help="rounds after a warm-up")
    parser.add_argument("--without-vllm", action="store_true", help="measure transformers alone")


def run(args: argparse.Namespace) -> None:
    ways = transformers_ways(args)
    if not args.without_vllm:
        ways["vllm"] = vllm_way(args)
    rounds = [receipts(args.images, seed) for seed in range(args.repeats + 1)]
    functions = {name: in_rounds(way, rounds) for name, way in ways.items()}
    seconds = median_seconds(functions, torch.device("cpu"), args.repeats)
    first = seconds["one by one"]
    rows = [
        {"way": name, "seconds": value, "images/s": args.images / value, "times": first / value}
        for name, value in seconds.items()
    ]
    report("serving", rows, torch.device("cpu"), args)


def receipts(count: int, seed: int) -> list[Image.Image]:
    """Draw receipts, the same ones for a seed."""
    from minimonkey.scripts.synthetic.documents import document

    return [document("receipt", index, seed).image for index in range(count)]


def in_rounds(way: Callable[[list], None], rounds: list[list]) -> Callable[[], None]:
    """Return a function that treats the images of the next round at each call."""
    remaining = iter(rounds)
    return lambda: way(next(remaining))


def transformers_ways(args: argparse.Namespace) -> dict[str, Callable[[list], None]]:
    """Return how transformers answers: with `chat` and with `batch_chat`, in float32."""
    model, processor = load_model(ROOT, dtype=torch.float32), load_processor(ROOT)
    options = {
        "images_kwargs": {"preset": args.preset},
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
        "do_sample": False,
    }

    def one_by_one(images: list) -> None:
        for image in images:
            model.chat(processor, image, QUESTION, **options)

    def in_batches(images: list) -> None:
        for start in range(0, len(images), args.batch):
            batch = images[start : start + args.batch]
            model.batch_chat(processor, batch, [QUESTION] * len(batch), **options)

    return {"one by one": one_by_one, f"batches of {args.batch}": in_batches}


def vllm_way(args: argparse.Namespace) -> Callable[[list], None]:
    """Return how vLLM answers: all images at once, in float32.

    Raises:
        ValueError: vLLM is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError(f"vLLM cannot be imported ({error}); pass --without-vllm, or make benchmark-vllm.") from error
    engine = LLM(
        str(ROOT),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=2**29,
        gpu_memory_utilization=0.3,
        mm_processor_kwargs={"preset": args.preset},
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)

    def at_once(images: list) -> None:
        asked = {"type": "text", "text": QUESTION}
        contents = [[{"type": "image_pil", "image_pil": image}, asked] for image in images]
        engine.chat([[{"role": "user", "content": content}] for content in contents], sampling, use_tqdm=False)

    return at_once
