"""Cut lines and blocks of lines out of PDF documents into a benchmark, with the text layer as truth.

    python scripts/crop_documents.py manuals/*.pdf --items 200 --lines 1 1 --out runs/manuals-lines
    python scripts/evaluate.py --benchmark runs/manuals-lines/benchmark.jsonl --metric anls --preset default

Writes images/ and benchmark.jsonl (see evaluation/suites.py). Training cuts such crops itself, see training/data.py. Needs the
`pdf` extra.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from minimonkey.scripts.importing.folder import check_free
from minimonkey.scripts.repository import number_within, reports_errors, whole_number
from minimonkey.scripts.synthetic.typeset import typeset


QUESTION = "Read all the text in the image."


def write(
    paths: list[Path], out: Path, items: int, lines: tuple[int, int] = (1, 6), difficulty: float = 0.0, seed: int = 0
) -> None:
    """Write images and benchmark.jsonl into a new folder.

    Raises:
        ValueError: The folder exists, a document cannot be opened, or none holds so many lines of plain text.
    """
    check_free(out)
    lines_of_benchmark = []
    for number in range(items):
        document = typeset(paths, random.Random(f"{seed}/{number}"), lines, difficulty)
        name = f"images/{number:05}.png"
        (out / "images").mkdir(parents=True, exist_ok=True)
        document.image.save(out / name)
        answer = document.questions[0].answer
        lines_of_benchmark.append({"id": str(number), "image": name, "question": QUESTION, "answers": [answer]})
    text = "".join(json.dumps(line) + "\n" for line in lines_of_benchmark)
    (out / "benchmark.jsonl").write_text(text, encoding="utf-8")


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    """Cut as the command line says, or `arguments` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+", metavar="PDF")
    parser.add_argument("--items", type=whole_number(1), default=200, help="how many crops")
    parser.add_argument(
        "--lines", type=whole_number(1), nargs=2, default=(1, 6), metavar=("FEWEST", "MOST"), help="lines of a crop"
    )
    parser.add_argument(
        "--difficulty", type=number_within(0, 1), default=0.0, help="blur, noise, JPEG artefacts: 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(arguments)
    if args.lines[0] > args.lines[1]:
        raise ValueError(f"--lines takes the fewest and the most, got {args.lines[0]} and {args.lines[1]}.")
    write(args.documents, args.out, args.items, tuple(args.lines), args.difficulty, args.seed)
    print(f"Wrote {args.items} crops to {args.out}.")


if __name__ == "__main__":
    sys.exit(main())
