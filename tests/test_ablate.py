"""Ways to show a picture, side by side: what is compared with what, and the command that does it."""

import json

import pytest
import torch
import transformers
from conftest import synthetic_picture
from model_helpers import tiny_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from minimonkey.scripts import ablate
from minimonkey.scripts.evaluation.flops import encoder_flops, prefill_flops, way_flops
from minimonkey.scripts.evaluation.runner import Answering
from minimonkey.scripts.evaluation.suites import Item
from minimonkey.scripts.evaluation.tables import Comparison, markdown
from minimonkey.scripts.evaluation.ways import (
    DEFAULT_COMPRESSORS,
    DEFAULT_TILINGS,
    Way,
    compressions,
    tilings,
)
from minimonkey.tiling import RANGE_NAMES, TILINGS, choose_grids, tile_counts


RANGES = (4, 12, 3, 7)
TILED = ("msac", "internvl", "detailed", "whole")


def predictions(scores: list[float], tokens: int = 100) -> list[dict]:
    return [
        {
            "id": str(number),
            "question": "What?",
            "answers": ["ab"],
            "metric": "exact_match",
            "score": score,
            "reference": "ab",
            "edits": int(not score),
            "image_tokens": 200,
            "image_tokens_read": tokens,
            "seconds": 0.5,
        }
        for number, score in enumerate(scores)
    ]


def counts_of(way: Way, width: int = 400, height: int = 300) -> tuple[int, int, int]:
    options = way.images_kwargs
    grids = choose_grids(width, height, tuple(options[name] for name in RANGE_NAMES), 112, options["tiling"])
    return tile_counts(*grids, options["use_thumbnail"])


def test_tilings_differ_in_their_tiles():
    whole, detailed, internvl, msac = (counts_of(way) for way in tilings(RANGES, TILED[::-1]))
    assert (whole, detailed, internvl) == ((0, 0, 1), (msac[0], 0, 0), (msac[0], 0, 1))
    assert msac[0] == 12 and msac[1] > 1
    for way in tilings(RANGES, TILINGS):
        assert counts_of(way) == tile_counts(*choose_grids(400, 300, RANGES, 112, way.name))
    assert [way.images_kwargs["drop_blank"] for way in tilings(RANGES, ["msac", "blank"])] == [False, True]


def test_ways_have_files_of_their_own():
    slugs = [way.slug for way in (*tilings(RANGES), *compressions(RANGES))]
    assert len(set(slugs)) == len(slugs) == len(DEFAULT_TILINGS) + 3 * len(DEFAULT_COMPRESSORS)
    assert all(slug.replace("-", "").isalnum() for slug in slugs)


@pytest.mark.parametrize("name", ["best", "token@nobody", "smaller-square", "random@last", "mass", "@last"])
def test_unknown_ways_are_refused(name):
    with pytest.raises(ValueError, match=f"no compressor {name!r}"):
        compressions(RANGES, [name])
    with pytest.raises(ValueError, match="no tiling 'square'"):
        tilings(RANGES, ["msac", "square"])


def test_tilings_are_compared_with_the_first():
    scores = ([1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0])
    shown = {way: predictions(values) for way, values in zip(tilings(RANGES, TILED), scores)}
    rows = Comparison("seams", "tilings", shown).rows()
    assert [row["score"] for row in rows] == [0.75, 0.5, 0.25, 0]
    assert [row.get("compared_with") for row in rows] == [None, "msac", "msac", "msac"]
    assert [row["difference"] for row in rows[1:]] == [-0.25, -0.5, -0.75]
    assert [(row["better"], row["worse"]) for row in rows[1:]] == [(0, 1), (0, 2), (0, 3)]
    assert rows[0]["character_error_rate"] == 0.125 and rows[0]["seconds"] == 0.5


def test_compressors_are_compared_with_all_tokens_and_with_the_smaller_grid():
    (full,) = tilings(RANGES, ["msac"])
    shown = {full: predictions([1, 1], 200)}
    ways = compressions(RANGES, ["random", "smaller-internvl", "token@question"])
    shown |= {way: predictions([1, int(way.compressor.startswith("token"))]) for way in ways}
    rows = {row["way"]: row for row in Comparison("receipts", "compression", shown).rows()}
    assert rows["token@question 0.5"]["compared_with"] == "msac" and rows["token@question 0.5"]["difference"] == 0
    assert rows["token@question 0.5"]["to_smaller"]["compared_with"] == "smaller-internvl 0.5"
    assert rows["token@question 0.5"]["to_smaller"]["difference"] == 0.5
    assert rows["random 0.25"]["to_smaller"]["difference"] == 0 and rows["random 0.25"]["difference"] == -0.5
    assert "to_smaller" not in rows["smaller-internvl 0.25"] and "to_smaller" not in rows["msac"]
    counted = [{**row, "encoder_flops": 2.5e9, "prefill_flops": 1e9} for row in rows.values()]
    (table,) = [text for text in markdown(counted).split("\n\n") if text.strip()]
    assert "| receipts | random 0.25 | 50.0% |" in table
    assert "| 2.5 | 1 | 0.50 |  | -50.0 (-100.0 to +0.0) | +0.0 (+0.0 to +0.0) |" in table


