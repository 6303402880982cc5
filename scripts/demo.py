"""Show a model in the browser: images, PDFs and clips, a conversation about them, and what the model sees of them.

    python scripts/demo.py                                      http://127.0.0.1:7860, with Nano
    python scripts/demo.py --model MiniMonkey-2B --preset docvqa
    python scripts/demo.py --host 0.0.0.0 --port 8000           for other machines, too

It needs gradio, and pypdfium2 for PDFs: pip install ".[demo]". Without --model, Nano answers.
"""

import argparse
import sys
from pathlib import Path

import transformers

from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    load_model,
    load_processor,
    prepared,
    reports_errors,
    whole_number,
)
from minimonkey.tiling import PRESETS


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.add_argument("--preset", default="default", choices=sorted(PRESETS), help="tiles at first (default)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    parser.add_argument("--port", type=whole_number(1), default=7860)
    parser.add_argument("--at-once", type=whole_number(1), default=2, help="answers made at a time; others wait (2)")
    parser.add_argument(
        "--conversations", type=whole_number(1), default=8, help="whose later turns are fast; others are read anew (8)"
    )
    parser.add_argument("--memory", type=whole_number(1), default=2, help="GB that these may take together (2)")
    return parser.parse_args(arguments)


def make_page(args: argparse.Namespace):
    """Load the model and return the page, not launched yet, with the options to launch it with.

    Raises:
        ValueError: gradio is not installed, or the model cannot be loaded.
    """
    try:
        from minimonkey.scripts.demonstration.page import LAUNCH, build
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("gradio"):
            raise
        raise ValueError('The page needs gradio: pip install ".[demo]"') from error
    from minimonkey.scripts.demonstration.answers import Answerer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = choose_dtype(args.dtype, args.device)
    model = load_model(args.model, subfolder=args.subfolder, dtype=dtype).to(args.device)
    parameters = model.num_parameters() / 10**6
    answerer = Answerer(load_processor(args.model), prepared(model), args.conversations, args.memory * 2**30)
    name = Path(args.subfolder or args.model).name
    subject = f"{name}, {parameters:,.1f} million parameters, on {args.device}. Small models invent text: check it."
    return build(answerer, args.preset, subject, args.at_once), LAUNCH


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    page, options = make_page(args)
    page.launch(server_name=args.host, server_port=args.port, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
