"""Weights in 4, 8 and 16 bits: what is stored and computed, loading, saving, adapters, and the command that writes them."""

import copy

import pytest
import torch
from conftest import ROOT, enable_activation_checkpointing
from model_helpers import GENERATION_MODES, prompt, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.quantized_weights import (
    FORMATS,
    PRESETS,
    QuantizedWeightsConfig,
    StoredLinear,
    group_size,
    store_weights,
)
from minimonkey.scripts import chat, quantize
from minimonkey.scripts.repository import load_model, load_processor


# How far two neighbouring values of a format are apart at most, as a share of the largest weight; an error is half of that.
STEPS = {"bfloat16": 2**-7, "int8": 1 / 127, "int4": 2 / 15}


def stored(preset: str, model=None):
    model = tiny_model() if model is None else model
    store_weights(model, QuantizedWeightsConfig(preset))
    return model


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(96, 40), (32, 7), (1088, 300)])
def test_weights_are_as_near_as_their_format_allows(kind, size):
    torch.manual_seed(0)
    linear = torch.nn.Linear(*size)
    layer = StoredLinear.of(linear, kind)
    weight, back = linear.weight.detach(), layer.dequantized()
    assert (back - weight).abs().max() <= 0.6 * STEPS[kind] * weight.abs().max()
    for rows in (1, 3, 200):  # few and many rows are computed in blocks of other sizes
        inputs = torch.randn(2, rows, size[0])
        expected = torch.nn.functional.linear(inputs, back, linear.bias)
        assert torch.allclose(layer(inputs), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [(64, 80), (192, 48), (192, 10), (96, 16), (32, 16), (1088, 304)])
def test_few_rows_in_bfloat16(kind, size):
    torch.manual_seed(0)
    linear = torch.nn.Linear(*size)
    layer = StoredLinear.of(linear, kind)
    weight, names = layer.dequantized(), set(layer.state_dict())
    layer.pack()
    assert set(layer.state_dict()) == names
    for shape in [(1,), (2, 1), (2, 8), (17,), (0,)]:
        inputs = torch.randn(*shape, size[0], dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(inputs.float(), weight, linear.bias)
        with torch.no_grad():
            assert torch.allclose(layer(inputs).float(), expected, atol=0.03)
            assert torch.allclose(layer(inputs.float()), expected, atol=1e-4)


def test_torch_kernels_are_used_where_they_can_read(monkeypatch):
    layer, odd = (StoredLinear.of(torch.nn.Linear(width, 32), "int8") for width in (128, 96))
    calls = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(len(args[0])) or kernel(*args))
    with torch.no_grad():
        for rows in (1, 16, 17):
            layer(torch.ones(rows, 128, dtype=torch.bfloat16))
            odd(torch.ones(rows, 96, dtype=torch.bfloat16))
        layer(torch.ones(1, 128))
    assert calls == [1, 16]


@pytest.mark.parametrize("preset", ["int8", "int4", "bluelm"])
def test_prepared_for_a_cpu_in_bfloat16(preset):
    model, inputs = stored(preset, tiny_model(hidden_size=64, intermediate_size=128)).bfloat16(), prompt(2, 1)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.prepare_for_cpu()
        assert (model.model.language_model.layers[0].mlp.down_proj._packed is None) == (preset == "int8")
        assert torch.allclose(model(**inputs).logits, expected, atol=0.1 * float(expected.std()))
        token = model(input_ids=inputs["input_ids"][:1, -1:]).logits
        plain = stored(preset, tiny_model(hidden_size=64, intermediate_size=128))(
            input_ids=inputs["input_ids"][:1, -1:]
        ).logits
        assert torch.allclose(token.float(), plain, atol=0.1 * float(plain.std()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_that_are_all_alike_or_zero(kind):
    linear = torch.nn.Linear(32, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0], [0.5], [-3.0], [1e-9]]).expand(4, 32))
    assert torch.allclose(StoredLinear.of(linear, kind).dequantized(), linear.weight, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_way_back_goes_through_the_stored_weights(kind):
    torch.manual_seed(0)
    layer = StoredLinear.of(torch.nn.Linear(64, 700), kind)
    inputs = torch.randn(3, 5, 64, requires_grad=True)
    layer(inputs).square().sum().backward()
    again = inputs.detach().clone().requires_grad_()
    torch.nn.functional.linear(again, layer.dequantized(), layer.bias).square().sum().backward()
    assert torch.allclose(inputs.grad, again.grad, rtol=1e-3, atol=1e-3)


def test_4_bit_weights_need_columns_that_8_divides():
    assert [group_size(columns) for columns in (96, 48, 40)] == [32, 16, 8]
    with pytest.raises(ValueError, match="8 divides, got 36; take int8"):
        StoredLinear.of(torch.nn.Linear(36, 4), "int4")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_model_is_the_same_bit_for_bit(preset, tmp_path):
    model, inputs = stored(preset), prompt(2, 1)
    model.config.quantization_config = QuantizedWeightsConfig(preset)
    with torch.no_grad():
        expected = model(**inputs).logits
    quantize_through_transformers(tmp_path, preset)
    loaded = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    # Another type for what is computed leaves what is stored alone.
    half = MiniMonkeyForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        assert value.is_floating_point() or torch.equal(value, half.state_dict()[name])
    assert half.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    again = MiniMonkeyForConditionalGeneration.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)


