"""Vision: tiles through tower and projector in chunks of several sizes, compiled and in onnxruntime, beside all at once."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minimonkey.scripts.benchmarking.measure import median_seconds, megabytes, peak_extra_bytes, report
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model, random_tiles
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import add_device_argument, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano"), help="dimensions")
    parser.add_argument("--tiles", type=whole_number(1), default=34)
    parser.add_argument("--chunks", type=whole_number(1), nargs="+", default=[16, 8, 4], help="tiles at a time")
    parser.add_argument("--compile", action="store_true", help="also the vision tower under torch.compile")
    parser.add_argument("--onnx", action="store_true", help="also onnxruntime, all at once, in float32")
    add_dtype_argument(parser)
    parser.add_argument("--repeats", type=whole_number(1), default=3)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    report("vision", rows(args), torch.device(args.device), args)


def in_chunks(model: nn.Module, tiles: torch.Tensor, size: int) -> Callable[[], torch.Tensor]:
    """Return a function that computes the features (T, K, D) of all tiles."""

    def features() -> torch.Tensor:
        parts = [model.get_image_features(part, return_dict=True).pooler_output for part in tiles.split(size)]
        return torch.cat(parts)

    return features


def in_onnxruntime(model: nn.Module, tiles: torch.Tensor) -> Callable[[], None]:
    """Return a function that computes the features of all tiles by onnxruntime, with torch's number of threads."""
    import onnxruntime

    from minimonkey.scripts.export_onnx import write_part
    from minimonkey.scripts.exporting.onnx_parts import VISION, parts

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vision.onnx")
        write_part(path, *parts(model)[VISION])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"pixel_values": tiles.float().numpy()}
    return lambda: session.run(None, inputs)


@torch.no_grad()
def rows(args: argparse.Namespace) -> list[dict]:
    device = torch.device(args.device)
    model = random_model(random_config(args.size, layers=1), device, getattr(torch, args.dtype))
    tiles = random_tiles(args.tiles, model)
    functions = {"all at once": in_chunks(model, tiles, args.tiles)}
    functions |= {f"{chunk} at a time": in_chunks(model, tiles, chunk) for chunk in args.chunks}
    if args.compile:
        compiled = random_model(random_config(args.size, layers=1), device, model.dtype)
        in_chunks(compiled, tiles[:1], 1)()  # transformers installs its hooks in the first pass, under a lock
        compiled.model.vision_tower = torch.compile(compiled.model.vision_tower, fullgraph=True)
        functions[f"compiled, {args.chunks[0]} at a time"] = in_chunks(compiled, tiles, args.chunks[0])
    if args.onnx:
        if model.dtype != torch.float32 or device.type != "cpu":
            raise ValueError("--onnx is compared with float32 on the CPU: --dtype float32 --device cpu.")
        functions["onnxruntime"] = in_onnxruntime(model, tiles)
    seconds = median_seconds(functions, device, args.repeats)
    extra = {name: peak_extra_bytes(function, device) for name, function in functions.items()}
    whole = extra["all at once"]
    return [
        {
            "way": name,
            "s": seconds[name],
            "ms / tile": 1000 * seconds[name] / args.tiles,
            "time ratio": seconds[name] / seconds["all at once"],
            "peak MB": megabytes(extra[name]),
            "memory ratio": None if not whole else extra[name] / whole,
        }
        for name in functions
    ]
