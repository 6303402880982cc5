"""scripts/finetune.py by its command, or its main function where a process of its own adds nothing."""

import copy
import json
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from training_helpers import (
    command,
    draw,
    finetune,
    line,
    metrics,
    stand_in_documents,
    write_lines,
    write_recipe,
    write_words,
)
from transformers import AutoModel, AutoProcessor, LlamaConfig, Qwen2Config

from minimonkey.quantized_weights import StoredLinear
from minimonkey.scripts import finetune as script
from minimonkey.scripts.benchmarking.models import random_config, random_model
from minimonkey.scripts.importing.folder import save_processor
from minimonkey.scripts.repository import load_processor
from minimonkey.scripts.training.models import deepen, load_model, model_folder
from minimonkey.scripts.training.optimizers import MuonWithAdamW, matrices_and_rest
from minimonkey.scripts.training.recipe import read_recipe
from minimonkey.scripts.training.trainer import FineTuner, last_checkpoint


LANGUAGE_MODEL = ("model.language_model.", "lm_head.")


def train_here(recipe, *options) -> None:
    """The command in this process."""
    script.main([str(recipe), *map(str, options)])


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("train", [["language_model"], ["projector", "vision"]], ids=str)
def test_only_what_is_to_be_trained_changes(tmp_path, train):
    options = {"bf16": True, "gradient_checkpointing": True} if train == ["language_model"] else {}
    recipe = write_recipe(tmp_path, train=train, save_dtype="float32", **options)
    values = read_recipe(recipe)
    before = load_model(str(ROOT), values).state_dict()
    train_here(recipe)
    model = AutoModel.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True, dtype=torch.float32)
    names = changed(before, model.state_dict())
    is_language_model = {name for name in before if name.startswith(LANGUAGE_MODEL)}
    trained = is_language_model if train == ["language_model"] else before.keys() - is_language_model
    assert names <= trained
    assert len(names) > 0.8 * len(trained)  # embeddings of tokens that do not occur stay, and so on
    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    assert isinstance(model.chat(processor, tmp_path / "0.png", "Read.", max_new_tokens=2), str)
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.text_config.use_cache
    report = metrics(tmp_path / "out")
    assert (report["steps"], report["world_size"], report["skipped_too_long"]) == (1, 1, 0)
    assert report["wrapper"] == "MiniMonkeyForConditionalGeneration"
    assert list((tmp_path / "out" / "logs").glob("events.*"))


def test_lora_is_saved_as_adapter_and_merged(tmp_path):
    options = {"lora_r": 4, "dtype": "bfloat16", "bf16": True, "save_dtype": "float32"}
    recipe = write_recipe(tmp_path, **options)
    base = load_model(str(ROOT), read_recipe(write_recipe(tmp_path, dtype="bfloat16")))
    train_here(write_recipe(tmp_path, **options))
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 7 * 2  # attention and MLP projections of one layer, two factors each
    assert all("language_model.layers.0" in name for name in adapter)
    merged = AutoModel.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True, dtype=torch.float32)
    names = changed(base.float().state_dict(), merged.state_dict())
    assert names == {f"{name.split('base_model.model.')[1].split('.lora_')[0]}.weight" for name in adapter}
    assert read_recipe(recipe).lora_alpha is None
    trained = metrics(tmp_path / "out")["trained_parameters"]
    assert trained == sum(tensor.numel() for tensor in adapter.values())


def test_the_loss_is_the_mean_over_answers_and_evaluation_runs(tmp_path):
    """However a batch is split in micro batches."""
    data = write_words(tmp_path, 8)
    losses = []
    for size in (1, 4):
        out = tmp_path / f"out{size}"
        options = {"output_dir": str(out), "per_device_train_batch_size": size, "eval_data": data, "max_steps": 2}
        train_here(write_recipe(tmp_path, data=data, **options))
        report = metrics(out)
        losses.append([*report["losses"].values(), report["eval_loss"]])
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-5)
    assert losses[0][2] > 0


def test_redrawn_documents_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("minimonkey.scripts.training.data.documents", stand_in_documents())
    data = {"a": {"synthetic": "word", "length": 4}}
    limits = {"too_long": "skip", "max_seq_length": 400}
    train_here(write_recipe(tmp_path, data=data, **limits))
    assert metrics(tmp_path / "out")["redrawn_too_long"] == 1


