"""Weights sorted for the processor: the same answers, files and refusals."""

import copy

import pytest
import torch
from chat_helpers import CHAT, QUESTION, tiny
from compression_helpers import GREEDY, batch
from conftest import ROOT
from model_helpers import GENERATION_MODES, prompt, tiny_model, tiny_mono
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoProcessor

from minimonkey.packed_weights import PackedLinear, can_pack
from minimonkey.quantized_weights import QuantizedWeightsConfig, store_weights
from minimonkey.scripts import chat, repository
from minimonkey.scripts.distill_vision import make_student
from minimonkey.scripts.repository import load_model, prepared


pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="packs on an x86 CPU")
IMAGE = str(ROOT / "assets/example.png")


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(repository, "PACKED_FROM", 0)


def linears(model) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, (nn.Linear, PackedLinear))}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", [(96, 40), (32, 7), (1088, 300)])
def test_the_product_is_that_of_the_plain_layer(size, has_bias):
    torch.manual_seed(0)
    linear = nn.Linear(*size, bias=has_bias)
    layer = PackedLinear(linear)
    for shape in [(0,), (1,), (2, 3), (1, 200)]:
        inputs = torch.randn(*shape, size[0])
        with torch.no_grad():
            assert torch.allclose(layer(inputs), linear(inputs), atol=1e-4)
    strided = torch.randn(size[0], 3).t()
    with torch.no_grad():
        assert torch.allclose(layer(strided), linear(strided), atol=1e-4)
    assert torch.equal(layer.unpacked(), linear.weight)


@pytest.mark.parametrize("mode", [{}, *GENERATION_MODES, {"prefill_chunk_size": 5}], ids=str)
def test_the_same_tokens_in_every_mode(mode):
    model, inputs, options = tiny_model(), prompt(2, 1), {**GREEDY, "pad_token_id": 0, **mode}
    expected = model.generate(**inputs, **options)
    model.prepare_for_cpu()
    assert linears(model) == {PackedLinear}
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_compressed_prompts_keep_the_same_tokens():
    model, rows = tiny_model(), batch((3, (4, 2, 1), 9), (5, (4, 0, 1), 2), side="left")
    options = {**GREEDY, "pad_token_id": 0, "use_scm": True}
    expected = model.generate(**rows, **options)
    model.prepare_for_cpu()
    assert torch.equal(model.generate(**rows, **options), expected)


def shared_layers():
    return make_student(tiny_model(), None, 2, "heads+conv")


@pytest.mark.parametrize("make", [tiny_mono, shared_layers])
def test_other_layers(make):
    model, inputs = make(), prompt(1)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.prepare_for_cpu()
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="the processor has no units for bfloat16")
def test_nano_in_bfloat16():
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    model = load_model(ROOT, dtype=torch.bfloat16)
    receipt, options = ROOT / "assets/receipt.png", {"use_scm": True, "max_new_tokens": 60}
    expected = [model.chat(processor, receipt, "Read the text.", max_new_tokens=60)]
    expected += [model.chat(processor, receipt, "What is the total?", **options)]
    model.prepare_for_cpu()
    assert expected[0] == model.chat(processor, receipt, "Read the text.", max_new_tokens=60)
    assert expected[1] == model.chat(processor, receipt, "What is the total?", **options)


def test_a_conversation_that_began_before():
    processor, model = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True), tiny()
    _, history = model.chat(processor, IMAGE, QUESTION, return_history=True, **CHAT)
    expected = model.chat(processor, IMAGE, "And?", history=list(history), **CHAT)
    model.prepare_for_cpu()
    assert model.chat(processor, IMAGE, "And?", history=history, **CHAT) == expected


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_saved_is_plain(tmp_path, is_tied):
    model = tiny_model()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = is_tied
    model.tie_weights()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare_for_cpu()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert linears(loaded) == {nn.Linear}
    assert loaded.config.tie_word_embeddings is is_tied
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.items())


