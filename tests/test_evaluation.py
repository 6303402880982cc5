"""Metrics on cases worked by hand, confidence intervals, and evaluations by their commands."""

import json
import random
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image, ImageDraw

from minimonkey.scripts import evaluate
from minimonkey.scripts.evaluation.dropping import choose, selection
from minimonkey.scripts.evaluation.intervals import (
    bootstrap_interval,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from minimonkey.scripts.evaluation.metrics import (
    METRICS,
    anls,
    edit_distance,
    exact_match,
    nearest_reference,
    normalise_vqa,
    ocrbench,
    ocrbench_formula,
    relaxed_accuracy,
    vqa_accuracy,
    word_accuracy,
)
from minimonkey.scripts.evaluation.predictions import Predictions, read_predictions
from minimonkey.scripts.evaluation.report import compare, score
from minimonkey.scripts.evaluation.runner import Answering, Asked, answer_suite, prediction
from minimonkey.scripts.evaluation.suites import SYNTHETIC, Item, Suite, read_benchmark, synthetic_suite
from minimonkey.scripts.synthetic.vocabulary import READ_ALL


TILES = {"min_tiles": 2, "max_tiles": 4, "adaptive_min_tiles": 1, "adaptive_max_tiles": 3}


@pytest.fixture
def run_here(monkeypatch, capsys):
    """evaluate.py without the start of another process: exit status, what it wrote and its errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            status = evaluate.main()
        except SystemExit as leaving:  # of argparse
            status = leaving.code
        return status, *capsys.readouterr()

    verbosity = transformers.logging.get_verbosity()
    yield run
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def report(written: str) -> dict:
    (line,) = [line for line in written.splitlines() if line.startswith("{")]
    return json.loads(line)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_edit_distance():
    assert [edit_distance(*pair) for pair in (("", "ab"), ("abc", "abc"), ("kitten", "sitting"))] == [2, 0, 3]
    assert nearest_reference("kitten", ["sitting", "kitchen"]) == ("kitchen", 2)  # ch for t


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Total  Due", ["total due"], 1.0),
        ("12.5O", ["12.50"], 0.8),  # one of five characters
        ("ab", ["abcd"], 0.5),  # at the threshold it counts
        ("a", ["abc"], 0.0),  # a third is below it
        ("cat", ["dog", "cast"], 0.75),  # the closest counts
        ("", ["x"], 0.0),
        ("abc", ["abd  "], 0.8),  # one edit, divided by the length as it is written
        ("abd\n\n", ["abc"], 0.8),
        ("ßab", ["ßac"], 0.75),  # and in upper case
        ("  ", [""], 1.0),
    ],
)
def test_anls(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("12%", "0.12", 1),
        ("12%", "12", 0),
        ("-10", "10", 0),
        ("0.01", "0", 0),  # no share of zero
        ("0", "0", 1),
        ("Apples", "apples", 1),
        ("1,000", "1000", 0),  # as the authors' code: no number
    ],
)
def test_relaxed_accuracy(answer, reference, expected):
    assert relaxed_accuracy(answer, [reference]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<box>[[0, 0, 100, 100]]</box>", 1),
        ("<box>[[0, 0, 100, 51]]</box>", 1),
        ("<box>[[0, 0, 100, 50]]</box>", 0),  # half is not more than half
        ("<box>[[200, 0, 300, 100]]</box>", 0),
        ("[0, 0, 100, 90]", 1),
        ("<box>[[0, 0, 100", 0),
        ("here", 0),
    ],
)
def test_a_box_counts_that_overlaps_by_more_than_half(answer, expected):
    assert METRICS["box"](answer, ["<box>[[0, 0, 100, 100]]</box>"]) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The total\nis 12", ["The total is 12"], 1.0),
        ("the total is 12", ["The total is 12"], 0.75),  # case counts
        ("The is 12", ["The total is 12"], 0.75),  # one is missing
        ("a b c d e f", ["x"], 0.0),  # six errors for one word
        ("one two", ["one", "one two three"], 2 / 3),  # the closest: one error for three words, not one for one
        ("", ["one"], 0.0),
    ],
)
def test_word_accuracy(answer, references, expected):
    assert word_accuracy(answer, references) == pytest.approx(expected)


def test_ocrbench():
    assert ocrbench("The sign says STOP\nhere.", ["stop here"]) == 1
    assert ocrbench("sto", ["stop"]) == 0
    assert ocrbench_formula("x ^ 2 + Y", ["x^2+Y"]) == 1
    assert ocrbench_formula("x^2+y", ["x^2+Y"]) == 0
    assert exact_match("Stop", ["stop", "Stop"]) == 1 and exact_match("Stop", ["stop"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("ice-cream", "ice cream"),
        ("ice - cream", "ice cream"),
        ("joe's", "joe 's"),
        ("a\nman", "man"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalise_vqa(text) == expected


def test_vqa_accuracy():
    people = ["red"] * 2 + ["blue"] * 8
    assert vqa_accuracy("Blue.", people) == 1.0
    # Two of ten leave one out that said red (1 other agrees), eight one that did not (2 agree).
    assert vqa_accuracy("red", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("green", people) == 0.0
    assert vqa_accuracy("The red", ["red"]) == 1.0


# --- intervals and reports -------------------------------------------------------------------------------------------


def test_intervals():
    low, high = wilson_interval(60, 100)
    assert (round(low, 3), round(high, 3)) == (0.502, 0.691)
    assert mean_interval([1.0] * 60 + [0.0] * 40) == (low, high)
    # 100 values with a standard deviation of 0.5: about 0.5 +- 1.96 * 0.05.
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)
    assert bootstrap_interval([0.3] * 5) == pytest.approx((0.3, 0.3))


def test_a_paired_difference_knows_that_items_are_the_same():
    rng = random.Random(0)
    first = [rng.random() for _ in range(50)]
    difference, low, high = paired_difference(first, [value + 0.1 for value in first])
    assert (difference, low, high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="50 and 49"):
        paired_difference(first, first[1:])


def predictions(answers: list[str], references: list[str], metric: str = "exact_match") -> list[dict]:
    items = [Item(str(i), [], "What?", [reference], metric) for i, reference in enumerate(references)]
    return [prediction(item, answer) | {"seconds": 0.5} for item, answer in zip(items, answers)]


def test_score():
    result = score(predictions(["one", "tow", ""], ["one", "two", "four"]))
    assert (result["items"], result["exact_match"], result["character_error_rate"]) == (3, 1 / 3, 6 / 10)
    assert (result["exact_match_low"], result["exact_match_high"]) == wilson_interval(1, 3)
    assert result["seconds"] == 1.5
    mixed = predictions(["one"], ["one"]) + predictions(["tow"], ["two"], "anls")
    assert score(mixed)["anls_items"] == 1


def test_comparing():
    first = {line["id"]: line for line in predictions(["one", "x", "x"], ["one", "two", "four"])}
    second = {line["id"]: line for line in predictions(["one", "two", "four"], ["one", "two", "four"])}
    result = compare(first, second)
    assert (result["difference"], result["better"], result["worse"]) == (pytest.approx(2 / 3), 2, 0)
    with pytest.raises(ValueError, match="different items"):
        compare(first, {"0": second["0"]})
    second["1"]["question"] = "Who?"
    with pytest.raises(ValueError, match="another question"):
        compare(first, second)


# --- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(tmp_path):
    """Three items, one of them with two pictures."""
    lines = []
    for number, text in enumerate(("tree", "house", "river")):
        picture = Image.new("RGB", (120 + 60 * number, 60), "white")
        ImageDraw.Draw(picture).text((10, 10), text, fill="black", font_size=30)
        picture.save(tmp_path / f"{number}.png")
        lines.append({"id": number, "image": f"{number}.png", "question": "Read the text.", "answers": [text]})
    lines[1] |= {"metric": "exact_match"}
    lines[2] |= {"image": ["0.png", "2.png"]}
    path = tmp_path / "benchmark.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "9.png"}, "line 3: there is no picture"),
        ({"id": 0}, "line 3: the id '0' was used before"),
        ({"answers": []}, "line 3: answers"),
        ({"question": " "}, "line 3: the question"),
        ({"metric": "bleu"}, "line 3: There is no metric 'bleu'"),
    ],
)
def test_a_wrong_line_is_named(benchmark, change, message):
    *lines, last = benchmark.read_text().splitlines()
    benchmark.write_text("\n".join([*lines, json.dumps(json.loads(last) | change)]))
    with pytest.raises(ValueError, match=message):
        read_benchmark(benchmark)
    assert len(read_benchmark(benchmark, items=2)) == 2


def test_a_benchmark_by_the_command_and_its_continuation(benchmark, tmp_path, run_here):
    out = tmp_path / "out" / "predictions.jsonl"
    tiles = [part for name, value in TILES.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = [
        "--benchmark",
        benchmark,
        *tiles,
        "--out",
        out,
        "--batch-size",
        2,
        "--dtype",
        "float32",
        "--max-new-tokens",
        8,
    ]
    result = subprocess.run(
        [sys.executable, "scripts/evaluate.py", *map(str, command), "--sheet", str(tmp_path / "sheet.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "3 items of benchmark" in result.stdout
    assert Image.open(tmp_path / "sheet.png").width >= 3 * 320
    whole = report(result.stdout)
    assert (whole["items"], whole["anls_items"], whole["exact_match_items"]) == (3, 2, 1)
    assert whole["image_tokens_per_item"] == whole["image_tokens_read_per_item"] > 49

    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == ["0", "1", "2"]
    out.write_text(lines[0] + lines[1][:30])  # as if killed while writing the second item of the first batch
    status, written, _ = run_here(*command, "--resume")
    assert status == 0 and {**report(written), "seconds": 0} == {**whole, "seconds": 0}
    seconds = {"seconds": 0}
    assert [json.loads(line) | seconds for line in out.read_text().splitlines()] == [
        json.loads(line) | seconds for line in lines
    ]

    status, _, errors = run_here(*command, "--resume", "--use-scm")
    assert status == 1 and "use_scm was False, is True" in errors


def test_compare_by_the_command(tmp_path, run_here):
    for name, answers in (("a", ["one", "x", "x"]), ("b", ["one", "two", "x"])):
        lines = predictions(answers, ["one", "two", "four"])
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, written, _ = run_here("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert status == 0 and report(written)["difference"] == pytest.approx(1 / 3)
    assert "1 better, 0 worse" in written
    status, _, errors = run_here("compare", tmp_path / "a.jsonl", tmp_path / "missing.jsonl")
    assert status == 1 and "missing.jsonl" in errors


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--items", 0], 2, "--items must be at least 1"),
        (["--drop", "random"], 2, "need --use-scm"),
        (["--scm-layer", 1], 2, "need --use-scm"),
        (["--resume"], 2, "--resume needs --out"),
        (["--suite", "page", "--clean"], 2, "use --difficulty"),
        (["--benchmark", "a.jsonl", "--questions", "text"], 2, "--questions belongs to rendered documents"),
        (["--suite", "word", "--questions", "values", "--items", 2], 1, "no questions for values"),
        (["--benchmark", "missing.jsonl"], 1, "no benchmark missing.jsonl"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(arguments, status, message, run_here):
    actual, _, errors = run_here(*arguments)
    assert actual == status and message in errors


@pytest.mark.parametrize("tiles", [["--preset", "docqva"], ["--min-tiles", 4, "--max-tiles", 2]], ids=str)
def test_wrong_tiles_are_refused_before_a_model_is_loaded(benchmark, tiles, run_here, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", None)
    status, _, errors = run_here("--benchmark", benchmark, *tiles)
    assert status == 1 and ("docvqa" in errors or "4 to 2" in errors)


# --- suites and answers ----------------------------------------------------------------------------------------------


def suite_of(name: str, items: int, **options) -> Suite:
    return synthetic_suite(name, items, seed=1, **options)


def test_every_kind_of_document_is_a_suite():
    from minimonkey.scripts.synthetic.documents import KINDS

    assert set(SYNTHETIC) == set(KINDS)
    for name in SYNTHETIC:
        suite = suite_of(name, 2)
        for index in range(2):
            item = suite.item(index)
            assert item.id == suite.ids[index] and item.images[0].width > 10
            assert len(item.answers[0].encode()) < suite.max_new_tokens
    with pytest.raises(ValueError, match="receipt"):
        synthetic_suite("novel", 1)


def test_questions_for_the_whole_text_or_for_values():
    for questions in ("text", "values"):
        suite = suite_of("seam", 12, questions=questions)  # some of its documents hold one word and no other question
        wordings = [suite.item(index).question in READ_ALL for index in range(12)]
        assert wordings == [questions == "text"] * 12
    with pytest.raises(ValueError, match="known are any, text, values"):
        synthetic_suite("seam", 1, questions="all")


def test_predictions_do_not_depend_on_where_a_run_was_interrupted(nano, processor, tmp_path):
    suite, settings = suite_of("scene", 5), {"suite": "scene"}
    answering = Answering(nano, processor, 6, TILES, scm_keep_ratio=0.5, compressor="random")
    (whole,) = answer_suite(suite, [Asked(answering, Predictions(None, settings))], batch_size=2)
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in whole[:3]))
    (tmp_path / "predictions.jsonl.settings.json").write_text(json.dumps(settings))
    (resumed,) = answer_suite(suite, [Asked(answering, Predictions(path, settings, resume=True))], batch_size=2)
    assert [line | {"seconds": 0} for line in resumed] == [line | {"seconds": 0} for line in whole]
    assert list(read_predictions(path)) == suite.ids


def test_a_random_choice_closes_up_or_keeps_its_places(nano, processor):
    suite = suite_of("page", 6)  # on some pages both ways read the same
    items, answers = [suite.item(number) for number in range(6)], {}
    for name in ("random", "random-original"):
        answering = Answering(nano, processor, 24, TILES, 0.3, name)
        images = [answering.open(item) for item in items]
        answers[name] = [answer.text for answer in answering(items, images)]
        assert answering.count_tokens(images[0])[1] < answering.count_tokens(images[0])[0]
    chosen = [selection(name, ["a"])["select"](0, 98, 49) for name in answers]
    assert chosen[0] == chosen[1] and answers["random"] != answers["random-original"]


def test_tiles_that_several_ways_show_are_encoded_once(nano, processor, monkeypatch):
    suite, encoded, encode = suite_of("scene", 3), [], type(nano).encode_tiles

    def count(model, pixel_values):
        encoded.append(len(pixel_values))
        return encode(model, pixel_values)

    monkeypatch.setattr(type(nano), "encode_tiles", count)
    ways = [Answering(nano, processor, 6, TILES, *options) for options in ((), (0.5, "random"), (0.5, "token"))]
    apart = [answer_suite(suite, [Asked(way, Predictions(None, {}))], batch_size=2)[0] for way in ways]
    once, encoded[:] = encoded[: len(encoded) // 3], []
    together = answer_suite(suite, [Asked(way, Predictions(None, {})) for way in ways], batch_size=2)
    assert encoded == once and len(once) == 2
    for first, second in zip(apart, together):
        assert [line | {"seconds": 0} for line in first] == [line | {"seconds": 0} for line in second]
    assert "encode_tiles" not in vars(nano)


def test_a_new_run_keeps_the_old_file_until_there_is_an_answer(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("old\n")
    fresh = Predictions(path, {})
    assert path.read_text() == "old\n"
    fresh.add(predictions(["one"], ["one"]))
    assert len(read_predictions(path)) == 1


def test_damaged_predictions_are_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "1"\n{"id": "2", "metric": "anls", "score": 1}\n')
    with pytest.raises(ValueError, match="line 1: no JSON"):
        read_predictions(path)
    with pytest.raises(ValueError, match="settings.json is missing"):
        Predictions(path, {}, resume=True)


# --- dropping --------------------------------------------------------------------------------------------------------


def test_choosing_evenly_and_by_chance():
    assert choose(10, 5, "uniform", random.Random()) == [1, 3, 5, 7, 9]
    assert choose(7, 3, "uniform", random.Random()) == [1, 3, 5]
    assert choose(7, 7, "uniform", random.Random()) == list(range(7))
    chosen = choose(100, 30, "random", random.Random("a"))
    assert chosen == sorted(set(chosen)) and len(chosen) == 30
    assert chosen == choose(100, 30, "random", random.Random("a")) != choose(100, 30, "random", random.Random("b"))


def kept(model, inputs, drop: str, names: list[str]) -> list[list[int]]:
    options = {"scm_keep_ratio": 0.3, "scm_select": selection(drop, names)}
    return [row.tolist() for row in model.kept_positions(**inputs, **options)]


def test_every_way_of_dropping_drops_as_many(nano, processor):
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in ((300, 200), (200, 340))]
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Read."}]}]
        for picture in pictures
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images_kwargs": TILES, "padding": True},
    )
    rows = {drop: kept(nano, inputs, drop, ["a", "b"]) for drop in ("scm", "random", "uniform")}
    assert rows["scm"] == [row.tolist() for row in nano.kept_positions(**inputs, scm_keep_ratio=0.3)]
    assert (
        [len(row) for row in rows["scm"]]
        == [len(row) for row in rows["random"]]
        == [len(row) for row in rows["uniform"]]
    )
    assert len({json.dumps(row) for row in rows.values()}) == 3
    assert rows["random"] == kept(nano, inputs, "random", ["a", "b"]) != kept(nano, inputs, "random", ["c", "d"])
    for row, (counts, mask) in enumerate(zip(inputs["tile_counts"], inputs["attention_mask"])):
        lost = int(mask.sum()) - len(rows["uniform"][row])
        assert lost == 49 * counts[0] - int(49 * counts[0] * 0.3)
    scm = {"use_scm": True, "scm_select": selection("random", ["a"]), "images_kwargs": TILES, "max_new_tokens": 1}
    with pytest.raises(ValueError, match="1 names for more rows"):  # chat goes there too
        nano.batch_chat(processor, pictures, ["Read."] * 2, **scm)


@torch.no_grad()
def test_tokens_are_counted_before_and_after(nano, processor):
    answering = Answering(nano, processor, 4, TILES, scm_keep_ratio=0.5)
    picture = Image.new("RGB", (300, 200), "white")
    inputs = processor.image_processor(picture, **TILES)
    detailed, adaptive, thumbnail = inputs["tile_counts"][0]
    total, read = answering.count_tokens([picture])
    assert total == 49 * (detailed + adaptive + thumbnail)
    assert total - read == 49 * detailed - int(49 * detailed * 0.5)
