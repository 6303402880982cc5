"""How well a model reads: words it never saw, in fonts it never saw.

    python scripts/evaluate.py --items 1000
    python scripts/evaluate.py --model MiniMonkey-2B --items 200 --out predictions.jsonl

Prints the share of words read exactly (case counts) with its 95% interval and the character error rate, and one JSON line.
Items are rendered on the spot from words and fonts that training leaves out; see synthetic/text_images.py for the Debian
packages they come from.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from repository import ROOT
from transformers import AutoModel, AutoProcessor

from synthetic.text_images import held_out_word


QUESTION = "Read the text."


def edit_distance(first: str, second: str) -> int:
    """Least number of insertions, deletions and substitutions between two strings (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def wilson_interval(successes: int, items: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson's score interval)."""
    share, spread = successes / items, z * z / items
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / items + spread / (4 * items)) / (1 + spread)
    return centre - half, centre + half


def score(references: list[str], answers: list[str]) -> dict[str, float]:
    """Exact matches with their interval and the character error rate: edits over characters of the references."""
    exact = sum(reference == answer for reference, answer in zip(references, answers))
    low, high = wilson_interval(exact, len(references))
    edits = sum(edit_distance(reference, answer) for reference, answer in zip(references, answers))
    return {
        "items": len(references),
        "exact_match": exact / len(references),
        "exact_match_low": low,
        "exact_match_high": high,
        "character_error_rate": edits / sum(map(len, references)),
    }


def read_words(model, processor, samples: list, batch_size: int) -> list[str]:
    answers = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        images = [sample.image for sample in batch]
        answers += model.batch_chat(processor, images, [QUESTION] * len(batch), max_new_tokens=32, do_sample=False)
        print(f"{len(answers)}/{len(samples)}", end="\r", file=sys.stderr)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: this repository)")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", action="store_true", help="no blur, noise, tilt or JPEG artefacts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=None, help="JSONL file for the predictions")
    args = parser.parse_args()
    if args.items < 1:
        parser.error("--items must be at least 1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    samples = [held_out_word(i, args.seed, 0.0 if args.clean else 1.0) for i in range(args.items)]
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype).to(args.device).eval()
    started = time.perf_counter()
    answers = read_words(model, processor, samples, args.batch_size)
    result = score([sample.text for sample in samples], answers)
    result |= {"seconds": time.perf_counter() - started, "seed": args.seed, "clean": args.clean}
    if args.out:
        lines = [json.dumps({"reference": s.text, "answer": a}) for s, a in zip(samples, answers)]
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(
        f"{result['items']} unseen words in unseen fonts: {result['exact_match']:.1%} read exactly "
        f"(95% interval {result['exact_match_low']:.1%} to {result['exact_match_high']:.1%}), "
        f"character error rate {result['character_error_rate']:.1%}, {result['seconds']:.0f} s"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
