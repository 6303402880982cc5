"""Scale compression: the published positions, attention weights as judge, queries, memory, misuse."""

import json
import sys

import pytest
import torch
from checkpoint_helpers import load_published
from compression_helpers import (
    GREEDY,
    IMAGE,
    LANGUAGE_MODELS,
    ROWS,
    alone,
    batch,
    eager_kept,
    eager_scores,
    image_positions,
    without_padding,
)
from conftest import FIXTURES, random_tiles
from model_helpers import tiny_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimonkey.attention_probe import attention_inputs
from minimonkey.compression import CompressionSettings, attention_received, find_images, kept_positions


GOLDENS = json.loads((FIXTURES / "scm" / "scm.json").read_text())["cases"]
TENSORS = load_file(FIXTURES / "scm" / "scm.safetensors")


def blocks_of(model, monkeypatch, elements: int) -> None:
    """Score in blocks of this many weights."""
    functions = (sys.modules[type(model).kept_positions.__module__].kept_positions, attention_received)
    for function in functions:
        monkeypatch.setattr(sys.modules[function.__module__], "BLOCK_ELEMENTS", elements)


# --- published -------------------------------------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, torch.Tensor], list[int], torch.Tensor]:
    """Inputs, kept positions of row 0 (with the token that the published code loses) and scores of row 0."""
    case = GOLDENS[name]
    inputs = {"input_ids": TENSORS[f"{name}.input_ids"], "attention_mask": TENSORS[f"{name}.attention_mask"]}
    inputs["tile_counts"] = torch.tensor(case["tile_counts"])
    if f"{name}.visual_features" not in TENSORS:
        tiles = random_tiles(case["seed"], case["tiles"], 3, 112, 112)
        inputs["pixel_values"] = tiles if case["tile_permutation"] is None else tiles[case["tile_permutation"]]
    kept = sorted(TENSORS[f"{name}.kept_positions"].tolist() + case["wrongly_dropped"])
    return inputs, kept, TENSORS[f"{name}.scores"][0]


def golden_embeddings(model, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = inputs["input_ids"]
    if "pixel_values" in inputs:
        return model.encode_images(ids, inputs["pixel_values"])
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == 500] = TENSORS[f"{name}.visual_features"].flatten(0, 1)
    return embeddings


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", GOLDENS)
def test_published_scores_and_positions(name, implementation, tmp_path):
    model = load_published(GOLDENS[name]["model"], tmp_path)
    model.set_attn_implementation(implementation)
    inputs, expected, scores = golden(name)
    embeddings = golden_embeddings(model, name, inputs)
    block = (inputs["input_ids"][0] == 500).nonzero()[0, 0].item()
    block = slice(block, block + len(scores))
    ours = attention_received(
        attention_inputs(model.model.language_model, embeddings[0], 1),
        block,
        torch.arange(block.stop, len(embeddings[0])),
    )
    assert torch.allclose(ours, scores, atol=1e-6, rtol=0)

    settings = CompressionSettings(keep_ratio=0.5, layer=1, num_layers=4)
    mask, tokens = inputs["attention_mask"], GOLDENS[name]["tokens_per_tile"]
    images = find_images(inputs["input_ids"], mask, inputs["tile_counts"], 500, tokens, settings)

    def probe(sequence, is_image):
        return attention_inputs(model.model.language_model, sequence, 1)

    kept, _ = kept_positions(embeddings, mask, images, settings, probe)
    assert kept[0].tolist() == expected
    if "pixel_values" in inputs:
        assert model.kept_positions(**inputs)[0].tolist() == expected


def test_second_row_of_the_published_batch_keeps_what_it_keeps_alone(tmp_path):
    model = load_published("internlm2", tmp_path)
    inputs, _, _ = golden("batch2_leftpad")
    mask = inputs["attention_mask"][1]
    assert not mask.all()
    kept = model.kept_positions(**inputs)[1]
    ids = inputs["input_ids"][1:, mask.bool()]
    half = len(inputs["pixel_values"]) // 2
    by_itself = model.kept_positions(
        input_ids=ids, pixel_values=inputs["pixel_values"][half:], tile_counts=inputs["tile_counts"][1:]
    )
    assert without_padding(kept, mask) == by_itself[0].tolist()


# --- attention weights as the judge ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_scores_are_the_attention_weights_of_the_model(model_type, layer, monkeypatch):
    model = tiny_model(model_type, num_hidden_layers=3, **LANGUAGE_MODELS[model_type])
    one = batch((3, IMAGE, 9))
    ((detailed, expected),) = eager_scores(model, one, layer)
    embeddings = model.encode_images(one["input_ids"], one["pixel_values"])[0]
    block, queries = slice(detailed[0], detailed[-1] + 1), torch.arange(detailed[-1] + 1, len(embeddings))
    inputs = attention_inputs(model.model.language_model, embeddings, layer)
    whole = attention_received(inputs, block, queries)
    assert torch.allclose(whole, expected.float(), atol=1e-5, rtol=0)  # float32 beside float64
    for elements in (1, 200):
        blocks_of(model, monkeypatch, elements)
        assert torch.allclose(attention_received(inputs, block, queries), whole, atol=1e-7, rtol=0)
        kept = model.kept_positions(**one, scm_layer=layer)
        assert kept[0].tolist() == eager_kept(model, one, layer)


