"""Published weights give the published numbers, loaded on the fly and through import_checkpoint.py."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import CASES, IMAGE_TOKEN, load_published, published_folder
from conftest import FIXTURES, random_tiles, recorded
from safetensors.torch import load_file
from transformers import AutoModel

from minimonkey.checkpoint import convert_tensor, fuse_wqkv, split_wqkv
from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.import_checkpoint import expected_shapes, import_checkpoint
from minimonkey.scripts.importing.weights import Shard, check_against_model


TOLERANCE = 1e-3
PIXEL_VALUES = {
    "A": random_tiles(1000, 2, 3, 112, 112),
    "B": random_tiles(1001, 4, 3, 112, 112),
    "E": random_tiles(1002, 1, 3, 84, 84),
}
PIXEL_VALUES["C"] = PIXEL_VALUES["B"][:3]
MONO_PIXEL_VALUES = {
    "A": random_tiles(1100, 2, 3, 112, 112),
    "B": random_tiles(1102, 4, 3, 112, 112),
    "C": random_tiles(1101, 3, 3, 112, 112),
}


def load_imported(name: str, tmp_path: Path):
    out = tmp_path / "imported"
    import_checkpoint(str(published_folder(name, tmp_path)), out, IMAGE_TOKEN)
    return AutoModel.from_pretrained(out, trust_remote_code=True, attn_implementation="eager").eval()


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual.float(), expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(params=[(name, load) for name in CASES for load in (load_published, load_imported)], ids=lambda p: p[0])
def model_and_case(request, tmp_path):
    name, load = request.param
    kind = "mono" if name.startswith("mono") else "cases"
    return load(name, tmp_path), load_file(recorded(f"{kind}/{name}.safetensors"))


def pixel_values(model, row: str) -> torch.Tensor:
    return (MONO_PIXEL_VALUES if model.config.visual_experts else PIXEL_VALUES)[row]


@torch.no_grad()
def test_logits_and_loss(model_and_case):
    model, case = model_and_case
    for row in "AB":
        inputs = {key: case[f"{row}.{key}"] for key in ("input_ids", "attention_mask", "labels")}
        if row == "B":
            inputs["image_flags"] = case["B.image_flags"]
        outputs = model(**inputs, pixel_values=pixel_values(model, row))
        assert abs(outputs.loss.item() - case[f"{row}.loss"].item()) < TOLERANCE
        if row == "A":
            step = 8 if case["A.logits"].shape != outputs.logits.shape else 1  # fixtures hold every eighth position
            assert close(outputs.logits[:, ::step], case["A.logits"])


@pytest.mark.parametrize("row", "ACD")
def test_greedy_tokens(model_and_case, row):
    model, case = model_and_case
    if row == "D" and model.config.visual_experts:
        pytest.skip("the published Mono-InternVL crashes without images")
    prompt = case[f"{row}.input_ids"]
    images = {} if row == "D" else {"pixel_values": pixel_values(model, row)}
    output = model.generate(
        input_ids=prompt,
        attention_mask=case.get(f"{row}.attention_mask", torch.ones_like(prompt)),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        **images,
    )
    assert torch.equal(output[:, : prompt.shape[1]], prompt)
    assert torch.equal(output[:, prompt.shape[1] :], case[f"{row}.generated"][:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["internlm2", "phi3"])
def test_image_features(name, tmp_path):
    model = load_published(name, tmp_path)
    case = load_file(FIXTURES / "cases" / f"{name}.safetensors")
    for row in "AE":
        if f"{row}.extract_feature" in case:
            features = model.get_image_features(PIXEL_VALUES[row], return_dict=True).pooler_output
            assert close(features, case[f"{row}.extract_feature"])
    if "A.vision_last_hidden_state" in case:
        states = model.model.vision_tower(PIXEL_VALUES["A"]).last_hidden_state
        assert close(states[:, ::8], case["A.vision_last_hidden_state"])


def test_nothing_is_missing_or_left_over_on_the_fly(tmp_path):
    for name in ("internlm2", "phi3"):
        _, info = MiniMonkeyForConditionalGeneration.from_pretrained(
            published_folder(name, tmp_path), image_token_id=IMAGE_TOKEN, output_loading_info=True
        )
        assert not any(info.values()), info


@pytest.mark.parametrize("name", ["internvl2-1b", "internvl2-2b_minimonkey", "internvl2-4b", "mono-internvl-2b"])
def test_full_size_names_and_shapes_fit(name):
    recorded = json.loads((FIXTURES / "keys" / f"{name}.json").read_text())
    config = MiniMonkeyConfig.from_dict(recorded["config"])
    shard = Shard(Path("published"), {key: tuple(shape) for key, shape in recorded["keys"].items()})
    expected = expected_shapes(config)
    check_against_model(
        [shard], expected, lambda key, tensor: convert_tensor(key, tensor, config.text_config), tied=False
    )
    assert sum(math.prod(shape) for shape in expected.values()) == recorded["n_params"]


def test_split_and_fuse_are_inverse():
    text_config = type("Text", (), {"num_attention_heads": 6, "num_key_value_heads": 2})
    for shape in ((40, 24), (40,)):
        wqkv = torch.arange(math.prod(shape)).reshape(shape)
        parts = split_wqkv(wqkv, text_config)
        assert [part.shape[0] for part in parts] == [24, 8, 8]
        assert torch.equal(fuse_wqkv(*parts, text_config), wqkv)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_select_layer_takes_that_hidden_state(layer, tmp_path):
    """Published: `hidden_states[select_layer]`, of which the first is the embeddings."""
    model = load_published("internlm2", tmp_path)
    states = model.model.vision_tower(PIXEL_VALUES["A"], output_hidden_states=True).hidden_states
    model.config.vision_feature_layer = layer
    features = model.get_image_features(PIXEL_VALUES["A"], return_dict=True).pooler_output
    grid = states[layer][:, 1:].unflatten(1, (8, 8))
    cells = grid.unflatten(1, (4, 2)).unflatten(3, (4, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)  # by rows within a cell
    expected = model.model.multi_modal_projector(cells.flatten(1, 2))
    assert close(features, expected)


@torch.no_grad()
def test_first_pixel_shuffle_is_the_transposed_grid(tmp_path):
    model = load_published("internlm2", tmp_path)
    second = model.get_image_features(PIXEL_VALUES["A"], return_dict=True).pooler_output
    model.config.pixel_shuffle_version = "v1"
    first = model.get_image_features(PIXEL_VALUES["A"], return_dict=True).pooler_output
    assert close(first, second.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))
