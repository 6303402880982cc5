"""The benchmarks of Mini-Monkey and Mono-InternVL in their published files: VLMEvalKit's TSV, or InternVL's JSONL.

    python scripts/prepare.py chartqa ChartQA_TEST.tsv data/chartqa
    python scripts/evaluate.py --benchmark data/chartqa/chartqa.jsonl --preset chartqa --out chartqa.predictions.jsonl

Prompts are those of VLMEvalKit's InternVL class, which the published figures were made with. What has no right answer here (a
test split that a server scores) gets the answer "unknown".

Source: VLMEvalKit's data sets, and InternVL's eval/vqa/evaluate_vqa.py.
"""

import ast
import base64
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minimonkey.scripts.preparing.records import Record, Refusal, with_image


UNKNOWN = "unknown"
ONE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
DIRECTLY = "Answer the question directly."
YES_OR_NO = "Please answer yes or no. " + ONE_WORD
LETTERS = "ABCDEFGH"
CIRCULAR = 1_000_000  # MMBench asks a question again with its options turned, under an index that is so much higher
REFERRING = 64  # characters: a shorter image is the index of a row that has it


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked and scored.

    Args:
        metric: Of evaluation/metrics.py.
        suffix: What is added to a question without options.
        preset: Its tile ranges, see tiling.py.
    """

    metric: str
    suffix: str
    preset: str


MINI_MONKEY = {
    "mme": Benchmark("yes_no", ONE_WORD, "mme"),
    "realworldqa": Benchmark("choice", ONE_WORD, "realworldqa"),
    "ai2d": Benchmark("choice", ONE_WORD, "others"),
    "ccbench": Benchmark("choice", ONE_WORD, "ccbench"),
    "seedbench": Benchmark("choice", ONE_WORD, "others"),
    "hallusionbench": Benchmark("yes_no", YES_OR_NO, "hallusionbench"),
    "pope": Benchmark("yes_no", ONE_WORD, "pope"),
    "mathvista": Benchmark("last_number", "", "others"),
    "docvqa": Benchmark("anls", ONE_WORD, "docvqa"),
    "chartqa": Benchmark("relaxed_accuracy", ONE_WORD, "chartqa"),
    "infovqa": Benchmark("anls", ONE_WORD, "infovqa"),
    "textvqa": Benchmark("vqa_accuracy", ONE_WORD, "others"),
    "ocrbench": Benchmark("ocrbench", ONE_WORD, "ocrbench"),
}
# What Mono-InternVL reports besides; it knows no adaptive tiles.
MONO_INTERNVL = {
    "mmvet": Benchmark("exact_match", "", "internvl"),  # a server scores it: score.py --submission
    "mmmu": Benchmark("choice", DIRECTLY, "internvl"),
    "mmbench": Benchmark("choice", ONE_WORD, "internvl"),
    "scienceqa": Benchmark("choice", ONE_WORD, "internvl"),
    "gqa": Benchmark("exact_match", ONE_WORD, "internvl"),
}
BENCHMARKS = MINI_MONKEY | MONO_INTERNVL
FORMULAS = "Handwritten Mathematical Expression Recognition"  # of OCRBench, whose spaces do not count


def read(name: str, path: Path, out: Path) -> Iterator[Record | Refusal]:
    """Yield the items of a benchmark's published file.

    Raises:
        ValueError: There is no such file, it is of another kind, or lacks columns; with what is missing.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no file {path}: {name} is one TSV file of VLMEvalKit, or one JSONL file of InternVL."
        )
    if path.suffix == ".tsv":
        return _from_tsv(name, path, out)
    if path.suffix == ".jsonl":
        return _from_internvl(name, path)
    raise ValueError(f"{path} is neither a .tsv of VLMEvalKit nor a .jsonl of InternVL.")


