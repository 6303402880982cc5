"""Synthetic documents: the same for the same arguments, readable, answerable, and cut where they should be."""

import random
import re
import subprocess
import sys
from itertools import combinations

import pytest
from conftest import ROOT
from PIL import Image

from minimonkey.scripts.synthetic.documents import KINDS, document
from minimonkey.scripts.synthetic.materials import words
from minimonkey.scripts.synthetic.seams import DEFAULT_RANGES, Seams, seam
from minimonkey.scripts.synthetic.text_images import CHARACTERS
from minimonkey.scripts.synthetic.vocabulary import LABELS
from minimonkey.tiling import msac_grids


SPLITS = ("training", "held_out")


def shown_text(item) -> str:
    return "".join(character.character for character in item.characters)


def unspaced(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_depends_on_nothing_but_its_arguments(kind):
    first = document(kind, 3, 1)
    document(kind, 4, 1)
    again = document(kind, 3, 1)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.questions, first.characters) == (again.questions, again.characters)
    for other in (document(kind, 5, 1), document(kind, 3, 2), document(kind, 3, 1, "held_out")):
        assert other.image.size != first.image.size or other.image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_answerable_and_whole(kind, split):
    for index in range(10):
        item = document(kind, index, 7, split, difficulty=index / 9)
        width, height = item.image.size
        assert item.image.mode == "RGB" and 15 < width < 500 and 15 < height < 800
        assert len({question.text for question in item.questions}) == len(item.questions) > 0
        text = shown_text(item)
        assert set(text) <= set(CHARACTERS)
        for question in item.questions:
            assert question.text.isascii() and question.answer.isascii() and question.answer == question.answer.strip()
            # Of a bill lines are read one by one, and what follows "=" is reckoned.
            lines = [line for line in question.answer.splitlines() if "=" not in line]
            for read in lines if kind == "bill" else [question.answer]:
                assert unspaced(read) in text, question
        for character in item.characters:
            left, top, right, bottom = character.box
            assert left >= -2 and top >= -2 and right <= width + 2 and bottom <= height + 2, character


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"scene"}))
def test_texts_do_not_overlap(kind):
    for index in range(8):
        item = document(kind, index, 11, difficulty=0.0)  # nothing is tilted
        for first, second in combinations(item.characters, 2):
            across = min(first.box[2], second.box[2]) - max(first.box[0], second.box[0])
            down = min(first.box[3], second.box[3]) - max(first.box[1], second.box[1])
            assert across <= 2 or down <= 3, (kind, index, first, second)


def test_difficulty_makes_documents_longer_and_text_smaller():
    def averages(difficulty: float) -> tuple[float, float]:
        items = [document("page", index, 3, difficulty=difficulty) for index in range(12)]
        boxes = [character.box for item in items for character in item.characters]
        return len(boxes) / len(items), sum(box[3] - box[1] for box in boxes) / len(boxes)

    (short, large), (long, small) = averages(0.0), averages(1.0)
    assert long > 2 * short and small < 0.8 * large


@pytest.mark.parametrize("split", SPLITS)
def test_documents_show_no_words_of_the_other_split(split):
    other = SPLITS[1 - SPLITS.index(split)]
    foreign = {word for same_length in words(other).values() for word in same_length} - LABELS
    for kind in ("page", "receipt", "form", "table", "chart", "seam"):
        for index in range(5):
            item = document(kind, index, 13, split)
            texts = [question.answer for question in item.questions]
            # Codes are random letters and spell anything.
            written = {word for text in texts for word in re.findall(r"(?<![\w-])[A-Za-z]{4,}(?![\w-])", text)}
            assert not {word.lower() for word in written if not _is_random(word)} & foreign


def _is_random(word: str) -> bool:
    return word not in (word.lower(), word.upper(), word.capitalize())


def word_boxes(item) -> list[tuple[float, float, float, float]]:
    """The boxes of the words of a seam document, whose lines are one word each."""
    remaining, boxes = list(item.characters), []
    for word in item.questions[0].answer.split("\n"):
        letters = [remaining.pop(0) for _ in word]
        assert "".join(letter.character for letter in letters) == word
        sides = list(zip(*(letter.box for letter in letters)))
        boxes.append((min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3])))
    return boxes


@pytest.mark.parametrize("ranges", [DEFAULT_RANGES, (2, 6, 1, 4)], ids=str)
def test_words_on_seams_are_cut_by_detailed_tiles_alone(ranges):
    cut_by_adaptive = total = 0
    for index in range(25):
        item = seam(random.Random(f"seams/{index}"), "training", 1.0, ranges)
        detailed, adaptive = msac_grids(*item.image.size, *ranges, tile_size=112)
        detailed, adaptive = (Seams.of(item.image.size, grid) for grid in (detailed, adaptive))
        for box in word_boxes(item):
            assert detailed.cut(box), (index, box)
            cut_by_adaptive += adaptive.cut(box)
            total += 1
    assert total > 40 and cut_by_adaptive == 0


def test_ranges_without_seams_are_refused():
    with pytest.raises(ValueError, match="no seams"):
        seam(random.Random(0), "training", 1.0, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("novel", 0, 0), "receipt"), (("page", 0, 0, "test"), "held_out"), (("page", 0, 0, "training", 2), "0 to 1")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        document(*arguments)


def test_the_sums_of_receipts_are_right():
    for index in range(10):
        text = document("receipt", index, 3, difficulty=0.0).questions[0].answer
        *items, total = [float(number) for number in re.findall(r"(?<![\d.])\d+\.\d{2}(?![\d.])", text)]
        assert sum(items) == pytest.approx(total), text


def test_a_sheet_is_written_by_the_command(tmp_path):
    command = [
        sys.executable,
        "scripts/synthetic/documents.py",
        tmp_path / "sheet.png",
        "--kind",
        "receipt",
        "--items",
        "2",
    ]
    result = subprocess.run([*map(str, command), "--split", "held_out"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "sheet.png").size[0] > 300
