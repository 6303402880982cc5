"""Data of training: files to samples, and the order in which they come."""

import json
import types

import pytest
import torch
from conftest import ROOT
from PIL import ExifTags, Image
from training_helpers import ONE_TILE, draw, line, stand_in_documents, write_lines, write_words
from transformers.utils import is_kernels_available

from minimonkey.scripts.synthetic.text_images import CharacterBox
from minimonkey.scripts.training.collator import Collator
from minimonkey.scripts.training.data import IMAGE_PLACEHOLDER, picture_size, read_sources
from minimonkey.scripts.training.encode import IGNORED, Conversation, Encoder, tile_options
from minimonkey.scripts.training.letters import CHARACTER_CLASS, cell_labels
from minimonkey.scripts.training.recipe import Recipe, changed_options, read_recipe
from minimonkey.scripts.training.samples import Samples
from minimonkey.tiling import RANGE_NAMES


MSAC = [[1, 4, 1, 3]]


@pytest.fixture(scope="module")
def encoder(processor, nano):
    return Encoder(processor, nano.config)


def recipe(**values) -> Recipe:
    required = {"model": "m", "output_dir": "o", "data": {}, "learning_rate": 1e-3}
    return Recipe(**{**required, "batch_size": 2, "use_cpu": True, "bf16": False, **values})


def samples(folder, encoder, entries: dict, ranges=ONE_TILE, **values) -> Samples:
    values = recipe(tile_ranges=ranges, **values)
    return Samples(read_sources(entries, folder, ranges, encoder), encoder, values)


# --- encoding --------------------------------------------------------------------------------------------------------


