"""The attention for CPUs against torch's: every shape, mask and type that language models and vision towers call it with."""

from types import SimpleNamespace

import pytest
import torch
from compression_helpers import GREEDY, batch
from model_helpers import GENERATION_MODES, prompt, tiny_model
from transformers import AttentionInterface

from minimonkey import cpu_attention as cpu
from minimonkey.packed_weights import can_pack


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.06}
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not can, reason="the processor has no units for it"))
    for dtype, can in {
        torch.float32: can_pack(torch.float32),
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported(),
    }.items()
]


@pytest.fixture
def everywhere(monkeypatch):
    """Let the attention compute even where torch's own is faster."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu, "FEW_SCORES", 0)


def states(heads, key_heads, rows, columns, dtype, batch=1, width=16, value_width=16):
    torch.manual_seed(0)
    shapes = [(rows, heads, width), (columns, key_heads, width), (columns, key_heads, value_width)]
    return [torch.randn(batch, *shape, dtype=dtype).transpose(1, 2) for shape in shapes]


def both(tensors, mask=None, **options):
    """Return what torch's back end and ours give."""
    heads, key_heads = (tensor.shape[1] for tensor in tensors[:2])
    options = {"is_causal": False, **options}
    module = SimpleNamespace(
        num_key_value_groups=heads // key_heads, is_causal=options.pop("is_causal"), training=False
    )
    expected, _ = AttentionInterface()["sdpa"](module, *tensors, mask, **options)
    attended, weights = AttentionInterface()[cpu.CPU_ATTENTION](module, *tensors, mask, **options)
    assert weights is None
    return expected, attended


def refused(*args):
    raise AssertionError("sdpa was to be called")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1), (600, 1)])
@pytest.mark.parametrize("rows, columns, causal", [(1, 7, True), (300, 300, False), (300, 300, True), (2, 2, True)])
def test_heads_and_rows(everywhere, dtype, threads, heads, key_heads, rows, columns, causal):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected, attended = both(states(heads, key_heads, rows, columns, dtype, batch=2), is_causal=causal)
    finally:
        torch.set_num_threads(before)
    assert attended.shape == expected.shape
    assert attended.is_contiguous()
    assert torch.allclose(attended, expected, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("rows", [1, 300])
def test_values_of_another_width(everywhere, rows):
    expected, attended = both(states(4, 2, rows, 300, torch.float32, width=24, value_width=16))
    assert torch.allclose(attended, expected, atol=1e-5)


def test_a_mask_for_all_rows(everywhere):
    mask = torch.rand(1, 1, 1, 300) < 0.5
    expected, attended = both(states(4, 2, 300, 300, torch.float32, batch=2), mask)
    assert torch.allclose(attended, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(everywhere, dtype, rows, size, kind):
    tensors = states(4, 2, rows, 40, dtype, batch=3)
    mask = torch.rand(size, 1, rows, 40) < 0.6
    mask[..., 0] = True
    given = mask if kind == "bool" else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    before = given.clone()
    expected, attended = both(tensors, given, scaling=0.3)
    assert torch.allclose(attended, expected, atol=TOLERANCES[dtype])
    assert torch.equal(given, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "minus infinity"])
def test_rows_that_see_nothing_stay_finite(everywhere, dtype, kind):
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., :2, :] = False
    given = mask if kind == "bool" else torch.where(mask, 0.0, -torch.inf).to(dtype)
    expected, attended = both(states(2, 2, 6, 6, dtype), given)
    assert attended.isfinite().all()
    assert torch.allclose(attended[:, 2:], expected[:, 2:], atol=TOLERANCES[dtype])


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.5},
        {"mask": torch.ones(1, 4, 5, 5, dtype=torch.bool)},
        {"dtype": torch.float64},
        {"columns": 9, "is_causal": True},
        {"requires_grad": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_it_leaves_to_torch(everywhere, monkeypatch, change):
    monkeypatch.setattr(cpu, "_attend", refused)
    change = {"mask": None, "dtype": torch.float32, "columns": 5, "requires_grad": False, **change}
    tensors = states(4, 2, 5, change.pop("columns"), change.pop("dtype"))
    tensors[0].requires_grad_(change.pop("requires_grad"))
    torch.manual_seed(0)
    expected, attended = both(tensors, change.pop("mask"), **change)
    if not change:
        assert torch.equal(attended, expected)


def test_few_scores_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(cpu, "_attend", refused)
    both(states(4, 2, 30, 30, torch.float32))


def test_keys_that_the_model_chooses():
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        both(states(4, 2, 1, 30, torch.float32), indices=torch.zeros(1, 1, 8, dtype=torch.long))
    model = tiny_model()
    model.config.text_config.index_topk = 8
    model.prepare_for_cpu(pack=False)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == cpu.CPU_ATTENTION


@pytest.mark.parametrize("pack", [False, True])
def test_autocast(everywhere, pack):
    model, inputs = tiny_model(), prompt(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        model.prepare_for_cpu(pack)
        logits = model(**inputs).logits
    assert logits.dtype == expected.dtype
    assert torch.allclose(logits, expected, atol=0.1 * float(expected.std()))


@pytest.mark.parametrize("mode", [{}, *GENERATION_MODES, {"prefill_chunk_size": 5}], ids=str)
def test_the_same_tokens_in_every_mode(everywhere, mode):
    model, inputs, options = tiny_model(), prompt(2, 1), {**GREEDY, "pad_token_id": 0, **mode}
    expected = model.generate(**inputs, **options)
    model.prepare_for_cpu(pack=False)
    assert model.config.text_config._attn_implementation == cpu.CPU_ATTENTION
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_compressed_prompts_keep_the_same_tokens(everywhere):
    model, rows = tiny_model(), batch((3, (4, 2, 1), 9), (5, (4, 0, 1), 2), side="left")
    options = {**GREEDY, "pad_token_id": 0, "use_scm": True}
    expected = model.generate(**rows, **options)
    model.prepare_for_cpu(pack=False)
    assert torch.equal(model.generate(**rows, **options), expected)


def test_an_attention_that_was_chosen_stays():
    model = tiny_model()
    model.set_attn_implementation("eager")
    model.prepare_for_cpu(pack=False)
    assert model.config.text_config._attn_implementation == "eager"


def test_training_goes_on_as_before(everywhere):
    model, inputs = tiny_model().train(), prompt(1)
    expected = model(**inputs, labels=inputs["input_ids"]).loss
    model.prepare_for_cpu(pack=False)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.language_model.layers.parameters())


def test_saved_folders_name_no_attention(tmp_path):
    model = tiny_model()
    model.prepare_for_cpu(pack=False)
    model.save_pretrained(tmp_path)
    assert cpu.CPU_ATTENTION not in (tmp_path / "config.json").read_text()