@pytest.mark.parametrize(
    "row", [(3, IMAGE, 2, (5, 2, 1), 6), (2, IMAGE, (3, 1, 1), 4), (1, IMAGE, 3, (0, 0, 1), 2, IMAGE, 1)]
)
def test_each_image_is_scored_without_the_tokens_of_the_others(row):
    model, one = tiny_model(), batch(row)
    assert model.kept_positions(**one)[0].tolist() == eager_kept(model, one)


def test_detailed_tiles_after_the_adaptive_ones():
    """The queries of a detailed block are the tokens after it: thumbnail and text."""
    model, one = tiny_model(), batch((3, IMAGE, 5))
    detailed_second = {**one, "tile_counts": torch.tensor([[0, 2, 0], [4, 0, 1]])}  # the same tokens said otherwise
    kept = model.kept_positions(**one, tile_order="adaptive_first")
    assert torch.equal(kept[0], model.kept_positions(**detailed_second)[0])
    assert set(range(3, 3 + 8)) <= set(kept[0].tolist())
    assert len(kept[0]) == one["input_ids"].shape[1] - 8


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_back_ends_keep_and_answer_the_same(implementation):
    eager, other = tiny_model(head_dim=16), tiny_model(head_dim=16)
    eager.set_attn_implementation("eager")
    other.set_attn_implementation(implementation)
    rows = ROWS[:2] if implementation == "sdpa" else ROWS[:1]  # torch 2.15 compiles no padded rows for flex on a CPU
    inputs = batch(*rows)
    for ours, theirs in zip(eager.kept_positions(**inputs), other.kept_positions(**inputs)):
        assert torch.equal(ours, theirs)
    answers = [model.generate(**inputs, **GREEDY, use_scm=True) for model in (eager, other)]
    assert torch.equal(*answers)


def test_half_precision_keeps_as_many():
    model, inputs = tiny_model().to(torch.bfloat16), batch(*ROWS[:2])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    in_float32 = tiny_model().kept_positions(**batch(*ROWS[:2]))
    assert [len(kept) for kept in model.kept_positions(**inputs)] == [len(kept) for kept in in_float32]
    assert model.generate(**inputs, **GREEDY, use_scm=True).shape[1] == inputs["input_ids"].shape[1] + 6


# --- ratios and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.9, 1, 1.0])
def test_a_ratio_keeps_that_many_detailed_tokens_and_all_others(ratio):
    model, inputs = tiny_model(), batch(*ROWS)
    for row, kept in enumerate(model.kept_positions(**inputs, scm_keep_ratio=ratio)):
        one = alone(inputs, row)
        images = image_positions(one) if "tile_counts" in one else []
        found = without_padding(kept, inputs["attention_mask"][row])
        assert kept.dtype == torch.int64
        assert found == sorted(set(found))
        detailed = [position for image, _ in images for position in image]
        assert not set(range(one["input_ids"].shape[1])) - set(found) - set(detailed)
        for image, _ in images:
            assert len(set(image) & set(found)) == int(len(image) * ratio)


def test_smaller_ratios_keep_a_subset():
    model, one = tiny_model(), batch(ROWS[1])
    kept = [set(model.kept_positions(**one, scm_keep_ratio=ratio)[0].tolist()) for ratio in (0.2, 0.4, 0.7, 1)]
    assert kept[0] < kept[1] < kept[2] < kept[3]


def test_settings_come_from_the_configuration():
    model, one = tiny_model(num_hidden_layers=3), batch(ROWS[0])
    explicit = {"scm_keep_ratio": 0.3, "scm_layer": 2, "scm_queries": "visual"}
    expected = model.kept_positions(**one, **explicit)[0]
    for name, value in explicit.items():
        setattr(model.config, name, value)
    assert torch.equal(model.kept_positions(**one)[0], expected)


# --- queries ---------------------------------------------------------------------------------------------------------


def kept_of_images(one: dict[str, torch.Tensor], kept: list[int]) -> list[list[int]]:
    """For each image of a row which of its detailed tokens stay, counted from its first."""
    return [[p - detailed[0] for p in detailed if p in set(kept)] for detailed, _ in image_positions(one)]


