"""The whole model pickled, exported, compiled, and reached by the names of the published class."""

import copy
import io
import pickle

import pytest
import torch
from compression_helpers import IMAGE, batch
from conftest import ROOT
from model_helpers import prompt, tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import AutoModel


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


# --- pickle ----------------------------------------------------------------------------------------------------------


def test_a_loaded_model_can_be_pickled_and_saved_whole():
    nano = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    expected = nano(input_ids=ids).logits
    assert torch.equal(pickle.loads(pickle.dumps(nano))(input_ids=ids).logits, expected)
    torch.save(nano, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input_ids=ids).logits, expected)


# --- export and compile ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_whole_model_exports_with_pixels():
    model, inputs = tiny_model(), prompt(2, 1)
    exported = torch.export.export(model, (), {**inputs, "use_cache": False})
    assert torch.equal(exported.module()(**inputs, use_cache=False).logits, model(**inputs).logits)


@torch.no_grad()
def test_the_whole_model_compiles_as_one_graph_with_pixels():
    model, inputs = tiny_model(), prompt(2, 1)
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend=(counter := CompileCounter()))
    assert torch.equal(compiled(**inputs).logits, expected)
    assert counter.frame_count == 1


def _compile_language_model(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")


def _compile_layers(model):
    layers = model.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")


def _compile_layers_in_place(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")


def _compile_blocks(model):
    for layer in model.model.language_model.layers:
        layer.self_attn, layer.mlp = (torch.compile(block, backend="eager") for block in (layer.self_attn, layer.mlp))


@pytest.mark.parametrize(
    "compile_part", [_compile_language_model, _compile_layers, _compile_layers_in_place, _compile_blocks]
)
def test_compression_reads_a_language_model_that_is_compiled_in_part(compile_part):
    model, inputs = tiny_model(), batch((3, IMAGE, 9))
    compiled = copy.deepcopy(model)
    compile_part(compiled)
    kept = compiled.kept_positions(**inputs)[0]
    assert torch.equal(kept, model.kept_positions(**inputs)[0])
    assert torch.equal(
        compiled.generate(**inputs, use_scm=True, **GREEDY), model.generate(**inputs, use_scm=True, **GREEDY)
    )


# --- published names -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_published_names():
    model, inputs = tiny_model(), prompt(2)
    ids, tiles = inputs["input_ids"], inputs["pixel_values"]
    assert model.num_image_token == 4
    assert model.img_context_token_id == 60
    model.img_context_token_id = 60  # as published scripts do before they generate
    with pytest.raises(ValueError, match="61 is not the model's image_token_id 60"):
        model.img_context_token_id = 61
    assert model.vision_model is model.model.vision_tower
    features = model.extract_feature(tiles)
    patches = model.vision_model(tiles).last_hidden_state[:, 1:]
    shuffled = model.model.pixel_shuffle(patches.unflatten(1, (4, 4)), 0.5).flatten(1, 2)
    torch.testing.assert_close(model.mlp1(shuffled), features)
    embeddings = model.language_model.get_input_embeddings()(ids)
    embeddings[ids == model.img_context_token_id] = features.flatten(0, 1)
    answer = model.language_model.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(answer, model.generate(**inputs, **GREEDY)[:, 24:])
    assert model.get_decoder() is model.model.language_model


def test_the_published_language_model_shares_its_weights():
    model = tiny_model()
    language_model = model.language_model
    assert language_model.lm_head.weight is model.lm_head.weight
    assert all(not parameter.is_meta for parameter in language_model.parameters())
    assert set(map(id, language_model.parameters())) <= set(map(id, model.parameters()))
