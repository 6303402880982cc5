"""The model beyond parity: generation modes, precision, memory options, saving, inputs that do not fit."""

import copy
import threading

import pytest
import torch
from conftest import ROOT, enable_activation_checkpointing, random_tiles
from model_helpers import GENERATION_MODES, IMAGE_TOKEN, prompt, tiny_model
from PIL import Image
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    TextIteratorStreamer,
)


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
)
def test_every_auto_class_gives_the_model(auto_class):
    model = auto_class.from_pretrained(ROOT, trust_remote_code=True)
    assert type(model).__name__ == "MiniMonkeyForConditionalGeneration"


def test_a_row_of_a_batch_gives_what_it_gives_alone():
    model, batch = tiny_model(), prompt(2, 1, 3)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    first_tile = 0
    for row, tiles in enumerate((2, 1, 3)):
        alone = model.generate(
            input_ids=batch["input_ids"][row : row + 1, row:],
            pixel_values=batch["pixel_values"][first_tile : first_tile + tiles],
            max_new_tokens=8,
            do_sample=False,
        )
        assert torch.equal(together[row, row : row + alone.shape[1]], alone[0])
        first_tile += tiles


@pytest.mark.parametrize("options", GENERATION_MODES, ids="-".join)
def test_generation_modes(options):
    model, batch = tiny_model(), prompt(2, 1)
    output = model.generate(**batch, max_new_tokens=6, eos_token_id=None, **options)
    copies = options.get("num_return_sequences", 1)
    assert output.shape == (2 * copies, 30)
    assert torch.equal(output[::copies, :24], batch["input_ids"])
    if "num_beams" not in options:
        greedy = model.generate(**batch, max_new_tokens=6, eos_token_id=None, do_sample=False)
        assert torch.equal(output[::copies], greedy)


def test_beams_see_the_right_images():
    model, batch = tiny_model(), prompt(2, 1)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)
    alone = model.generate(input_ids=batch["input_ids"][1:, 1:], pixel_values=batch["pixel_values"][2:], **options)
    assert torch.equal(together[1, 1:], alone[0])


def test_cached_decoding_equals_full_passes():
    model, batch = tiny_model(), prompt(2)
    output = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = batch["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(output, ids)


def test_vision_runs_once_a_generate():
    model, batch, calls = tiny_model(), prompt(2, 1), []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
    assert len(calls) == 1


def test_attention_back_ends_agree():
    eager, sdpa = tiny_model(), tiny_model()
    eager.set_attn_implementation("eager")
    sdpa.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.allclose(eager(**prompt(2)).logits, sdpa(**prompt(2)).logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    model, batch = tiny_model().to(dtype), prompt(1)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    from_float32 = model.generate(**batch, **options)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    assert torch.equal(model.generate(**batch, **options), from_float32)


def test_device_map_auto(processor):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, device_map="auto")
    assert isinstance(model.chat(processor, Image.new("RGB", (64, 32)), "Read the text.", max_new_tokens=4), str)


def test_arguments_of_the_published_readme():
    options = {"low_cpu_mem_usage": True, "use_flash_attn": False, "load_in_8bit": False}
    AutoModel.from_pretrained(ROOT, trust_remote_code=True, torch_dtype=torch.bfloat16, **options)
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        AutoModel.from_pretrained(ROOT, trust_remote_code=True, load_in_8bit=True)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, batch = tiny_model().train(), prompt(2)
        if checkpointing:
            enable_activation_checkpointing(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(model.model.vision_tower.embeddings.patch_embeddings.projection.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_streamer_gives_the_answer_piece_by_piece(nano, processor):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    image = Image.open(ROOT / "assets" / "example.png")
    options = {"max_new_tokens": 8, "do_sample": False}
    call = {"target": nano.chat, "args": (processor, image, "Read the text.")}
    thread = threading.Thread(**call, kwargs={**options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == nano.chat(processor, image, "Read the text.", **options)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "qwen3", "gemma2"])
def test_save_and_reload_is_bit_equal(model_type, tmp_path):
    extra = {"head_dim": 16} if model_type in ("qwen3", "gemma2") else {}
    model = tiny_model(model_type, **extra)
    for number in range(2):  # once from a fresh configuration, once after a load
        model.save_pretrained(tmp_path / str(number))
        reloaded = AutoModel.from_pretrained(tmp_path / str(number), trust_remote_code=True, dtype=torch.float32)
        assert model.state_dict().keys() == reloaded.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, reloaded.state_dict()[name]), name
        model = reloaded
    with torch.no_grad():
        assert model(**prompt(1)).logits.shape == (1, 24, 64)


def test_published_names_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="save_original_format"):
        tiny_model().save_pretrained(tmp_path, save_original_format=True)


def test_image_tokens_and_features_of_different_number():
    model, batch = tiny_model(), prompt(2)
    batch["pixel_values"] = batch["pixel_values"][:1]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"8 image tokens .* 4 features"):
            call(**batch)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (torch.zeros(2, 3, 28, 28, dtype=torch.int64), "floating-point"),
        (torch.zeros(3, 28, 28), r"\(tiles, 3, S, S\)"),
        (torch.zeros(2, 4, 28, 28), r"\(tiles, 3, S, S\)"),
        (torch.zeros(2, 3, 28, 35), r"\(tiles, 3, S, S\)"),
        (torch.zeros(2, 3, 30, 30), "patch groups"),
        (torch.zeros(2, 3, 28, 28, device="meta"), "model.device"),
    ],
    ids=["integers", "three_dimensions", "four_channels", "not_square", "odd_size", "other_device"],
)
def test_tiles_that_do_not_fit(tiles, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**prompt(2), "pixel_values": tiles})


