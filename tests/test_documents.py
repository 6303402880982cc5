"""Synthetic documents: the same for the same arguments, readable, answerable, and cut where they should be."""

import random
import re
import string
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from minimonkey.grounding import denormalise, parse_boxes
from minimonkey.scripts.synthetic.documents import KINDS, document
from minimonkey.scripts.synthetic.layouts import HOW_MANY, boxes
from minimonkey.scripts.synthetic.materials import font_files, is_held_out, load_font, words
from minimonkey.scripts.synthetic.prose import ACCENTED, SIGNS, accented_words, prose, shown, used_words, wrapped
from minimonkey.scripts.synthetic.seams import DEFAULT_RANGES, Seams, seam
from minimonkey.scripts.synthetic.skills import CAMERAS, PAINTS
from minimonkey.scripts.synthetic.text_images import CHARACTERS, character_boxes
from minimonkey.scripts.synthetic.vocabulary import LABELS
from minimonkey.tiling import msac_grids


SPLITS = ("training", "held_out")
SKILLS = ("find", "count", "shape", "views")  # their answers are not written in the image


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
        assert set(text) <= set(CHARACTERS if kind != "layout" else string.printable + ACCENTED + SIGNS)
        for question in item.questions:
            assert kind == "layout" or (question.text.isascii() and question.answer.isascii())
            assert question.answer == question.answer.strip()
            if question.text in HOW_MANY or kind in SKILLS:
                continue
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


# --- layouts ---------------------------------------------------------------------------------------------------------


def layouts(count: int, seed: int, **options) -> list:
    return [document("layout", index, seed, **options) for index in range(count)]


def test_columns_are_read_one_after_the_other():
    found = 0
    for item in layouts(40, 17, difficulty=0.0):  # nothing is tilted
        text, reach = shown_text(item), {}
        assert text == unspaced(item.questions[0].answer)
        for question in item.questions:
            side = re.search(r"(left|right) column", question.text)
            if not side or "line" in question.text:
                continue
            start = text.index(unspaced(question.answer))
            letters = item.characters[start : start + len(unspaced(question.answer))]
            reach[side[1]] = (min(c.box[0] for c in letters), max(c.box[2] for c in letters), start)
        if len(reach) == 2:
            assert reach["left"][1] < reach["right"][0] and reach["left"][2] < reach["right"][2]
            found += 1
    assert found >= 2


def test_questions_about_lines_have_the_right_answers():
    kinds = {"after": 0, "count": 0, "under": 0}
    for item in layouts(30, 19):
        lines = item.questions[0].answer.split("\n")
        for question in item.questions[1:]:
            if match := re.fullmatch(
                r'(?:What is the line after|Which line follows|Read the line after) "(.*)"[?.]', question.text
            ):
                assert lines[lines.index(match[1]) + 1] == question.answer
                kinds["after"] += 1
            elif question.text in HOW_MANY:
                assert question.answer == str(len(lines))
                kinds["count"] += 1
            elif match := re.search(r'under "(.*)"[?.]$', question.text):
                heading = " ".join(lines).index(match[1])
                assert " ".join(lines).index(question.answer.replace("\n", " ")) > heading
                kinds["under"] += 1
    assert min(kinds.values()) > 3, kinds


def test_accents_are_shown_where_a_font_has_them():
    texts = "".join(item.questions[0].answer for item in layouts(24, 23))
    assert len(set(texts) & set(ACCENTED)) > 4
    assert set(texts) - set(string.printable) <= set(ACCENTED + SIGNS)
    for path in font_files("training")[::9]:
        font = load_font(path, 24)
        assert not {bytes(font.getmask(c)) for c in shown(path)} & {bytes(font.getmask("\uffff"))}
    assert shown(font_files("training")[0], "\u0414\u4e00e") in ("e", "\u0414e")  # no Chinese in a Latin font


@pytest.mark.parametrize("split", SPLITS)
def test_running_text_keeps_to_its_side_of_the_split(split):
    chosen = {*used_words(split)[0], *accented_words(split)}
    assert {is_held_out(word) for word in chosen} == {split == "held_out"}
    text = prose(random.Random(3), split, ACCENTED, "lower")
    written = {word for word, _ in zip(text, range(800)) if re.fullmatch("[a-z]{4,12}", word)}
    assert len(written) > 200 and written <= chosen | {word for same in words(split).values() for word in same}


def test_lines_are_as_wide_as_they_may_be():
    font, rng = load_font(font_files("training")[0], 16), random.Random(5)
    lines = wrapped(prose(rng, "training"), font, 500, 9, rng, hyphenates=True)
    assert 1 <= len(lines) <= 9 and all(font.getlength(line) <= 502 for line in lines)
    assert all(font.getlength(line) > 350 for line in lines[:-1])


@pytest.mark.parametrize("path", font_files("training")[::13], ids=lambda path: path.stem)
def test_boxes_of_letters_are_those_that_are_measured_one_by_one(path):
    text, font = "Affine Voltage, To 1.5% (Wavy)", load_font(path, 17)
    for quick, exact in zip(boxes(text, font, 5, 7), character_boxes(text, font, 5, 7), strict=True):
        assert quick.character == exact.character
        assert quick.box == pytest.approx(exact.box, abs=3)


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


def test_a_found_word_stands_in_its_box():
    for index in range(20):
        item = document("find", index, 3, "training", index / 19)
        for question in item.questions:
            word = question.text.rstrip("?.").replace("Where does ", "").replace(" stand", "").split()[-1]
            left, top, right, bottom = denormalise(parse_boxes(question.answer)[0].box, item.image.size)
            inside = [
                character.character
                for character in item.characters
                if left < (character.box[0] + character.box[2]) / 2 < right
                and top < (character.box[1] + character.box[3]) / 2 < bottom
            ]
            assert "".join(inside) == word


def test_a_camera_that_shows_a_vehicle_is_where_it_is():
    for index in range(20):
        item = document("views", index, 3, "training", 0.0)
        assert item.image.size == (336, 224)
        (place,) = (question for question in item.questions if question.answer.startswith("CAM_"))
        column, row = CAMERAS.index(place.answer) % 3, CAMERAS.index(place.answer) // 3
        paint = PAINTS[next(name for name in PAINTS if name in place.text)]
        cell = item.image.crop((112 * column, 112 * row, 112 * column + 112, 112 * row + 112))
        assert (np.asarray(cell) == paint).all(axis=2).sum() > 100


def test_shapes_are_counted():
    counts = [int(document("count", index, 3).questions[0].answer) for index in range(60)]
    assert set(counts) == {1, 2, 3, 4, 5, 6}
