"""Ways to run on a CPU: first token and tokens per second, by how weights are stored and computed, beside the machine's floor.

Random weights. With --depth so many layers of tower and language model are measured, with --decode-depth so many of the
language model for new tokens (more than the processor's cache holds), and the rest is taken to be like them; of the tiles
--encoded are encoded and the others taken to be like them. The first way is the baseline of the ratios; floors are the
operations at the speed of a square product, and the bytes of the weights, as stored and as computed with, at that of a copy.
"bfloat16" and "float32" alone are the model as a program loads it, all others go through `prepare_for_cpu`. Ratios are of the
processor's seconds, which other processes of the machine hardly change. To see a processor without bfloat16 units, on one that
has them: ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache, DynamicCache

from minimonkey.packed_weights import PackedLinear, can_pack, multiply
from minimonkey.quantized_weights import PRESETS, QuantizedWeightsConfig, StoredLinear, store_weights
from minimonkey.scripts.benchmarking.compression import tile_counts
from minimonkey.scripts.benchmarking.measure import megabytes, report
from minimonkey.scripts.benchmarking.models import SIZES, published_config, random_model, random_tiles
from minimonkey.scripts.repository import whole_number
from minimonkey.transformers_bridge import CACHE_NAME


PREPARED = "prepared"
WAYS = (
    "bfloat16",
    "float32",
    f"bfloat16, {PREPARED}",
    f"float32, {PREPARED}",
    *(f"float32, {preset}" for preset in PRESETS),
    *(f"bfloat16, {preset}" for preset in PRESETS),
)
TEXT_TOKENS = 70
SQUARE, COPIED_BYTES = 1024, 2**29


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", default=["2B"], choices=(*SIZES, "Nano", "Mono"), help="dimensions")
    usual = (*WAYS[:4], "float32, bfloat16", "float32, int8")
    here = [way for way in usual if PREPARED not in way or can_pack(getattr(torch, way.partition(",")[0]))]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=here)
    parser.add_argument("--tiles", type=tile_counts, default="12+6+1", metavar="D+A+T")
    parser.add_argument("--encoded", type=whole_number(1), default=1, help="tiles that are really encoded, at a time")
    parser.add_argument(
        "--depth", type=whole_number(1), default=100, help="layers that really encode and read the prompt"
    )
    parser.add_argument(
        "--decode-depth", type=whole_number(1), default=100, help="layers that really compute new tokens"
    )
    parser.add_argument("--tokens", type=whole_number(1), default=4, help="new tokens")
    parser.add_argument("--repeats", type=whole_number(1), default=2)
    parser.add_argument("--compile", action="store_true", help="each way compiled besides")
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> None:
    report("cpu", rows(args), torch.device("cpu"), args)


@dataclass
class Way:
    """Parts that are run in one way, and the least seconds that each took, of the clock and of the processor."""

    parts: dict[str, Callable]
    dtype: torch.dtype
    stored: int = 0
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


@dataclass(frozen=True)
class Shares:
    """How much of the whole is measured: full depth by that of a stack, and tiles by those that are encoded."""

    vision: float
    prefill: float
    decode: float

    @classmethod
    def of(cls, config, args: argparse.Namespace) -> "Shares":
        """Return those of a model of this configuration."""
        vision, text = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
        tiles = sum(map(int, args.tiles.split("+")))
        return cls(
            tiles / args.encoded * max(1, vision / args.depth),
            max(1, text / args.depth),
            max(1, text / args.decode_depth),
        )

    def first_token(self, seconds: dict[str, float]) -> float:
        """Return the seconds until the first token."""
        return seconds["vision"] * self.vision + seconds["prefill"] * self.prefill + seconds["head"]

    def next_token(self, seconds: dict[str, float], tokens: int) -> float:
        """Return the seconds of each token after it."""
        return seconds["decode"] * self.decode / tokens + seconds["head"]


def shallow(config, args: argparse.Namespace, vocabulary: int = 8):
    """Return the configuration with the layers that are run, and a small vocabulary: the head is measured by itself."""
    fields = {**config.to_dict(), "scm_layer": 0, "image_token_id": 3}
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    vision["num_hidden_layers"] = min(args.depth, vision["num_hidden_layers"])
    text |= {
        "num_hidden_layers": min(max(args.depth, args.decode_depth), text["num_hidden_layers"]),
        "vocab_size": vocabulary,
    }
    text |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    text.pop("layer_types", None)
    return type(config)(**fields | {"vision_config": vision, "text_config": text})


def make_way(size: str, name: str, args: argparse.Namespace, heads: dict[tuple, nn.Module], compiled: bool) -> Way:
    """Build the model of a way; `heads` holds those of earlier ways, which are large and shared."""
    dtype_name, _, preset = name.partition(", ")
    dtype, config = getattr(torch, dtype_name), published_config(size)
    model = random_model(shallow(config, args), torch.device("cpu"), dtype)
    head_way = preset if preset in ("", "bfloat16") else PREPARED
    kind = (size, dtype_name, head_way)
    if kind not in heads:
        linear = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False, dtype=dtype)
        if head_way == "bfloat16":
            linear = StoredLinear.of(linear, "bfloat16")
        heads[kind] = PackedLinear(linear) if head_way == PREPARED and can_pack(dtype) else linear
    if preset and preset != PREPARED:
        store_weights(model, QuantizedWeightsConfig(preset))
    tiles, language_model = random_tiles(args.encoded, model), model.model.language_model
    length = sum(map(int, args.tiles.split("+"))) * config.image_seq_length + TEXT_TOKENS
    shape = (1, length, config.text_config.hidden_size)
    prompt = torch.empty(shape, dtype=dtype).normal_(generator=torch.Generator().manual_seed(1))
    is_image = torch.arange(length)[None] < length - TEXT_TOKENS
    layers = language_model.layers
    if compiled:
        model.encode_tiles(tiles)  # transformers installs its hooks in the first pass, under a lock
        model.model.vision_tower = torch.compile(model.model.vision_tower)
        for layer in layers:
            layer.compile(dynamic=True)

    def read(part: slice, cache=None) -> Cache:
        routing = {"visual_token_mask": is_image[:, part]} if config.visual_experts else {}
        cache = DynamicCache() if cache is None else cache
        language_model(inputs_embeds=prompt[:, part], use_cache=True, **{CACHE_NAME: cache}, **routing)
        return cache

    def prefill() -> None:
        language_model.layers = layers[: args.depth]
        read(slice(0, length))
        language_model.layers = layers

    cache = read(slice(length - TEXT_TOKENS, length))

    def decode() -> None:
        for _ in range(args.tokens):
            read(slice(length - 1, length), cache)
        cache.crop(-args.tokens)

    blocks = sum(parameter.nbytes for name, parameter in layers.named_parameters() if "visual_mlp" not in name)
    head = config.text_config.hidden_size * config.text_config.vocab_size
    head *= 2 if preset == "bfloat16" else dtype.itemsize
    stored = blocks * Shares.of(config, args).decode + head
    if preset:
        model.prepare_for_cpu(pack=can_pack(dtype))
    parts = {"vision": lambda: model.encode_tiles(tiles), "prefill": prefill, "decode": decode}
    return Way({**parts, "head": lambda: heads[kind](prompt[:, :1])}, dtype, round(stored))


def layer_weights(text) -> int:
    """Count the weights of a language layer that a token meets."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * text.hidden_size * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    return attention + 3 * text.hidden_size * text.intermediate_size


