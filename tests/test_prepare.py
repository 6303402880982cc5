"""`minimonkey prepare`: from the layout of a download to conversations that training reads, with what is refused and why."""

import json
import shutil

import pytest
from clips import write_clip
from download_helpers import CAMERAS, DOWNLOADS, image
from PIL import Image
from training_helpers import metrics

from minimonkey.multi_view import StitchedViews
from minimonkey.scripts import finetune
from minimonkey.scripts.evaluation.suites import read_benchmark
from minimonkey.scripts.prepare import main
from minimonkey.scripts.preparing.conversations import from_shares, from_turned, upright_box
from minimonkey.scripts.preparing.drivelm import to_cameras, to_stitched, with_options
from minimonkey.scripts.preparing.records import Record, Writer
from minimonkey.scripts.preparing.sets import GROUPS, SETS
from minimonkey.scripts.training.data import read_sources
from minimonkey.scripts.training.encode import Encoder


RANGES = [[4, 12, 3, 7]]


def prepared(name: str, tmp_path, *options: str) -> tuple[list[dict], dict, list[dict]]:
    """Run the command on a made-up download: the lines, the meta JSON, and what was refused."""
    download, out = tmp_path / "download", tmp_path / "out"
    if not download.exists():
        DOWNLOADS[name](download)
    assert main([name, str(download), str(out), *options]) == 0
    split = options[options.index("--split") + 1] if "--split" in options else "train"
    label = name if split == "train" else f"{name}-{split}"
    return read(out / f"{label}.jsonl"), read_meta(out), read(out / f"{label}.refused.jsonl")


