"""Plain llama.cpp: answers of llama.cpp by itself, with one grid of tiles, beside those with MSAC, on rendered documents.

All have the same language model in a GGUF file of 16 bits; only the tiles differ, and with --use-scm their tokens.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from minimonkey.conversation import IMAGE_PLACEHOLDER
from minimonkey.scripts.benchmarking.measure import report
from minimonkey.scripts.evaluation.intervals import mean_interval, paired_difference
from minimonkey.scripts.evaluation.metrics import METRICS
from minimonkey.scripts.evaluation.suites import SYNTHETIC, synthetic_suite
from minimonkey.scripts.repository import (
    add_model_arguments,
    add_tile_arguments,
    load_processor,
    tile_options,
    whole_number,
)


MEDIA = "<__media__>"  # where llama.cpp puts an image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--suite", choices=SYNTHETIC, default="receipt", help="what to render")
    parser.add_argument("--items", type=whole_number(1), default=50)
    parser.add_argument("--seed", type=int, default=0)
    add_tile_arguments(parser)
    parser.add_argument("--use-scm", action="store_true", help="also with scale compression")
    parser.add_argument("--threads", type=whole_number(1), default=None, help="by default torch's")


def run(args: argparse.Namespace) -> None:
    report("plain", rows(args), torch.device("cpu"), args)


def rows(args: argparse.Namespace) -> list[dict]:
    from minimonkey.scripts.engines.libllama import LibLlama
    from minimonkey.scripts.engines.llama_cpp import load_llama_cpp
    from minimonkey.scripts.engines.mtmd import PlainLlamaCpp
    from minimonkey.scripts.export_gguf import export_gguf

    threads = args.threads or torch.get_num_threads()
    suite = synthetic_suite(args.suite, args.items, args.seed)
    processor = load_processor(args.model)
    with tempfile.TemporaryDirectory() as folder:
        language, mmproj = Path(folder, "language.gguf"), Path(folder, "mmproj.gguf")
        export_gguf(args.model, language, "F16", mmproj, args.subfolder)
        ours = load_llama_cpp(
            args.model, language, torch.float32, args.subfolder, use_scm=args.use_scm, threads=threads
        )
        alone = PlainLlamaCpp(LibLlama(language, ours.engine.context_length, threads), mmproj, threads)
        end_ids = torch.atleast_1d(torch.as_tensor(ours.generation_config.eos_token_id)).tolist()

        def with_msac(item, use_scm: bool = False) -> str:
            options = {"max_new_tokens": suite.max_new_tokens, "images_kwargs": tile_options(args)}
            return ours.chat(processor, item.images, item.question, use_scm=use_scm, **options)

        def plain(item) -> str:
            content = [{"type": "image"}, {"type": "text", "text": f"\n{item.question}"}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            prompt = prompt.removeprefix(processor.tokenizer.bos_token or "").replace(IMAGE_PLACEHOLDER, MEDIA)
            ids = alone.answer(item.images[0], prompt, end_ids, suite.max_new_tokens)
            return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

        ways = {"llama.cpp by itself": plain, "MSAC, llama.cpp as engine": with_msac}
        if args.use_scm:
            ways["MSAC and SCM, llama.cpp as engine"] = lambda item: with_msac(item, use_scm=True)
        items = [suite.item(index) for index in range(len(suite))]
        scores = {
            name: [METRICS[item.metric](answer(item), item.answers) for item in items] for name, answer in ways.items()
        }
    base = next(iter(scores.values()))
    return [
        {
            "way": name,
            items[0].metric: sum(values) / len(values),
            "95%": "{:.3f} to {:.3f}".format(*mean_interval(values)),
            "against the first": "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired_difference(base, values)),
        }
        for name, values in scores.items()
    ]