def chat_prompt(nano, processor, monkeypatch, *args, **kwargs) -> list[int]:
    """The token ids that `chat` gives to the model."""
    seen = {}

    class AskedError(Exception):
        pass

    def generate(self, **options):
        seen.update(options)
        raise AskedError

    monkeypatch.setattr(nano, "generate", types.MethodType(generate, nano))
    with pytest.raises(AskedError):
        nano.chat(processor, *args, **kwargs)
    return seen["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("turns", "pictures"),
    [
        ((("<image>\nRead the text.", "Mini"),), 1),
        ((("Who are you?", "A model.\n"),), 0),
        ((("<image>\nRead <|im_end|> it.", " <box>[[1]]</box> <|im_start|>"), ("And é中文?", "Yes")), 1),
        ((("<image>\nWhich tag?", "An <image> tag, not <IMG_CONTEXT>."), ("Sure?", "<image>")), 1),
        ((("Image-1: <image>\nImage-2: <image>\nCompare.", "Same."), ("Sure?", "Yes."), ("<image>\nHere?", "No")), 3),
    ],
    ids=["picture", "text", "control tokens", "word in answers", "several"],
)
def test_prompts_are_those_of_chat(nano, processor, encoder, monkeypatch, turns, pictures):
    images = [Image.new("RGB", (300, 130 + 40 * i)) for i in range(pictures)]
    ranges = (1, 4, 1, 3)
    sample = encoder(Conversation(turns), images, ranges)
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    ends = [i for i in range(1, len(ids) + 1) if labels[i - 1] != IGNORED and (i == len(ids) or labels[i] == IGNORED)]
    starts = [i for i in range(len(ids)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
    assert len(starts) == len(ends) == len(turns)
    seen = 0
    for turn, (question, answer) in enumerate(turns):
        seen += question.count("<image>")
        history = [(asked, answered.strip()) for asked, answered in turns[:turn]]
        options = {"history": history, "images_kwargs": tile_options(ranges, pictures)}
        prompt = chat_prompt(nano, processor, monkeypatch, images[:seen] or None, question, **options)
        assert ids[: starts[turn]] == prompt
        assert ids[starts[turn] : ends[turn]] == labels[starts[turn] : ends[turn]]
        separator = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert ids[ends[turn] - 1] == separator
        assert separator not in ids[starts[turn] : ends[turn] - 1]
        assert processor.decode(ids[starts[turn] : ends[turn] - 1]) == answer.strip()


def test_grounding_tokens_can_stay(processor, nano):
    box = processor.tokenizer.convert_tokens_to_ids("<box>")
    conversation = Conversation((("Where?", "<box>[[1, 2, 3, 4]]</box>"),))
    assert box not in Encoder(processor, nano.config).ids_and_labels(conversation, [])[0]
    assert box in Encoder(processor, nano.config, grounding_tokens=True).ids_and_labels(conversation, [])[1]


def test_a_system_message_replaces_the_default(encoder, processor):
    ids, _ = encoder.ids_and_labels(Conversation((("Hi", "Hello"),), "Be brief."), [])
    assert processor.decode(ids).startswith("<s><|im_start|>system\nBe brief.<|im_end|>")


def test_image_is_a_word_in_answers_and_the_system_message(encoder, processor):
    turns = (("<image>\nWhich tag?", "Write <image> here."), ("Sure?", "<image>"))
    ids, labels = encoder.ids_and_labels(Conversation(turns, "Answer with <image> alone."), [1])
    assert ids.count(processor.image_token_id) == processor.image_seq_length
    assert processor.image_token_id not in labels
    told = [label for label in labels if label != IGNORED]
    assert processor.decode(told) == "Write <image> here.<|im_end|><image><|im_end|>"
    assert "Answer with <image> alone." in processor.decode(ids)


def test_pictures_share_tiles():
    assert tile_options((4, 12, 3, 7), 2, use_thumbnail=False) == dict(zip(RANGE_NAMES, (4, 6, 3, 3)))
    assert list(tile_options((1, 8, 1, 4), 1).values()) == [1, 8, 1, 4]
    least, most, adaptive_least, adaptive_most = tile_options((2, 8, 1, 4), 3).values()
    assert most + adaptive_most + 1 <= 13 // 3 and 1 <= least <= most and 1 <= adaptive_least <= adaptive_most
    assert list(tile_options((1, 8, 1, 4), 30).values()) == [1, 1, 1, 1]


def test_lengths_are_known_without_pixels(tmp_path, encoder):
    draw(tmp_path / "wide.png", "wide", (500, 120))
    draw(tmp_path / "tall.png", "tall", (120, 300))
    lines = [
        line("<image>\nRead.", "one", "wide.png"),
        line("<image> and <image>", "two", ["wide.png", "tall.png"], "More?", "no"),
        line("Hi", "Hello"),
    ]
    data = samples(tmp_path, encoder, {"a": {"annotation": write_lines(tmp_path, lines)}}, MSAC, order="grouped")
    rows = data.sources[0].rows
    for position, (_, index, _) in enumerate(data.slots.tolist()):
        assert len(data[position]["input_ids"]) == data._size(rows[index], (1, 4, 1, 3), True)[0]


def test_sideways_pictures_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    draw(tmp_path / "a.jpg", "a", (300, 100), exif=exif)
    assert picture_size(tmp_path / "a.jpg", "here") == (300, 100)


# --- files -----------------------------------------------------------------------------------------------------------

GOOD = line("<image>\nRead.", "one", "a.png")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "not JSON"),
        ({"image": "a.png"}, "conversations"),
        (line("Read.", "one", "a.png"), "0 <image> placeholders, but 1 images"),
        (line("<image>", "one"), "1 <image> placeholders, but 0 images"),
        (line("<image>", "one", "missing.png"), "no picture .*missing.png"),
        (line("<image>", "one", "lines.jsonl"), "cannot be read as a picture"),
        (line("Read.", " "), "not empty"),
        ({"conversations": GOOD["conversations"][:1]}, "human and gpt must alternate"),
        ({"conversations": GOOD["conversations"][::-1]}, "human and gpt must alternate"),
        ({"conversations": []}, "human and gpt must alternate"),
        ({**GOOD, "image": 3}, "a path or a list of paths"),
        ({"video": "a.mp4", "conversations": []}, "videos"),
    ],
)
def test_wrong_lines_are_named(tmp_path, encoder, entry, message):
    draw(tmp_path / "a.png", "a")
    write_lines(tmp_path, [GOOD])
    text = entry if isinstance(entry, str) else json.dumps(entry)
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ValueError, match=f"lines.jsonl, line 2: .*{message}"):
        read_sources({"a": {"annotation": "lines.jsonl"}}, tmp_path, ONE_TILE, encoder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "annotation"),
        ({"annotation": "missing.jsonl"}, "no annotation file"),
        ({"annotation": "lines.jsonl", "repeats": 2}, "unknown repeats"),
        ({"annotation": "lines.jsonl", "repeat_time": 1.5}, "repeat_time"),
        ({"annotation": "lines.jsonl", "repeat_time": 0}, "repeat_time"),
        ({"annotation": "lines.jsonl", "repeat_time": 0.01}, "is none"),
        ({"annotation": "lines.jsonl", "data_augment": True}, "data_augment"),
        ({"annotation": "lines.jsonl", "tile_ranges": [[1, 8]]}, "tile_ranges"),
        ({"annotation": "lines.jsonl", "tile_ranges": MSAC, "max_tiles": 3}, "not both"),
        ({"annotation": "lines.jsonl", "max_dynamic_patch": 0}, "holds no grid"),
        ({"synthetic": "novel", "length": 3}, "no synthetic documents 'novel'"),
        ({"synthetic": "word"}, "length"),
        ({"synthetic": "word", "length": 3, "difficulty": [1]}, "difficulty"),
        ({"synthetic": "first-words", "length": 3, "difficulty": [0, 2]}, "difficulty"),
        ({"synthetic": "first-words", "length": 3, "split": "held_out"}, "for training alone"),
        ({"synthetic": "word", "length": 3, "annotation": "a"}, "unknown annotation"),
        ({"synthetic": "word", "length": 3, "split": "other"}, "no split other"),
        ({"synthetic": "word", "length": 3, "turns": 0}, "turns"),
        ({"annotation": "lines.jsonl", "use_thumbnail": 0}, "use_thumbnail"),
        ({"annotation": "lines.jsonl", "turns": 2}, "unknown turns"),
    ],
)
def test_wrong_datasets_are_named(tmp_path, encoder, monkeypatch, entry, message):
    monkeypatch.setattr("minimonkey.scripts.training.data.documents", stand_in_documents())
    write_words(tmp_path)
    with pytest.raises(ValueError, match=f"Dataset mine.*{message}"):
        read_sources({"mine": entry}, tmp_path, ONE_TILE, encoder)


