"""The recipes that are published here, what they take, and what they freeze."""

import subprocess

import pytest
import torch
import yaml
from conftest import ROOT
from model_helpers import tiny_mono
from training_helpers import write_recipe

from minimonkey.scripts import finetune as script
from minimonkey.scripts.benchmarking.models import published_config, random_config
from minimonkey.scripts.training.estimate import GIB, WASTE, Cards, Estimate, kept_bytes
from minimonkey.scripts.training.models import freeze, freeze_by_name
from minimonkey.scripts.training.recipe import read_recipe


RECIPES = ROOT / "scripts" / "training" / "recipes"
LAUNCH = ROOT / "scripts" / "training" / "launch"
# Steps and accumulation on 8 GPUs, as published for Mini-InternVL's adaptation.
ADAPTATION = {"da-drivelm": (15100, 1), "da-bdd": (240, 8), "da-remote-sensing": (2500, 8), "da-medical": (2200, 8)}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_read(name):
    assert read_recipe(RECIPES / f"{name}.yaml", ["use_cpu=true", "bf16=false"]).model


@pytest.mark.parametrize("name", ADAPTATION)
def test_adaptation_has_the_published_figures(name):
    recipe = read_recipe(RECIPES / f"{name}.yaml", ["use_cpu=true", "bf16=false"])
    steps, accumulation = ADAPTATION[name]
    assert (recipe.max_steps, recipe.batch_size) == (steps, 8 * accumulation)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.warmup_steps) == (1e-5, 0.01, 0.03)
    assert (recipe.pack_tokens, recipe.pack_tiles, recipe.pack_buffer, recipe.max_seq_length) == (16384, 48, 20, 8192)
    assert recipe.loss_reduction == "square" and set(recipe.train) == {"language_model", "projector", "vision"}
    assert recipe.tile_ranges == [[1, 12, 1, 1]]


# --- dry run ---------------------------------------------------------------------------------------------------------