@pytest.mark.parametrize("only", [True, False])
def test_letters_are_a_loss_of_their_own(tmp_path, monkeypatch, only):
    monkeypatch.setattr("minimonkey.scripts.training.data.documents", stand_in_documents())
    data = {"a": {"synthetic": "word", "length": 4}}
    train = ["vision"] if only else ["vision", "projector", "language_model"]
    letters = {"letters_only": True} if only else {"letters_weight": 0.3}
    options = {"train": train, "data": data, "save_dtype": "float32"}
    before = load_model(str(ROOT), read_recipe(write_recipe(tmp_path))).state_dict()
    train_here(write_recipe(tmp_path, **options, **letters))
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")  # without the head
    assert {name.split(".")[1] for name in changed(before, after) if only} <= {"vision_tower"}
    assert any("vision_tower" in name for name in changed(before, after))
    checkpoint = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert checkpoint.keys() - after.keys() == {"letters_head.weight", "letters_head.bias"}
    loss = metrics(tmp_path / "out")["losses"]["1"]
    train_here(write_recipe(tmp_path, **options, output_dir=str(tmp_path / "plain")))
    assert loss != metrics(tmp_path / "plain")["losses"]["1"]


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "layer types": Qwen2Config(**TINY, num_hidden_layers=2),
    "biases": LlamaConfig(**TINY, num_hidden_layers=3, attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_deeper_without_effect(family, tmp_path):
    language_model = AutoModel.from_config(copy.deepcopy(FAMILIES[family])).eval()
    for parameter in language_model.parameters():
        torch.nn.init.normal_(parameter)
    holder = types.SimpleNamespace(language_model=language_model)
    model = types.SimpleNamespace(model=holder, config=types.SimpleNamespace(text_config=language_model.config))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = language_model(ids).last_hidden_state
        deepen(model, 5)
        torch.testing.assert_close(language_model(ids).last_hidden_state, before)
        language_model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).last_hidden_state, before)
    assert len(again.layers) == 5


def test_layers_that_cannot_be_silenced_are_refused():
    layers = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(8, 2)])
    layers[0].self_attn.layer_idx = 0
    model = types.SimpleNamespace(
        model=types.SimpleNamespace(language_model=types.SimpleNamespace(layers=layers)),
        config=types.SimpleNamespace(text_config=types.SimpleNamespace()),
    )
    with pytest.raises(ValueError, match="o_proj and down_proj, got TransformerEncoderLayer"):
        deepen(model, 2)


def test_new_layers_begin_without_effect_and_are_trained(tmp_path, nano):
    model = load_model(str(ROOT), read_recipe(write_recipe(tmp_path, depth=None)))
    layers = model.config.text_config.num_hidden_layers
    inputs = {"input_ids": torch.arange(10, 40)[None]}
    with torch.no_grad():
        before = model(**inputs).logits
        deepen(model, 2 * layers + 1)
        after = model(**inputs).logits
    assert torch.equal(before, after)
    assert [layer.self_attn.layer_idx for layer in model.model.language_model.layers] == [*range(2 * layers + 1)]
    train_here(write_recipe(tmp_path, depth=None, language_layers=layers + 2, save_dtype="float32"))
    trained = load_model(str(tmp_path / "out" / "model"), read_recipe(write_recipe(tmp_path, depth=None)))
    assert trained.config.text_config.num_hidden_layers == layers + 2
    added = [layer for layer in trained.model.language_model.layers if layer.mlp.down_proj.weight.abs().max() < 0.01]
    assert len(added) == 2 and all(layer.mlp.down_proj.weight.abs().max() > 0 for layer in added)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, "take a multiple of 2"),
        ({"model": "nowhere"}, "import_checkpoint.py"),
        ({"depth": 9}, "depth 9 is more than"),
        ({"depth": None, "language_layers": 2}, "language_layers 2 is less than"),
        ({"depth": 1, "language_layers": 9}, "give one of them"),
        ({"use_cpu": False, "bf16": True}, "use_cpu=true"),
        ({"max_seq_length": 20}, "do not fit max_seq_length 20"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_wrong_is_said_before_training(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        train_here(write_recipe(tmp_path, **options))
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_is_never_dropped_quietly(tmp_path, monkeypatch, variable):
    trainer = FineTuner.__new__(FineTuner)
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    trainer.accelerator = type("A", (), {"distributed_type": type("T", (), {"value": "MULTI_CPU"})})
    trainer.args = type("B", (), {"device": torch.device("cpu")})
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="accelerate would run MULTI_CPU on cpu; .* needs GPUs"):
        trainer._check_wrapper()


@pytest.mark.parametrize(("most", "is_sharded", "fits"), [(7, True, True), (8, True, False), (8, False, True)])
def test_sharded_processes_run_the_vision_tower_equally_often(most, is_sharded, fits):
    source = type("S", (), {"ranges": [(1, most, 1, 1)]})
    trainer = FineTuner.__new__(FineTuner)
    trainer.is_fsdp_enabled, trainer.train_dataset = is_sharded, type("D", (), {"sources": [source]})
    trainer.args = type("R", (), {"per_device_train_batch_size": 1 if most == 7 else 2, "pack_tokens": None})
    trainer.processor = load_processor(ROOT)
    if fits:
        trainer._check_tiles()
    else:
        with pytest.raises(ValueError, match="2 with up to 10 tiles each"):
            trainer._check_tiles()


def test_muon_and_adamw_go_on_from_their_state(nano):
    def run(steps: int, state: dict | None = None) -> tuple[list[torch.Tensor], dict]:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"layers": torch.nn.Linear(4, 6), "out": torch.nn.Linear(6, 2)})
        if state:
            model.load_state_dict(state["model"])
        optimizer = MuonWithAdamW(*matrices_and_rest(model), 0.1, 0.01, 0.1, (0.9, 0.98))
        if state:
            optimizer.load_state_dict(state["optimizer"])
        for step in range(*((state["step"], steps) if state else (0, steps))):
            inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model["out"](model["layers"](inputs)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters()), {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": steps,
        }

    whole, _ = run(6)
    _, half = run(3)
    resumed, state = run(6, half)
    assert all(map(torch.equal, whole, resumed))
    assert len(state["optimizer"]["state"]) == len(whole)
    matrices, rest = matrices_and_rest(nano.requires_grad_(True))
    assert {matrix.ndim for matrix in matrices} == {2}
    assert any(parameter is nano.lm_head.weight for parameter in rest)