def test_a_meta_json_counts_paths_from_its_folder(tmp_path, encoder):
    (tmp_path / "meta" / "pictures").mkdir(parents=True)
    draw(tmp_path / "meta" / "pictures" / "a.png", "a")
    write_lines(tmp_path / "meta", [GOOD, GOOD])
    entries = {"a": {"root": "pictures", "annotation": "lines.jsonl", "max_dynamic_patch": 6, "length": 2}}
    (tmp_path / "meta" / "meta.json").write_text(json.dumps(entries))
    (source,) = read_sources("meta/meta.json", tmp_path, [[1, 8, 1, 4]], encoder)
    assert (source.size, source.repeats, source.ranges) == (2, 1, ((1, 6, 1, 4),))
    with pytest.raises(ValueError, match="no meta JSON"):
        read_sources("other.json", tmp_path, MSAC, encoder)


def test_changed_lines_are_read_again(tmp_path, encoder):
    for answer in ("first", "second"):
        write_lines(tmp_path, [line("Hi", answer)])
        (source,) = read_sources({"a": {"annotation": "lines.jsonl"}}, tmp_path, MSAC, encoder)
        assert source.example(0, 0).conversation.turns == (("Hi", answer),)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_too_long_raises_or_is_skipped_and_counted(tmp_path, encoder):
    entries = {"a": {"annotation": write_lines(tmp_path, [line("Hi", "x" * n) for n in (5, 900, 7)])}}
    with pytest.raises(ValueError, match=r"Dataset a, line 2: \d+ tokens, 0 of them of images, do not fit .* 400"):
        samples(tmp_path, encoder, entries, max_seq_length=400)
    data = samples(tmp_path, encoder, entries, max_seq_length=400, too_long="skip")
    assert (data.skipped, data.epoch_size) == (1, 2)
    assert {index for _, index, _ in data.slots.tolist()} == {0, 2}
    with pytest.raises(ValueError, match="No example fits"):
        samples(tmp_path, encoder, entries, max_seq_length=4, too_long="skip")