def operations(config, tiles: int, tokens: int) -> float:
    """Return the operations until the first token: two for each weight and patch or token, and those of attention."""
    vision, text = config.vision_config, config.text_config
    patches = (config.tile_size // vision.patch_size[0]) ** 2 + 1
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    tower = vision.num_hidden_layers * patches * (2 * block + 4 * patches * vision.hidden_size)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attended = 2 * tokens * head_dim * text.num_attention_heads  # half of the pairs of tokens, twice
    language = text.num_hidden_layers * tokens * (2 * layer_weights(text) + attended)
    return tiles * tower + language


@torch.no_grad()
def rows(args: argparse.Namespace) -> list[dict]:
    heads: dict[tuple, nn.Module] = {}
    ways = {}
    for size, name in itertools.product(args.size, args.ways):
        ways[size, name] = make_way(size, name, args, heads, False)
        if args.compile:
            ways[size, f"{name}, compiled"] = make_way(size, name, args, heads, True)
    squares = {dtype: torch.ones(SQUARE, SQUARE, dtype=dtype) for dtype in {way.dtype for way in ways.values()}}
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.ones_like(source)
    products = {str(dtype): lambda square=square: square @ square for dtype, square in squares.items()}
    if torch.float32 in squares and can_pack(torch.float32):  # never slower
        products[str(torch.float32)] = lambda: multiply(squares[torch.float32], squares[torch.float32])
    machine = Way({**products, "copy": lambda: target.copy_(source)}, torch.float32)
    for way in (machine, *ways.values()):
        way.measure()
        way.clock, way.processor = {}, {}  # that was to warm up
    for _ in range(args.repeats):
        for way in (machine, *ways.values()):
            way.measure()
    tiles = sum(map(int, args.tiles.split("+")))
    bandwidth = 2 * COPIED_BYTES / machine.processor["copy"]  # a copy reads and writes
    results: list[dict] = []
    for (size, name), way in ways.items():
        config = published_config(size)
        shares, text = Shares.of(config, args), config.text_config
        work = operations(config, tiles, tiles * config.image_seq_length + TEXT_TOKENS)
        numbers = text.num_hidden_layers * layer_weights(text) + text.hidden_size * text.vocab_size
        first, token = shares.first_token(way.processor), shares.next_token(way.processor, args.tokens)
        speed = 2 * SQUARE**3 / machine.processor[str(way.dtype)]
        row = {
            "size": size,
            "way": name,
            "read MB": megabytes(way.stored),
            "first token: s": shares.first_token(way.clock),
            "CPU s": first,
        }
        row |= {"ratio": first / (results[0]["CPU s"] if results else first), "by floor": first / (work / speed)}
        row |= {"tokens / s": 1 / shares.next_token(way.clock, args.tokens), "tokens / CPU s": 1 / token}
        row["faster"] = row["tokens / CPU s"] / (results[0] if results else row)["tokens / CPU s"]
        row |= {"by stored floor": token / (way.stored / bandwidth)}
        row |= {"by computed floor": token / (numbers * way.dtype.itemsize / bandwidth)}
        results.append({**row, "GFLOPS": speed / 1e9, "GB/s": bandwidth / 1e9})
    return results
