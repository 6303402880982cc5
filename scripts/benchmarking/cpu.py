"""Ways to run on a CPU: first token and tokens per second of each way to store and compute weights, beside what the machine can do.

Random weights. With --depth the first layers of tower and language model are measured and the rest is taken to be like them; of the
tiles --encoded are encoded and the others taken to be like them. The first way is the baseline of the ratios, and the floors are the
operations at the speed of a square product and the bytes of the weights at that of a copy, both in the same run. To see a processor
without bfloat16 units, on one that has them: ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from minimonkey.quantized_weights import PRESETS, QuantizedWeightsConfig, store_weights
from minimonkey.scripts.benchmarking.compression import tile_counts
from minimonkey.scripts.benchmarking.measure import megabytes, report
from minimonkey.scripts.benchmarking.models import SIZES, published_config, random_model, random_tiles
from minimonkey.scripts.repository import whole_number
from minimonkey.transformers_bridge import CACHE_NAME


WAYS = ("bfloat16", "float32", *(f"float32, {preset}" for preset in PRESETS), *(f"bfloat16, {preset}" for preset in PRESETS))
TEXT_TOKENS = 70
SQUARE, COPIED_BYTES = 1024, 2**27


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano", "Mono"), help="dimensions")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bfloat16", "float32", "float32, bfloat16", "float32, int8"])
    parser.add_argument("--tiles", type=tile_counts, default="12+6+1", metavar="D+A+T")
    parser.add_argument("--encoded", type=whole_number(1), default=1, help="tiles that are really encoded, at a time")
    parser.add_argument("--depth", type=whole_number(1), default=None, help="layers of each stack that are really run")
    parser.add_argument("--tokens", type=whole_number(1), default=4, help="new tokens")
    parser.add_argument("--repeats", type=whole_number(1), default=2)
    parser.add_argument("--compile", action="store_true", help="each way compiled besides")
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> None:
    report("cpu", rows(args), torch.device("cpu"), args)


@dataclass
class Way:
    """A model that is run in one way, and the least seconds that each of its parts took, of the clock and of the processor."""

    model: nn.Module
    parts: dict[str, Callable]
    clock: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    def measure(self) -> None:
        """Run every part once more."""
        for name, part in self.parts.items():
            clock, processor = time.perf_counter(), time.process_time()
            part()
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            self.clock[name] = min(clock, self.clock.get(name, clock))
            self.processor[name] = min(processor, self.processor.get(name, processor))


def shallow(config, depth: int | None):
    """Return the configuration with at most `depth` layers in each stack."""
    if depth is None:
        return config
    fields = {**config.to_dict(), "scm_layer": None}
    for name in ("vision_config", "text_config"):
        part = getattr(config, name).to_dict()
        part.pop("layer_types", None)
        fields[name] = {**part, "num_hidden_layers": min(depth, part["num_hidden_layers"])}
    fields["scm_layer"] = min(1, fields["text_config"]["num_hidden_layers"] - 1)
    return type(config)(**fields)


def make_way(name: str, args: argparse.Namespace, compiled: bool) -> Way:
    dtype, _, preset = name.partition(", ")
    config = published_config(args.size)
    model = random_model(shallow(config, args.depth), torch.device("cpu"), getattr(torch, dtype))
    if preset:
        store_weights(model, QuantizedWeightsConfig(preset))
    tiles = random_tiles(args.encoded, model)
    length = sum(map(int, args.tiles.split("+"))) * config.image_seq_length + TEXT_TOKENS
    width = config.text_config.hidden_size
    prompt = torch.empty(1, length, width, dtype=model.dtype).normal_(generator=torch.Generator().manual_seed(1))
    routing = {"visual_token_mask": torch.arange(length)[None] < length - TEXT_TOKENS} if config.visual_experts else {}
    language_model, one = model.model.language_model, prompt[:, :1]
    beside = {"visual_token_mask": torch.zeros(1, 1, dtype=torch.bool)} if config.visual_experts else {}
    cache = language_model(inputs_embeds=prompt[:, :TEXT_TOKENS], use_cache=True, **{k: v[:, :TEXT_TOKENS] for k, v in routing.items()})
    cache = cache[CACHE_NAME]
    if compiled:
        model.model.vision_tower = torch.compile(model.model.vision_tower, dynamic=False)
        for layer in language_model.layers:
            layer.compile(dynamic=True)

    def decode() -> None:
        for _ in range(args.tokens):
            language_model(inputs_embeds=one, use_cache=True, **{CACHE_NAME: cache}, **beside)
        cache.crop(-args.tokens)

    parts = {
        "vision": lambda: model.encode_tiles(tiles),
        "prefill": lambda: language_model(inputs_embeds=prompt, use_cache=True, **routing),
        "decode": decode,
        "head": lambda: model.lm_head(one),
    }
    return Way(model, parts)


def stored_bytes(model: nn.Module, scale: float) -> int:
    """Return the bytes of weights that one new token reads, at full depth."""
    layers = sum(parameter.nbytes for parameter in model.model.language_model.layers.parameters())
    return round(layers * scale + sum(parameter.nbytes for parameter in model.lm_head.parameters()))


def operations(config, tiles: int, tokens: int) -> float:
    """Return the operations until the first token: two for each weight and patch or token, and those of attention."""
    vision, text = config.vision_config, config.text_config
    patches = (config.tile_size // vision.patch_size[0]) ** 2 + 1
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    tower = vision.num_hidden_layers * patches * (2 * block + 4 * patches * vision.hidden_size)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * text.hidden_size * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    block = attention + 3 * text.hidden_size * text.intermediate_size
    language = text.num_hidden_layers * tokens * (2 * block + 2 * tokens * head_dim * text.num_attention_heads)
    return tiles * tower + language


@torch.inference_mode()
def rows(args: argparse.Namespace) -> list[dict]:
    ways = {name: make_way(name, args, False) for name in args.ways}
    if args.compile:
        ways |= {f"{name}, compiled": make_way(name, args, True) for name in args.ways}
    squares = {dtype: torch.ones(SQUARE, SQUARE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    source = torch.ones(COPIED_BYTES // 4)
    floors = {dtype: lambda dtype=dtype: squares[dtype] @ squares[dtype] for dtype in squares}
    target = torch.ones_like(source)
    machine = Way(nn.Identity(), {**floors, "copy": lambda: target.copy_(source)})
    for _ in range(args.repeats + 1):  # the first is a warm-up, and never the least
        machine.measure()
        for way in ways.values():
            way.measure()
    config = published_config(args.size)
    tiles = sum(map(int, args.tiles.split("+")))
    length = tiles * config.image_seq_length + TEXT_TOKENS
    work, bandwidth = operations(config, tiles, length), 2 * COPIED_BYTES / machine.clock["copy"]
    results = []
    for name, way in ways.items():
        depths = [len(way.model.model.language_model.layers), len(way.model.model.vision_tower.encoder.layer)]
        full = [config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers]
        scale = [whole / max(part, 1) for whole, part in zip(full, depths)]

        def whole(seconds: dict[str, float]) -> tuple[float, float]:
            first = seconds["vision"] * (scale[1] if full[1] else 1) * tiles / args.encoded
            first += seconds["prefill"] * scale[0] + seconds["head"]
            return first, seconds["decode"] / args.tokens * scale[0] + seconds["head"]

        (first, token), (first_cpu, _) = whole(way.clock), whole(way.processor)
        dtype = getattr(torch, name.partition(",")[0])
        stored = stored_bytes(way.model, scale[0])
        speed = 2 * SQUARE**3 / machine.clock[dtype]
        results.append(
            {
                "way": name,
                "MB a token": megabytes(stored),
                "first token s": first,
                "cpu s": first_cpu,
                "first / floor": first / (work / speed),
                "tokens / s": 1 / token,
                "decode / floor": token / (stored / bandwidth),
                "GFLOPS": speed / 1e9,
                "GB/s": bandwidth / 1e9,
            }
        )
    baseline = results[0]
    return [
        {**row, "first ratio": row["first token s"] / baseline["first token s"], "speed ratio": row["tokens / s"] / baseline["tokens / s"]}
        for row in results
    ]
