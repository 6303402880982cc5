"""The options of scripts that let another program run the language model; nothing is imported before it is asked for."""

import argparse
from pathlib import Path

import torch

from minimonkey.scripts.repository import whole_number


ENGINES = ("torch", "llama.cpp", "onnx")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--engine` and what the engines need."""
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="what runs the language model")
    parser.add_argument("--gguf", type=Path, help="with llama.cpp: the file of `minimonkey export-gguf`")
    parser.add_argument("--context", type=whole_number(1), help="with llama.cpp: most tokens of prompt and answer")
    parser.add_argument("--threads", type=whole_number(1), help="with llama.cpp or onnx: how many compute")


def check_engine_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if options do not go with the engine."""
    if (args.engine == "llama.cpp") != (args.gguf is not None):
        parser.error("--engine llama.cpp and --gguf FILE go together")
    needs = {"context": ("llama.cpp",), "threads": ("llama.cpp", "onnx")}
    for name, engines in needs.items():
        if getattr(args, name) is not None and args.engine not in engines:
            parser.error(f"--{name} goes with --engine {' or '.join(engines)}")
    attention = getattr(args, "attn_implementation", None)
    if args.engine != "torch" and (attention is not None or torch.device(args.device).type != "cpu"):
        parser.error(f"--engine {args.engine} runs on the CPU, with an attention of its own; take --device cpu")


def load_engine(args: argparse.Namespace, dtype: torch.dtype):
    """Return the model that `--engine` asks for; see `llama_cpp.load_llama_cpp` and `onnx_runtime.load_onnx`."""
    if args.engine == "llama.cpp":
        from minimonkey.scripts.engines.llama_cpp import load_llama_cpp

        return load_llama_cpp(args.model, args.gguf, dtype, args.subfolder, args.use_scm, args.context, args.threads)
    from minimonkey.scripts.engines.onnx_runtime import load_onnx

    if args.subfolder:
        raise ValueError("A folder of ONNX files is one model's: leave out --subfolder, and give it to `export-onnx`.")
    return load_onnx(Path(args.model), args.threads)