def read(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def read_meta(out) -> dict:
    return json.loads((out / "meta.json").read_text()) if (out / "meta.json").exists() else {}


def texts(line: dict) -> list[str]:
    return [message["value"] for message in line["conversations"]]


@pytest.mark.parametrize("name", [name for name in DOWNLOADS if name in SETS])
def test_every_set_becomes_data_that_training_reads(name, tmp_path, processor, nano):
    lines, meta, refused = prepared(name, tmp_path)
    assert lines and meta[name]["length"] == len(lines)
    (source,) = read_sources(str(tmp_path / "out" / "meta.json"), tmp_path, RANGES, Encoder(processor, nano.config))
    assert source.size == len(lines)
    assert all(entry["reason"] for entry in refused)
    assert Image.open(tmp_path / "out" / f"{name}.png").width > 300


@pytest.mark.parametrize(
    ("name", "split"),
    [(name, split) for name in SETS for split in SETS[name].tests if name in DOWNLOADS and name != "drivelm"],
)
def test_every_test_split_becomes_a_benchmark(name, split, tmp_path):
    if split == "test_phili":
        DOWNLOADS[name](tmp_path / "download")
        for part in ("questions", "answers"):
            folder = tmp_path / "download"
            shutil.copy(folder / f"USGS_split_test_{part}.json", folder / f"USGS_split_test_phili_{part}.json")
    prepared(name, tmp_path, "--split", split)
    assert len(read_benchmark(tmp_path / "out" / f"{name}-{split}.jsonl"))


@pytest.mark.parametrize("name", ["drivelm", "geochat", "llava-mix665k", "bdd", "slake"])
def test_from_download_to_a_training_step(name, tmp_path):
    prepared(name, tmp_path)
    out = tmp_path / "run"
    command = ["--data", str(tmp_path / "out" / "meta.json"), "--output", str(out)]
    finetune.main(
        [*command, *(f"--set={text}" for text in ("depth=1", "use_cpu=true", "max_steps=1", "disable_tqdm=true"))]
    )
    assert metrics(out)["steps"] == 1 and metrics(out)["losses"]["1"] > 0


# --- DriveLM ---------------------------------------------------------------------------------------------------------


def test_drivelm_is_stitched_with_points_in_thousandths_and_options(tmp_path):
    lines, meta, refused = prepared("drivelm", tmp_path)
    stitched = Image.open(tmp_path / "out" / lines[0]["image"])
    assert stitched.size == (2688, 896)
    assert stitched.getpixel((600, 300))[0] > 200  # CAM_FRONT_LEFT is red
    assert meta["drivelm"]["tile_ranges"] == [[1, 12, 1, 1]]
    # The middle of CAM_BACK, the second of three columns in the second of two rows.
    assert "<c1,CAM_BACK,[500, 750]>" in texts(lines[0])[1]
    (moving,) = [line for line in lines if "frame1" in line["id"] and "moving status" in texts(line)[0]]
    assert "following options: A. " in texts(moving)[0] and texts(moving)[1] in "AB"
    letter = texts(moving)[1]
    assert f"{letter}. Going ahead." in texts(moving)[0]
    assert len(refused) == 2 and all("CAM_BACK" in entry["reason"] for entry in refused)  # 900 of 160 pixels


def test_drivelms_scored_questions_have_tags(tmp_path):
    lines, _, _ = prepared("drivelm", tmp_path, "--split", "eval")
    first = [line for line in lines if line["frame"] == "scene_frame1"]
    assert [line["tag"] for line in first] == [2, 0, 3, 0, 1, 0]
    assert len(read_benchmark(tmp_path / "out" / "drivelm-eval.jsonl")) == len(lines) == 12


def test_key_objects_are_drawn(tmp_path):
    prepared("drivelm", tmp_path, "--draw-objects")
    drawn = Image.open(tmp_path / "out" / "stitch" / "scene_frame1.jpg")
    edge = drawn.getpixel((896 + round(70 / 160 * 896), 448 + round(45 / 90 * 448)))
    assert edge != drawn.getpixel((896 + 100, 448 + 300))


def test_tags_go_there_and_back():
    views = StitchedViews(Image.new("RGB", (1, 1)), CAMERAS, ((1600, 900),) * 6, 3, (896, 448))
    for camera in CAMERAS:
        for x, y in ((0.0, 0.0), (1088.3, 497.5), (1600.0, 900.0)):
            there = to_stitched(f"see <c1,{camera},{x},{y}>.", views)
            back = to_cameras(there).split(",")
            assert abs(float(back[2]) - x) <= 1600 * 3 / 2000 + 0.05
            assert abs(float(back[3].split(">")[0]) - y) <= 0.95
    assert (
        to_cameras("<c1,CAM_NONE,[1, 2]> and <c2,CAM_BACK,[1001, 2]>")
        == "<c1,CAM_NONE,[1, 2]> and <c2,CAM_BACK,[1001, 2]>"
    )


def test_options_hold_the_right_one_once():
    choices = [f"choice {i}" for i in range(9)]
    for seed in "abcdef":
        question, letter = with_options("Q?", "choice 3", choices, seed)
        assert question.count("choice 3") == 1 and f"{letter}. choice 3" in question
    assert with_options("Q?", "choice 3", choices, "a") == with_options("Q?", "choice 3", choices, "a")


# --- others ----------------------------------------------------------------------------------------------------------


def test_bdd_has_numbered_frames_and_refuses_clips_without(tmp_path):
    lines, _, refused = prepared("bdd", tmp_path)
    assert [len(line["image"]) for line in lines] == [3, 2]
    assert texts(lines[1])[0] == "Frame-1: <image>\nFrame-2: <image>\nWhat is the car doing?"
    assert [entry["id"] for entry in refused] == ["2-clip9"] and "clip9_0.png" in refused[0]["reason"]
    items, _, _ = prepared("bdd", tmp_path, "--split", "test")
    assert [item["kind"] for item in items[:3]] == ["description", "justification", "control"]


def test_bdd_takes_frames_of_videos(tmp_path):
    DOWNLOADS["bdd"](tmp_path / "download")
    shutil.rmtree(tmp_path / "download" / "BDD_X_imgs_select")
    (tmp_path / "download" / "videos").mkdir()
    write_clip(tmp_path / "download" / "videos" / "clip7.mp4", step=5)
    lines, _, refused = prepared("bdd", tmp_path)
    assert len(lines) == 1 and len(lines[0]["image"]) > 1 and len(refused) == 2


def test_dior_counts_objects_over_all_annotations(tmp_path):
    lines, _, refused = prepared("dior-rsvg", tmp_path)
    assert [line["id"] for line in lines] == ["0", "4"]
    assert texts(lines[1]) == [
        "<image>\nDetect <ref>the ship 16</ref>",
        "<ref>the ship 16</ref><box>[[200, 100, 600, 500]]</box>",
    ]
    assert lines[1]["image"] == "JPEGImages/00002.jpg"
    reasons = {entry["id"]: entry["reason"] for entry in refused}
    assert "90" in reasons["2"] and reasons["6"] == "the annotations hold 6 objects"


def test_rsvqa_refuses_what_has_no_answer(tmp_path):
    lines, _, refused = prepared("rsvqa-lr", tmp_path)
    assert len(lines) == 3 and [entry["id"] for entry in refused] == ["8"]
    assert texts(lines[0])[0].endswith("Is there water?\nAnswer the question using a single word or phrase.")


def test_scenes_list_their_candidates_and_split_in_two(tmp_path):
    train, _, _ = prepared("scenes", tmp_path)
    test, _, _ = prepared("scenes", tmp_path, "--split", "test")
    assert "classes: Airport, Beach." in texts(train[0])[0] and texts(train[0])[1] == "Airport"
    assert len(train) + len(test) == 24 and not {line["id"] for line in train} & {line["id"] for line in test}


def test_llavas_boxes_are_shares_of_the_padded_square(tmp_path):
    lines, _, refused = prepared("llava-mix665k", tmp_path)
    # 200 x 100 pixels, padded by 50 above and below: y 0.25 is the upper edge, 0.75 the lower.
    assert texts(lines[0]) == ["<image>\nWhere?", "<box>[[250, 0, 500, 1000]]</box>"]
    assert lines[1]["image"] == "ocr_vqa/images/2.png"
    assert "image" not in lines[2]
    assert len(refused) == 1 and "is none of an image of 200 x 100 pixels" in refused[0]["reason"]
    assert from_shares("no box: [1, 2, 3, 4]", (10, 10)) == "no box: [1, 2, 3, 4]"


@pytest.mark.parametrize(
    ("turned", "upright"),
    [
        ((10, 20, 30, 40, 0), [100, 200, 300, 400]),
        ((10, 20, 30, 60, 90), [0, 300, 400, 500]),
        ((40, 40, 60, 60, 45), [359, 359, 641, 641]),
        ((0, 0, 20, 20, 45), [0, 0, 241, 241]),
    ],
)
def test_turned_boxes_become_upright(turned, upright):
    assert upright_box(*turned) == upright


def test_geochats_phrases_and_tags():
    text = (
        "[refer] <p>a ship</p> {<10><20><30><40>|<0>}<delim>{<0><0><10><10>|<0>} near <p>quay</p>{<0><0><50><50>|<0>}"
    )
    assert from_turned(text, (1, 1)) == (
        "<ref>a ship</ref><box>[[100, 200, 300, 400], [0, 0, 100, 100]]</box>near <ref>quay</ref><box>[[0, 0, 500, 500]]</box>"
    )


def test_slake_takes_one_language_and_pmc_vqa_letters(tmp_path):
    assert len(prepared("slake", tmp_path / "slake")[0]) == 2
    lines, _, refused = prepared("pmc-vqa", tmp_path / "pmc")
    assert (
        texts(lines[0])[0].splitlines()[1:4] == ["Which?", "A. choice A", "B. choice B"] and texts(lines[0])[1] == "B"
    )
    assert "the answer 'E'" in refused[0]["reason"]


def test_the_playground_is_checked_and_keeps_its_meta(tmp_path, capsys):
    DOWNLOADS["playground"](tmp_path / "download")
    assert main(["playground", str(tmp_path / "download"), str(tmp_path / "out")]) == 0
    meta = read_meta(tmp_path / "out")
    assert len(meta) == 7 and all(entry["length"] == 1 and entry["repeat_time"] == 1 for entry in meta.values())
    said = capsys.readouterr().out
    assert "docvqa_train_10k: published with 10211 lines, here are 1" in said and "1 refused" in said


def test_a_group_takes_published_folders_and_general_data(tmp_path, capsys):
    for name, (folder, *_) in GROUPS["remote-sensing"].items():
        DOWNLOADS[name](tmp_path / "download" / folder)
    DOWNLOADS["playground"](tmp_path / "playground")
    assert main(["playground", str(tmp_path / "playground"), str(tmp_path / "general")]) == 0
    command = ["remote-sensing", str(tmp_path / "download"), str(tmp_path / "out")]
    assert main([*command, "--general", str(tmp_path / "general" / "meta.json"), "--general-share", "0.5"]) == 0
    meta = read_meta(tmp_path / "out")
    domain = sum(meta[name]["length"] for name in GROUPS["remote-sensing"])
    assert meta["docvqa_train_10k"]["repeat_time"] == pytest.approx(0.5 * domain / 7)
    shutil.rmtree(tmp_path / "download" / "FIT-RS")
    assert main(command) == 1
    assert "missing: fit-rs (FIT-RS)" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in DOWNLOADS if name != "scenes"])
