"""How this project measures: interleaved runs, medians, ratios to a baseline of the same run, peak memory.

Machines are shared, so two ways are never timed one after the other but in turns, and their ratio is what counts.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(functions: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median seconds of each function, after one warm-up each, all run in turns."""
    return {name: wall for name, (wall, _) in median_times(functions, device, repeats).items()}


def median_times(functions: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median seconds of each function, and those that all processors spent on it in this process.

    The second tell what a function costs where other programs take the processors from it.
    """
    times = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter(), time.process_time()
            function()
            synchronize(device)
            if number:
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: tuple(map(statistics.median, zip(*values))) for name, values in times.items()}


def peak_extra_bytes(function: Callable, device: torch.device) -> int | None:
    """Return the most memory a function held beyond what was held before it; None where the system does not tell.

    On a GPU it is what PyTorch's allocator counts; on the CPU, resident memory as Linux counts it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not be counted as held
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """Return the resident memory of this process as Linux counts it: VmRSS now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on the device, what the system holds for files among them where it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    information = Path("/proc/meminfo")
    lines = information.read_text().splitlines() if information.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    if available:
        return available[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe the machine that was measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(name: str, rows: list[dict], device: torch.device, args: argparse.Namespace) -> None:
    """Print one table for people and one JSON line for machines."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    print(json.dumps({"benchmark": name, **machine(device), "settings": settings, "rows": rows}, default=str))


def megabytes(size: int | None) -> int | None:
    """Convert bytes to MiB, rounded."""
    return None if size is None else round(size / 2**20)


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