def test_visual_queries_depend_on_nothing_but_the_image():
    model = tiny_model()
    first = batch((3, IMAGE, 9), seed=3)
    (expected,) = kept_of_images(first, model.kept_positions(**first, scm_queries="visual")[0].tolist())
    tiles = first["pixel_values"]
    for row in ((0, IMAGE, 1), (17, IMAGE, 2), (1, IMAGE, 0)):
        other_text = {**batch(row, seed=8), "pixel_values": tiles}
        kept = model.kept_positions(**other_text, scm_queries="visual")[0].tolist()
        assert kept_of_images(other_text, kept) == [expected]
    together = batch((12,), (4, (3, 1, 1), 2, IMAGE, 5), seed=9)
    together["pixel_values"][5:] = tiles
    kept = without_padding(model.kept_positions(**together, scm_queries="visual")[1], together["attention_mask"][1])
    assert kept_of_images(alone(together, 1), kept)[1] == expected


def test_visual_queries_are_the_image_as_a_sequence_of_its_own():
    model, one = tiny_model(), batch((3, (6, 2, 1), 9))
    image = {**batch(((6, 2, 1),)), "pixel_values": one["pixel_values"]}
    visual = kept_of_images(one, model.kept_positions(**one, scm_queries="visual")[0].tolist())
    assert visual == kept_of_images(image, eager_kept(model, image))
    assert visual != kept_of_images(one, model.kept_positions(**one, scm_queries="all")[0].tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_after_the_query_end_does_not_count(side):
    model, inputs = tiny_model(), batch((3, IMAGE, 12), (5, IMAGE, 30), side=side)
    ends = [int(mask.nonzero()[0]) + start + 28 + 4 for mask, start in zip(inputs["attention_mask"], (3, 5))]
    kept = model.kept_positions(**inputs, scm_query_ends=ends)
    assert any(not torch.equal(*pair) for pair in zip(kept, model.kept_positions(**inputs)))
    for row, start in enumerate((3, 5)):
        one = alone(inputs, row)
        shorter = {**one, **{name: one[name][:, : start + 28 + 4] for name in ("input_ids", "attention_mask")}}
        expected = kept_of_images(shorter, eager_kept(model, shorter))
        assert kept_of_images(one, without_padding(kept[row], inputs["attention_mask"][row])) == expected


def test_each_image_has_its_own_query_end():
    model, one = tiny_model(), batch((3, IMAGE, 5, (5, 2, 1), 20))
    ends = [3 + 28 + 5, one["input_ids"].shape[1]]
    kept = kept_of_images(one, model.kept_positions(**one, scm_query_ends=ends)[0].tolist())
    names = ("input_ids", "attention_mask")
    first = {**one, **{name: one[name][:, : ends[0]] for name in names}}
    first |= {"pixel_values": one["pixel_values"][:7], "tile_counts": one["tile_counts"][:1]}
    assert kept[0] == kept_of_images(first, eager_kept(model, first))[0]
    assert kept[1] == kept_of_images(one, eager_kept(model, one))[1]


# --- memory ----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_memory_does_not_grow_with_heads_times_length_squared(monkeypatch):
    model, one = tiny_model(num_attention_heads=8, head_dim=4), batch((8, (200, 100, 1), 290))
    blocks_of(model, monkeypatch, 2**16)
    length = one["input_ids"].shape[1]
    assert length > 1500
    for queries in ("all", "visual"):
        with LargestTensor() as largest:
            model.kept_positions(**one, scm_queries=queries)
        assert largest.elements < 8 * length**2 / 16
        assert largest.elements <= max(one["pixel_values"].numel(), 2**17)


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"scm_keep_ratio": ratio}, "scm_keep_ratio must be above 0") for ratio in (0, 1.5, -0.1, True, "x")),
        ({"scm_keep_ratio": float("nan")}, "scm_keep_ratio must be above 0"),
        *(({"scm_layer": layer}, "scm_layer .* does not exist") for layer in (2, -1, 1.0, True, "1")),
        ({"scm_queries": "text"}, "scm_queries must be one of all, visual"),
        ({"tile_order": "sideways"}, "'detailed_first' or 'adaptive_first'"),
        ({"tile_counts": None}, "pass tile_counts"),
        ({"tile_counts": torch.tensor([[4, 2]])}, r"shape \(images, 3\)"),
        ({"tile_counts": torch.tensor([4, 2, 1])}, r"shape \(images, 3\)"),
        ({"tile_counts": torch.tensor([[4.0, 2.0, 1.0]])}, "integers"),
        ({"tile_counts": torch.tensor([[4, 4, -1]])}, "integers"),
        ({"tile_counts": torch.tensor([[4, 2, 2]])}, "28 image tokens .* 32"),
        ({"tile_counts": torch.tensor([[4, 2, 1], [4, 2, 1]])}, "28 image tokens .* 56"),
        ({"tile_counts": torch.zeros(0, 3, dtype=torch.long)}, "28 image tokens .* 0"),
        ({"scm_query_ends": []}, "0 entries for 1 images"),
        ({"scm_query_ends": [40, 40]}, "2 entries for 1 images"),
        ({"scm_query_ends": [30]}, "must lie after the image"),
        ({"scm_query_ends": [41]}, "of at most"),
        ({"scm_query_ends": [-1]}, "must lie after the image"),
        ({"attention_mask": torch.ones(1, 39)}, "shape of input_ids"),
    ],
)
def test_settings_that_cannot_work(options, message):
    model, inputs = tiny_model(), {**batch((3, IMAGE, 9)), **options}
    for call in (model.kept_positions, lambda **given: model.generate(**given, **GREEDY, use_scm=True)):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_hidden_image_tokens_are_refused():
    model, one = tiny_model(), batch((3, IMAGE, 9))
    one["attention_mask"][0, 5] = 0
    for call in (model.kept_positions, lambda **given: model.generate(**given, use_scm=True)):
        with pytest.raises(ValueError, match="hides tokens of image 0"):
            call(**one)


