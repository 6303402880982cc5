"""Scores of the adaptation domains and the benchmarks, by cases that were worked by hand."""

import base64
import csv
import io
import json

import pytest
from download_helpers import DOWNLOADS
from PIL import Image

from minimonkey.scripts import evaluate, prepare, score
from minimonkey.scripts.evaluation import domains
from minimonkey.scripts.evaluation.captions import caption_scores, words
from minimonkey.scripts.evaluation.drivelm import Item, language_score, match, score_drivelm, scored
from minimonkey.scripts.evaluation.metrics import choice, chosen_letter, last_number, same_text, yes_no
from minimonkey.scripts.evaluation.suites import read_benchmark
from minimonkey.scripts.preparing.benchmarks import BENCHMARKS, MINI_MONKEY
from minimonkey.tiling import PRESETS


@pytest.fixture
def coco():
    return pytest.importorskip("pycocoevalcap", reason="captions need pip install pycocoevalcap")


def rows(*pairs: tuple[str, str], **fields) -> list[dict]:
    """Items with the answer given and the right one; `fields` are lists, a value for each."""
    return [
        {"id": str(i), "answer": given, "answers": [right], **{name: values[i] for name, values in fields.items()}}
        for i, (given, right) in enumerate(pairs)
    ]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a ship", "B"),
        ("b", None),
        ("The answer is C.", "C"),
        ("A ship", None),
        ("Bridge", None),
        ("It is D", "D"),
        ("", None),
        ("Both A and B", "B"),
    ],
)
def test_letters(answer, letter):
    assert chosen_letter(answer) == letter


def test_choices_by_letter_or_text():
    assert choice("B", ["B"]) == choice("a ship.", ["B. a ship"]) == choice("(B) a ship", ["B. a ship"]) == 1
    assert choice("C", ["B. a ship"]) == choice("ship", ["B. a ship"]) == 0


@pytest.mark.parametrize(
    ("answer", "right", "is_right"),
    [("Yes, it is.", "Yes", 1), ("no", "Yes", 0), ("yes and no", "Yes", 0), ("NO.", "no", 1), ("nothing", "no", 0)],
)
def test_yes_and_no(answer, right, is_right):
    assert yes_no(answer, [right]) == is_right


@pytest.mark.parametrize(
    ("answer", "right", "is_right"),
    [
        ("So it is 3.0", "3", 1),
        ("1,200 km", "1200", 1),
        ("0.504", "0.5", 1),
        ("0.56", "0.5", 0),
        ("5 and 7", "5", 0),
        ("red", "Red", 1),
    ],
)
def test_values(answer, right, is_right):
    assert last_number(answer, [right]) == is_right


def test_text_regardless_of_case():
    assert same_text(" Left Lung ", ["left lung"]) == 1 and same_text("lung", ["left lung"]) == 0


# --- captions --------------------------------------------------------------------------------------------------------


def test_words_are_lower_case_without_punctuation():
    assert words("The car's speed: 3.5, it stops!") == "the car's speed 3.5 it stops"


def test_captions_by_hand(coco):
    # "the car stops" of "the car stops now": all n-grams are right, brevity exp(1 - 4 / 3); ROUGE-L with beta 1.2 has
    # precision 1 and recall 3/4.
    scores = caption_scores(["The car stops."], [["the car stops now"]])
    brevity = 0.716531
    assert scores["BLEU-1"] == pytest.approx(brevity, abs=1e-4) and scores["BLEU-3"] == pytest.approx(brevity, abs=1e-4)
    # There are no four words in a row; COCO's script counts 1e-15 of 1e-9 of them, to the power of 1/4.
    assert scores["BLEU-4"] == pytest.approx(brevity * 1e-6**0.25, rel=1e-3)
    assert scores["ROUGE-L"] == pytest.approx((1 + 1.44) * 0.75 / (0.75 + 1.44), abs=1e-6)


def test_cider_is_ten_for_what_is_said_exactly(coco):
    texts = ["a car stops at the light", "a dog runs over the road"]
    assert caption_scores(texts, [[text] for text in texts])["CIDEr"] == pytest.approx(10)
    assert caption_scores(["x y z w", texts[1]], [[text] for text in texts])["CIDEr"] == pytest.approx(5)