def test_a_picture_that_grew_raises(tmp_path, encoder):
    entries = write_words(tmp_path, 2)
    limit = 300
    data = samples(tmp_path, encoder, entries, [[1, 6, 1, 1]], max_seq_length=limit)
    for name in ("0.png", "1.png"):
        draw(tmp_path / name, "long", (900, 150))
    with pytest.raises(ValueError, match=f"tokens do not fit max_seq_length {limit}"):
        data[0]


def test_long_documents_are_drawn_anew_and_counted(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr("minimonkey.scripts.training.data.documents", stand_in_documents())
    entries = {"a": {"synthetic": "word", "length": 4, "difficulty": [0, 1], "seed": 5}}
    values = {"order": "curriculum", "max_seq_length": 400, "num_train_epochs": 2}
    data = samples(tmp_path, encoder, entries, too_long="skip", **values)
    drawn = [data[position] for position in range(len(data))]
    assert [sample["redrawn"] for sample in drawn] == [0, 0, 1, 0, 1, 0, 0, 1]
    assert all(torch.equal(sample["input_ids"], data[i]["input_ids"]) for i, sample in enumerate(drawn))
    texts = [encoder.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED]) for sample in drawn]
    assert texts[0] == "word 0 5 training 0.00<|im_end|>"
    assert texts[3] == "word 3 5 training 1.00<|im_end|>"
    assert len(set(texts)) == len(texts)  # another epoch brings other documents
    with pytest.raises(ValueError, match="do not fit"):
        [*map(samples(tmp_path, encoder, entries, too_long="raise", **values).__getitem__, range(4))]
    with pytest.raises(ValueError, match="order: grouped"):
        samples(tmp_path, encoder, entries, order="grouped")


# --- order -----------------------------------------------------------------------------------------------------------


def test_datasets_repeat_and_epochs_differ(tmp_path, encoder):
    entries = {
        "part": {"annotation": write_lines(tmp_path, [line("Hi", "x" * n) for n in range(1, 9)]), "repeat_time": 0.5},
        "again": {"annotation": write_lines(tmp_path, [line("Ho", "y")], "b.jsonl"), "repeat_time": 3},
    }
    data = samples(tmp_path, encoder, entries, num_train_epochs=2)
    assert (data.epoch_size, data.steps, len(data)) == (7, 7, 14)
    first, second = data.slots[:7].tolist(), data.slots[7:].tolist()
    assert sorted(first) == [*([0, i, 0] for i in range(4)), *([1, 0, r] for r in range(3))]
    assert sorted(second) == [*([0, i, 1] for i in range(4)), *([1, 0, r] for r in range(3, 6))]
    assert [slot[:2] for slot in first] != [slot[:2] for slot in second]
    assert (samples(tmp_path, encoder, entries, num_train_epochs=2).slots == data.slots).all()
    assert len(samples(tmp_path, encoder, entries, max_steps=50)) == 100


def test_groups_hold_examples_of_like_length(tmp_path, encoder):
    sizes = [5, 500] * 64
    entries = {"a": {"annotation": write_lines(tmp_path, [line("Hi", "x" * n) for n in sizes])}}
    data = samples(tmp_path, encoder, entries, order="grouped", batch_size=4)
    batches = [{sizes[index] for index in batch} for batch in data.slots[:, 1].reshape(-1, 4).tolist()]
    assert sum(len(batch) == 2 for batch in batches) <= 4  # of 32: where short follows long in a sorted part
    assert sorted(data.slots[:, 1].tolist()) == list(range(128))


