"""Decoding: tokens per second with a growing and a static cache, and compiled, compared with what memory bandwidth allows.

Every new token reads all weights of the language model once; the floor is that time at the bandwidth that this machine
reaches when it copies memory. The prompt is short, so that what is timed are the new tokens.
"""

import argparse
from functools import partial

import torch
from torch import nn

from minimonkey.scripts.benchmarking.measure import median_seconds, report
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import add_device_argument, whole_number


COPIED_BYTES = 2**29


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano"), help="dimensions")
    parser.add_argument("--prompt", type=whole_number(1), default=8, help="tokens before")
    parser.add_argument("--tokens", type=whole_number(1), default=16, help="new tokens")
    parser.add_argument("--compile", action="store_true", help="also a static cache under torch.compile")
    add_dtype_argument(parser)
    parser.add_argument("--layers", type=whole_number(1), default=None, help="fewer layers of the language model")
    parser.add_argument("--repeats", type=whole_number(1), default=3)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    report("decode", rows(args), torch.device(args.device), args)


def bytes_read(model: nn.Module) -> int:
    """Return the bytes of weights read for one new token; of the input embeddings this is a single row."""
    body = sum(parameter.nbytes for parameter in model.model.language_model.layers.parameters())
    return body + model.lm_head.weight.nbytes


def generate(model: nn.Module, ids: torch.Tensor, tokens: int, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


def rows(args: argparse.Namespace) -> list[dict]:
    device = torch.device(args.device)
    model = random_model(random_config(args.size, args.layers), device, getattr(torch, args.dtype))
    ids = torch.arange(3, 3 + args.prompt, device=device)[None] % 300
    runs = {
        "growing cache": partial(generate, model, ids, args.tokens),
        "static cache": partial(generate, model, ids, args.tokens, cache_implementation="static"),
    }
    if args.compile:
        compiled = random_model(random_config(args.size, args.layers), device, model.dtype)
        compiled.forward = torch.compile(compiled.forward, fullgraph=True)
        runs["static cache, compiled"] = partial(generate, compiled, ids, args.tokens, cache_implementation="static")
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.ones_like(source)
    seconds = median_seconds({"copy": lambda: target.copy_(source), **runs}, device, args.repeats)
    floor = bytes_read(model) * seconds["copy"] / (2 * COPIED_BYTES)  # a copy reads and writes
    each = {"memory bandwidth": floor} | {name: seconds[name] / args.tokens for name in runs}
    return [
        {"way": name, "ms / token": 1000 * value, "tokens / s": 1 / value, "time ratio": value / floor}
        for name, value in each.items()
    ]
