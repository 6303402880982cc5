"""Batches of pages on many machines, by Ray Data: each worker loads the model once, and one that dies is replaced.

    for lines in spread(batches, settings, load_reader, workers=4):
        journal.add(lines)

The batches go out as names of files and pages, so that the workers must see the files under the same paths. The lines come back
to one process, which alone writes them: whatever is read a second time after a worker died, its lines come once.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minimonkey.scripts.reading.batches import Page, open_pages
from minimonkey.scripts.reading.pages import Settings, pixel_limit
from minimonkey.scripts.reading.reader import Reader


MOST_BLOCKS = 10_000
LEAST_CPUS = 4  # with 2, Ray Data waits for ever
# For a cluster that no other machine joins: without it Ray listens on all addresses. On other systems
# than Linux this is Ray's default; --node-ip-address 127.0.0.1 does not do it. Ray looks as it is imported.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def check_ray() -> None:
    """Raise `ValueError` if Ray Data is not installed."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
        raise ValueError('--ray needs Ray Data: pip install "ray[data]"')


class _Worker:
    """Reads batches in a process of its own."""

    def __init__(self, load: Callable[[], Reader], settings: Settings):
        self.reader, self.settings = load(), settings

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        batch = [Page(**page) for page in json.loads(row["batch"])]
        with pixel_limit(self.settings.max_pixels):
            return {"lines": json.dumps(self.reader.read(open_pages(batch, self.settings)))}


def spread(
    batches: Iterator[list[Page]], settings: Settings, load: Callable[[], Reader], workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of batches as workers finish them, in any order.

    Joins the cluster that the environment names (RAY_ADDRESS), or starts one on this machine, which listens on 127.0.0.1 alone.
    Each worker has a GPU where the cluster has some.

    Args:
        load: Makes what a worker reads with; it is pickled.
    """
    rows = [{"batch": json.dumps([asdict(page) for page in batch])} for batch in batches]
    if not rows:
        return
    if not os.environ.get("RAY_ADDRESS"):
        os.environ |= LOOPBACK
    import ray
    import ray.data

    is_own = not ray.is_initialized()
    if is_own:
        scripts = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([scripts, *filter(None, [os.environ.get("PYTHONPATH")])])
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "log_to_driver": False}
        if not os.environ.get("RAY_ADDRESS"):
            # "local", since Ray would join the last cluster that was started here, though it may have ended.
            cpus = max(LEAST_CPUS, workers + 2, os.cpu_count() or 1)
            options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        ray.init(**options)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0 and torch.cuda.is_available()
        done = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS)).map(
            _Worker,
            fn_constructor_args=(load, settings),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if has_gpus else 0,
        )
        for row in done.iter_rows():
            yield json.loads(row["lines"])
    finally:
        if is_own:
            ray.shutdown()