def dry_run(capsys, *arguments: str) -> tuple[int, str]:
    status = script.main([str(RECIPES / f"{arguments[0]}.yaml"), "--dry-run", *arguments[1:]])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("model", ["MiniInternVL-1B", "MiniInternVL-2B", "MiniInternVL-4B", "Mono-InternVL-2B"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_dry_run_of_every_model(capsys, monkeypatch, tmp_path, model, kind):
    monkeypatch.chdir(tmp_path)
    smaller = ["--set", "pack_tiles=16", "--set", "pack_tokens=6144"]
    status, said = dry_run(capsys, "da-drivelm", "--model", model, *smaller, *(["--lora"] if kind == "lora" else []))
    assert status == 0 and "a step at most 49152 tokens" in said and "hours on 8 cards" in said
    assert list(tmp_path.iterdir()) == []
    assert said.count("fits") >= (1 if kind == "full" else 4)


def test_a_dry_run_says_what_does_not_fit(capsys):
    status, said = dry_run(capsys, "da-drivelm", "--model", "MiniInternVL-4B", "--card-gib", "12")
    assert status == 1 and "It does not fit" in said and "takes at most 16 tiles at once, here are 48" in said
    with pytest.raises(SystemExit):
        dry_run(capsys, "da-drivelm", "--model", "Unknown-70X")
    assert "tells no published size" in capsys.readouterr().err


def test_memory_by_hand():
    """A billion trained weights and a billion that are not, on four cards."""
    estimate = Estimate(Cards(4, 80), 2 * 10**9, 10**9, (6, 2), 3 * GIB, 2 * GIB, (100, 10), (8, 1), 10, 1e15)
    billion = 10**9 / GIB * WASTE
    rest = 5 * WASTE
    assert estimate.card_gib(0) == pytest.approx((6 + 4 + 8 + 2) * billion + rest)
    assert estimate.card_gib(1) == pytest.approx((4 + 2 + 12 / 4) * billion + rest)
    assert estimate.card_gib(2) == pytest.approx((4 + 2 / 4 + 12 / 4) * billion + rest)
    assert estimate.card_gib(3) == pytest.approx((4 + 2 + 12) / 4 * billion + rest)
    assert estimate.hours == pytest.approx(10 * 1e15 / (4 * 71e12 * 0.35) / 3600)


def test_what_a_layer_keeps_by_hand():
    """A linear layer keeps its input, a GELU what goes in: in float32 (3 + 5) numbers of four bytes a token."""
    with torch.device("meta"):
        layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU())
    assert kept_bytes(layer, 10, 3) == (3 + 5) * 4


def test_recomputing_and_packing_change_what_is_kept(tmp_path):
    config = random_config("1B")
    base = {"per_device_train_batch_size": 1, "train": ["language_model", "projector", "vision"], "batch_size": 1}

    def estimate(**options) -> Estimate:
        return Estimate.of(config, read_recipe(write_recipe(tmp_path, depth=None, **base, **options)), Cards())

    plain = estimate(max_seq_length=2048)
    assert estimate(max_seq_length=2048, gradient_checkpointing=True).activations < plain.activations / 5
    assert estimate(max_seq_length=4096, tile_ranges=[[1, 6, 1, 1]]).logits == 2 * plain.logits
    packed = estimate(pack_tokens=4096, pack_tiles=8)
    assert packed.logits == plain.logits and packed.row == (4096, 8)  # half of the row is images
    assert plain.parameters == pytest.approx(938.2e6, rel=1e-4)


def test_the_published_mono_has_its_parameters():
    config = published_config("Mono-InternVL-2B")
    recipe = read_recipe(RECIPES / "mono-llava665k.yaml", ["use_cpu=true", "bf16=false"])
    assert Estimate.of(config, recipe, Cards()).parameters == pytest.approx(3.111e9, rel=1e-3)


# --- frozen by name --------------------------------------------------------------------------------------------------


def trained(model, **options) -> set[str]:
    recipe = type("R", (), {"train_only": None, "frozen": None, **options})
    freeze(model, ["language_model", "projector", "vision"])
    freeze_by_name(model, recipe)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_monos_stages_train_what_they_should():
    model, everything = tiny_mono(), {name for name, _ in tiny_mono().named_parameters()}
    first = yaml.safe_load((RECIPES / "mono-evip.yaml").read_text())["train_only"]
    names = trained(model, train_only=first)
    assert names == {
        name for name in everything if "vision_tower" in name or "projector" in name or "visual_mlp" in name
    }
    assert any("visual_mlp" in name for name in names) and not any("self_attn" in name for name in names)
    third = trained(model, train_only=[*first, "self_attn"])
    assert third - names == {name for name in everything if "self_attn" in name and "vision" not in name}
    assert everything - trained(model, frozen=["visual_mlp"]) == {name for name in everything if "visual_mlp" in name}
    assert trained(model) == everything


def test_names_that_freeze_nothing_are_refused():
    with pytest.raises(ValueError, match="No trained parameter has 'visual_mpl' in its name"):
        trained(tiny_mono(), frozen=["visual_mpl"])
    with pytest.raises(ValueError, match="leave nothing to train"):
        trained(tiny_mono(), train_only=["lm_head"], frozen=["lm_head"])


# --- launch ----------------------------------------------------------------------------------------------------------


def test_slurm_starts_one_launcher_a_node():
    text = (LAUNCH / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"]).returncode == 0
    assert "--machine_rank" in text and "launch/zero1.yaml" in text and "--requeue" in text


def test_a_dry_run_of_fewer_layers(capsys):
    whole, cut = (
        float(dry_run(capsys, "minimonkey-2b-lora", *change)[1].partition(" million")[0].split()[-1])
        for change in ((), ("--set", "depth=3"))
    )
    layer = 12.6 + 62.9 + 1.0  # of the tower, of the language model, and its adapters, in millions
    assert whole - cut == pytest.approx(21 * layer, rel=0.02)


def test_frozen_weights_in_few_bits_take_less(capsys):
    """At the 2B model's size the frozen layers of tower and language model are 1.8 billion weights."""
    needed = {}
    for kind in ("none", "int8", "int4"):
        chosen = [] if kind == "none" else ["--set", f"frozen_weights={kind}"]
        status, said = dry_run(capsys, "minimonkey-2b-lora", "--cards", "1", *chosen)
        needed[kind] = float(said.partition("DDP")[2].split()[0])
    assert needed["none"] - needed["int8"] == pytest.approx(1.8e9 / GIB * WASTE, abs=0.2)
    assert needed["int8"] - needed["int4"] == pytest.approx(0.375 * 1.8e9 / GIB * WASTE, abs=0.2)
    assert dry_run(capsys, "minimonkey-2b-lora-8bit", "--cards", "1", "--card-gib", "10")[0] == 0