def quantize_through_transformers(folder, preset):
    tiny_model().save_pretrained(folder / "source")
    options = {"dtype": torch.float32, "quantization_config": QuantizedWeightsConfig(preset)}
    MiniMonkeyForConditionalGeneration.from_pretrained(folder / "source", **options).save_pretrained(folder / "out")


@pytest.mark.parametrize("preset", ["int8", "bluelm"])
@pytest.mark.parametrize("mode", GENERATION_MODES, ids=str)
def test_every_way_to_generate(preset, mode):
    model, inputs = stored(preset), prompt(1, 2)
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False} | mode
    plain = tiny_model()
    for name, module in model.named_modules():  # the same numbers in an ordinary model
        if isinstance(module, StoredLinear):
            plain.get_submodule(name).weight.data = module.dequantized()
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_which_layers_a_preset_stores():
    kinds = {
        name: module.format for name, module in stored("bluelm").named_modules() if isinstance(module, StoredLinear)
    }
    assert {kind for name, kind in kinds.items() if "language_model" in name} == {"int4"}
    assert {kind for name, kind in kinds.items() if "language_model" not in name} == {"int8"}
    assert "lm_head" not in kinds
    assert isinstance(stored("bfloat16").lm_head, StoredLinear)
    tied = tiny_model()
    tied.config.tie_word_embeddings = True
    assert not isinstance(stored("bfloat16", tied).lm_head, StoredLinear)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "int3"}, "preset must be one of int8, int4, bluelm, bfloat16, got 'int3'"),
        ({}, "Give one of preset and formats"),
        ({"preset": "int8", "formats": {".*": "int4"}}, "Give one of preset and formats"),
        ({"formats": {".*": "int2"}}, "A format must be one of int4, int8, bfloat16, got int2"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedWeightsConfig(**options)


def test_names_that_no_layer_has():
    with pytest.raises(ValueError, match="No linear layer has a name that fits .*nowhere"):
        store_weights(tiny_model(), QuantizedWeightsConfig(formats={".*nowhere": "int8"}))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_learn_on_top(kind):
    torch.manual_seed(0)
    model, inputs = stored(kind), prompt(1)
    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model\.layers\..*_proj"))
    adapted.enable_input_require_grads()
    enable_activation_checkpointing(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in adapted.state_dict().items()
    }
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_command_writes_a_folder_that_answers(tmp_path, capsys):
    out = tmp_path / "nano-int8"
    assert quantize.main([str(ROOT), str(out), "--preset", "int8"]) == 0
    assert "MB before" in capsys.readouterr().out
    chat.main([str(ROOT / "assets/example.png"), "Read the text.", "--model", str(out), "--dtype", "float32"])
    assert "Monkey" in capsys.readouterr().out
    assert quantize.main([str(out), str(tmp_path / "twice"), "--preset", "int4"]) == 1
    assert "quantised already (int8); quantise the model that it was made from" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    assert quantize.main([str(ROOT), str(out), "--preset", "int8"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_layers_by_name(tmp_path, capsys):
    out = tmp_path / "mixed"
    layers = ["--layer", r".*language_model.*mlp.*=int4", "--layer", r"model\..*=int8"]
    assert quantize.main([str(ROOT), str(out), *layers]) == 0
    model = load_model(out, dtype=torch.float32)
    assert model.model.language_model.layers[0].mlp.up_proj.format == "int4"
    assert model.model.language_model.layers[0].self_attn.q_proj.format == "int8"
    assert quantize.main([str(ROOT), str(tmp_path / "x"), "--layer", "mlp=int9"]) == 1
    assert "REGEX=FORMAT" in capsys.readouterr().err


def test_bluelm_keeps_its_cache_in_8_bits(tmp_path):
    quantize.main([str(ROOT), str(tmp_path / "out"), "--preset", "bluelm"])
    assert load_model(tmp_path / "out", dtype=torch.float32).config.kv_cache_dtype == "int8"


# --- other packages' ways, through transformers -----------------------------------------------------------------------


def torchao_8_bit():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes_4_bit():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", [torchao_8_bit, bitsandbytes_4_bit])
def test_models_quantised_by_other_packages(config, tmp_path):
    model = load_model(ROOT, dtype=torch.float32, quantization_config=config())
    model.save_pretrained(tmp_path)  # at once: bitsandbytes lays weights out anew for the CPU when it first computes
    processor = load_processor(ROOT)
    question = (str(ROOT / "assets/example.png"), "Read the text.")
    answer, history = model.chat(processor, *question, return_history=True)
    assert answer and model.chat(processor, question[0], "And?", history=history)
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.chat(processor, *question) == answer
    assert quantize.main([str(tmp_path), str(tmp_path / "out"), "--preset", "int8"]) == 1