def test_a_curriculum_keeps_every_dataset_in_order(tmp_path, encoder):
    entries = {
        name: {"annotation": write_lines(tmp_path, [line("Hi", "x")] * size, f"{name}.jsonl")}
        for name, size in (("a", 20), ("b", 5))
    }
    slots = samples(tmp_path, encoder, entries, order="curriculum", batch_size=1).slots
    for number, size in enumerate((20, 5)):
        assert slots[slots[:, 0] == number][:, 1].tolist() == list(range(size))
    assert 1 in slots[:8, 0] and 1 in slots[-8:, 0]


def test_samples_of_few_tiles_stand_together_in_a_step(tmp_path, encoder):
    annotation = write_lines(tmp_path, [line("Hi", "x")] * 12)
    entries = {
        name: {"annotation": annotation, "tile_ranges": [[1, most, 1, 1]]}
        for name, most in (("a", 9), ("b", 1), ("c", 4))
    }
    slots = samples(tmp_path, encoder, entries, order="curriculum", batch_size=6).slots
    for step in slots.reshape(6, 6, 3):
        assert sorted(set(step[:, 0])) == [0, 1, 2]
        order = [{1: 0, 2: 1, 0: 2}[source] for source in step[:, 0]]
        assert order == sorted(order)


def test_several_questions_share_a_picture_and_the_whole_text_comes_last(tmp_path, encoder):
    def conversations(turns):
        entries = {"a": {"synthetic": "receipt", "length": 12, "turns": turns, "tile_ranges": [[2, 4, 1, 1]]}}
        (source,) = read_sources(entries, tmp_path, ONE_TILE, encoder)
        return [source.example(index, 0).conversation.turns for index in range(12)]

    assert {len(turns) for turns in conversations(1)} == {1}
    several = conversations(4)
    assert {len(turns) for turns in several} == {1, 2, 3, 4}
    for turns in several:
        assert [IMAGE_PLACEHOLDER in question for question, _ in turns] == [True] + [False] * (len(turns) - 1)
        assert all("\n" not in answer for _, answer in turns[:-1])
    assert any("\n" in turns[-1][1] for turns in several)


@pytest.mark.parametrize("kind", ["first-letters", "first-words"])
def test_first_words_grow_harder(tmp_path, encoder, kind):
    entries = {"a": {"synthetic": kind, "length": 300, "difficulty": [0, 1]}}
    (source,) = read_sources(entries, tmp_path, ONE_TILE, encoder)
    early, late = ([source.example(index + start, 0) for index in range(40)] for start in (0, 260))
    assert early[3].pictures[0].tobytes() == source.example(3, 0).pictures[0].tobytes()
    assert all(example.characters for example in (*early, *late))
    asked = {example.conversation.turns[0][0] for example in (*early, *late)}
    assert len(asked) > 5 and all(question.startswith(IMAGE_PLACEHOLDER) for question in asked)
    lengths = [sum(len(example.conversation.turns[0][1]) for example in part) for part in (early, late)]
    assert lengths[0] > lengths[1] if kind == "first-letters" else lengths[0] < lengths[1]  # from pages to words


def test_a_dataset_without_thumbnails(tmp_path, encoder):
    draw(tmp_path / "a.png", "a", (300, 150))
    entry = {"annotation": write_lines(tmp_path, [GOOD]), "tile_ranges": [[2, 4, 1, 1]]}
    whole, parts = (samples(tmp_path, encoder, {"a": {**entry, "use_thumbnail": use}})[0] for use in (True, False))
    assert torch.equal(whole["pixel_values"][:-1], parts["pixel_values"])
    assert len(whole["input_ids"]) == len(parts["input_ids"]) + 49


