"""Detailed tokens left out in training: really out, the same in every part of a run, and the answers untouched."""

import copy

import pytest
import torch
from training_helpers import metrics, stand_in_documents, write_recipe, write_words

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts import finetune as script
from minimonkey.scripts.training.collator import Collator
from minimonkey.scripts.training.data import read_sources
from minimonkey.scripts.training.dropping import WAYS, Dropping, read_dropping, shorten, with_dropping
from minimonkey.scripts.training.encode import IGNORED, Encoder
from minimonkey.scripts.training.recipe import read_recipe
from minimonkey.scripts.training.samples import Samples


TILES = [[4, 4, 3, 3]]
SEVERAL_TILES = (224, 224)
ALWAYS = {"steps": 1, "share": [0.5, 0.5], "by": "random"}


@pytest.fixture(scope="module")
def dropping_nano(nano):
    """The Nano of all tests, in the class that drops."""
    model = with_dropping(MiniMonkeyForConditionalGeneration)(nano.config).float().eval()
    model.load_state_dict(nano.float().state_dict())
    return model


def samples_of(folder, processor, nano, is_evaluation: bool = False, **options) -> Samples:
    options = {"tile_ranges": TILES, "per_device_train_batch_size": 1, "max_steps": 6, **options}
    recipe = read_recipe(write_recipe(folder, data=write_words(folder, 6), **options))
    encoder = Encoder(processor, nano.config)
    return Samples(read_sources(recipe.data, folder, recipe.tile_ranges, encoder), encoder, recipe, is_evaluation)


def collated(samples: list[dict], nano, processor, **options) -> dict:
    config = nano.config
    sizes = (0, config.image_token_id, processor.image_seq_length, config.tile_size)
    batch = Collator(*sizes, always_with_tile=False, **options)(samples)
    return {name: value for name, value in batch.items() if name != "redrawn"}


def answer(sample: dict) -> list[int]:
    return sample["labels"][sample["labels"] != IGNORED].tolist()


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_half_of_the_detailed_tokens_go_and_nothing_else(tmp_path, processor, nano, way):
    whole = samples_of(tmp_path, processor, nano)
    shorter = samples_of(tmp_path, processor, nano, drop_tokens={**ALWAYS, "by": way})
    token, per_tile = nano.config.image_token_id, processor.image_seq_length
    for position in range(6):
        before, after = whole[position], shorter[position]
        assert torch.equal(before["pixel_values"], after["pixel_values"])
        kept = after["kept_features"]
        detailed, others = kept.split([4 * per_tile, 4 * per_tile])
        assert detailed.sum() == 2 * per_tile and others.all()
        assert (after["input_ids"] == token).sum() == kept.sum() == len(kept) - 2 * per_tile
        texts = [one["input_ids"][one["input_ids"] != token].tolist() for one in (before, after)]
        assert texts[0] == texts[1] and answer(before) == answer(after)
        first = [(one["labels"] != IGNORED).nonzero()[0].item() for one in (before, after)]
        assert first[0] - first[1] == 2 * per_tile
        assert {"tile_counts", "tile_grids"}.isdisjoint(after)


def test_blocks_stand_together(tmp_path, processor, nano):
    """Neighbours in a row of a tile are both there or both away more often than single tokens at random."""

    def same_neighbours(way: str) -> float:
        samples = samples_of(tmp_path, processor, nano, max_steps=12, drop_tokens={**ALWAYS, "by": way})
        side = int(processor.image_seq_length**0.5)
        tiles = [samples[i]["kept_features"][: 4 * side**2].reshape(4, side, side) for i in range(48)]
        return torch.stack([(tile[..., 1:] == tile[..., :-1]).float().mean() for tile in tiles]).mean().item()

    assert same_neighbours("blocks") > 0.65 > 0.55 > same_neighbours("random")


