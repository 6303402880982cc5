"""Medical images: captions (PMC-OA, Quilt-1M) and questions (SLAKE, VQA-RAD, PMC-VQA).

    PMC-OA      pmc_oa.jsonl, caption_T060_filtered_top4_sep_v0_subfigures/ (or in images/)
    Quilt-1M    quilt_1M_lookup.csv, images/
    SLAKE       {train,validate,test}.json, imgs/
    VQA-RAD     VQA_RAD Dataset Public.json, VQA_RAD Image Folder/
    PMC-VQA     {train,test}.csv, images/ (or figures/)

The 500,000 samples of Mini-InternVL's medical model are published as conversations: `prepare meta`.

Source: the data sets' own pages.
"""

from collections.abc import Iterator
from pathlib import Path

from minimonkey.scripts.preparing.layouts import read_json, require
from minimonkey.scripts.preparing.records import Record, Refusal, with_image
from minimonkey.scripts.training.own_data import read_rows


CAPTION = "Describe this medical image."
ONE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def pmc_oa(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the captions of PMC-OA."""
    folder = "caption_T060_filtered_top4_sep_v0_subfigures"
    found = require(root, "PMC-OA", {"captions": "pmc_oa.jsonl", "images": (folder, f"images/{folder}")})
    return _captions(found["captions"], found["images"], "image", "caption")


def quilt(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the captions of Quilt-1M."""
    found = require(root, "Quilt-1M", {"captions": "quilt_1M_lookup.csv", "images": ("images", "quilt_1m")})
    return _captions(found["captions"], found["images"], "image_path", "caption")


def _captions(table: Path, images: Path, image: str, caption: str) -> Iterator[Record | Refusal]:
    for number, row in enumerate(read_rows(table)):
        if not row.get(image) or not str(row.get(caption, "")).strip():
            yield Refusal(str(number), f"it lacks {image} or {caption}")
            continue
        yield Record(str(number), (images / row[image],), ((with_image(CAPTION), row[caption].strip()),))


def slake(root: Path, split: str, out: Path, language: str = "en") -> Iterator[Record | Refusal]:
    """Yield SLAKE's questions in one of its languages."""
    name = {"val": "validate"}.get(split, split)
    found = require(root, "SLAKE", {"questions": f"{name}.json", "images": "imgs"})
    for entry in read_json(found["questions"]):
        if entry.get("q_lang", language) == language:
            image = found["images"] / entry["img_name"]
            yield _question(str(entry["qid"]), image, entry["question"], entry["answer"], entry["answer_type"])


def vqa_rad(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield VQA-RAD's questions; its test split is told by `phrase_type`."""
    names = {"questions": "VQA_RAD Dataset Public.json", "images": "VQA_RAD Image Folder"}
    found = require(root, "VQA-RAD", names)
    for entry in read_json(found["questions"]):
        if entry["phrase_type"].startswith("test") == (split == "test"):
            image = found["images"] / entry["image_name"]
            yield _question(str(entry["qid"]), image, entry["question"], str(entry["answer"]), entry["answer_type"])


def _question(name: str, image: Path, question: str, answer: str, answer_type: str) -> Record:
    kind = "closed" if answer_type.strip().upper() == "CLOSED" else "open"
    turn = (with_image(f"{question}\n{ONE_WORD}"), answer.strip())
    return Record(name, (image,), (turn,), {"kind": kind, "metric": "same_text"})


def pmc_vqa(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield PMC-VQA's questions with their four lettered choices."""
    found = require(root, "PMC-VQA", {"questions": f"{split}.csv", "images": ("images", "figures")})
    for number, row in enumerate(read_rows(found["questions"])):
        choices = {
            letter: row.get(f"Choice {letter}", "").strip().removeprefix(f"{letter}:").strip() for letter in "ABCD"
        }
        label = (row.get("Answer_label") or row.get("Answer") or "").strip()
        if label not in choices or not all(choices.values()):
            yield Refusal(str(number), f"it has the choices {choices} and the answer {label!r}")
            continue
        listed = "\n".join(f"{letter}. {text}" for letter, text in choices.items())
        turn = (with_image(f"{row['Question'].strip()}\n{listed}\n{LETTER}"), label)
        image = found["images"] / row["Figure_path"]
        yield Record(str(number), (image,), (turn,), {"kind": "closed", "metric": "choice"})
