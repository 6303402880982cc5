"""Read documents: files, folders and globs of images, TIFF and PDF, to text or to fields, one line of JSON a page.

    python scripts/read.py assets/example.png assets/receipt.png
    python scripts/read.py scans/ "invoices/*.pdf" --model MiniMonkey-2B --preset docvqa --out pages.jsonl --resume
    python scripts/read.py book.pdf --pages 1-3,10- --dpi 150 --format text --out book/
    python scripts/read.py invoices/ --fields invoice_number,total,date --out invoices.jsonl
    python scripts/read.py invoices/ --schema invoice.json --out invoices.jsonl

Each page is asked --question. Lines are written as they come; a run that was killed goes on with --resume, no page lost, none
twice. A file or page that cannot be read has a line that says why, and the exit status is then 1. docs/reading.md says more.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from minimonkey.scripts.evaluation.predictions import weights_digest
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.reading.batches import Page, ahead, open_pages, plan
from minimonkey.scripts.reading.engines import ENGINES, Question, Weights, count_page_tokens
from minimonkey.scripts.reading.fields import Schema, fields_schema, read_schema
from minimonkey.scripts.reading.journal import open_journal
from minimonkey.scripts.reading.pages import (
    DEFAULT_MAX_PIXELS,
    Settings,
    find_files,
    parse_ranges,
    pixel_limit,
    survey,
)
from minimonkey.scripts.reading.progress import Progress
from minimonkey.scripts.reading.reader import Reader
from minimonkey.scripts.reading.workers import check_ray, spread
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    add_tile_arguments,
    load_processor,
    number_within,
    reports_errors,
    tile_options,
    whole_number,
)


READ_ALL = "Read the text."
READ_FIELDS = "Read these fields and answer in JSON, with null for what is not there: {names}."


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder (with all below it) or glob")
    parser.add_argument("--pages", type=parse_ranges_argument, default=None, help="of each file, e.g. 1-3,7,10-")
    parser.add_argument("--dpi", type=number_within(10, 1200), default=200.0, help="at which PDF is rendered (200)")
    parser.add_argument(
        "--max-pixels", type=whole_number(1), default=DEFAULT_MAX_PIXELS, help="of one page (default: %(default)s)"
    )
    add_model_arguments(parser)
    add_device_argument(parser)
    add_dtype_argument(parser)
    add_tile_arguments(parser)
    parser.add_argument("--use-scm", action="store_true", help="compress the tokens of the detailed tiles")
    parser.add_argument("--scm-keep-ratio", type=number_within(0.01, 1), default=0.5, help="share that stays (0.5)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fields", default=None, help="names with commas between: answers are JSON with these texts")
    what.add_argument("--schema", type=Path, default=None, help="JSON schema of an object that answers must fulfil")
    parser.add_argument(
        "--question", default=None, help=f"asked of every page (default: {READ_ALL!r}, or for the fields)"
    )
    parser.add_argument(
        "--field-question",
        default=None,
        metavar="TEXT",
        help='ask for each of --fields by itself, e.g. "What is the {field}?", which models that write no JSON can answer',
    )
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=1024, help="longest answer (1024)")
    parser.add_argument("--words", action="store_true", help="add each word with its confidence")
    parser.add_argument("--keep-loops", action="store_true", help="do not end answers that repeat themselves")
    parser.add_argument(
        "--retry-preset",
        default=None,
        help="tile ranges with which a page is asked once more whose answer repeated itself",
    )
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument(
        "--ray",
        type=whole_number(1),
        default=None,
        metavar="WORKERS",
        help="so many workers of Ray, see docs/reading.md",
    )
    parser.add_argument(
        "--max-batch-tokens", type=whole_number(1), default=16384, help="of the pages read together, with their answers"
    )
    parser.add_argument(
        "--format", choices=("jsonl", "text"), default="jsonl", help="text: a file of text for each page"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSONL file, or folder of texts (default: printed)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--overwrite", action="store_true", help="begin --out anew")
    args = parser.parse_args(arguments)
    _check(parser, args)
    return args


def parse_ranges_argument(text: str):
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.resume or args.overwrite) and args.out is None:
        parser.error("--resume and --overwrite need --out")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with --out and --overwrite begins it anew; choose one")
    if args.format == "text" and args.out is None:
        parser.error("--format text needs --out, a folder for the texts")
    if args.words and (args.fields or args.schema):
        parser.error("--words belongs to text; fields have their own confidence")
    if args.field_question is not None and (args.fields is None or args.question is not None):
        parser.error("--field-question goes with --fields, and without --question")
    if args.field_question is not None and "{field}" not in args.field_question:
        parser.error("--field-question must say where the name of the field goes: {field}")
    if args.keep_loops and args.retry_preset:
        parser.error("--retry-preset needs answers that were ended; leave out --keep-loops")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty")


def question_of(args: argparse.Namespace) -> Question:
    """Return what pages are asked.

    Raises:
        ValueError: A schema that cannot be.
    """
    schema = None
    if args.fields is not None:
        schema = None if args.field_question else fields_schema(names_of(args))
    elif args.schema is not None:
        schema = read_schema(args.schema)
    default = READ_ALL
    if schema is not None:
        Schema(schema)
        default = READ_FIELDS.format(names=", ".join(schema.get("properties", {})))
    return Question(
        args.question or default,
        args.max_new_tokens,
        tile_options(args),
        schema,
        stop_repetition=not args.keep_loops,
        scm_keep_ratio=args.scm_keep_ratio if args.use_scm else None,
    )


def names_of(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in args.fields.split(",")]


def field_questions(args: argparse.Namespace) -> dict[str, str] | None:
    """Return the question for each field; None: they are asked for together, if at all."""
    if args.field_question is None:
        return None
    properties = fields_schema(names_of(args))["properties"]
    return {name: args.field_question.replace("{field}", name.replace("_", " ")) for name in properties}


def settings_of(args: argparse.Namespace, question: Question) -> dict[str, Any]:
    """Return what decides the answers, for --resume."""
    names = ("model", "subfolder", "engine", "dtype", "dpi", "max_pixels", "words", "retry_preset", "format")
    return {name: getattr(args, name) for name in names} | {
        "question": vars(question),
        "field_questions": field_questions(args),
        "pages": args.pages,
        "weights": weights_digest(args.model, args.subfolder),
    }


def retry_options(args: argparse.Namespace) -> dict[str, Any] | None:
    return None if args.retry_preset is None else {"preset": args.retry_preset}


def questions_of(args: argparse.Namespace, question: Question) -> list[Question]:
    """Return all that a page may be asked: for its fields, and once more with other tiles."""
    texts = (field_questions(args) or {"": question.text}).values()
    tiles = [one for one in (question.images_kwargs, retry_options(args)) if one is not None]
    return [replace(question, text=text, images_kwargs=one) for text in texts for one in tiles]


def load_reader(args: argparse.Namespace, question: Question) -> Reader:
    weights = Weights(args.model, args.subfolder, args.device, args.dtype)
    engine = ENGINES[args.engine](weights, questions_of(args, question))
    return Reader(engine, question, field_questions(args), retry_options(args), args.words)


def read_batches(args: argparse.Namespace, question: Question, batches: Iterator[list[Page]]) -> Iterator[list[dict]]:
    """Yield the lines of batch after batch, here or by the workers of Ray."""
    settings = Settings(args.pages, args.dpi, args.max_pixels)
    load = partial(load_reader, args, question)
    if args.ray is not None:
        yield from spread(batches, settings, load, args.ray)
        return
    reader = load()
    for pages in ahead(open_pages(batch, settings) for batch in batches):  # opened while the last are read
        yield reader.read(pages)


def read(args: argparse.Namespace) -> int:
    """Read all pages that are not done; return how many files and pages could not be read."""
    question = question_of(args)
    if args.ray is not None:
        check_ray()
    processor = load_processor(args.model)
    for options in (question.images_kwargs, retry_options(args) or {}):
        processor.image_processor.get_number_of_image_patches(100, 100, options)
    paths, settings = find_files(args.inputs), Settings(args.pages, args.dpi, args.max_pixels)
    with (
        open_journal(
            args.out, settings_of(args, question), args.resume, args.overwrite, args.format == "text"
        ) as journal,
        pixel_limit(args.max_pixels),
    ):
        documents = list(survey(paths, settings))
        keys = [(one.path, page) for one in documents for page in (one.pages if one.error is None else [None])]
        progress = Progress(sum(key not in journal.done for key in keys))
        if progress.total < len(keys):
            print(f"{len(keys) - progress.total} of {len(keys)} pages are done already.", file=sys.stderr)
        if progress.total:
            cost = partial(count_page_tokens, processor, question=question)
            batches = plan(documents, journal.done, settings, cost, args.max_batch_tokens)
            for lines in read_batches(args, question, batches):
                journal.add(lines)
                progress.add(len(lines), sum("error" in line for line in lines))
        progress.close()
        return journal.errors


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return int(read(parse_arguments(arguments)) > 0)


if __name__ == "__main__":
    sys.exit(main())