def _from_tsv(name: str, path: Path, out: Path) -> Iterator[Record | Refusal]:
    csv.field_size_limit(sys.maxsize)  # an image is one field
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        missing = {"index", "image", "question"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; it has {rows.fieldnames}.")
        (out / "images").mkdir(parents=True, exist_ok=True)
        for row in rows:
            try:
                images = [*_images(row, out / "images", name)]
                yield _record(name, row, images)
            except (ValueError, SyntaxError, TypeError) as error:
                yield Refusal(str(row["index"]), str(error))


def _images(row: dict, folder: Path, name: str) -> Iterator[Path]:
    """Write the images of a row, and yield where they are; those of an earlier row are referred to by its index."""
    content = row["image"]
    parts = ast.literal_eval(content) if content.startswith("[") else [content]
    for number, part in enumerate(parts):
        if len(part) <= REFERRING:
            yield folder / f"{name}-{part}-{number}.jpg"
            continue
        path = folder / f"{name}-{row['index']}-{number}.jpg"
        path.write_bytes(base64.b64decode(part, validate=True))
        yield path


def _record(name: str, row: dict, images: list[Path]) -> Record:
    benchmark = BENCHMARKS[name]
    options = {letter: row[letter] for letter in LETTERS if row.get(letter)}
    question, answer, metric = row["question"], row.get("answer") or UNKNOWN, benchmark.metric
    if row.get("hint"):
        question = f"{row['hint']}\n{question}"
    if name == "mathvista" and row.get("choices", "[]") not in ("", "[]"):
        options = dict(zip(LETTERS, ast.literal_eval(row["choices"])))
        answer = row.get("answer_option") or answer
    if options:
        listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        question, metric = f"{question}\n{listed}\n{LETTER}", "choice"
        answers = [f"{answer}. {options[answer]}" if answer in options else answer]
    else:
        separator = " " if benchmark.metric == "yes_no" else "\n"
        question = f"{question}{separator}{benchmark.suffix}".strip()
        answers = _answers(answer)
    if name == "ocrbench" and row.get("category") == FORMULAS:
        metric = "ocrbench_formula"
    scoring = {"answers": answers, "metric": metric} | {
        ours: row[theirs] for ours, theirs in (("category", "category"), ("kind", "split")) if row.get(theirs)
    }
    if name == "mmbench":
        scoring["group"] = str(int(row["index"]) % CIRCULAR)
    if name == "mme":
        scoring["group"] = row.get("image_path") or images[0].name
    if name == "hallusionbench":
        set_, figure, asked = row["index"].split("_")[:3]
        kind = f"{row.get('l2-category') or row.get('category')}_{set_}"
        scoring |= {"group": f"{kind}_{figure}", "pair": f"{kind}_{asked}"}
    return Record(str(row["index"]), tuple(images), ((with_image(question, len(images)), answers[0]),), scoring)


def _answers(answer: str) -> list[str]:
    """Return the right answers of a field: one, or a list written as Python writes it."""
    found = ast.literal_eval(answer) if answer.startswith("[") and answer.endswith("]") else answer
    return [*map(str, found)] if isinstance(found, list) and found else [answer]


def _from_internvl(name: str, path: Path) -> Iterator[Record | Refusal]:
    """Yield the items of InternVL's JSONL; its image paths start from the working folder, or from the file's."""
    benchmark = BENCHMARKS[name]
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            image = Path(row["image"])
            image = (image if image.is_file() else path.parent / image).resolve()
            answers = row.get("answer", UNKNOWN)
            answers = [*map(str, answers)] if isinstance(answers, list) else [str(answers)]
            question = with_image(f"{row['question']}\n{benchmark.suffix}".strip())
        except (ValueError, KeyError, TypeError) as error:
            yield Refusal(f"line {number}", f"{type(error).__name__}: {error}")
            continue
        scoring = {"answers": answers, "metric": benchmark.metric, "question_id": row.get("question_id", number)}
        yield Record(str(row.get("question_id", number)), (image,), ((question, answers[0]),), scoring)
