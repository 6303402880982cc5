"""A whole process: a folder with random weights is written, then loaded and asked about an image in a process of its own.

Gives the file's size, the seconds until it is loaded and until the first token, the tokens per second, and the most resident
memory of the process, Python and torch included. 19 tiles are 12+6+1, a photograph or a page at the default preset.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.quantized_weights import PRESETS, QuantizedWeightsConfig, QuantizedWeightsQuantizer
from minimonkey.scripts.benchmarking.compression import TEXT_AFTER, TEXT_BEFORE, tile_counts
from minimonkey.scripts.benchmarking.measure import megabytes, report, resident_bytes
from minimonkey.scripts.benchmarking.models import SIZES, published_config, random_tiles
from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.quantize import INT8_CACHE, file_bytes
from minimonkey.scripts.repository import ROOT, load_model, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano", "Mono"), help="dimensions")
    parser.add_argument("--preset", default="int8", choices=(*PRESETS, "none"), help="how weights are stored")
    parser.add_argument("--tiles", type=tile_counts, default="12+6+1", metavar="D+A+T")
    parser.add_argument("--tokens", type=whole_number(2), default=5, help="new tokens")
    parser.add_argument("--vision-chunk", type=whole_number(1), default=4, help="tiles encoded at a time")
    parser.add_argument(
        "--prefill-chunk", type=whole_number(1), default=None, help="tokens read at a time (default: all)"
    )
    parser.add_argument("--offload-vision", action="store_true", help="free the vision tower before decoding")
    parser.add_argument("--prepare", action="store_true", help="call prepare_for_cpu()")
    parser.add_argument("--folder", type=Path, default=None, help="where the weights are written (default: temporary)")
    add_dtype_argument(parser)
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_random(args.size, args.preset, Path(folder))
        command = [
            sys.executable,
            "-c",
            f"from minimonkey.scripts.benchmarking.process import child; child({arguments(args, folder)!r})",
        ]
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "scripts")
        size = file_bytes(Path(folder))
    names = ("load s", "first token s", "CPU s", "tokens / s", "tokens / CPU s", "MB then", "peak MB")
    values = [float(word) for word in found.stdout.split()[-len(names) :]]
    row = {"size": args.size, "preset": args.preset, "file MB": megabytes(size), **dict(zip(names, values))}
    report("process", [row], torch.device("cpu"), args)


def arguments(args: argparse.Namespace, folder: str) -> dict:
    """Return what the child process is to do."""
    names = ("tiles", "tokens", "vision_chunk", "prefill_chunk", "offload_vision", "prepare", "dtype")
    return {"folder": folder, **{name: getattr(args, name) for name in names}}


def write_random(size: str, preset: str, folder: Path) -> None:
    """Write a model with random weights, stored as `preset` says, without ever holding it in another form."""
    config = published_config(size)
    with init_empty_weights(include_buffers=False):
        model = MiniMonkeyForConditionalGeneration(config)
    if preset != "none":
        stored = QuantizedWeightsConfig(preset)
        QuantizedWeightsQuantizer(stored)._process_model_before_weight_loading(model)
        config.quantization_config = stored
        config.kv_cache_dtype = "int8" if preset in INT8_CACHE else None
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_random(name, parameter, generator), requires_grad=False)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return values like those of a real model: scales (bits of float16) that make weights of about 0.02."""
    if like.is_floating_point():
        value = torch.empty(like.shape, dtype=torch.bfloat16)
        return value.fill_(1.0) if like.ndim == 1 else value.normal_(std=0.02, generator=generator)
    if like.dtype == torch.int16 and name != "weight":
        size = {"least": -0.04}.get(name, 0.04 / 127)
        return torch.full(like.shape, size, dtype=torch.float16).view(torch.int16)
    if like.dtype == torch.int16:
        return torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator).view(torch.int16)
    low, high = (0, 256) if like.dtype == torch.uint8 else (-127, 128)
    return torch.randint(low, high, like.shape, dtype=like.dtype, generator=generator)


@torch.inference_mode()
def child(options: dict) -> None:
    """Load, answer, and print what `run` reads: seconds, tokens per second, megabytes."""
    start = time.perf_counter()
    dtype = choose_dtype(options["dtype"], "cpu")
    model = load_model(options["folder"], dtype=dtype)
    model.vision_chunk_tiles = options["vision_chunk"]
    if options["offload_vision"]:
        model.offload_vision()
    if options["prepare"]:
        model.prepare_for_cpu()
    load = time.perf_counter() - start
    count = sum(map(int, options["tiles"].split("+")))
    ids = torch.full((1, TEXT_BEFORE + count * model.config.image_seq_length + TEXT_AFTER), 5)
    ids[0, TEXT_BEFORE : ids.shape[1] - TEXT_AFTER] = model.config.image_token_id
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": options["tokens"]}
    if options["prefill_chunk"] is not None:
        settings["prefill_chunk_size"] = options["prefill_chunk"]
    clock = _Clock()
    model.generate(ids, pixel_values=random_tiles(count, model), streamer=clock, **settings)
    first, rest = clock.first, clock.last - clock.first
    speeds = [(options["tokens"] - 1) / seconds for seconds in (rest, clock.rest)]
    memory = [clock.resident / 2**20, resident_bytes("VmHWM") / 2**20]
    print(load, first - clock.start, clock.processor, *speeds, *memory)


class _Clock:
    """A streamer that notes when the first and the last token came, and how much memory there was then."""

    def __init__(self):
        self.start, self._processor = time.perf_counter(), time.process_time()
        self.first = self.last = self.processor = self.rest = self.resident = 0.0
        self._calls = 0

    def put(self, value) -> None:
        """Note the time; the first call is of the prompt."""
        self._calls += 1
        self.last = time.perf_counter()
        processor = time.process_time() - self._processor
        if self._calls == 2:
            self.first, self.processor = self.last, processor
        self.rest = processor - self.processor
        if self._calls == 3:
            self.resident = resident_bytes("VmRSS")

    def end(self) -> None:
        """Do nothing: the last token has come."""