def test_a_sample_takes_one_of_its_tile_ranges(tmp_path, encoder):
    ranges = [[1, 1, 1, 1], [2, 4, 1, 1], [1, 4, 2, 3]]
    draw(tmp_path / "a.png", "a", (300, 150))
    entries = {"a": {"annotation": write_lines(tmp_path, [GOOD] * 20), "tile_ranges": ranges}}
    data = samples(tmp_path, encoder, entries)
    tiles = [len(data[position]["pixel_values"]) for position in range(20)]
    assert len(set(tiles)) == 3
    assert tiles == [len(data[position]["pixel_values"]) for position in range(20)]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_padded_and_a_needless_tile_changes_nothing(nano, encoder, processor):
    short = encoder(Conversation((("Hi", "Hello"),)), [], (1, 1, 1, 1))
    long = encoder(Conversation((("How is it?", "Fine, thank you."),)), [], (1, 1, 1, 1))
    settings = (processor.tokenizer.pad_token_id, nano.config.image_token_id, 49, 112)
    losses = []
    for always_with_tile in (False, True):
        batch = Collator(*settings, always_with_tile)([short, long])
        assert batch.pop("redrawn") == 0
        assert ("pixel_values" in batch) == always_with_tile
        padding = torch.arange(batch["labels"].shape[1]) >= torch.tensor([[len(s["input_ids"])] for s in (short, long)])
        assert (batch["labels"][padding] == IGNORED).all()
        with torch.no_grad():
            losses.append(nano(**batch).loss)
            losses.append(nano(**batch, attention_mask=(~padding).long()).loss)
    for loss in losses:
        torch.testing.assert_close(loss, losses[0])
    picture = encoder(Conversation((("<image>", "a"),)), [Image.new("RGB", (300, 100))], (1, 4, 1, 1))
    batch = Collator(*settings, True)([short, picture, picture])
    assert batch["pixel_values"].shape == (2 * len(picture["pixel_values"]), 3, 112, 112)
    assert batch["pixel_values"].dtype == torch.uint8


def test_cells_name_the_characters_under_them():
    """A picture of 80 x 40 in tiles of 4 x 4 patches, two cells a patch across."""
    characters = [CharacterBox("A", (0, 0, 20, 20)), CharacterBox("b", (60, 30, 64, 40))]
    labels = cell_labels(Image.new("RGB", (80, 40)), characters, [(2, 1), (1, 1)], 4)
    a, b = CHARACTER_CLASS["A"], CHARACTER_CLASS["b"]
    assert labels.shape == (3, 4, 8)
    assert labels[0, :2, :4].eq(a).all() and labels[0].eq(a).sum() == 8
    assert (labels[1] == b).nonzero().tolist() == [[3, 4]]
    assert labels[2, :2, :2].eq(a).all() and labels[2].eq(a).sum() == 4
    assert (labels[2] == b).nonzero().tolist() == [[3, 6]]


def test_letters_that_have_no_class_are_no_background():
    characters = [CharacterBox("A", (0, 0, 20, 20)), CharacterBox("é", (40, 0, 60, 20))]
    labels = cell_labels(Image.new("RGB", (80, 20)), characters, [(1, 1)], 4)[0]
    assert labels[0].tolist() == [CHARACTER_CLASS["A"]] * 2 + [0] * 2 + [IGNORED] * 2 + [0] * 2


def test_batches_mask_letters_that_are_not_known():
    tiles, cells = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 4, 8, dtype=torch.int64)
    text = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}
    known, unknown = {**text, "pixel_values": tiles, "cell_labels": cells}, {**text, "pixel_values": tiles[:1]}
    batch = Collator(0, 5, 49, 8, False)([unknown, text, known])
    assert batch["cell_labels"].flatten(1)[:, 0].tolist() == [IGNORED, 1, 1]
    assert "cell_labels" not in Collator(0, 5, 49, 8, False)([unknown, text])


# --- recipes ---------------------------------------------------------------------------------------------------------