def test_a_third_of_the_steps_drop_and_a_resumed_run_draws_the_same(tmp_path, processor, nano):
    options = {"max_steps": 60, "batch_size": 2, "drop_tokens": {"by": ["random", "blocks"]}}
    first, again = (samples_of(tmp_path, processor, nano, **options) for _ in range(2))
    steps, shares = [], []
    for step in range(60):
        both = [first[position] for position in (2 * step, 2 * step + 1)]
        assert len({"kept_features" in sample for sample in both}) == 1  # a step as a whole
        steps.append("kept_features" in both[0])
        shares += [1 - one["kept_features"][:196].float().mean().item() for one in both if steps[-1]]
    assert 10 <= sum(steps) <= 30
    assert 0.24 < min(shares) < 0.45 and 0.8 < max(shares) <= 1 and len(set(shares)) > 10
    place = 2 * steps.index(True)
    again = again[place]  # without the samples before it
    assert torch.equal(again["kept_features"], first[place]["kept_features"])
    other = samples_of(tmp_path, processor, nano, **options, seed=2)
    assert [("kept_features" in other[2 * step]) for step in range(60)] != steps


def test_what_has_no_other_tiles_and_what_is_measured_lose_nothing(tmp_path, processor, nano):
    options = {"drop_tokens": ALWAYS}
    assert "kept_features" not in samples_of(tmp_path, processor, nano, is_evaluation=True, **options)[0]
    for ranges in ([[1, 1, 1, 1]], [[1, 1, 2, 4]]):
        assert "kept_features" not in samples_of(tmp_path, processor, nano, tile_ranges=ranges, **options)[0]
    text = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([IGNORED, 6])}
    assert shorten(text, Dropping(steps=1), (1, 0, 0), 9, 4) is text
    alone = {
        "input_ids": torch.tensor([9] * 8 + [5]),
        "labels": torch.tensor([IGNORED] * 8 + [5]),
        "tile_counts": torch.tensor([[2, 0, 0]]),
        "tile_grids": torch.tensor([[2, 1, 1, 1]]),
    }
    assert shorten(alone, Dropping(steps=1), (1, 0, 0), 9, 4) is alone


# --- model -----------------------------------------------------------------------------------------------------------


def loss_of(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).loss


def test_dropped_tokens_are_not_read(tmp_path, processor, nano, dropping_nano):
    everything = {"steps": 1, "share": [1, 1], "by": "random"}
    sample = samples_of(tmp_path, processor, nano, drop_tokens=everything)[0]
    whole = samples_of(tmp_path, processor, nano)[0]
    losses = {}
    for name, one in (("dropped", sample), ("whole", whole)):
        other = {**one, "pixel_values": one["pixel_values"].clone()}
        other["pixel_values"][:4] = 255 - other["pixel_values"][:4]  # the detailed tiles
        losses[name] = [loss_of(dropping_nano, collated([each], nano, processor)) for each in (one, other)]
    assert losses["dropped"][0] == losses["dropped"][1]
    assert losses["whole"][0] != losses["whole"][1]
    assert losses["whole"][0] == pytest.approx(loss_of(nano, collated([whole], nano, processor)).item(), rel=1e-5)


def test_a_batch_reads_what_its_samples_read_alone(tmp_path, processor, nano, dropping_nano):
    """One sample that drops at random, one by blocks, one by scores and one that is whole, padded to a multiple."""
    ways = ("random", "blocks", "scm")
    samples = [samples_of(tmp_path, processor, nano, drop_tokens={**ALWAYS, "by": way})[1] for way in ways]
    samples.append(samples_of(tmp_path, processor, nano)[1])
    together = collated(samples, nano, processor, pad_to_multiple_of=64)
    assert together["input_ids"].shape[1] % 64 == 0 and len(together["scored"]) == 1
    answers = sum(len(answer(sample)) for sample in samples)
    alone = sum(loss_of(dropping_nano, collated([sample], nano, processor)) * len(answer(sample)) for sample in samples)
    assert loss_of(dropping_nano, together) == pytest.approx(alone.item() / answers, rel=1e-4)