def test_whole_numbers_are_normalised_by_the_model(nano, processor):
    image = Image.open(ROOT / "assets" / "example.png")
    raw = {"images_kwargs": {"do_rescale": False, "do_normalize": False}}
    tiles = processor.image_processor(image, return_tensors="pt", **raw["images_kwargs"])["pixel_values"]
    assert tiles.dtype == torch.uint8
    normalised = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    ids = torch.full((1, 49), nano.config.image_token_id)
    assert torch.allclose(nano.encode_images(ids, tiles), nano.encode_images(ids, normalised), atol=1e-3)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert nano.chat(processor, image, "Read the text.", **raw, **options) == nano.chat(
        processor, image, "Read the text.", **options
    )


def test_many_tiles_go_through_in_chunks():
    model, batch, calls = tiny_model(), prompt(5), []
    whole = model.encode_images(batch["input_ids"], batch["pixel_values"])
    model.vision_chunk_tiles = 2
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    assert torch.allclose(model.encode_images(batch["input_ids"], batch["pixel_values"]), whole, atol=1e-5)
    assert len(calls) == 3


def test_tiles_without_a_prompt():
    with pytest.raises(ValueError, match="input_ids"):
        tiny_model().generate(pixel_values=random_tiles(0, 1, 3, 28, 28))


def test_prompts_that_contradict_themselves():
    model, batch = tiny_model(), prompt(2)
    with pytest.raises(ValueError, match="8 image tokens, but no pixel_values"):
        model.generate(batch["input_ids"])
    with pytest.raises(ValueError, match="twice"):
        model.generate(batch["input_ids"], **batch)
    with pytest.raises(ValueError, match="no inputs_embeds"):
        model(**batch, inputs_embeds=torch.zeros(1, 24, 32))


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 3}])
def test_modes_that_would_lose_the_images_are_refused(option):
    model, batch = tiny_model(), prompt(1)
    with pytest.raises(ValueError, match="does not work with images"):
        model.generate(**batch, **option)
    with pytest.raises(ValueError, match="does not work with images"):
        model.generate(**batch, generation_config=GenerationConfig(**option))


def test_settings_by_position():
    model, batch = tiny_model(), prompt(1)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    output = model.generate(batch["input_ids"], settings, pixel_values=batch["pixel_values"])
    assert output.shape == (1, 27)


def test_inputs_are_not_changed():
    model, batch = tiny_model(), prompt(2)
    before = copy.deepcopy(batch)
    model.generate(**batch, max_new_tokens=2)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


@torch.no_grad()
def test_the_vision_tower_compiles_whole():
    tower, tiles = tiny_model().model.vision_tower, random_tiles(0, 2, 3, 28, 28)
    expected = tower(tiles).last_hidden_state
    compiled = torch.compile(tower, fullgraph=True, backend=(counter := CompileCounter()))
    assert torch.equal(compiled(tiles).last_hidden_state, expected)
    assert counter.frame_count == 1


def test_a_decoding_step_compiles_whole():
    model, batch = tiny_model(), prompt(2, 1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(**batch, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=(counter := CompileCounter()))
    assert torch.equal(model.generate(**batch, **options), expected)
    assert counter.frame_count == 2  # the prompt, and a step


# --- heads that scale their logits -----------------------------------------------------------------------------------

SCALED_HEADS = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
}


@pytest.mark.parametrize("model_type", SCALED_HEADS)
def test_loss_and_logits_are_those_of_the_language_model_alone(model_type):
    model = tiny_model(model_type, **SCALED_HEADS[model_type])
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    alone = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.weight = model.lm_head.weight
    expected, output = alone(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(model.language_model(input_ids=ids).logits, expected.logits)


def test_a_head_that_is_not_known_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="'llama' with logits_scaling=3.0 is not known"):
        tiny_model("llama", logits_scaling=3.0)


# --- what does not fit together --------------------------------------------------------------------------------------


def test_image_tokens_without_pixels_are_refused_by_forward_too():
    model, inputs = tiny_model(), prompt(2)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="8 image tokens, but no pixel_values"):
            call(input_ids=inputs["input_ids"])


def test_masks_of_four_dimensions_are_refused_by_generate_with_images():
    model, inputs = tiny_model(), prompt(2)
    causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match=r"attention_mask must be \(rows, tokens\)"):
        model.generate(**{**inputs, "attention_mask": causal}, max_new_tokens=2)
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**{**inputs, "attention_mask": causal}).logits, expected)


def test_token_types_of_a_processor_are_accepted():
    model, inputs = tiny_model(), prompt(2, 1)
    types = (inputs["input_ids"] == IMAGE_TOKEN).long()
    expected = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, mm_token_type_ids=types, max_new_tokens=4), expected)
    assert torch.equal(model(**inputs, mm_token_type_ids=types).logits, model(**inputs).logits)
