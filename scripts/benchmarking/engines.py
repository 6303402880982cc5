"""Engines: first token and tokens per second of the language model in torch, llama.cpp and onnxruntime, all in turns.

Weights are random, of a published size; the model is exported in a folder that is deleted again. The floor is the time to read
the stored weights once at the bandwidth that this machine copies memory with.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from minimonkey.packed_weights import can_pack
from minimonkey.quantized_weights import PRESETS, QuantizedWeightsConfig
from minimonkey.scripts.benchmarking.decode import COPIED_BYTES, bytes_read
from minimonkey.scripts.benchmarking.measure import report
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model
from minimonkey.scripts.engines.model import LanguageEngine
from minimonkey.scripts.exporting.gguf_file import TYPES
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import ROOT, load_model, load_processor, whole_number
from minimonkey.transformers_bridge import CACHE_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="1B", choices=(*SIZES, "Nano"), help="dimensions")
    parser.add_argument("--layers", type=whole_number(2), default=None, help="fewer layers of the language model")
    parser.add_argument("--types", nargs="*", choices=TYPES, default=["F16", "Q8_0"], help="of GGUF files")
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=[], help="of weights in torch")
    parser.add_argument("--onnx", action="store_true", help="also onnxruntime, in float32")
    parser.add_argument("--prompt", type=whole_number(1), default=256, help="tokens before")
    parser.add_argument("--tokens", type=whole_number(1), default=16, help="new tokens")
    parser.add_argument("--threads", type=whole_number(1), default=None, help="by default torch's")
    parser.add_argument("--repeats", type=whole_number(1), default=3)
    add_dtype_argument(parser, "torch's: ")
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> None:
    report("engines", rows(args), torch.device("cpu"), args)


def in_torch(model: torch.nn.Module, ids: list[int], tokens: int) -> tuple[float, float]:
    """Return the wall seconds of the prompt and of `tokens` more, one after the other."""
    cache, start = DynamicCache(config=model.config.get_text_config()), time.perf_counter()
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), logits_to_keep=1, **{CACHE_NAME: cache}).logits
        first = time.perf_counter()
        for _ in range(tokens):
            logits = model(logits[:, -1:].argmax(-1), logits_to_keep=1, **{CACHE_NAME: cache}).logits
    return first - start, time.perf_counter() - first


def in_engine(engine: LanguageEngine, ids: list[int], tokens: int) -> tuple[float, float]:
    """Return the wall seconds of the prompt and of `tokens` more, one after the other."""
    engine.cut(0)
    start = time.perf_counter()
    logits = engine.read_ids(ids)
    first = time.perf_counter()
    for _ in range(tokens):
        logits = engine.read_ids([int(logits[-1].argmax())])
    return first - start, time.perf_counter() - first


def rows(args: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(args.threads or torch.get_num_threads())
    config = random_config(args.size, args.layers)
    if args.size != "Nano":
        config.vision_config.num_hidden_layers = 1  # its time is not taken
    model = random_model(config, torch.device("cpu"), getattr(torch, args.dtype))
    ids = [3 + i % 300 for i in range(args.prompt)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        ways: dict[str, tuple[Callable, float]] = {
            f"torch, {args.dtype}": (lambda: in_torch(model, ids, args.tokens), bytes_read(model))
        }
        for preset in ["prepared", *args.presets] if can_pack(model.dtype) else []:
            options = {} if preset == "prepared" else {"quantization_config": QuantizedWeightsConfig(preset)}
            other = load_model(f"{folder}/model", dtype=model.dtype, **options)
            size = bytes_read(other)
            other.prepare_for_cpu()
            ways[f"torch, {args.dtype}, {preset}"] = (lambda other=other: in_torch(other, ids, args.tokens), size)
        for name, engine, size in engines(args, Path(folder)):
            ways[name] = (lambda engine=engine: in_engine(engine, ids, args.tokens), size)
        return measure(ways, args)


def engines(args: argparse.Namespace, folder: Path):
    """Yield the name of each way, its engine, and the bytes of the weights that a new token reads."""
    source, threads = str(folder / "model"), torch.get_num_threads()
    if args.types:
        from minimonkey.scripts.engines.libllama import LibLlama
        from minimonkey.scripts.export_gguf import export_gguf
    for kind in args.types:
        path = folder / f"{kind}.gguf"
        export_gguf(source, path, kind)
        yield f"llama.cpp, {kind}", LibLlama(path, args.prompt + args.tokens, threads), stored_bytes(path)
    if args.onnx:
        from minimonkey.scripts.engines.onnx_runtime import load_onnx
        from minimonkey.scripts.export_onnx import export_onnx

        load_processor(ROOT).save_pretrained(source)  # which is not used, but belongs to an export
        export_onnx(source, folder / "onnx")
        path = folder / "onnx" / "decoder_model.onnx"
        size = sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
        yield "onnxruntime, float32", load_onnx(folder / "onnx", threads).engine, size


def stored_bytes(path: Path) -> int:
    """Return the bytes of a GGUF file's weights that a new token reads: of the embeddings one row."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if tensor.name != "token_embd.weight")


def measure(ways: dict[str, tuple[Callable, float]], args: argparse.Namespace) -> list[dict]:
    """Run all ways in turns; return a row for each, with medians and ratios to the first."""
    source = torch.ones(COPIED_BYTES // 4)
    target, copies = torch.ones_like(source), []
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(args.repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - start)
        for name, (function, _) in ways.items():
            cpu = time.process_time()
            prompt, rest = function()
            if number:
                taken[name].append((prompt, rest / args.tokens, time.process_time() - cpu))
    second = statistics.median(copies) / (2 * COPIED_BYTES)  # for one byte; a copy reads and writes
    medians = {name: [statistics.median(column) for column in zip(*values)] for name, values in taken.items()}
    base = next(iter(medians.values()))
    return [
        {
            "way": name,
            "weights MB": round(ways[name][1] / 1e6),
            "prompt s": prompt,
            "tokens / s": 1 / each,
            "CPU s": cpu,
            "prompt, of torch's": prompt / base[0],
            "token, of torch's": each / base[1],
            "token, of the floor": each / (ways[name][1] * second),
        }
        for name, (prompt, each, cpu) in medians.items()
    ]