@pytest.mark.parametrize("selection", ["scm", "smooth", "features"])
def test_scores_choose_what_generate_would_keep(tmp_path, processor, nano, dropping_nano, selection):
    options = {"drop_tokens": {"steps": 1, "share": [0.4, 0.6], "by": selection}}
    sample = samples_of(tmp_path, processor, nano, **options)[2]
    scored = sample["scored"]
    features = dropping_nano.encode_tiles(sample["pixel_values"]).flatten(0, 1)
    chosen = dropping_nano._chosen({**scored, "first_feature": 0}, features)
    prompt = scored["whole_ids"][None, : scored["query_end"]]  # before the answer, as it is asked
    scm_select = "token" if selection == "scm" else selection
    (kept,) = nano.float().kept_positions(
        prompt,
        pixel_values=sample["pixel_values"],
        tile_counts=scored["tile_counts"],
        tile_grids=scored["tile_grids"],
        scm_keep_ratio=scored["keep_ratio"],
        scm_select=scm_select,
    )
    stays = torch.zeros(prompt.shape[1], dtype=torch.bool)
    stays[kept] = True
    assert torch.equal(chosen, stays[prompt[0] == nano.config.image_token_id])
    assert chosen.sum() == sample["kept_features"].sum() and not torch.equal(chosen, sample["kept_features"])


def test_compiled_layers_choose_the_same(tmp_path, processor, nano, dropping_nano):
    sample = samples_of(tmp_path, processor, nano, drop_tokens={**ALWAYS, "by": "scm"})[2]
    batch, compiled = collated([sample], nano, processor), copy.deepcopy(dropping_nano)
    for layer in (*compiled.model.vision_tower.encoder.layer, *compiled.model.language_model.layers):
        layer.compile(dynamic=True, backend="eager")
    assert loss_of(compiled, batch) == pytest.approx(loss_of(dropping_nano, batch).item(), rel=1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [{"per_device_train_batch_size": 2, "pad_to_multiple_of": 32}, {"pack_tokens": 1000}],
    ids=["padded", "packed"],
)
def test_runs_with_dropping(tmp_path, monkeypatch, layout):
    """Another loss than without, the same in rows as in batches, and a model like any other at the end."""
    data, losses = write_words(tmp_path, 4, SEVERAL_TILES), []
    base = {"data": data, "tile_ranges": TILES, "depth": None, "max_steps": 2, "per_device_train_batch_size": 1}
    for name, drop in (("with", {**ALWAYS, "by": ["random", "scm"]}), ("without", None)):
        options = {**base, **layout, "drop_tokens": drop, "output_dir": str(tmp_path / name)}
        script.main([str(write_recipe(tmp_path, **options))])
        losses.append([*metrics(tmp_path / name)["losses"].values()])
    assert len(losses[0]) == 2 and losses[0] != losses[1]
    MiniMonkeyForConditionalGeneration.from_pretrained(tmp_path / "with" / "model")


def test_letters_are_taught_where_tokens_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("minimonkey.scripts.training.data.documents", stand_in_documents(SEVERAL_TILES))
    parts = ["vision", "projector", "language_model"]
    options = {"train": parts, "letters_weight": 0.3, "tile_ranges": TILES, "depth": 2, "drop_tokens": ALWAYS}
    script.main([str(write_recipe(tmp_path, data={"a": {"synthetic": "word", "length": 4}}, **options))])
    assert metrics(tmp_path / "out")["losses"]["1"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"often": 1}, "no often; known are steps, share, by"),
        ({"steps": 0}, "steps is a share of the steps"),
        ({"steps": True}, "steps is a share of the steps"),
        ({"share": [0.5, 0.25]}, r"\[least, most\]"),
        ({"share": 0.5}, r"\[least, most\]"),
        ({"by": ["scm", "luck"]}, "random, blocks, scm"),
        ({"by": []}, "random, blocks, scm"),
        ({"by": "layer"}, "random, blocks, scm"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_dropping(options)
    with pytest.raises(ValueError, match=message):
        read_recipe(write_recipe(tmp_path, drop_tokens=options))


def test_recipes_without_anything_to_drop_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(write_recipe(tmp_path, drop_tokens=ALWAYS))])
    assert "nothing to leave out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="letters_only"):
        read_recipe(write_recipe(tmp_path, drop_tokens=ALWAYS, letters_only=True, train=["vision"]))
    with pytest.raises(ValueError, match="names and values"):
        read_recipe(write_recipe(tmp_path, drop_tokens="scm"))
