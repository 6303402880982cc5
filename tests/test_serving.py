"""What serving engines ask of processor and model, without an engine; tests/vllm asks vLLM itself."""

import copy
import random

import pytest
import torch
from model_helpers import prompt, tiny_model, tiny_mono
from transformers import AttentionInterface

from minimonkey.tiling import PRESETS, TILINGS, choose_grids, largest_image, tile_counts


@pytest.mark.parametrize(
    ("preset", "tiling"), [*((preset, "msac") for preset in PRESETS), *(("default", tiling) for tiling in TILINGS)]
)
def test_no_image_gives_more_tiles_than_the_largest(preset, tiling):
    ranges, shapes = PRESETS[preset], random.Random(0)

    def tiles(width: int, height: int) -> int:
        return sum(tile_counts(*choose_grids(width, height, ranges, 28, tiling)))

    most = tiles(*largest_image(ranges, 28, tiling=tiling))
    assert all(tiles(*(int(2 ** shapes.uniform(0, 12)) for _ in "wh")) <= most for _ in range(2000))
    assert most >= tiles(4000, 3000)


def test_the_processor_says_which_image_is_the_largest(processor):
    height, width = processor.image_processor.largest_image(preset="default", size={"height": 28, "width": 28})
    options = {"preset": "default", "size": {"height": 28, "width": 28}}
    (count,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)], **options)["num_image_patches"]
    assert count == 12 + 7 + 1
    assert processor.image_processor.largest_image(use_thumbnail=False) == (112, 112)


def test_what_stands_for_an_image_is_said_in_the_words_of_engines(small, pictures):
    """vLLM finds the places by `image_token`, what comes there by `replacement`, and whose tiles are whose by the grids."""
    text, options = f"a {small.image_token} b <image>", {"preset": "default"}
    inputs = small(pictures[:2], text, return_text_replacement_offsets=True, images_kwargs=options)
    (entries,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in entries] == ["image", "image"]
    expanded = text
    for entry in reversed(entries):
        assert text[slice(*entry["span"])] == entry["text"] == "<image>"
        expanded = expanded[: entry["span"][0]] + entry["replacement"] + expanded[entry["span"][1] :]
    assert all(expanded[slice(*entry["new_span"])] == entry["replacement"] for entry in entries)
    assert small.tokenizer(expanded, add_special_tokens=False)["input_ids"] == inputs["input_ids"][0].tolist()
    tiles = inputs["image_grid_thw"].prod(-1)
    assert tiles.tolist() == inputs["tile_counts"].sum(-1).tolist()
    assert [entry["replacement"].count("<IMG_CONTEXT>") for entry in entries] == (
        tiles * small.image_seq_length
    ).tolist()
    assert "image_grid_thw" not in small(pictures[:2], text, images_kwargs=options)


def test_vllm_gets_the_model_without_its_head(monkeypatch):
    """Its transformers backend asks AutoModel for a model and puts a head of its own on it."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", None)  # as importing vLLM does
    whole, inputs = tiny_model(), prompt(2)
    config = copy.deepcopy(whole.config)
    config.text_config._attn_implementation = "vllm"
    model = type(whole)._from_config(config)
    assert not hasattr(model, "lm_head")
    assert {f"model.{name}" for name in model.state_dict()} == whole.state_dict().keys() - {"lm_head.weight"}
    features = whole.encode_tiles(inputs["pixel_values"])
    model.load_state_dict(whole.model.state_dict())
    assert torch.equal(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output, features)


def test_vllm_is_told_that_visual_experts_do_not_run_there():
    mono = tiny_mono()
    config = copy.deepcopy(mono.config)
    config.text_config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="vLLM cannot run .* visual experts"):
        type(mono)._from_config(config)
