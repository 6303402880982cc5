"""Packed rows: samples that do not see each other, with the loss that they have alone."""

import random

import pytest
import torch
from chat_helpers import tiny
from training_helpers import draw, line, metrics, write_lines, write_recipe, write_words

from minimonkey.scripts import finetune as script
from minimonkey.scripts.training.collator import Collator
from minimonkey.scripts.training.data import read_sources
from minimonkey.scripts.training.encode import Encoder
from minimonkey.scripts.training.packing import loss_weights, pack, weighted_loss
from minimonkey.scripts.training.recipe import read_recipe
from minimonkey.scripts.training.samples import Samples


def collator(config, always_with_tile: bool = False, reduction: str = "token") -> Collator:
    return Collator(
        0, config.image_token_id, config.image_seq_length, config.tile_size, always_with_tile, loss_reduction=reduction
    )


def random_samples(config, lengths: tuple[int, ...], seed: int = 0) -> list[dict]:
    """Samples of text, each second one with a tile, with answers of different lengths at the end."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 30, (length,), generator=generator)
        sample = {}
        if number % 2:
            ids[2 : 2 + config.image_seq_length] = config.image_token_id
            size = config.tile_size
            sample["pixel_values"] = torch.randint(0, 256, (1, 3, size, size), generator=generator).to(torch.uint8)
        labels = ids.clone()
        labels[: length - 2 - number] = -100
        samples.append({**sample, "input_ids": ids, "labels": labels})
    return samples


def loss_of(model, batch: dict, divisor: float | torch.Tensor = 1.0) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("redrawn", "loss_weights")}
    return weighted_loss(model, inputs, batch["loss_weights"], divisor)[0]


# --- plan ------------------------------------------------------------------------------------------------------------


def test_rows_by_hand():
    sizes = [(300, 1), (500, 2), (250, 1), (100, 3), (800, 0)]
    # The second joins the first (800 tokens, 3 tiles); the third and fourth would be 4 tiles; the last fills a row alone.
    assert [*pack(sizes, 800, 3, 20)] == [[0, 1], [2], [3], [4]]
    # With one open row, a row is closed as soon as the next sample does not fit.
    assert [*pack([(3, 0), (3, 0), (1, 0)], 4, 9, 1)] == [[0], [1, 2]]
    # With two, the fullest row in which it fits is taken.
    assert [*pack([(3, 0), (2, 0), (1, 0)], 4, 9, 2)] == [[0, 2], [1]]


def test_every_sample_is_in_one_row_within_the_limits():
    rng = random.Random(1)
    sizes = [(rng.randint(1, 100), rng.randint(0, 9)) for _ in range(500)]
    rows = [*pack(sizes, 128, 12, 20)]
    assert sorted(place for row in rows for place in row) == [*range(500)]
    for number in (0, 1):
        assert max(sum(sizes[place][number] for place in row) for row in rows) <= (128, 12)[number]
    least = max(sum(tokens for tokens, _ in sizes) / 128, sum(tiles for _, tiles in sizes) / 12)
    assert len(rows) < 1.15 * least


def test_a_sample_that_fits_nowhere():
    with pytest.raises(ValueError, match="A sample of 9 tokens and 0 tiles fits in no row of 8 and 1"):
        [*pack([(9, 0)], 8, 1, 1)]


# --- loss ------------------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    labels = torch.tensor([-100, 5, 6, 7, 8, -100])
    assert loss_weights(labels, "token").tolist() == [0, 1, 1, 1, 1, 0]
    assert loss_weights(labels, "square").tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0]
    assert loss_weights(labels, "sample").tolist() == [0, 0.25, 0.25, 0.25, 0.25, 0]
    assert loss_weights(torch.tensor([-100]), "square").tolist() == [0]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "mono"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_gives_the_loss_and_gradients_of_its_samples(kind, attention):
    family = {"visual_experts": True, "model_type": "llama"} if kind == "mono" else {"model_type": kind}
    model = tiny(**family, num_hidden_layers=2).float().train()
    model.set_attn_implementation(attention)
    model.config.text_config.use_cache = False
    samples = random_samples(model.config, (14, 30, 9, 40))
    results = []
    for batches in (
        [[sample] for sample in samples],
        [[{"row": samples}]],
        [[{"row": samples[:2]}], [{"row": samples[2:]}]],
    ):
        model.zero_grad()
        collate = collator(model.config, reduction="square")
        losses = [loss_of(model, collate(batch)) for batch in batches]
        sum(losses).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((sum(losses).detach(), gradients))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-4, atol=1e-6)


def test_samples_of_a_row_do_not_see_each_other(nano):
    samples = random_samples(nano.config, (60, 80))
    collate = collator(nano.config)
    batch = collate([{"row": samples}])
    assert batch["position_ids"].tolist() == [[*range(60), *range(80)]]
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], "use_cache": False}
    with torch.no_grad():
        row = nano(**inputs, position_ids=batch["position_ids"]).logits[:, 60:]
        alone = nano(input_ids=samples[1]["input_ids"][None], pixel_values=samples[1]["pixel_values"]).logits
        mixed = nano(**inputs).logits[:, 60:]
    torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed, alone, atol=1e-2)


def test_a_black_tile_behind_a_row_changes_nothing(nano):
    (sample, _) = random_samples(nano.config, (20, 60))
    batches = [collator(nano.config, always)([{"row": [sample, sample]}]) for always in (False, True)]
    assert "pixel_values" not in batches[0] and batches[1]["pixel_values"].shape[0] == 1
    with torch.no_grad():
        losses = [loss_of(nano, batch) for batch in batches]
    torch.testing.assert_close(*losses)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token", "square"])
def test_packed_and_unpacked_runs_have_the_same_losses(tmp_path, reduction):
    """Six samples a step: as six batches, and as two rows."""
    data = write_words(tmp_path, 6)
    losses = []
    for name, options in (
        ("plain", {"batch_size": 6}),
        ("packed", {"batch_size": 2, "pack_tokens": 550, "pack_buffer": 6}),
    ):
        options |= {"output_dir": str(tmp_path / name), "per_device_train_batch_size": 1, "loss_reduction": reduction}
        script.main([str(write_recipe(tmp_path, data=data, max_steps=3, learning_rate=1e-4, **options))])
        report = metrics(tmp_path / name)
        assert report["epochs"] == 3
        losses.append([*report["losses"].values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len({round(loss, 6) for loss in losses[0]}) == 3


def samples_of(tmp_path, processor, nano, **options) -> Samples:
    recipe = read_recipe(write_recipe(tmp_path, per_device_train_batch_size=1, **options))
    encoder = Encoder(processor, nano.config)
    return Samples(read_sources(recipe.data, tmp_path, recipe.tile_ranges, encoder), encoder, recipe)


def test_epochs_are_whole_and_the_last_step_is_filled(tmp_path, processor, nano):
    samples = samples_of(tmp_path, processor, nano, batch_size=4, pack_tokens=400, num_train_epochs=2, max_steps=-1)
    shown = [tuple(samples.slots[place]) for row in samples.rows for place in row]
    first_two = {(0, index, epoch) for index in range(6) for epoch in (0, 1)}
    assert first_two <= {tuple(map(int, slot)) for slot in shown}
    assert len(samples) == samples.steps * 4 and samples.shown >= 12
    tokens = [sum(len(sample["input_ids"]) for sample in samples[i]["row"]) for i in range(len(samples))]
    assert max(tokens) <= 400


def test_what_does_not_fit_a_row_is_skipped_or_refused(tmp_path, processor, nano):
    draw(tmp_path / "wide.png", "wide", (600, 100))
    name = write_lines(tmp_path, [line("<image>\nRead.", "wide", "wide.png"), line("Who?", "Me.")], "wide.jsonl")
    data = {"wide": {"root": str(tmp_path), "annotation": str(tmp_path / name), "tile_ranges": [[4, 6, 1, 1]]}}
    options = {"data": data, "pack_tokens": 4096, "pack_tiles": 3, "batch_size": 1}
    assert samples_of(tmp_path, processor, nano, too_long="skip", **options).skipped == 1
    with pytest.raises(ValueError, match="line 1: .* tiles do not fit pack_tiles 3"):
        samples_of(tmp_path, processor, nano, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack_tokens": 0}, "pack_tokens must be at least 1"),
        ({"pack_tokens": 100, "per_device_train_batch_size": 2}, "a row is a batch"),
        ({"pack_tokens": 100, "per_device_train_batch_size": 1, "order": "grouped"}, "shuffled or curriculum"),
        ({"loss_reduction": "square", "train": ["vision"], "letters_weight": 0.3}, "letters weigh"),
        (
            {"pack_tokens": 500, "per_device_train_batch_size": 1, "data": {"a": {"synthetic": "word", "length": 2}}},
            "beforehand",
        ),
    ],
)
def test_what_cannot_be_packed_is_said(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        script.main([str(write_recipe(tmp_path, **options))])
    assert message in capsys.readouterr().err
