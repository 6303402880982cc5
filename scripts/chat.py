"""Ask a model about images and videos, in one question or in a conversation.

    python scripts/chat.py assets/example.png "Read the text."
    python scripts/chat.py page-1.png page-2.png "Compare them." --model MiniMonkey-2B --preset docvqa
    python scripts/chat.py receipt.jpg                     no question: a conversation, with history
    python scripts/chat.py page.png "What is it?" --model MiniMonkey-2B --quantize auto --offload-vision    little memory
    python scripts/chat.py clip.mp4 "What happens?" --num-frames 8
    python scripts/chat.py page.png "Read the text." --engine llama.cpp --gguf nano-q8.gguf      see docs/llamacpp.md

The answer is printed as it is made; later questions of a conversation cost only what is new. In a conversation,
`/add page-2.png` shows another image or video. Without --model, MiniMonkey-Nano of this repository answers.
"""

import argparse
import sys
from pathlib import Path

import transformers

from minimonkey.quantized_weights import PRESETS, QuantizedWeightsConfig
from minimonkey.scripts.engines.options import add_engine_arguments, check_engine_arguments, load_engine
from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.quantize import load_quantized, storage_that_fits
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    add_tile_arguments,
    load_model,
    load_processor,
    number_within,
    prepared,
    reports_errors,
    tile_options,
    whole_number,
)


PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"}


def is_video(text: str) -> bool:
    """Tell whether a command-line argument names a video."""
    return Path(text[:255]).suffix.lower() in VIDEO_SUFFIXES


def is_medium(text: str) -> bool:
    """Tell whether a command-line argument names an image or a video rather than being the question."""
    return (
        text.startswith(("http://", "https://", "data:image/"))
        or Path(text[:255]).suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES
        or Path(text[:255]).is_file()
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="FILE ... QUESTION", help="pictures and videos, then the question")
    add_model_arguments(parser)
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.add_argument(
        "--quantize",
        default=None,
        choices=("auto", *PRESETS),
        help="store weights so; auto: as the free memory asks for",
    )
    parser.add_argument("--offload-vision", action="store_true", help="free the vision tower while answers are made")
    parser.add_argument("--prefill-chunk", type=whole_number(1), default=None, help="tokens of a prompt read at a time")
    parser.add_argument("--attn-implementation", default=None, help="sdpa, eager or flash_attention_2")
    add_tile_arguments(parser)
    parser.add_argument("--tile-budget", type=whole_number(1), default=None, help="most tiles of all pictures together")
    parser.add_argument("--num-frames", type=whole_number(1), default=8, help="of each video")
    parser.add_argument("--use-scm", action="store_true", help="compress the tokens of the pictures' detailed tiles")
    parser.add_argument("--scm-keep-ratio", type=float, default=None, help="share of them that stays (with --use-scm)")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=512)
    parser.add_argument("--temperature", type=number_within(0, 1000), default=0.0, help="above 0: sample")
    add_engine_arguments(parser)
    parser.add_argument("--interactive", action="store_true", help="go on asking after the first question")
    args = parser.parse_args(arguments)
    if args.engine != "torch" and (args.quantize or args.offload_vision or args.prefill_chunk):
        parser.error("--quantize, --offload-vision and --prefill-chunk go with --engine torch")
    if "/" in (args.attn_implementation or ""):
        parser.error("--attn-implementation takes what is installed; code from the Hub is not run")
    check_engine_arguments(parser, args)
    has_question = bool(args.inputs) and not is_medium(args.inputs[-1])
    args.question = args.inputs[-1] if has_question else None
    args.media = args.inputs[:-1] if has_question else args.inputs
    wrong = [text for text in args.media if not is_medium(text)]
    if wrong:
        parser.error(
            f"neither a picture nor a video: {', '.join(wrong)} (put a question of several words in quotes, behind them)"
        )
    return args


def load(args: argparse.Namespace):
    processor = load_processor(args.model)
    options = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    options |= {"subfolder": args.subfolder, "dtype": choose_dtype(args.dtype, args.device)}
    if args.engine != "torch":
        return processor, load_engine(args, options["dtype"])
    preset = args.quantize
    if preset == "auto":
        preset = storage_that_fits(args.model, args.subfolder, options["dtype"])
    if preset is None:
        model = load_model(args.model, **options)
    else:
        model = load_quantized(args.model, QuantizedWeightsConfig(preset), **options)
    model = model.to(args.device)
    if args.offload_vision:
        model.offload_vision()
    model = prepared(model)
    if args.attn_implementation:  # "sdpa" too, which looks like the default
        model.set_attn_implementation(args.attn_implementation)
    return processor, model


def ask(processor, model, args: argparse.Namespace, question: str, history: list | None) -> list:
    """Print the answer while it is made; return the history with this turn."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    if args.prefill_chunk is not None:
        sampling["prefill_chunk_size"] = args.prefill_chunk
    images = [medium for medium in args.media if not is_video(medium)]
    answer = model.chat(
        processor,
        images or None,
        question,
        history=history,
        videos=[medium for medium in args.media if is_video(medium)] or None,
        videos_kwargs={"num_frames": args.num_frames},
        stream=True,
        images_kwargs=tile_options(args),
        tile_budget=args.tile_budget if images else None,
        use_scm=args.use_scm,
        scm_keep_ratio=args.scm_keep_ratio,
        max_new_tokens=args.max_new_tokens,
        **sampling,
    )
    for text in answer:
        print(text, end="", flush=True)
    print()
    return answer.history


def add_medium(args: argparse.Namespace, command: str) -> None:
    """Obey `/add FILE`: show another image or video from the next question on."""
    name = command.removeprefix("/add").strip()
    if not command.startswith("/add ") or not name:
        print("error: the only command is /add FILE", file=sys.stderr)
    elif name.startswith(("http://", "https://")) or Path(name).is_file():
        args.media = [*args.media, name]
    else:
        print(f"error: there is no file {name}", file=sys.stderr)


def converse(processor, model, args: argparse.Namespace) -> None:
    """Answer question after question until an empty line or the end of input."""
    history = ask(processor, model, args, args.question, None) if args.question else None
    shown = args.media
    print("An empty line ends the conversation, /add FILE shows another picture or video.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        if question.startswith("/"):
            add_medium(args, question)
            continue
        try:
            history = ask(processor, model, args, question, history)
            shown = args.media
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            args.media = shown  # what was added since the last answer may be the cause


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args = parse_arguments(arguments)
    processor, model = load(args)
    if args.question and not args.interactive:
        ask(processor, model, args, args.question, None)
    else:
        converse(processor, model, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
