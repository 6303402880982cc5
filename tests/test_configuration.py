"""Configurations: the published format, what is saved, and values that cannot work."""

import copy
import json
import logging
import sys
from itertools import product

import pytest
from conftest import FIXTURES, ROOT
from model_helpers import IMAGE_TOKEN, TINY_TEXT, TINY_VISION

from minimonkey.configuration_minimonkey import MiniMonkeyConfig


PUBLISHED = json.loads((FIXTURES / "models" / "internlm2" / "config.json").read_text())


def test_published_values_arrive():
    config = MiniMonkeyConfig.from_dict(
        json.loads((FIXTURES / "keys" / "internvl2-2b_minimonkey.json").read_text())["config"]
    )
    assert (config.text_config.model_type, config.text_config.num_hidden_layers) == ("llama", 24)
    assert (config.tile_size, config.image_seq_length, config.image_token_id) == (448, 256, 92546)
    assert (config.template, config.pixel_shuffle_version, config.vision_feature_layer) == ("internlm2-chat", "v2", -1)
    assert config.vision_config.attention_bias
    assert not config.vision_config.use_qk_norm


def test_published_file_is_read_as_it_is(caplog):
    config = MiniMonkeyConfig.from_pretrained(FIXTURES / "models" / "phi3_su_long", image_token_id=500)
    assert config.text_config.rope_parameters["rope_type"] == "longrope"
    assert config.image_token_id == 500
    assert "instantiate a model of type" not in caplog.text


def test_saved_and_reloaded_configuration_is_the_same(tmp_path):
    config = MiniMonkeyConfig.from_dict(PUBLISHED)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    assert saved["auto_map"]["AutoModelForMultimodalLM"].startswith("modeling_minimonkey.")
    assert "llm_config" not in saved
    assert MiniMonkeyConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_dicts_of_the_caller_are_not_changed():
    given = copy.deepcopy(PUBLISHED)
    MiniMonkeyConfig.from_dict(given)
    MiniMonkeyConfig(**{key: given[key] for key in ("llm_config", "vision_config", "template")})
    assert given == PUBLISHED


def test_default_configuration_works():
    assert MiniMonkeyConfig().image_seq_length == 256


def with_published(**changes) -> dict:
    config = copy.deepcopy(PUBLISHED)
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[part][name] = value
        else:
            config[key] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"force_image_size": 100}, "tile_size 100 is not a multiple of the patch size 14"),
        ({"force_image_size": 126}, "9 x 9 patches"),
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"downsample_ratio": 2.0}, "downsample_ratio"),
        ({"ps_version": "v3"}, "'v1' or 'v2'"),
        ({"select_layer": -9}, "vision_feature_layer -9"),
        ({"image_token_id": 512}, "outside the vocabulary of 512"),
        ({"scm_keep_ratio": 0.0}, "scm_keep_ratio"),
        ({"scm_layer": 4}, "scm_layer 4"),
        ({"scm_queries": "some"}, "scm_queries"),
        ({"llm_config__architectures": ["GPT9ForCausalLM"]}, "GPT9ForCausalLM.*InternLM2ForCausalLM"),
        ({"vision_config__model_type": "vit_x"}, "vit_x"),
        ({"vision_config__num_attention_heads": 5}, "not a multiple of its 5 heads"),
    ],
)
def test_impossible_values_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        MiniMonkeyConfig.from_dict(with_published(**changes))


@pytest.mark.parametrize(("whole", "text"), list(product([None, True, False], repeat=2)))
def test_the_tie_of_transformers_internvl_is_that_of_the_whole(whole, text, tmp_path):
    parts = {"text_config": {**TINY_TEXT, "model_type": "qwen2"}, "vision_config": TINY_VISION}
    config = {"model_type": "internvl", "image_token_id": IMAGE_TOKEN, **parts}
    for part, tied in ((config, whole), (config["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        if tied is not None:
            part["tie_word_embeddings"] = tied
    (tmp_path / "config.json").write_text(json.dumps(config))
    for loaded in (
        MiniMonkeyConfig.from_pretrained(tmp_path),
        MiniMonkeyConfig.from_dict(MiniMonkeyConfig.get_config_dict(tmp_path)[0]),
    ):
        expected = True if whole is None else whole
        assert (loaded.tie_word_embeddings, loaded.text_config.tie_word_embeddings) == (expected, expected)


def test_one_layer_needs_no_scm_layer():
    text = {**TINY_TEXT, "model_type": "llama", "num_hidden_layers": 1}
    assert MiniMonkeyConfig(text_config=text, vision_config=TINY_VISION, image_token_id=IMAGE_TOKEN).scm_layer == 0


@pytest.mark.parametrize(
    ("installed", "is_newer"),
    [("5.24.0", False), ("5.9.3", False), ("5.24.1", True), ("5.25.0.dev0", True), ("6.0", True)],
)
def test_a_newer_transformers_than_was_tried_is_said_once(installed, is_newer, monkeypatch):
    module = sys.modules[MiniMonkeyConfig.__module__]
    monkeypatch.setattr(module, "NEWEST_TRIED_TRANSFORMERS", "5.24.0")
    said = []
    monkeypatch.setattr(logging.getLogger("transformers.minimonkey"), "warning", said.append)
    module.logging.get_logger("transformers.minimonkey").warning_once.cache_clear()
    for _ in range(2):
        module.warn_beside_untried(installed)
    assert [f"up to 5.24.0, this is {installed};" in line for line in said] == [True] * is_newer


def test_the_newest_that_was_tried_is_the_locked_one():
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    assert f"\ntransformers=={sys.modules[MiniMonkeyConfig.__module__].NEWEST_TRIED_TRANSFORMERS} ;" in lock
