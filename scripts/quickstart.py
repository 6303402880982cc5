"""Let the Nano of this repository answer a few questions about the images in assets/: what works after set-up.

    python scripts/quickstart.py
    python scripts/quickstart.py --model MiniMonkey-2B

One model and one way to ask for all of them: a page of text, a receipt, a word.
"""

import argparse
import sys

import transformers

from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.repository import (
    ROOT,
    add_device_argument,
    add_model_arguments,
    load_model,
    load_processor,
    prepared,
    reports_errors,
)


QUESTIONS = (
    ("page.png", "Read all the text."),
    ("receipt.png", "What is the total?"),
    ("receipt.png", "Read the date."),
    ("example.png", "Read the text."),
)
MOST_NEW_TOKENS = 256


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_device_argument(parser)
    add_dtype_argument(parser)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    processor = load_processor(args.model)
    dtype = choose_dtype(args.dtype, args.device)
    model = prepared(load_model(args.model, subfolder=args.subfolder, dtype=dtype).to(args.device))
    for name, question in QUESTIONS:
        answer = model.chat(processor, ROOT / "assets" / name, question, max_new_tokens=MOST_NEW_TOKENS)
        print(f"assets/{name}  {question}", *(f"    {line}" for line in answer.splitlines()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