def test_images_in_pieces_are_refused():
    model = tiny_model()
    for row in ((3, (2, 0, 0), 2, (2, 2, 1), 9), (3, (3, 0, 0), 1, (4, 0, 0), 2)):
        one = {**batch(row), "tile_counts": torch.tensor([[4, 2, 1]])}
        with pytest.raises(ValueError, match="do not stand together"):
            model.kept_positions(**one)
    two_rows = {**batch((3, (2, 0, 0)), (2, (2, 2, 1), 5)), "tile_counts": torch.tensor([[4, 2, 1]])}
    with pytest.raises(ValueError, match="do not stand together"):
        model.kept_positions(**two_rows)


@pytest.mark.parametrize(
    "option",
    [{"scm_keep_ratio": 0.5}, {"scm_layer": 1}, {"scm_queries": "all"}, {"scm_query_ends": [40]}],
    ids="-".join,
)
def test_settings_without_compression_are_refused(option):
    with pytest.raises(ValueError, match="works only with use_scm=True"):
        tiny_model().generate(**batch((3, IMAGE, 9)), **option)


@pytest.mark.parametrize(
    "option",
    [
        {"position_ids": torch.arange(40)[None]},
        {"past_key_values": ()},
        {"prompt_lookup_num_tokens": 3},
        {"encoder_repetition_penalty": 2.0},
        {"assistant_model": "model"},
    ],
    ids="-".join,
)
def test_what_counts_the_whole_prompt_is_refused(option):
    model, one = tiny_model(), batch((3, IMAGE, 9))
    if "assistant_model" in option:
        option = {"assistant_model": model}
    with pytest.raises(
        ValueError, match=f"{next(iter(option))} (does not work with images|counts tokens).*leave it out"
    ):
        model.generate(**one, **option, **GREEDY, use_scm=True)


@pytest.mark.parametrize("queries", ["all", "visual"])
def test_an_image_that_nothing_comes_after(queries):
    model, one = tiny_model(), batch((3, (4, 0, 0)))
    with pytest.raises(ValueError, match="needs a thumbnail, or the prompt text after it"):
        model.kept_positions(**one, scm_queries=queries)
    assert len(model.kept_positions(**one, scm_keep_ratio=1)[0]) == 19


def test_visual_queries_need_other_tiles():
    model, one = tiny_model(), batch((3, (4, 0, 0), 5))
    with pytest.raises(ValueError, match="needs a thumbnail"):
        model.kept_positions(**one, scm_queries="visual")
    assert len(model.kept_positions(**one)[0]) == 3 + 8 + 5


def test_images_without_pixels_are_refused():
    one = batch((3, IMAGE, 9))
    with pytest.raises(ValueError, match="28 image tokens, but no pixel_values"):
        tiny_model().kept_positions(input_ids=one["input_ids"], tile_counts=one["tile_counts"])


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)
def test_language_models_of_another_build_say_so(model_type, options):
    model, one = tiny_model(model_type, **options), batch((3, IMAGE, 9))
    with pytest.raises(ValueError, match=r"layers\[1\].self_attn.*use_scm=False"):
        model.generate(**one, **GREEDY, use_scm=True)
    assert model.generate(**one, **GREEDY).shape[1] == 46


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        (
            "llama4_text",
            {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 32},
        ),
        ("doge", {}),
        ("xglm", {}),
        ("minimax", {}),
    ],
)
def test_attention_that_queries_and_keys_do_not_tell_is_right_or_refused(model_type, options):
    model, one = tiny_model(model_type, **options), batch((3, IMAGE, 9))
    try:
        kept = model.kept_positions(**one)[0].tolist()
    except ValueError as error:
        assert "use_scm=False" in str(error)
    else:
        assert kept == eager_kept(model, one)