RECIPES = ROOT / "scripts" / "training" / "recipes"
ON_CPU = "use_cpu=true"  # where there is no GPU, a recipe for one is refused


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = read_recipe(path, [ON_CPU])
    assert recipe.learning_rate > 0
    assert recipe.gradient_accumulation_steps * recipe.per_device_train_batch_size == recipe.batch_size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense=1", "unknown nonsense"),
        ("nonsense", "name=value"),
        ("data={a: [", "data=.* is not YAML"),
        ("lora_rank=1", "unknown lora_rank; did you mean .*lora_r "),
        ("micro_batch_size=1", "unknown micro_batch_size; did you mean batch_size"),
        ("batch=1", "unknown batch"),  # no abbreviations
        ("train_sampling_strategy=random", "unknown train_sampling_strategy"),
        ("batch_size=two", "batch_size.*invalid int value: 'two'"),
        ("batch_size=1.5", "batch_size.*invalid int value: '1.5'"),
        ("batch_size=true", "batch_size.*invalid int value"),
        ("batch_size=[1]", "batch_size must be one value"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("gradient_accumulation_steps=4", "give one of them"),
        ("max_steps=0", "max_steps must be at least 1"),
        ("max_steps=-2", "max_steps must be at least 1"),
        ("num_train_epochs=0", "num_train_epochs must be more than 0"),
        ("save_steps=0", "save_steps must be more than 0"),
        ("bf16=2", "bf16"),
        ("lora_merge=perhaps", "lora_merge"),
        ("order=random", "order.*'shuffled', 'grouped', 'curriculum'"),
        ("dtype=float16", "dtype.*'auto', 'float32', 'bfloat16'"),
        ("train=[head]", "'language_model', 'projector', 'vision'"),
        ("train=[]", "train"),
        ("tile_ranges=[[3, 1, 1, 1]]", "holds no grid"),
        ("tile_ranges=[1, 8, 1, 4]", "tile_ranges must be a list of"),
        ("tile_ranges=many", "tile_ranges must be a list of"),
        ("learning_rate=fast", "learning_rate.*invalid float value: 'fast'"),
        ("learning_rate=-1e-5", "learning_rate must be more than 0"),
        ("lr_scheduler_type=steep", "steep"),
        ("muon_learning_rate=1", "leave out muon_learning_rate"),
        ("muon_learning_rate=0", "muon_learning_rate must be more than 0"),
        ("dimensions={vision: {patch_size: 7}}", "begins as untrained-nano"),
        ("eval_steps=2", "eval_data"),
        ("eval_strategy=epoch", "eval_data"),
        ("letters_weight=1", "letters teach the vision tower"),
        ("letters_only=true", "letters teach the vision tower"),
        ("lora_dropout=1", r"lora_dropout in \[0, 1\)"),
        ("lora_r=null", "belong to lora_r"),
        ("decay_ratio=0.99", "decay_ratio"),
        ("language_layers=0", "at least 1"),
        ("language_layers=30", "without LoRA"),
        ("data=null", "required: --data"),
        ("learning_rate=null", "required: --learning_rate"),
        ("use_cpu=false", "use_cpu=true"),
        ("1=2", "unknown 1"),
        ("learning_rate=.nan", "learning_rate must be a finite number"),
        ("weight_decay=nan", "weight_decay must be a finite number"),
        ("num_train_epochs=.inf", "num_train_epochs must be a finite number"),
        ("weight_decay=-1", "weight_decay must be at least 0"),
        ("max_grad_norm=-1", "max_grad_norm must be at least 0"),
        ("adam_beta1=5", "adam_beta1 must be from 0 to below 1"),
        ("adam_beta2=-0.1", "adam_beta2 must be from 0 to below 1"),
        ("seed=-1", "seed must be at least 0"),
        ("data_seed=-1", "data_seed must be at least 0"),
        ("seed=9999999999999999999999", r"seed must be .* below 2\*\*32"),
        ("dtype=[float32]", "dtype must be one value"),
        ("output_dir=[a, b]", "output_dir must be text"),
        ("output_dir={a: b}", "output_dir must be text"),
        ("model=5", "model must be text"),
        ("model=''", "model must name a folder or model, got ''"),
        ("output_dir=''", "output_dir must name a folder, got ''"),
        ("output_dir='  '", "output_dir must name a folder, got '  '"),
        ("attn_implementation=kernels-community/flash-attn2", "kernel of the Hub, which needs: pip install kernels"),
        ("learning_rate=[1e-3]", "learning_rate must be one value"),
        ("train={vision: 1}", "train must be a list"),
        ("lr_scheduler_kwargs=5", "lr_scheduler_kwargs must hold names and values"),
        ("data='{a'", "data is not JSON"),
        ("data=&a [*a]", "data holds itself"),
        ("accelerator_config=nowhere.json", "nowhere.json"),
    ],
)
def test_recipes_say_what_is_wrong_in_a_line(override, message):
    path = RECIPES / "minimonkey-2b-lora.yaml"
    if override == "use_cpu=false" and torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    if "kernels" in override and is_kernels_available():
        pytest.skip("kernels is installed")
    with pytest.raises(ValueError, match=message) as raised:
        read_recipe(path, [ON_CPU, override])
    assert "\n" not in str(raised.value)