def test_flops_grow_with_tiles_and_tokens_and_count_the_scoring_pass(nano):
    config = nano.config
    assert encoder_flops(config, 8) == 8 * encoder_flops(config, 1) > 0
    assert prefill_flops(config, 200) > 2 * prefill_flops(config, 100)
    msac, smaller, token, features, layer = (
        way_flops(config, way, 700, 500, 1)
        for way in (
            *tilings(RANGES, ["msac"]),
            *compressions(RANGES, ["smaller-internvl", "token", "features", "layer"], [0.5]),
        )
    )
    assert msac == smaller == features == (encoder_flops(config, 700 / 49), prefill_flops(config, 500))
    assert msac[1] < token[1] < layer[1] < prefill_flops(config, 700) + prefill_flops(config, 700, 3)
    small = tiny_model(head_dim=16)
    small.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small.model.language_model(inputs_embeds=torch.randn(1, 60, 32), use_cache=False)
    half = 2 * 2 * 60**2 * 32  # layers, and the attention to later tokens, which is computed and masked
    assert counter.get_total_flops() == pytest.approx(prefill_flops(small.config, 60) + half, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small.encode_tiles(torch.randn(3, 3, 28, 28))
    assert counter.get_total_flops() == pytest.approx(
        encoder_flops(small.config, 3), rel=0.25
    )  # attention is not counted


def test_a_smaller_grid_has_at_most_as_many_tokens(nano, processor):
    pictures = [[synthetic_picture(300, 200, 1)], [synthetic_picture(90, 400, 2)], [synthetic_picture(250, 250, 3)]]
    (full,) = tilings(RANGES, ["msac"])
    for tiling in ("internvl", "msac"):
        smaller = Answering(nano, processor, 4, full.images_kwargs, 0.5, f"smaller-{tiling}")
        compressed = Answering(nano, processor, 4, full.images_kwargs, 0.5, "token")
        for images in pictures:
            tokens, read = smaller.count_tokens(images)
            whole, most = compressed.count_tokens(images)
            assert tokens == read <= most < whole
    items = [Item(str(i), images, "Read.", ["x"], "exact_match") for i, images in enumerate(pictures)]
    answers = smaller(items, pictures)
    assert answers == [smaller([item], [images])[0] for item, images in zip(items, pictures)]


def test_tokens_without_blank_tiles_are_those_of_the_prompt(nano, processor):
    page = Image.new("RGB", (800, 1000), "white")
    page.paste(synthetic_picture(200, 100, 1), (20, 20))
    (blank,) = tilings(RANGES, ["blank"])
    tokens, _ = Answering(nano, processor, 4, blank.images_kwargs).count_tokens([page])
    inputs = processor(page, "<image>", images_kwargs=blank.images_kwargs)
    assert tokens == int((inputs["input_ids"] == processor.image_token_id).sum())


@pytest.fixture(autouse=True)
def verbosity():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


def test_the_command_writes_tables_and_figure_and_goes_on(tmp_path, capsys):
    command = [str(tmp_path), "--suites", "seams"]
    command += ["--tilings", "whole", "--compressors", "random", "token@last", "smaller-internvl"]
    command += ["--compressed", "seams", "--keep-ratios", "0.25", "--items", "2", "--difficulty", "0"]
    assert ablate.main(command) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["subject"] for row in rows] == ["tilings"] * 2 + ["compression"] * 4
    kept = {row["way"]: row["image_tokens_read"] for row in rows if row["subject"] == "compression"}
    assert kept["msac"] > kept["token@last 0.25"] == kept["random 0.25"] >= kept["smaller-internvl 0.25"]
    assert all(row["encoder_flops"] > 0 and row["prefill_flops"] > 0 for row in rows)
    assert (tmp_path / "ablation.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "ablation.png") as figure:
        assert figure.width > 600
    answered = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert len(answered) == 5
    (tmp_path / "seams.msac.jsonl").write_text("")
    assert ablate.main(command) == 0
    again = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert {name for name in again if again[name] != answered[name]} <= {"seams.msac.jsonl"}
    assert [json.loads(line)["answer"] for line in again["seams.msac.jsonl"].splitlines()] == [
        json.loads(line)["answer"] for line in answered["seams.msac.jsonl"].splitlines()
    ]
    command[command.index("--suites") + 1 : command.index("--suites") + 2] = ["lines", "seams"]
    assert ablate.main([*command, "--seed", "5"]) == 1
    assert "seed was 0, is 5" in capsys.readouterr().err
    assert not (tmp_path / "lines.whole.jsonl").exists()  # said before anything is read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suites", "seams", "--compressed", "lines"], "not among --suites"),
        (["--items", "1"], "at least 2"),
        (["--keep-ratios", "0.5", "1"], "between 0 and 1"),
        (["--preset", "docqva"], "known are default"),
        (["--compressors", "best"], "no compressor 'best'"),
        (["--tilings", "square"], "invalid choice: 'square'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        ablate.main([str(tmp_path), *options])
    assert refusal.value.code == 2 and message in capsys.readouterr().err
