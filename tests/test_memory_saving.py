"""A prompt read in chunks, tiles encoded in chunks, the tower out of the way, images encoded ahead: the same answers."""

import pytest
import torch
from chat_helpers import CHAT, QUESTION, assert_equal, tiny
from compression_helpers import GREEDY, batch
from conftest import ROOT
from model_helpers import prompt, tiny_model, tiny_mono
from transformers import AutoProcessor, GenerationConfig


IMAGE = str(ROOT / "assets/example.png")
LOGITS = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def assert_same_logits(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    for one, other in zip(output.logits, expected.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 8, 23, 128])
@pytest.mark.parametrize("make", [tiny_model, tiny_mono])
def test_a_prompt_with_images_read_in_chunks(make, size):
    model, inputs = make(), prompt(1, 2)  # rows of different lengths
    widest = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, options: widest.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    expected = model.generate(**inputs, **GREEDY, **LOGITS)
    assert max(widest) == 24
    widest.clear()
    assert_same_logits(model.generate(**inputs, **GREEDY, **LOGITS, prefill_chunk_size=size), expected)
    assert max(widest) == min(size, 24)
    config = GenerationConfig(prefill_chunk_size=size)
    assert_same_logits(model.generate(**inputs, **GREEDY, **LOGITS, generation_config=config), expected)
    assert config.prefill_chunk_size == size


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}], ids=str
)
def test_chunks_with_several_answers(mode):
    model, inputs, options = tiny_model(), prompt(2, 1), {**GREEDY, "pad_token_id": 0}
    expected = model.generate(**inputs, **options | mode)
    assert torch.equal(model.generate(**inputs, **options | mode, prefill_chunk_size=5), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("select", [None, {"stage": "layer", "positions": "original"}])
def test_chunks_of_a_compressed_prompt(side, select):
    model, rows = tiny_model(), batch((3, (4, 2, 1), 9), (5, (4, 0, 1), 2), side=side)
    options = {**GREEDY, **LOGITS, "use_scm": True, "scm_select": select}
    assert_same_logits(model.generate(**rows, **options, prefill_chunk_size=6), model.generate(**rows, **options))


def test_chunks_in_a_conversation(processor):
    model, chunks = tiny(), {"prefill_chunk_size": 16}
    first, history = model.chat(processor, IMAGE, QUESTION, return_history=True, **CHAT, **chunks)
    assert first == model.chat(processor, IMAGE, QUESTION, **CHAT)
    second = model.chat(processor, IMAGE, "And?", history=history, return_dict=True, **CHAT, **chunks)
    model.forget_conversations()
    assert_equal(second, model.chat(processor, IMAGE, "And?", history=list(history), return_dict=True, **CHAT))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefill_chunk_size": 0}, "at least 1, got 0"),
        ({"prefill_chunk_size": 4, "cache_implementation": "static"}, "leave out cache_implementation"),
        ({"prefill_chunk_size": 4, "use_cache": False}, "use_cache=False"),
    ],
)
def test_chunks_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**prompt(1), max_new_tokens=2, pad_token_id=0, **options)


@torch.no_grad()
def test_tiles_encoded_in_chunks():
    model, tiles = tiny_model(), prompt(5)["pixel_values"]
    expected, seen = model.encode_tiles(tiles), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, __, options: seen.append(len(options["pixel_values"])), with_kwargs=True
    )
    for chunk in (1, 2, 4):
        model.vision_chunk_tiles = chunk
        assert torch.allclose(model.encode_tiles(tiles), expected, atol=1e-5)
    assert seen == [1] * 5 + [2, 2, 1] + [4, 1]


def test_the_vision_tower_out_of_the_way(processor):
    plain, model = tiny(), tiny()
    weights = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    assert model.offload_vision() == sum(weight.nbytes for weight in weights)
    answer, history = model.chat(processor, IMAGE, QUESTION, return_history=True, **CHAT)
    assert answer == plain.chat(processor, IMAGE, QUESTION, **CHAT)
    assert history.memory.belongs_to(model)  # coming and going changes no weight
    expected = plain.chat(processor, IMAGE, "And?", history=list(history), return_dict=True, **CHAT)
    assert_equal(model.chat(processor, IMAGE, "And?", history=history, return_dict=True, **CHAT), expected)
    assert model.device == plain.device
    with pytest.raises(ValueError, match="done once"):
        model.offload_vision()


def test_a_model_without_its_tower_can_be_saved(tmp_path):
    model = tiny_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.offload_vision()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


def test_images_encoded_before_the_question(processor):
    model, encoded = tiny(), []
    expected = model.chat(processor, [IMAGE, IMAGE], QUESTION, return_dict=True, **CHAT)
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    history = model.encode_ahead(processor, [IMAGE, IMAGE])
    assert history == [] and len(encoded) == 1
    answer = model.chat(processor, [IMAGE, IMAGE], QUESTION, history=history, return_dict=True, **CHAT)
    assert len(encoded) == 1
    assert_equal(answer, expected)
    # Another image than was announced is encoded then.
    other = str(ROOT / "assets/receipt.png")
    model.chat(processor, other, QUESTION, history=model.encode_ahead(processor, IMAGE), **CHAT)
    assert len(encoded) == 3


def test_what_cannot_be_encoded_ahead(processor):
    model = tiny()
    with pytest.raises(ValueError, match="takes images"):
        model.encode_ahead(processor, None)
    model.remembered_conversations = 0
    with pytest.raises(ValueError, match="remembered_conversations"):
        model.encode_ahead(processor, IMAGE)