def test_recipes_take_overrides():
    path = RECIPES / "minimonkey-2b-full.yaml"
    changed = read_recipe(path, [ON_CPU, "learning_rate=4e-9", "lora_r=4", "data={a: {annotation: 1e3, root: '2024'}}"])
    assert (changed.learning_rate, changed.lora_r) == (4e-9, 4)
    assert changed.data == {"a": {"annotation": "1e3", "root": "2024"}}  # left as YAML has them
    assert read_recipe(path, [ON_CPU, "data=meta.json"]).data == "meta.json"
    with pytest.raises(ValueError, match="muon_learning_rate"):
        read_recipe(path, [ON_CPU, "lora_r=4", "muon_learning_rate=1e-3"])
    with pytest.raises(ValueError, match="no recipe"):
        read_recipe(path.with_name("other.yaml"))


def test_recipes_take_what_trainer_takes(tmp_path):
    """Values that YAML reads as text, lists, switches and nested options among them."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\noutput_dir: o\ndata: meta.json\nuse_cpu: true\nbf16: false\nlearning_rate: 4e-9\nmax_steps: -1\n"
        "train: [vision, projector]\nlr_scheduler_kwargs: {min_lr_ratio: 0.02}\nlr_scheduler_type: warmup_stable_decay\n"
        "gradient_checkpointing: true\nreport_to: none\nwarmup_steps: 7\nadam_epsilon: 1e-7\nlora_merge: true\n"
    )
    recipe = read_recipe(path, ["eval_data=meta.json", "eval_steps=3"])
    assert (recipe.learning_rate, recipe.max_steps, recipe.adam_epsilon) == (4e-9, -1, 1e-7)
    assert (recipe.train, recipe.report_to, recipe.eval_strategy) == (["vision", "projector"], [], "steps")
    assert getattr(recipe, "activation_checkpointing", recipe.gradient_checkpointing)
    recipe.set_steps(20)
    assert (recipe.max_steps, recipe.warmup_steps) == (20, 7)
    assert recipe.lr_scheduler_kwargs == {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.02}


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", 6), ("warmup_stable_decay", 12)])
def test_a_rate_rises_within_the_run(schedule, steps):
    with pytest.raises(ValueError, match=f"warmup_steps 7 are too many for the {steps} steps"):
        recipe(warmup_steps=7, lr_scheduler_type=schedule).set_steps(steps)
    recipe(warmup_steps=7, lr_scheduler_type=schedule).set_steps(14)


def test_a_batch_is_divided_or_counted():
    assert recipe(batch_size=6, per_device_train_batch_size=2).gradient_accumulation_steps == 3
    assert recipe(batch_size=None, per_device_train_batch_size=2, gradient_accumulation_steps=4).batch_size == 8


def test_a_resumed_run_may_differ_in_what_decides_no_step():
    recorded = json.loads(json.dumps(recipe().to_dict()))
    free = {"output_dir": "elsewhere", "save_steps": 3, "logging_steps": 1, "dataloader_num_workers": 0}
    assert not changed_options(recipe(**free), recorded)
    other = {"seed": 2, "learning_rate": 1e-4, "max_steps": 9, "tile_ranges": MSAC, "train": ["vision"]}
    assert set(changed_options(recipe(**other), recorded)) == other.keys()