def test_what_a_download_lacks_is_said_by_name(name, tmp_path, capsys):
    (tmp_path / "download").mkdir()
    image(tmp_path / "download" / "other.png")
    assert main([name, str(tmp_path / "download"), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "is not whole; missing: " in said and "The folder holds other.png" in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_cut_off_is_named(tmp_path, capsys):
    DOWNLOADS["slake"](tmp_path / "download")
    path = tmp_path / "download" / "train.json"
    path.write_text(path.read_text()[:50])
    assert main(["slake", str(tmp_path / "download"), str(tmp_path / "out")]) == 1
    assert "train.json is not JSON, perhaps not wholly downloaded" in capsys.readouterr().err


def test_a_limit_is_a_sample_that_the_seed_decides(tmp_path):
    ids = [[line["id"] for line in prepared("scenes", tmp_path, "--limit", "5", "--seed", seed)[0]] for seed in "112"]
    assert len(ids[0]) == 5 and ids[0] == ids[1] != ids[2]


def test_a_record_is_refused_for_what_training_would_refuse(tmp_path):
    good = image(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:20])
    records = [
        Record("good", (good,), (("<image>\nQ", "A"),)),
        Record("good", (good,), (("<image>\nQ", "A"),)),
        Record("count", (good,), (("Q", "A"),)),
        Record("cut", (tmp_path / "cut.png",), (("<image>\nQ", "A"),)),
        Record("empty", (), (("Q", " "),)),
        Record("box", (good,), (("<image>\nQ", "<box>[[1, 2, 3]]</box>"),)),
        Record("outside", (good,), (("<image>\nQ", "<box>[[1, 2, 3, 4000]]</box>"),)),
    ]
    writer = Writer(tmp_path, "x", tmp_path, is_benchmark=False)
    writer.write(records)
    reasons = {entry["id"]: entry["reason"] for entry in read(tmp_path / "x.refused.jsonl")}
    assert writer.written == 1 and set(reasons) == {"good", "count", "cut", "empty", "box", "outside"}
    assert "used before" in reasons["good"] and "list of boxes" in reasons["box"]
    assert "6 refused" in writer.report()