def test_captions_need_answers():
    with pytest.raises(ValueError, match="got 0 answers and 0"):
        caption_scores([], [])


# --- DriveLM ---------------------------------------------------------------------------------------------------------


def test_points_are_matched_within_sixteen_pixels():
    right = "<c1,CAM_BACK,100.0,100.0> and <c2,CAM_BACK,500.0,500.0>"
    found, f1 = match("<c1,CAM_BACK,107.0,108.0>", right)  # 15 pixels away; one of two found
    assert found == [(100.0, 100.0)] and f1 == pytest.approx(2 / 3)
    assert match("<c1,CAM_BACK,108.0,108.0>", right)[1] == pytest.approx(0)  # 16 are too many
    assert match("nothing", right) == ([], pytest.approx(0))
    assert match(right + " 7.5", right)[1] == pytest.approx(1)  # a number without a partner is left
    # A right point is found once.
    assert match("<c1,CAM_BACK,100.0,100.0> <c2,CAM_BACK,101.0,100.0>", right)[1] == pytest.approx(0.5)


def drivelm_items() -> list[Item]:
    objects = "A car <c1,CAM_BACK,100.0,100.0>, a dog <c2,CAM_BACK,500.0,500.0>."
    return [
        Item("f", 2, "Important?", objects, "A car <c1,CAM_BACK,100.0,100.0>."),
        Item("f", 0, "Moving <c1,CAM_BACK,100.0,100.0>?", "A", "A"),
        Item("f", 0, "Moving <c2,CAM_BACK,500.0,500.0>?", "B", "B"),  # was not found: does not count
        Item("f", 0, "Behaviour?", "C", "D"),
        Item("f", 3, "First?", "<c1,CAM_BACK,100.0,100.0>", "<c1,CAM_BACK,100.0,100.0>"),
        Item("f", 1, "Actions?", "Stop.", "Halt."),
    ]


def test_later_questions_count_if_their_points_were_found():
    kept = scored(drivelm_items())
    assert [item.question for item in kept] == [
        "Important?",
        drivelm_items()[1].question,
        "Behaviour?",
        "First?",
        "Actions?",
    ]


def test_drivelms_final_score_by_hand(coco):
    result = score_drivelm(drivelm_items())
    assert result["accuracy"] == 0.5 and result["match_f1"] == pytest.approx(100) and result["counted"] == 5
    language = language_score(result)
    assert result["final_low"] == pytest.approx(0.2 * language + 0.2 * 0.5 + 0.2 * 0.5, abs=1e-6)
    assert result["final_high"] == pytest.approx(0.4 + 0.2 * language + 0.2 + 0.1, abs=1e-6)
    judged = score_drivelm(drivelm_items(), judge=lambda answer, right: 60.0)
    assert judged["gpt"] == 60 and judged["match"] == pytest.approx(80)
    assert judged["final"] == pytest.approx(0.4 * 0.6 + 0.2 * language + 0.2 * 0.8 + 0.2 * 0.5, abs=1e-6)


def test_the_language_score_by_hand():
    scores = {"BLEU-1": 0.8, "BLEU-2": 0.6, "BLEU-3": 0.4, "BLEU-4": 0.2, "ROUGE-L": 0.7, "CIDEr": 3.0}
    assert language_score(scores) == pytest.approx((0.5 + 0.7 + 0.3) / 3)


def test_drivelm_needs_every_part():
    with pytest.raises(ValueError, match="No item with tag 1, 2 counts"):
        score_drivelm([item for item in drivelm_items() if item.tag in (0, 3)])


# --- BDD-X, remote sensing, medical ----------------------------------------------------------------------------------


def test_control_signals_by_hand():
    chosen = rows(("Speed: 3.0, turning angle: -1", "4.0 and 0.0"), ("6.0 0.05", "6.0, 0.0"), ("fast", "1.0 1.0"))
    result = domains.score_control(chosen)
    assert result["control_unread"] == 1
    assert result["speed_RMSE"] == pytest.approx((1 / 2) ** 0.5)
    assert result["course_RMSE"] == pytest.approx(((1 + 0.0025) / 2) ** 0.5)
    assert [result[f"speed_A_{tau}"] for tau in ("0.1", "0.5", "1", "5", "10")] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3]
    )
    assert result["course_A_0.1"] == pytest.approx(1 / 3)


