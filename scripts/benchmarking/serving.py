"""Many images: one by one, in batches, and in vLLM (in its environment: make benchmark-vllm).

Rendered receipts, other ones in every round, so that no cache knows them; every answer has the same number of tokens. The ways
take turns, so their ratio holds on a machine that does other things too; so do the seconds that its processors spent. With
another --size than Nano weights are random and both towers have --layers layers.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.scripts.benchmarking.measure import report
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model
from minimonkey.scripts.repository import ROOT, load_model, load_processor, whole_number


QUESTION = "Read the text."
WARM_UP_IMAGES = 4
Times = tuple[float, float]  # seconds, and those of all processors
STAGES = ("vision", "prompts", "answers")  # of transformers; the rest is cutting images, choosing tokens, and Python


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=whole_number(1), default=64, help="in a round")
    parser.add_argument("--batch", type=whole_number(1), default=16, help="images in a batch of batch_chat")
    parser.add_argument("--new-tokens", type=whole_number(1), default=32, help="of every answer")
    parser.add_argument("--preset", default="default", help="tile ranges")
    parser.add_argument("--size", default="Nano", choices=("Nano", *SIZES), help="dimensions; Nano has its own weights")
    parser.add_argument("--layers", type=whole_number(1), default=2, help="of both towers of another size than Nano")
    parser.add_argument("--threads", type=whole_number(1), default=None, help="of a processor (default: all)")
    parser.add_argument("--repeats", type=whole_number(1), default=1, help="rounds after a warm-up")
    parser.add_argument("--without-vllm", action="store_true", help="measure transformers alone")


def run(args: argparse.Namespace) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
        os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    rounds = [receipts(WARM_UP_IMAGES, 0), *(receipts(args.images, seed + 1) for seed in range(args.repeats))]
    with tempfile.TemporaryDirectory() as folder:
        model = ROOT if args.size == "Nano" else write_random_model(args.size, args.layers, Path(folder))
        spent: dict[str, float] = {}
        ways = {name: in_rounds(way, rounds) for name, way in transformers_ways(model, args, spent).items()}
        with ExitStack() as stack:
            if not args.without_vllm:
                ways["vllm"] = stack.enter_context(in_process(vllm_way, model, args, rounds))
            times, stages = in_turns(ways, spent, args.repeats)
    first, first_cpu = times["one by one"]
    rows = [
        {
            "way": name,
            "seconds": wall,
            "images/s": args.images / wall,
            "times": first / wall,
            "CPU s": cpu,
            "images/CPU s": args.images / cpu,
            "times in CPU s": first_cpu / cpu,
            **{f"{stage} CPU s": stages[name].get(stage) for stage in STAGES},
        }
        for name, (wall, cpu) in times.items()
    ]
    report("serving", rows, torch.device("cpu"), args)


def write_random_model(size: str, layers: int, folder: Path) -> Path:
    """Write a model of a published size with random weights and few layers, with Nano's tokenizer; return the folder."""
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)  # which saves its code too
    config = random_config(size, layers)
    fields = {**config.to_dict(), "image_token_id": processor.image_token_id}
    fields["vision_config"] = {**config.vision_config.to_dict(), "num_hidden_layers": layers}
    config = MiniMonkeyConfig(**fields)
    random_model(config, torch.device("cpu"), torch.float32).save_pretrained(folder)
    processor.image_processor.size = {"height": config.tile_size, "width": config.tile_size}
    processor.image_seq_length = config.image_seq_length
    processor.save_pretrained(folder)
    return folder


def receipts(count: int, seed: int) -> list[Image.Image]:
    """Draw receipts, the same ones for a seed."""
    from minimonkey.scripts.synthetic.documents import document

    return [document("receipt", index, seed).image for index in range(count)]


