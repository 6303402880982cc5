"""Score predictions as a benchmark's authors do, or write the file that its server takes.

    python scripts/evaluate.py --benchmark data/drivelm/drivelm-eval.jsonl --preset multi_view --out drivelm.jsonl
    python scripts/score.py drivelm data/drivelm/drivelm-eval.jsonl drivelm.jsonl
    python scripts/score.py docvqa data/docvqa/docvqa.jsonl predictions.jsonl --submission submission.json

Benchmarks come from `minimonkey prepare`, predictions from `minimonkey evaluate --out`. Prints a table and one JSON line.
Captions (drivelm, bdd) need `pip install pycocoevalcap`. The part of DriveLM's score that a large language model judges is left
out, and the final score given as a range: a judge is a function, see evaluation/drivelm.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from minimonkey.scripts.evaluation import domains
from minimonkey.scripts.evaluation.drivelm import items_of, score_drivelm
from minimonkey.scripts.evaluation.intervals import mean_interval
from minimonkey.scripts.evaluation.predictions import read_predictions
from minimonkey.scripts.evaluation.submissions import SUBMISSIONS
from minimonkey.scripts.preparing.benchmarks import BENCHMARKS
from minimonkey.scripts.repository import reports_errors


def score_items(rows: domains.Rows) -> dict[str, float]:
    """Return the mean of the items' own scores with its 95% interval, over all and for each category."""
    groups = {"all": [*rows]}
    for row in rows:
        if "category" in row:
            groups.setdefault(row["category"], []).append(row)
    result: dict[str, float] = {}
    for name, chosen in groups.items():
        scores = [row["score"] for row in chosen]
        low, high = mean_interval(scores)
        result |= {
            name: sum(scores) / len(scores),
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_items": len(scores),
        }
    return result


SCORERS: dict[str, Callable[[domains.Rows], dict]] = {
    "bdd": domains.score_bdd,
    "rsvqa": domains.score_rsvqa,
    "dior-rsvg": domains.score_grounding,
    "medical": domains.score_medical,
    **dict.fromkeys(BENCHMARKS, score_items),
    "mme": domains.score_mme,
    "hallusionbench": domains.score_hallusionbench,
    "pope": domains.score_pope,
    "mmbench": domains.score_mmbench,
    "scenes": score_items,
}
SERVER_ONLY = ("mmvet",)  # scored by a large language model of its authors


def read_items(path: Path) -> dict[str, dict]:
    """Read the items of a benchmark by id.

    Raises:
        ValueError: There is no such file, or a line that is none.
    """
    if not path.is_file():
        raise ValueError(f"There is no benchmark {path}; minimonkey prepare writes one.")
    items = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(text)
            items[str(item["id"])] = item
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no item of a benchmark ({error}).") from error
    return items


def check_whole(items: dict[str, dict], predictions: dict[str, dict]) -> None:
    """Raise `ValueError` unless there is a prediction for each item, and none besides."""
    missing, others = items.keys() - predictions.keys(), predictions.keys() - items.keys()
    if missing or others or not items:
        raise ValueError(
            f"Of {len(items)} items {len(missing)} have no prediction ({', '.join(sorted(missing)[:3])}), and {len(others)} "
            "predictions are for none; go on with evaluate --resume, or take the benchmark that was asked."
        )


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Score or submit what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("drivelm", *SCORERS)
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("benchmark", type=Path, help="JSONL file of minimonkey prepare")
    parser.add_argument("predictions", type=Path, help="JSONL file of minimonkey evaluate --out")
    parser.add_argument("--submission", type=Path, default=None, help="write this file for the server instead")
    args = parser.parse_args(arguments)
    if args.submission is not None and args.name not in SUBMISSIONS:
        parser.error(f"--submission is for {', '.join(SUBMISSIONS)}")
    if args.submission is None and args.name in SERVER_ONLY:
        parser.error(f"{args.name} is scored by its server; give --submission FILE")
    items, predictions = read_items(args.benchmark), read_predictions(args.predictions)
    check_whole(items, predictions)
    if args.submission is not None:
        content = SUBMISSIONS[args.name](items, predictions)
        args.submission.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"Wrote {args.submission}.")
        return 0
    if args.name == "drivelm":
        result = score_drivelm(items_of(items, predictions))
    else:
        rows = [item | {key: predictions[name][key] for key in ("answer", "score")} for name, item in items.items()]
        result = SCORERS[args.name](rows)
    for name, value in result.items():
        if not name.endswith(("_low", "_high", "_items")) or f"{name.rpartition('_')[0]}" not in result:
            interval = (
                f"  ({result[f'{name}_low']:.4f} to {result[f'{name}_high']:.4f})" if f"{name}_low" in result else ""
            )
            print(f"{name:<28}{value:10.4f}{interval}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
