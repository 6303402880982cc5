"""Training without a recipe: data of one's own, and what the model and the machine decide."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from training_helpers import draw, line, metrics, write_lines

from minimonkey.scripts import finetune as script
from minimonkey.scripts.benchmarking.models import random_config
from minimonkey.scripts.training import own_options as options_module
from minimonkey.scripts.training.own_data import count_examples, own_data
from minimonkey.scripts.training.own_options import count_parameters, own_options


@pytest.fixture
def photos(tmp_path):
    """A folder with two images, and no table yet."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        draw(folder / f"{name}.png", name)
    return folder


TABLES = {
    "rows.csv": "image,question,answer\na.png,Which?,one\nb.png,Which?,two\n",
    "rows.tsv": "file\tlabel\na.png\tone\nb.png\ttwo\n",
    "metadata.csv": "\ufefffile_name,text\na.png,one\nb.png,two\n",
    "rows.jsonl": '{"image": "a.png", "answers": ["one", "1"]}\n\n{"image": ["b.png"], "answer": "two"}\n',
    "talks.jsonl": "".join(
        json.dumps(line("<image>\nWhich?", word, name)) + "\n" for name, word in (("a.png", "one"), ("b.png", "two"))
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_folder_with_a_table_is_taken_as_it_is(photos, tmp_path, name):
    (photos / name).write_text(TABLES[name], encoding="utf-8")
    data = own_data(photos, tmp_path / "out", "Which?")
    ((_, entry),) = data.items()
    assert entry["root"] == str(photos) and count_examples(data) == 2
    rows = [json.loads(text) for text in Path(entry["annotation"]).read_text(encoding="utf-8").splitlines()]
    turns = [[message["value"] for message in row["conversations"]] for row in rows]
    assert turns == [["<image>\nWhich?", "one"], ["<image>\nWhich?", "two"]]
    assert data == own_data(photos, tmp_path / "out", "Which?")  # the same file, so that a run can be resumed


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found none"),
        ({"a.csv": "", "b.csv": ""}, "found a.csv, b.csv"),
        ({"a.csv": "image,answer\n"}, "one or more rows"),
        ({"a.csv": "image,answer\na.png\n"}, "row 1: 2 columns"),
        ({"a.csv": "picture,answer\na.png,x\n"}, "none of the columns image, .* the row has picture, answer"),
        ({"a.csv": "image,answer\na.png,x\n"}, "there is no question"),
        ({"a.jsonl": "{\n"}, "line 1: this is not JSON"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(photos, tmp_path, files, message):
    for name, text in files.items():
        (photos / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        own_data(photos, tmp_path / "out")


def test_no_such_data(tmp_path):
    with pytest.raises(ValueError, match="There is no data"):
        own_data(tmp_path / "nowhere.csv", tmp_path)


def test_a_meta_json_stays_one(tmp_path):
    annotation = write_lines(tmp_path, [line("Who?", "Me."), line("Who?", "You.")])
    (tmp_path / "meta.json").write_text(
        json.dumps({"a": {"annotation": annotation}, "b": {"synthetic": "word", "length": 5}})
    )
    data = own_data(tmp_path / "meta.json", tmp_path / "out")
    assert data == str(tmp_path / "meta.json") and count_examples(data) == 7


def test_crops_of_pdf_documents_are_counted_as_they_are_asked_for():
    assert count_examples({"manuals": {"pdf": "manuals/*.pdf", "length": 3}}) == 3


def test_the_short_command_trains_and_resumes(photos, tmp_path, capsys):
    (photos / "rows.csv").write_text(TABLES["rows.csv"])
    out = tmp_path / "out"
    command = ["--data", str(photos), "--output", str(out), "--set", "depth=1", "--set", "use_cpu=true"]
    command += ["--set", "max_steps=2", "--set", "save_steps=1"]
    script.main(command)
    assert "minimonkey chat" in capsys.readouterr().out
    report = metrics(out)
    assert report["examples"] == 2 and report["steps"] == 2
    assert (out / "model" / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        script.main(command)
    script.main([*command, "--resume"])
    assert "Going on from" in capsys.readouterr().out


def test_options_follow_the_model(monkeypatch, tmp_path):
    small = own_options(str(ROOT), {}, 20, tmp_path)
    assert small["train"] == ["language_model", "projector", "vision"] and "lora_r" not in small
    assert small["tile_ranges"] == [[4, 12, 3, 7]]  # as Nano's processor cuts
    assert (small["batch_size"], small["num_train_epochs"]) == (8, 25)
    assert own_options(str(ROOT), {}, 100_000, tmp_path)["num_train_epochs"] == 1
    monkeypatch.setattr(options_module, "count_parameters", lambda config: 2e9)
    large = own_options(str(ROOT), {}, 20, tmp_path)
    assert large["lora_r"] == 16 and "train" not in large and large["per_device_train_batch_size"] == 1


@pytest.mark.parametrize(("size", "billions"), [("1B", 0.938), ("2B", 2.206), ("4B", 4.147)])
def test_parameters_are_counted_without_memory(size, billions):
    assert count_parameters(random_config(size)) / 1e9 == pytest.approx(billions, abs=0.001)


def test_the_command_line_changes_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: x, output_dir: y, data: z, learning_rate: 1.0, train: [vision], use_cpu: true}")
    args = script.parse_arguments([str(recipe), "--model", "other", "--output", "runs/o", "--lora", "4"])
    chosen = script.choose_recipe(args)
    assert (chosen.model, chosen.output_dir, chosen.lora_r, chosen.learning_rate) == ("other", "runs/o", 4, 1e-4)
    assert chosen.train == ["language_model"]


@pytest.mark.parametrize("arguments", [[], ["recipe.yaml", "--question", "Which?"]])
def test_command_lines_that_cannot_be_meant(arguments, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(arguments)
    assert "--data" in capsys.readouterr().err
