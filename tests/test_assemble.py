"""assemble.py: vision towers and language models of different families become one model that trains and chats."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import language_folder, load_published
from conftest import FIXTURES, ROOT, random_tiles, synthetic_picture
from model_helpers import tiny_mono
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
)

from minimonkey.scripts.assemble import assemble, check_same_logits


def published_vision(folder: Path) -> Path:
    """A whole published model, of which only the vision tower is wanted."""
    return FIXTURES / "models" / "internlm2"


def native_vision(folder: Path) -> Path:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(1)
    model = InternVLVisionModel(InternVLVisionConfig(**config, image_size=28, patch_size=7))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(
    params=[("qwen3", {"tie_word_embeddings": True}, published_vision), ("mistral", {}, native_vision)],
    ids=["qwen3-published", "mistral-native"],
)
def parts(request, tmp_path):
    model_type, options, vision = request.param
    return vision(tmp_path / "vision"), language_folder(tmp_path / "language", model_type, **options)


def test_the_command_joins_two_families(parts, tmp_path):
    vision, language = parts
    command = [sys.executable, "scripts/assemble.py", vision, language, tmp_path / "out", "--dtype", "float32"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(language).eval()(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits[..., :270], alone[..., :270], atol=1e-5)
    picture = synthetic_picture(200, 100, seed=3)
    ranges = {"min_tiles": 2, "max_tiles": 4, "adaptive_min_tiles": 2, "adaptive_max_tiles": 3}
    for use_scm in (False, True):
        answer = model.chat(
            processor, picture, "Hello", images_kwargs=ranges, use_scm=use_scm, max_new_tokens=3, do_sample=False
        )
        assert isinstance(answer, str)


def test_the_vision_tower_is_the_one_given(parts, tmp_path):
    assemble(str(parts[0]), str(parts[1]), tmp_path / "out", "chatml", torch.float32)
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    size = model.config.tile_size
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(random_tiles(0, 1, 3, size, size)).last_hidden_state
    if parts[0].name == "vision":
        with torch.no_grad():
            alone = InternVLVisionModel.from_pretrained(parts[0]).eval()(random_tiles(0, 1, 3, size, size))
        assert torch.equal(states, alone.last_hidden_state)
    else:
        with torch.no_grad():
            whole = load_published("internlm2", tmp_path).model.vision_tower
            assert torch.allclose(states, whole(random_tiles(0, 1, 3, size, size)).last_hidden_state, atol=1e-5)


def test_the_projector_can_be_trained(parts, tmp_path):
    assemble(str(parts[0]), str(parts[1]), tmp_path / "out", "internlm2-chat", torch.float32)
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    size, tokens = model.config.tile_size, model.config.image_seq_length
    ids = torch.full((1, tokens + 4), 5)
    ids[0, 2:-2] = model.config.image_token_id
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, pixel_values=random_tiles(0, 1, 3, size, size), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_language_model_that_bounds_its_logits_is_joined(tmp_path):
    language = language_folder(tmp_path / "language", "gemma2", final_logit_softcapping=0.05)
    assemble(str(published_vision(tmp_path)), str(language), tmp_path / "out", "chatml", torch.float32)
    assert AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).lm_head.softcap == 0.05


def test_a_language_model_whose_head_cannot_be_carried_is_refused(tmp_path):
    language = language_folder(tmp_path / "language", "phi")  # its head has a bias
    with pytest.raises(ValueError, match="output layer of PhiForCausalLM has a bias"):
        assemble(str(published_vision(tmp_path)), str(language), tmp_path / "out", "chatml", torch.float32)
    assert not (tmp_path / "out").exists()


def test_other_logits_than_outside_are_refused(tmp_path):
    language = AutoModelForCausalLM.from_pretrained(language_folder(tmp_path / "language", "qwen3"))
    changed = copy.deepcopy(language)
    changed.lm_head.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="qwen3 gives other logits"):
        check_same_logits(changed, language)


def test_parts_that_are_something_else(tmp_path):
    language = language_folder(tmp_path / "language", "qwen3")
    vision = published_vision(tmp_path)
    with pytest.raises(ValueError, match="VISION must be an InternViT"):
        assemble(str(language), str(language), tmp_path / "out", "chatml", torch.float32)
    with pytest.raises(ValueError, match="Unknown chat template"):
        assemble(str(vision), str(language), tmp_path / "out", "latin", torch.float32)
    with pytest.raises(ValueError, match="exists already"):
        assemble(str(vision), str(language), tmp_path, "chatml", torch.float32)


def without_some_weights(folder: Path) -> Path:
    path = language_folder(folder, "qwen3") / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if ".layers.1.mlp." not in name}
    save_file(weights, path, {"format": "pt"})
    return folder


def whole_internvl(folder: Path) -> Path:
    native_vision(folder)
    vision = InternVLVisionConfig.from_pretrained(folder)
    text = AutoConfig.from_pretrained(language_folder(folder, "qwen3"))
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=260)
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("language", "message"),
    [
        (without_some_weights, r"are not those of a Qwen3ForCausalLM.*layers\.1\.mlp"),
        (whole_internvl, "is not a causal language model of transformers"),
        (lambda folder: ROOT, "is not a causal language model of transformers"),  # a MiniMonkey
        (lambda folder: language_folder(folder, "gpt2"), "GPT2LMHeadModel is not built like Llama"),
        (lambda folder: folder / "missing", "There is no folder"),
    ],
    ids=["missing_weights", "internvl", "minimonkey", "gpt2", "no_folder"],
)
def test_language_models_that_cannot_be_used(language, message, tmp_path):
    source, out = language(tmp_path / "language"), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        assemble(str(published_vision(tmp_path)), str(source), out, "chatml", torch.float32)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_a_patch_embedding_is_no_vision_tower(tmp_path):
    tiny_mono().save_pretrained(tmp_path / "mono")
    language = language_folder(tmp_path / "language", "qwen3")
    with pytest.raises(ValueError, match="only a patch embedding"):
        assemble(str(tmp_path / "mono"), str(language), tmp_path / "out", "chatml", torch.float32)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_beside_what_was_written(tmp_path):
    language = language_folder(tmp_path / "language", "qwen3")
    assemble(str(published_vision(tmp_path)), str(language), tmp_path / "out", "chatml", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "out"]
    assert not [path for path in (tmp_path / "out").iterdir() if "unfinished" in path.name]


def test_a_partial_folder_that_is_not_ours_is_left_alone(tmp_path):
    language = language_folder(tmp_path / "language", "qwen3")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not an unfinished import; move it away"):
        assemble(str(published_vision(tmp_path)), str(language), tmp_path / "out", "chatml", torch.float32)
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1e9}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": 10**12}, "vocab_size must be a whole number"),
        ({"hidden_act": 5}, "is not a causal language model|is no configuration"),
    ],
)
def test_language_models_that_cannot_be_are_refused_before_they_are_made(tmp_path, change, message):
    language = language_folder(tmp_path / "language", "qwen3")
    path = language / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        assemble(str(published_vision(tmp_path)), str(language), tmp_path / "out", "chatml", torch.float32)
    assert not (tmp_path / "out.partial").exists()


def test_a_language_model_with_weights_that_are_nan_is_refused(tmp_path):
    path = language_folder(tmp_path / "language", "qwen3") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="norm.weight holds values that are not finite"):
        assemble(str(published_vision(tmp_path)), str(path.parent), tmp_path / "out", "chatml", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["language"]