def test_rsvqa_by_hand():
    kinds = ["presence", "comp", "count", "count", "area", "count"]
    pairs = (("Yes", "yes"), ("no", "yes"), ("57", "60"), ("0", "3"), ("1,500 m2", "2000m2"), ("many", "60"))
    result = domains.score_rsvqa(rows(*pairs, kind=kinds))
    assert (result["presence"], result["comp"], result["area"]) == (1, 0, 1)
    assert result["count"] == pytest.approx(1 / 3)
    assert result["all"] == 0.5 and result["useful"] == 0.5 and result["useful_items"] == 2


@pytest.mark.parametrize(("value", "number"), [(0, 0), (1, 1), (100, 1), (101, 2), (1000, 2), (1001, 3)])
def test_bins_of_counts(value, number):
    assert domains.count_bin(value) == number


def test_boxes_count_both_edges():
    assert domains.intersection_over_union((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    # 10 x 10 and 10 x 10 pixels that share 5 x 10: 50 of 150.
    assert domains.intersection_over_union((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(1 / 3)
    assert domains.intersection_over_union((0, 0, 9, 9), (20, 20, 29, 29)) == 0


def test_grounding_by_hand():
    field = {"box": [[0, 0, 99, 99]] * 4, "size": [[200, 100]] * 4}
    answers = ("[[0, 0, 495, 990]]", "<box>[[0, 0, 200, 990]]</box>", "no box", "[0, 0, 9999, 990]")
    result = domains.score_grounding(rows(*((answer, "") for answer in answers), **field))
    # Whole; 41 of 100 columns; none; clamped to the image: 100 of 201 columns, less than half.
    assert result["Acc@0.5"] == 0.25


def test_medical_by_hand():
    pairs = (("Yes, there is.", "yes"), ("left", "right"), ("the left upper lung", "Left lung"), ("lung", "Left lung"))
    result = domains.score_medical(rows(*pairs, kind=["closed", "closed", "open", "open"]))
    assert result["closed"] == 0.5 and result["open_exact"] == 0 and result["open_recall"] == pytest.approx(0.75)


# --- yes or no -------------------------------------------------------------------------------------------------------


def test_mme_by_hand():
    pairs = (("yes", "Yes"), ("no", "No"), ("yes", "Yes"), ("yes", "No"), ("no", "No"), ("no", "No"))
    fields = {"category": ["OCR"] * 4 + ["code_reasoning"] * 2, "group": ["a", "a", "b", "b", "c", "c"]}
    result = domains.score_mme(rows(*pairs, **fields))
    assert result["OCR"] == 75 + 50 and result["code_reasoning"] == 200
    assert (result["perception"], result["cognition"], result["total"]) == (125, 200, 325)


def test_hallusionbench_by_hand():
    pairs = (("yes", "Yes"), ("no", "No"), ("yes", "No"), ("no", "No"))
    result = domains.score_hallusionbench(rows(*pairs, group=["f0", "f0", "f1", "f1"], pair=["q0", "q1", "q0", "q1"]))
    assert (result["aAcc"], result["fAcc"], result["qAcc"]) == (0.75, 0.5, 0.5)
    assert result["mean"] == pytest.approx(1.75 / 3)


def test_pope_by_hand():
    pairs = (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("yes", "yes"))
    result = domains.score_pope(rows(*pairs, category=["random"] * 5))
    assert result["all_accuracy"] == 0.6 and result["all_precision"] == result["all_recall"] == pytest.approx(2 / 3)
    assert result["random_F1"] == pytest.approx(2 / 3)
    assert domains.score_pope(rows(("no", "yes"), category=["random"]))["all_F1"] == 0


def test_mmbench_by_hand():
    pairs = (("A", "A"), ("B", "B"), ("A", "A"), ("A", "B"), ("C", "C"))
    result = domains.score_mmbench(rows(*pairs, score=[1, 1, 1, 0, 1], group=["0", "0", "1", "1", "2"]))
    assert result["circular"] == pytest.approx(2 / 3) and result["vanilla"] == 0.8


def test_rows_without_what_a_score_needs():
    with pytest.raises(ValueError, match="Item 0 has no category"):
        domains.score_mme(rows(("yes", "yes")))


# --- published files -------------------------------------------------------------------------------------------------


def as_base64() -> str:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "white").save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


ROWS = {
    "mme": {"answer": "Yes", "category": "OCR", "image_path": "a.jpg"},
    "realworldqa": {"answer": "B", "A": "one", "B": "two"},
    "ai2d": {"answer": "A", "A": "one", "B": "two", "C": "three", "D": "four"},
    "ccbench": {"answer": "A", "A": "one", "B": "two", "category": "relic"},
    "seedbench": {"answer": "A", "A": "one", "B": "two"},
    "hallusionbench": {"answer": "No", "category": "VD", "l2-category": "figure"},
    "pope": {"answer": "yes", "category": "random"},
    "mathvista": {"answer": "3.5", "choices": "[]"},
    "docvqa": {"answer": "['1999', '1999.']"},
    "chartqa": {"answer": "14", "split": "human"},
    "infovqa": {"answer": "['x']"},
    "textvqa": {"answer": str(["stop"] * 10)},
    "ocrbench": {"answer": "['x^2']", "category": "Handwritten Mathematical Expression Recognition"},
    "mmvet": {"answer": "a cat"},
    "mmmu": {"answer": "B", "A": "<image 1>", "B": "two"},
    "mmbench": {"answer": "A", "A": "one", "B": "two", "category": "ocr"},
    "scienceqa": {"answer": "A", "A": "one", "B": "two", "hint": "Look."},
    "gqa": {"answer": "yes"},
}


def write_tsv(path, row: dict, first="0_1_2", second="0_1_3", third="0_1_4") -> None:
    with path.open("w", newline="") as file:
        names = ["index", "image", "question", *row]
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        writer.writerow({"index": first, "image": as_base64(), "question": "Which?", **row})
        writer.writerow({"index": second, "image": first, "question": "And?", **row})
        writer.writerow({"index": third, "image": "!" * 80, "question": "And?", **row})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_read_and_scored(name, tmp_path, capsys):
    assert set(ROWS) == set(BENCHMARKS) and len(MINI_MONKEY) == 13 and BENCHMARKS[name].preset in PRESETS
    numbers = ("3", "1000003", "2000003") if name == "mmbench" else ()
    write_tsv(tmp_path / "x.tsv", ROWS[name], *numbers)
    assert prepare.main([name, str(tmp_path / "x.tsv"), str(tmp_path / "out")]) == 0
    assert f"--preset {BENCHMARKS[name].preset}" in capsys.readouterr().out
    path = tmp_path / "out" / f"{name}.jsonl"
    suite = read_benchmark(path)
    assert len(suite) == 2 and (tmp_path / "out" / f"{name}.refused.jsonl").exists()  # no base64
    items = [suite.item(i) for i in range(2)]
    lines = [{"id": item.id, "metric": item.metric, "score": 1.0, "answer": item.answers[0]} for item in items]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [name, str(path), str(tmp_path / "predictions.jsonl")]
    if name in score.SERVER_ONLY:
        with pytest.raises(SystemExit):
            score.main(command)
        assert score.main([*command, "--submission", str(tmp_path / "s.json")]) == 0
        assert json.loads((tmp_path / "s.json").read_text()) == {"v1_0_1_2": "a cat", "v1_0_1_3": "a cat"}
        return
    assert score.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert max(result.values()) in (1, 2, 200)


def test_options_hints_and_metrics_of_published_files(tmp_path):
    row = {**ROWS["ai2d"], "hint": "Look."}
    write_tsv(tmp_path / "x.tsv", row)
    prepare.main(["ai2d", str(tmp_path / "x.tsv"), str(tmp_path / "out")])
    item = read_benchmark(tmp_path / "out" / "ai2d.jsonl").item(0)
    assert item.question.startswith("Look.\nWhich?\nA. one\nB. two") and item.question.endswith("choices directly.")
    assert item.answers == ["A. one"] and item.metric == "choice"
    write_tsv(tmp_path / "x.tsv", ROWS["ocrbench"])
    prepare.main(["ocrbench", str(tmp_path / "x.tsv"), str(tmp_path / "out")])
    assert read_benchmark(tmp_path / "out" / "ocrbench.jsonl").item(0).metric == "ocrbench_formula"


def test_internvls_own_files_and_the_servers_submission(tmp_path, capsys):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "page.png")
    lines = [{"image": "page.png", "question": "Total?", "question_id": number} for number in (7, 9)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare.main(["docvqa", str(tmp_path / "test.jsonl"), str(tmp_path / "out")]) == 0
    benchmark = tmp_path / "out" / "docvqa.jsonl"
    assert read_benchmark(benchmark).item(0).answers == ["unknown"]
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(
        "".join(json.dumps({"id": i, "metric": "anls", "score": 0, "answer": f"a{i}"}) + "\n" for i in "79")
    )
    out = tmp_path / "submission.json"
    assert score.main(["docvqa", str(benchmark), str(predictions), "--submission", str(out)]) == 0
    assert json.loads(out.read_text()) == [{"questionId": 7, "answer": "a7"}, {"questionId": 9, "answer": "a9"}]
    predictions.write_text(predictions.read_text().splitlines()[0] + "\n")
    assert score.main(["docvqa", str(benchmark), str(predictions)]) == 1
    assert "1 have no prediction (9)" in capsys.readouterr().err


def test_a_file_of_another_kind_is_said(tmp_path, capsys):
    (tmp_path / "x.tsv").write_text("index\tquestion\n1\tWhich?\n")
    assert prepare.main(["chartqa", str(tmp_path / "x.tsv"), str(tmp_path / "out")]) == 1
    assert "lacks the columns image" in capsys.readouterr().err
    assert prepare.main(["chartqa", str(tmp_path / "none.tsv"), str(tmp_path / "out")]) == 1
    assert "There is no file" in capsys.readouterr().err


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "scorer"),
    [
        ("rsvqa-lr", "test", "rsvqa"),
        ("dior-rsvg", "test", "dior-rsvg"),
        ("slake", "test", "medical"),
        ("scenes", "test", "scenes"),
    ],
)
def test_from_download_to_a_score(name, split, scorer, tmp_path, capsys):
    DOWNLOADS[name](tmp_path / "download")
    assert prepare.main([name, str(tmp_path / "download"), str(tmp_path / "out"), "--split", split]) == 0
    benchmark, predictions = tmp_path / "out" / f"{name}-{split}.jsonl", tmp_path / "predictions.jsonl"
    options = ["--max-new-tokens", "3", "--batch-size", "16", "--device", "cpu", "--dtype", "float32"]
    assert evaluate.main(["--benchmark", str(benchmark), "--out", str(predictions), *options]) == 0
    assert score.main([scorer, str(benchmark), str(predictions)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(0 <= value <= 100 for value in result.values())


@pytest.mark.parametrize(("name", "split"), [("drivelm", "eval"), ("bdd", "test")])
def test_driving_from_download_to_a_score(name, split, coco, tmp_path, capsys):
    DOWNLOADS[name](tmp_path / "download")
    assert prepare.main([name, str(tmp_path / "download"), str(tmp_path / "out"), "--split", split]) == 0
    benchmark, predictions = tmp_path / "out" / f"{name}-{split}.jsonl", tmp_path / "predictions.jsonl"
    items = [json.loads(text) for text in benchmark.read_text().splitlines()]
    lines = [{"id": item["id"], "metric": "exact_match", "score": 1, "answer": item["answers"][0]} for item in items]
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score.main([name, str(benchmark), str(predictions)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    if name == "drivelm":  # right answers, whose points were rounded to thousandths
        assert result["accuracy"] == 1 and result["match_f1"] == pytest.approx(100) and result["BLEU-1"] > 0.7
        submission = tmp_path / "submission.json"
        assert score.main([name, str(benchmark), str(predictions), "--submission", str(submission)]) == 0
        assert len(json.loads(submission.read_text())["results"]) == len(items)
    else:
        assert result["speed_RMSE"] == 0 and result["course_A_0.1"] == 1
        assert result["justification_BLEU-4"] == pytest.approx(1, abs=1e-3)
