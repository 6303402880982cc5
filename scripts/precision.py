"""Which data type the scripts compute in, depending on what the machine supports.

bfloat16 halves memory and, with hardware for it, time. A processor without it (x86 without AVX512-BF16 and AMX) converts every
number, or computes without vectors, which makes it 6 to 200 times slower than float32.

    dtype = choose_dtype(args.dtype, args.device)      what --dtype says, or what suits the device; reported in a line
"""

import argparse
import os
import platform
import sys
import time
from functools import lru_cache

import torch


DTYPES = ("auto", "float32", "bfloat16", "float16")
# oneDNN, which computes torch's matrix products on x86, can be kept from using all that a processor has.
ONEDNN_CAP = "ONEDNN_MAX_CPU_ISA"
CAPS_WITH_BFLOAT16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "DEFAULT", "ALL")


def add_dtype_argument(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Add `--dtype`, for `choose_dtype`."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help=f"{what}auto: bfloat16 where the machine is fast in it, or float32",
    )


def choose_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """Return the type called `name` (one of DTYPES); "auto" is `fast_dtype`, reported in a line on the error stream."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {name!r}.")
    if name != "auto":
        return getattr(torch, name)
    dtype = fast_dtype(device)
    reason = "which this machine is fast in" if dtype == torch.bfloat16 else "since bfloat16 is slow on this machine"
    print(f"Computing in {str(dtype).removeprefix('torch.')}, {reason}.", file=sys.stderr)
    return dtype


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 where the device has units for it, float32 elsewhere."""
    return torch.bfloat16 if has_fast_bfloat16(torch.device(device).type) else torch.float32


def choose_storage(numbers: int, dtype: torch.dtype, free: int) -> str | None:
    """Return how so many weights are best stored, a preset of quantized_weights.py, where the model computes in `dtype`.

    None, as they are, where they take at most half of `free` bytes; else the most bits with which they do.

    Raises:
        ValueError: They do with none.
    """
    sizes = {None: dtype.itemsize, "bfloat16": 2, "int8": 1, "int4": 0.625}
    for preset, size in sizes.items():
        if size <= dtype.itemsize and numbers * size <= free / 2:
            return preset
    raise ValueError(
        f"A model of {numbers / 1e9:.2g} billion weights takes {numbers * sizes['int4'] / 2**30:.1f} GiB in 4 bits, and about "
        f"as much again to compute, but {free / 2**30:.1f} GiB are free."
    )


@lru_cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Tell whether a kind of device ("cpu", "cuda", ...) is at least as fast in bfloat16 as in float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        cap = os.environ.get(ONEDNN_CAP, "DEFAULT").upper()
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return has_units and cap.startswith(CAPS_WITH_BFLOAT16)
    return _seconds(device_type, torch.bfloat16) <= _seconds(device_type, torch.float32)


@torch.inference_mode()
def _seconds(device_type: str, dtype: torch.dtype) -> float:
    """Return the least time that one matrix product took."""
    matrix = torch.ones(512, 512, dtype=dtype, device=device_type)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)
