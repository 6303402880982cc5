"""Writes GGUF files, a tensor at a time, in the number formats of llama.cpp."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


# What `--type` takes; in Q4_K_M different tensors have different formats, which libllama's quantiser chooses.
TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K_M")
K_BLOCK = 256
F16_MOST = 65504.0


@dataclass(frozen=True)
class Planned:
    """A tensor of a file: its name and shape there, and what reads it when its turn has come."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def require_gguf():
    """Return the module `gguf`; raise `ValueError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError('GGUF files are written with gguf: pip install "minimonkey[gguf]" or gguf') from error
    return gguf


def tensor_type(planned: Planned, kind: str, keeps: bool = False):
    """Return the `gguf.GGMLQuantizationType` of a tensor in a file of this kind.

    Args:
        kind: One of TYPES but Q4_K_M.
        keeps: Whether it stays in 8 bits where others have 4: embeddings and head.

    Raises:
        ValueError: Its rows are not a whole number of the format's blocks.
    """
    gguf = require_gguf()
    types = gguf.GGMLQuantizationType
    if len(planned.shape) == 1 or kind == "F32":
        return types.F32
    chosen = types.Q8_0 if keeps and kind == "Q4_0" else types[kind]
    check_rows([planned], gguf.GGML_QUANT_SIZES[chosen][0], chosen.name)
    return chosen


def check_rows(tensors: list[Planned], block: int, kind: str) -> None:
    """Raise `ValueError` if the rows of a matrix are not a whole number of blocks."""
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.shape[-1] % block:
            smaller = "Q8_0 or Q4_0, whose blocks are of 32, or F16" if block > 32 else "F16"
            raise ValueError(
                f"{kind} packs {block} numbers of a row together, but {tensor.name} has rows of {tensor.shape[-1]}; take "
                f"{smaller}."
            )


def write_file(writer, tensors: list[Planned], types: dict[str, int]) -> None:
    """Write settings that a `gguf.GGUFWriter` has been given, then the tensors one after the other.

    Args:
        types: The `gguf.GGMLQuantizationType` of each by its name.

    Raises:
        ValueError: A value that 16 bits do not hold.
    """
    gguf = require_gguf()
    for tensor in tensors:
        kind = types[tensor.name]
        is_plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        dtype = np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32
        shape = tensor.shape if is_plain else gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(dtype if is_plain else np.uint8), nbytes, None if is_plain else kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        values = tensor.read().float().contiguous().numpy()
        kind = types[tensor.name]
        largest = float(np.abs(values).max(initial=0))
        if not np.isfinite(largest) or (kind != gguf.GGMLQuantizationType.F32 and largest > F16_MOST):
            raise ValueError(f"{tensor.name} holds {largest:g}, which {kind.name} cannot hold; take F32.")
        writer.write_tensor_data(gguf.quantize(values, kind))
    writer.close()


def quantise(source: Path, out: Path, threads: int) -> None:
    """Write a GGUF file as Q4_K_M by libllama's own quantiser.

    Raises:
        ValueError: llama-cpp-python is not installed, or libllama refuses.
    """
    from minimonkey.scripts.engines.libllama import require_libllama

    libllama = require_libllama()
    parameters = libllama.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = libllama.LLAMA_FTYPE_MOSTLY_Q4_K_M, threads
    failed = libllama.llama_model_quantize(str(source).encode(), str(out).encode(), parameters)
    if failed:
        raise ValueError(f"libllama could not quantise {source} (status {failed}).")
