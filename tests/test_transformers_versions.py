"""What transformers may rename without breaking us: caches under both names, overrides with their parents' signatures."""

import inspect
import re

import pytest
import torch
from compression_helpers import IMAGE, batch
from conftest import ROOT
from model_helpers import prompt, tiny_model
from transformers import DynamicCache, GenerationMixin, InternVLForConditionalGeneration, LogitsProcessorList


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
CACHE_NAMES = ["past_key_values", "cache"]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_taken_under_either_name(name):
    model, inputs = tiny_model(), prompt(1)
    expected = model.generate(**inputs, **GREEDY)
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(**inputs, **GREEDY, **{name: cache}), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    text = {"input_ids": torch.arange(3, 12)[None]}
    whole = model(**text).logits
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=text["input_ids"][:, :5], **{name: cache})
    torch.testing.assert_close(model(input_ids=text["input_ids"][:, 5:], **{name: cache}).logits, whole[:, 5:])


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_given_under_either_name(name):
    model, inputs = tiny_model(), prompt(1)
    assert getattr(model(**inputs, use_cache=True), name).get_seq_length() == 24
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert getattr(output, name).get_seq_length() == 28
    output = model.generate(input_ids=torch.arange(3, 12)[None], **GREEDY, return_dict_in_generate=True)
    assert getattr(output, name).get_seq_length() == 13


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_of_a_compressed_prompt_is_refused_under_either_name(name):
    model, inputs = tiny_model(), batch((3, IMAGE, 9))
    first = model.generate(**inputs, **GREEDY, use_scm=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=f"{name} comes from .* does not fit its input_ids"):
        model.generate(first.sequences, **GREEDY, **{name: first.past_key_values})
    with pytest.raises(ValueError, match=f"{name} counts tokens"):
        model.generate(**inputs, **GREEDY, use_scm=True, **{name: DynamicCache()})


def test_two_caches_are_refused():
    model, inputs = tiny_model(), prompt(1)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="given twice"):
            call(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


def test_overrides_show_the_signature_of_their_parents():
    model = tiny_model()
    for override, parent, added in (
        (model.forward, InternVLForConditionalGeneration.forward, "tile_counts"),
        (model.generate, GenerationMixin.generate, "use_scm"),
    ):
        shown, inherited = list(inspect.signature(override).parameters), list(inspect.signature(parent).parameters)
        assert [name for name in shown if name in inherited] == inherited[1:]
        assert added in shown
        assert shown[-1] == "kwargs"


def test_positions_are_those_of_the_parent():
    model, inputs = tiny_model(), prompt(1)
    expected = model(**inputs).logits
    assert torch.equal(model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits, expected)
    seen = []
    processors = LogitsProcessorList([lambda ids, scores: seen.append(ids.shape) or scores])
    model.generate(inputs["input_ids"], None, processors, pixel_values=inputs["pixel_values"], **GREEDY)
    assert seen[0] == (1, 24)
    with pytest.raises(TypeError, match="positional arguments"):
        model(*range(40))


def test_the_image_features_are_in_the_output():
    model, inputs = tiny_model(), prompt(2, 1)
    output = model(**inputs)
    features = output.image_outputs.pooler_output if hasattr(output, "image_outputs") else output.image_hidden_states
    assert features.shape == (3, 4, 32)
    assert torch.equal(features, model.extract_feature(inputs["pixel_values"]))
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_what_is_not_documented_stands_in_one_file():
    documented = {"transformers", "transformers.utils", "transformers.image_utils"}
    for file in sorted(ROOT.glob("*.py")):
        modules = set(re.findall(r"^\s*(?:from|import) (transformers[\w.]*)", file.read_text(), flags=re.MULTILINE))
        assert file.name == "transformers_bridge.py" or modules <= documented, file.name


def test_transformers_serve_finds_the_class():
    tiny_model()
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as NAMES

    assert NAMES["minimonkey"] == "MiniMonkeyForConditionalGeneration"