def test_with_the_vision_tower_out_of_the_way():
    processor, model = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True), tiny()
    expected = model.chat(processor, IMAGE, QUESTION, **CHAT)
    model.offload_vision()
    model.prepare_for_cpu()
    assert linears(model.model.vision_tower) == {nn.Linear}
    assert linears(model.model.language_model) == {PackedLinear}
    assert model.chat(processor, IMAGE, QUESTION, **CHAT) == expected


def test_a_quantised_model_has_its_head_prepared(any_size):
    model, inputs = tiny_model(), prompt(1)
    store_weights(model, QuantizedWeightsConfig("int8"))
    expected = model.generate(**inputs, **GREEDY, pad_token_id=0)
    assert type(prepared(model).lm_head) is PackedLinear
    assert torch.equal(model.generate(**inputs, **GREEDY, pad_token_id=0), expected)
    store_weights(whole := tiny_model(), QuantizedWeightsConfig("bfloat16"))
    assert PackedLinear not in linears(prepared(whole))


def test_compiled_layers():
    model, inputs = tiny_model(), prompt(1)
    model.prepare_for_cpu()
    with torch.inference_mode():
        expected = model(**inputs).logits
        model.model.language_model.layers[0].compile(backend="eager")
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)


def test_what_cannot_be_prepared():
    model = tiny_model()
    model.prepare_for_cpu()
    model.prepare_for_cpu()  # again, which does nothing
    with pytest.raises(ValueError, match=r"call offload_vision\(\) before"):
        model.offload_vision()
    with pytest.raises(ValueError, match=r"stay on the CPU in torch.float32; .* torch.float64"):
        model.double()
    with pytest.raises(ValueError, match="meta"):
        model.to("meta")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # nothing was moved
    assert model.to("cpu", torch.float32) is model
    with pytest.raises(ValueError, match="torch.float64"):
        tiny_model().double().prepare_for_cpu()
    with pytest.raises(ValueError, match="on meta"):
        tiny_model().to("meta").prepare_for_cpu()
    with pytest.raises(ValueError, match=r"load a state dict before prepare_for_cpu\(\)"):
        model.load_state_dict(tiny_model().state_dict())
    with pytest.raises(AttributeError, match=r"unpacked\(\) copies one"):
        _ = model.lm_head.weight
    with pytest.raises(ValueError, match="PackedLinear"):  # peft's own
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="stay on the CPU"):
        model.model.language_model.half()
    adapted = tiny_model()
    get_peft_model(adapted, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge the adapters"):
        adapted.prepare_for_cpu()


@pytest.mark.parametrize("is_tied", [False, True])
def test_copies_and_files_of_the_whole_model(tmp_path, is_tied):
    model, inputs = tiny_model(), prompt(1)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = is_tied
    model.tie_weights()
    model.prepare_for_cpu()
    model.tie_weights()
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert linears(other) == {PackedLinear}
            assert torch.equal(other(**inputs).logits, expected)


def test_the_published_name_of_the_language_model():
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model.language_model(input_ids=ids).logits
        model.prepare_for_cpu()
        assert torch.allclose(model.language_model(input_ids=ids).logits, expected, atol=1e-4)


def test_gradients_are_refused():
    model, inputs = tiny_model(), prompt(1)
    model.prepare_for_cpu()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(**inputs).logits.requires_grad is False
    with pytest.raises(ValueError, match="no gradients"):
        PackedLinear(nn.Linear(8, 8))(torch.ones(1, 8, requires_grad=True))


def test_a_machine_that_cannot(any_size, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = tiny_model()
    assert prepared(model) is model
    assert linears(model) == {nn.Linear}
    with pytest.raises(ValueError, match="x86 CPU"):
        model.prepare_for_cpu()


def test_scripts_pack_large_models(monkeypatch):
    args = chat.parse_arguments([IMAGE, "Read.", "--device", "cpu", "--dtype", "float32"])
    assert linears(chat.load(args)[1]) == {nn.Linear}
    monkeypatch.setattr(repository, "PACKED_FROM", 10**6)
    assert linears(chat.load(args)[1]) == {PackedLinear}