def test_a_checkpoint_that_was_being_written_is_not_taken(tmp_path):
    for step, is_complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if is_complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize(
    "layout",
    [
        {"order": "grouped"},
        {"pack_tokens": 400, "per_device_train_batch_size": 1, "batch_size": 2, "loss_reduction": "square"},
        {"tile_ranges": [[2, 2, 3, 3]], "drop_tokens": {"steps": 0.7}, "depth": 2, "pad_to_multiple_of": 64},
    ],
    ids=["grouped", "packed", "dropping"],
)
def test_a_killed_run_goes_on_exactly(tmp_path, capsys, layout):
    data = write_words(tmp_path, 10, (224, 224) if "drop_tokens" in layout else (112, 112))
    settings = {"data": data, "max_steps": 8, "save_steps": 2, "muon_learning_rate": 1e-4, **layout}
    parts = ["language_model", "projector", "vision"]
    recipe = write_recipe(tmp_path, train=parts, learning_rate=1e-4, save_dtype="float32", **settings)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(recipe, "--set", f"output_dir={whole}")
    process = subprocess.Popen(command(recipe, "--set", f"output_dir={broken}"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (broken / "checkpoint-2" / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "metrics.json").exists()
    for options, message in (([], "--resume"), (["--resume", "--set", "seed=2"], "another seed")):
        with pytest.raises(SystemExit):
            train_here(recipe, "--set", f"output_dir={broken}", *options)
        assert message in capsys.readouterr().err
    train_here(recipe, "--set", f"output_dir={broken}", "--resume")
    assert metrics(whole)["losses"] == metrics(broken)["losses"]
    assert len(metrics(whole)["losses"]) == 8
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (whole, broken)]
    assert not changed(*weights)


def test_an_untrained_nano_of_other_dimensions(tmp_path):
    dimensions = {"vision": {"patch_size": 14, "num_hidden_layers": 2}, "text": {"num_hidden_layers": 1}}
    recipe = read_recipe(write_recipe(tmp_path, model="untrained-nano", depth=None, dimensions=dimensions))
    model = load_model(model_folder(recipe), recipe)
    assert model.encode_tiles(torch.zeros(2, 3, 112, 112)).shape == (2, 16, 192)
    assert (len(model.model.vision_tower.encoder.layer), len(model.model.language_model.layers)) == (2, 1)
    for other in ("small", {"tower": {}}, {"vision": 3}):
        with pytest.raises(ValueError, match="dimensions must be vision and text"):
            read_recipe(write_recipe(tmp_path, model="untrained-nano", dimensions=other))


@pytest.fixture(scope="module")
def two_billion(tmp_path_factory, nano):
    """A folder like MiniMonkey-2B in every dimension, with two layers and random weights; Nano's tokenizer."""
    folder = tmp_path_factory.mktemp("2B")
    config = random_config("2B")
    fields = {**config.to_dict(), "image_token_id": nano.config.image_token_id, "scm_layer": None}
    for name in ("vision_config", "text_config"):
        fields[name] = {**getattr(config, name).to_dict(), "num_hidden_layers": 2}
        fields[name].pop("layer_types", None)
    model = random_model(type(config)(**fields), torch.device("cpu"), torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).tokenizer
    save_processor(folder, model.config, tokenizer, with_bos=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minimonkey-2b-full", "minimonkey-2b-lora"])
def test_the_recipes_of_the_2b_model_take_a_step_at_reduced_depth(tmp_path, two_billion, name):
    recipe = ROOT / "scripts" / "training" / "recipes" / f"{name}.yaml"
    draw(tmp_path / "page.png", "page", (900, 600))
    data = {"page": {"root": str(tmp_path), "annotation": str(tmp_path / "lines.jsonl"), "max_dynamic_patch": 2}}
    write_lines(tmp_path, [line("<image>\nRead.", "page", "page.png")])
    changes = {"model": two_billion, "output_dir": tmp_path / "out", "depth": 1, "max_steps": 1, "batch_size": 1}
    changes |= {"use_cpu": "true", "dataloader_num_workers": 0, "data": json.dumps(data), "warmup_steps": 0}
    result = finetune(recipe, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}")))
    assert result.returncode == 0, result.stderr
    report = metrics(tmp_path / "out")
    assert report["steps"] == 1 and report["losses"]["1"] > 0
    before = load_file(two_billion / "model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    names = {name for name in after if not torch.equal(before[name], after[name])}
    assert names and all(name.startswith(LANGUAGE_MODEL) for name in names)


@pytest.mark.slow
def test_train_nano_smoke(tmp_path):
    """The whole way by its commands: generator, training, evaluation."""
    recipe = ROOT / "scripts" / "training" / "recipes" / "nano-smoke.yaml"
    result = finetune(recipe, "--set", f"output_dir={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    losses = list(metrics(tmp_path / "out")["losses"].values())
    assert losses[-1] < 0.8 * losses[0]
    arguments = ["scripts/evaluate.py", "--model", tmp_path / "out" / "model", "--items", "2"]
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- weights in few bits under adapters ------------------------------------------------------------------------------


def test_adapters_on_8_bit_weights_and_modules_beside_them(tmp_path):
    """TinyGPT-V's second stage: adapters, with norms and projector trained whole, on weights that stay in 8 bits."""
    options = {"lora_r": 4, "train": ["language_model"], "frozen_weights": "int8", "gradient_checkpointing": True}
    options |= {"lora_also": ["norm", "multi_modal_projector"], "learning_rate": 1e-2}
    path = write_recipe(tmp_path, **options)
    recipe = read_recipe(path)
    model = load_model(str(ROOT), recipe)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert {"lora_A", "lora_B", "norm", "multi_modal_projector"} == {
        next(part for part in ("lora_A", "lora_B", "multi_modal_projector", "norm") if part in name) for name in trained
    }
    frozen = model.get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer
    assert isinstance(frozen, StoredLinear) and frozen.weight.dtype == torch.int8
    train_here(path)
    merged = AutoModel.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True, dtype=torch.float32)
    before = load_model(str(ROOT), read_recipe(write_recipe(tmp_path))).state_dict()
    names = changed(before, merged.state_dict())
    assert any("multi_modal_projector" in name for name in names) and any("_proj" in name for name in names)
    assert not any("vision_tower" in name for name in names)


def test_what_few_bits_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="A fresh_projector has to be trained, but train is .'language_model'"):
        read_recipe(write_recipe(tmp_path, train=["language_model"], fresh_projector=True))
    for options in ({"frozen_weights": "int8"}, {"lora_also": ["norm"]}):
        with pytest.raises(ValueError, match="lora_also and frozen_weights belong to lora_r"):
            read_recipe(write_recipe(tmp_path, **options))
    recipe = read_recipe(write_recipe(tmp_path, lora_r=4, train=["language_model"], lora_also=["no_such"]))
    with pytest.raises(ValueError, match="no module of projector or language model has 'no_such'"):
        load_model(str(ROOT), recipe)


def test_the_four_stages_of_tinygpt_v(tmp_path):
    """Each goes on from the one before; the warm-up trains norms and a fresh projector and nothing else."""
    model = str(ROOT)
    for stage in range(1, 5):
        recipe = ROOT / "scripts/training/recipes" / f"tinygpt-v-{stage}.yaml"
        out = tmp_path / str(stage)
        changes = [
            f"output_dir={out}",
            f"data={json.dumps(write_words(tmp_path))}",
            "max_steps=1",
            "max_seq_length=2048",
        ]
        changes += [f"model={model}", "batch_size=2", "per_device_train_batch_size=2", "dataloader_num_workers=0"]
        train_here(recipe, *(part for change in changes for part in ("--set", change)))
        model = str(out / "model")
    before, after = load_file(ROOT / "model.safetensors"), load_file(tmp_path / "1" / "model" / "model.safetensors")
    names = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert names and all("norm" in name or "multi_modal_projector" in name for name in names)
    assert torch.equal(before["lm_head.weight"].bfloat16(), after["lm_head.weight"])