def count_cpu(module: torch.nn.Module, spent: dict[str, float], name: str) -> None:
    """Add what a module's `forward` costs in seconds of all processors to `spent`, apart for prompts and answers."""
    started = []

    def begin(*_) -> None:
        started.append(time.process_time())

    def end(module, args, kwargs, output) -> None:
        stage = name
        if name == "language":
            stage = "answers" if output.last_hidden_state.shape[1] == 1 else "prompts"
        spent[stage] = spent.get(stage, 0.0) + time.process_time() - started.pop()

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, with_kwargs=True)


def in_turns(ways: dict[str, Callable[[], Times]], spent: dict[str, float], repeats: int):
    """Return the median (seconds, CPU seconds) of each way after a warm-up, all run in turns, and what its last run `spent`."""
    times: dict[str, list[Times]] = {name: [] for name in ways}
    stages = {}
    for number in range(repeats + 1):
        for name, way in ways.items():
            spent.clear()
            measured = way()
            stages[name] = dict(spent)
            if number:
                times[name].append(measured)
    return {name: tuple(map(statistics.median, zip(*values))) for name, values in times.items()}, stages


def in_rounds(way: Callable[[list], None], rounds: list[list]) -> Callable[[], Times]:
    """Return a function that treats the images of the next round at each call and returns the seconds it took."""
    remaining = iter(rounds)

    def timed() -> Times:
        images, start = next(remaining), (time.perf_counter(), time.process_time())
        way(images)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    return timed


@contextmanager
def in_process(make: Callable[..., Callable[[list], None]], folder: Path, args: argparse.Namespace, rounds: list[list]):
    """Make a way in a process of its own, since vLLM changes transformers' classes in its; yield it `in_rounds`."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, make, folder, args, rounds))
    process.start()
    theirs.close()

    def ask() -> Times:
        ours.send("next")
        return ours.recv()

    try:
        if (problem := ours.recv()) is not None:
            raise ValueError(problem)
        yield ask
    finally:
        ours.close()
        process.join()


def _serve(connection, make, folder: Path, args: argparse.Namespace, rounds: list[list]) -> None:
    try:
        way = in_rounds(make(folder, args), rounds)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send(None)
    with suppress(EOFError):  # when there are no more rounds
        while connection.recv():
            connection.send(way())


def transformers_ways(
    folder: Path, args: argparse.Namespace, spent: dict[str, float]
) -> dict[str, Callable[[list], None]]:
    """Return how transformers answers, with `chat` and with `batch_chat`, in float32; `spent` is what `count_cpu` adds to."""
    model, processor = load_model(folder, dtype=torch.float32), load_processor(folder)
    watched = ("vision", model.model.vision_tower), ("language", model.model.language_model)
    for name, module in watched:
        count_cpu(module, spent, name)
    options = {
        "images_kwargs": {"preset": args.preset},
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
        "do_sample": False,
    }

    def one_by_one(images: list) -> None:
        for image in images:
            model.chat(processor, image, QUESTION, **options)

    def in_batches(images: list) -> None:
        for start in range(0, len(images), args.batch):
            batch = images[start : start + args.batch]
            model.batch_chat(processor, batch, [QUESTION] * len(batch), **options)

    return {"one by one": one_by_one, f"batches of {args.batch}": in_batches}


def vllm_way(folder: Path, args: argparse.Namespace) -> Callable[[list], None]:
    """Return how vLLM answers: all images at once, in float32.

    Raises:
        ValueError: vLLM is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # whose seconds are to be counted
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError(f"vLLM cannot be imported ({error}); pass --without-vllm, or make benchmark-vllm.") from error
    engine = LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096 if args.size == "Nano" else 8192,
        max_num_batched_tokens=8192,
        limit_mm_per_prompt={"image": 1},
        kv_cache_memory_bytes=2**29,
        gpu_memory_utilization=0.3,
        mm_processor_kwargs={"preset": args.preset},
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True, detokenize=False)

    def at_once(images: list) -> None:
        asked = {"type": "text", "text": QUESTION}
        contents = [[{"type": "image_pil", "image_pil": image}, asked] for image in images]
        engine.chat([[{"role": "user", "content": content}] for content in contents], sampling, use_tqdm=False)

    return at_once
