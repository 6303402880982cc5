"""Keys and values in 8 bits: what they remember, and every way to generate, to chat and to go on with them."""

import pytest
import torch
from chat_helpers import CHAT, QUESTION, SCM, tiny
from compression_helpers import GREEDY, batch
from conftest import ROOT
from model_helpers import GENERATION_MODES, prompt, tiny_model
from transformers import AutoProcessor, DynamicCache

from minimonkey.quantized_cache import Int8Layer, empty_cache, from_int8, to_int8


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def with_int8(model):
    model.config.kv_cache_dtype = "int8"
    return model


def test_states_come_back_within_half_a_step():
    states = torch.randn(2, 3, 5, 16) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    stored = to_int8(states)
    assert stored.dtype == torch.int8 and stored.shape == (2, 3, 5, 20)
    step = states.abs().amax(dim=-1, keepdim=True) / 127
    assert ((from_int8(stored, torch.float32) - states).abs() <= 0.501 * step).all()
    assert torch.equal(from_int8(to_int8(torch.zeros(1, 1, 1, 4)), torch.float32), torch.zeros(1, 1, 1, 4))


def test_it_does_not_matter_in_which_pieces_tokens_come():
    keys, values = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    whole, pieces = Int8Layer(), Int8Layer()
    expected = whole.update(keys, values)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        last = pieces.update(keys[:, :, part], values[:, :, part])
    assert all(torch.equal(one, other) for one, other in zip(expected, last))
    pieces.crop(-3)
    assert pieces.get_seq_length() == 6
    assert torch.equal(pieces.states()[0], expected[0][:, :, :6])


@torch.no_grad()
def test_logits_hardly_change():
    model, inputs = tiny_model(), prompt(2)
    plain = model(**inputs).logits
    cached = model(**inputs, past_key_values=empty_cache(with_int8(model).config), use_cache=True).logits
    assert torch.nn.functional.cosine_similarity(plain.flatten(), cached.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("mode", GENERATION_MODES, ids=str)
@pytest.mark.parametrize("has_images", [True, False])
def test_every_way_to_generate_uses_it(mode, has_images, monkeypatch):
    model, inputs = with_int8(tiny_model()), prompt(1, 1)
    if not has_images:
        inputs = {"input_ids": torch.arange(3, 15)[None]}
    used = []
    update = Int8Layer.update
    monkeypatch.setattr(Int8Layer, "update", lambda self, *args, **kw: used.append(1) or update(self, *args, **kw))
    output = model.generate(**inputs, max_new_tokens=4, eos_token_id=None, pad_token_id=0, **mode)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4
    assert bool(used) == ("cache_implementation" not in mode)


def test_one_that_the_caller_gives_counts():
    model, cache = with_int8(tiny_model()), DynamicCache()
    model.generate(torch.arange(3, 15)[None], past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    assert not isinstance(cache.layers[0], Int8Layer) and cache.get_seq_length() == 13


@pytest.mark.parametrize(
    "options",
    [{}, SCM, {**SCM, "scm_select": {"stage": "layer", "positions": "original"}}],
    ids=["plain", "scm", "layer"],
)
def test_conversations_go_on_from_it(processor, options):
    model, image = with_int8(tiny()), str(ROOT / "assets/example.png")
    _, history = model.chat(processor, image, QUESTION, return_history=True, **CHAT, **options)
    layers = history.memory._state.cache.layers
    assert all(isinstance(layer, Int8Layer) and layer.keys.dtype == torch.int8 for layer in layers)
    remembered = model.chat(processor, image, "And?", history=history, return_dict=True, **CHAT, **options)
    model.forget_conversations()
    computed = model.chat(processor, image, "And?", history=list(history), return_dict=True, **CHAT, **options)
    assert remembered.token_ids == computed.token_ids


def test_rows_of_a_batch_that_drop_tokens_in_a_layer():
    model, rows = with_int8(tiny_model()), batch((3, (4, 2, 1), 9), (5, (4, 2, 1), 2))
    options = {**GREEDY, "pad_token_id": 0, "use_scm": True, "scm_select": {"stage": "layer", "positions": "original"}}
    assert model.generate(**rows, **options).shape[0] == 2
    assert model.generate(**rows, num_beams=2, **options).shape[0] == 2


def test_models_that_it_does_not_fit():
    with pytest.raises(ValueError, match="kv_cache_dtype must be None or 'int8', got 'int4'"):
        type(tiny_model().config)(**{**tiny_model().config.to_dict(), "kv_cache_dtype": "int4"})
    model = with_int8(tiny_model("gemma2", head_dim=16, sliding_window=12))
    with pytest.raises(ValueError, match="full attention, not sliding_attention; leave it None"):
        model.generate(**prompt(1), max_new_tokens=2, pad_token_id=0)
