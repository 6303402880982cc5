"""Synthetic documents with questions: endless, deterministic, made on demand.

    python scripts/synthetic/documents.py sheet.png --kind receipt --split held_out

`document(kind, i, seed)` depends on nothing but its arguments. Images are a few 112 px tiles wide with text of 12 to 24
px, so that a model of small tiles needs several of them. Words and fonts come from one side of the split of materials.py;
the fixed words of receipts and forms are the same on both. All text is printable ASCII but for the accents of `layout`.
"""

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as for the scripts in the folder above

from minimonkey.scripts.repository import reports_errors
from minimonkey.scripts.synthetic.bills import bill
from minimonkey.scripts.synthetic.canvas import Document, Question
from minimonkey.scripts.synthetic.charts import chart
from minimonkey.scripts.synthetic.forms import form
from minimonkey.scripts.synthetic.layouts import layout
from minimonkey.scripts.synthetic.pages import line, page, word
from minimonkey.scripts.synthetic.receipts import receipt
from minimonkey.scripts.synthetic.scenes import scene
from minimonkey.scripts.synthetic.seams import seam
from minimonkey.scripts.synthetic.sheet import sheet
from minimonkey.scripts.synthetic.skills import count, find, shape, views
from minimonkey.scripts.synthetic.tables import table


__all__ = ["KINDS", "SPLITS", "Document", "Question", "document"]

SPLITS = ("training", "held_out")
KINDS: dict[str, Callable[[random.Random, str, float], Document]] = {
    "word": word,
    "line": line,
    "page": page,
    "receipt": receipt,
    "form": form,
    "table": table,
    "chart": chart,
    "scene": scene,
    "seam": seam,
    "bill": bill,
    "layout": layout,
    "find": find,
    "count": count,
    "shape": shape,
    "views": views,
}


def document(kind: str, index: int, seed: int, split: str = "training", difficulty: float = 1.0) -> Document:
    """Make document `index` of an endless series.

    Args:
        kind: One of KINDS.
        index, seed: Any integers; the same integers give the same document.
        split: Whose words and fonts: "training" or "held_out".
        difficulty: From 0 (short, large and clean) to 1 (long, small and damaged).

    Raises:
        ValueError: An unknown kind or split, or a difficulty outside 0 to 1.
        FileNotFoundError: Words or fonts are missing, with the packages to install.
    """
    if kind not in KINDS:
        raise ValueError(f"There are no documents of kind {kind!r}; known are {', '.join(KINDS)}.")
    if split not in SPLITS:
        raise ValueError(f"split is 'training' or 'held_out', got {split!r}.")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is from 0 to 1, got {difficulty!r}.")
    return KINDS[kind](random.Random(f"{seed}/{split}/{kind}/{index}"), split, difficulty)


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a sheet of documents with their questions, to look at.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="page")
    parser.add_argument("--split", choices=SPLITS, default="training")
    parser.add_argument("--difficulty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--columns", type=int, default=4)
    args = parser.parse_args(arguments)
    if args.items < 1 or args.columns < 1:
        parser.error("--items and --columns must be at least 1")
    items = [document(args.kind, i, args.seed, args.split, args.difficulty) for i in range(args.items)]
    captions = [[f"{asked.text} -> {asked.answer!r}" for asked in item.questions] for item in items]
    sheet([(item.image, texts) for item, texts in zip(items, captions)], args.columns).save(args.out)


if __name__ == "__main__":
    sys.exit(main())
