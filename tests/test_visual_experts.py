"""Mono-InternVL: image tokens have feed-forward blocks of their own, in every way a prompt can reach the model."""

import pytest
import torch
from conftest import enable_activation_checkpointing, random_tiles
from model_helpers import IMAGE_TOKEN, TINY_TEXT, TINY_VISION, prompt, tiny_mono
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, DynamicCache

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def mono():
    return tiny_mono()


@torch.no_grad()
def test_each_kind_of_token_goes_through_its_block_alone(mono):
    """Published: both blocks run on all tokens, and what is not wanted is multiplied by zero."""
    layer, hidden = mono.model.language_model.layers[0], torch.randn(2, 7, 32)
    mask = torch.rand(2, 7) > 0.5
    chosen = mask.unsqueeze(-1).float()
    dense = layer.mlp(hidden) * (1 - chosen) + layer.visual_mlp(hidden) * chosen
    assert torch.allclose(layer.feed_forward(hidden, mask), dense, atol=1e-5)
    seen = {"mlp": 0, "visual_mlp": 0}
    handles = [
        getattr(layer, name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0].numel() // 32)
        )
        for name in seen
    ]
    layer.feed_forward(hidden, mask)
    assert seen == {"mlp": int((~mask).sum()), "visual_mlp": int(mask.sum())}
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_an_image_costs_one_block_a_token(mono):
    layer, hidden, mask = mono.model.language_model.layers[0], torch.randn(1, 40, 32), torch.arange(40)[None] < 30
    operations = []
    for run in (
        lambda: layer.feed_forward(hidden, mask),
        lambda: layer.mlp(hidden),
        lambda: (layer.mlp(hidden), layer.visual_mlp(hidden)),  # as published
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1] == operations[2] / 2


@torch.no_grad()
def test_equal_experts_give_the_plain_language_model():
    mono, plain, batch = tiny_mono(), tiny_mono(visual_experts=False), prompt(2)
    weights = {name: tensor for name, tensor in mono.state_dict().items() if ".visual_mlp." not in name}
    plain.load_state_dict(weights)
    for layer in mono.model.language_model.layers:
        layer.visual_mlp.load_state_dict(layer.mlp.state_dict())
    assert torch.allclose(mono(**batch).logits, plain(**batch).logits, atol=1e-5)


@torch.no_grad()
def test_the_visual_expert_is_for_images_only():
    model, batch = tiny_mono(), prompt(2)
    text = {"input_ids": torch.arange(3, 20)[None]}
    before = {"text": model(**text).logits, "image": model(**batch).logits}
    for layer in model.model.language_model.layers:
        layer.visual_mlp.down_proj.weight.mul_(2)
    assert torch.equal(model(**text).logits, before["text"])
    after = model(**batch).logits
    assert torch.equal(after[:, :4], before["image"][:, :4])  # the text before the image
    assert not torch.allclose(after[:, 4:], before["image"][:, 4:], atol=1e-3)


def test_text_alone_generates(mono):
    assert mono.generate(torch.arange(3, 20)[None], **GREEDY).shape == (1, 23)


@torch.no_grad()
def test_cached_decoding_equals_full_passes(mono):
    batch = prompt(2)
    output, ids = mono.generate(**batch, **GREEDY), batch["input_ids"]
    for _ in range(6):
        logits = mono(input_ids=ids, pixel_values=batch["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(output, ids)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"num_beams": 2, "use_scm": 1}]
)
def test_a_row_of_a_batch_gives_what_it_gives_alone(mono, options):
    batch = prompt(2, 3)
    options = {**GREEDY, **options}
    if options.pop("use_scm", None):
        options |= {"use_scm": True, "tile_counts": torch.tensor([[1, 0, 1], [2, 0, 1]])}
    together = mono.generate(**batch, **options)
    if "tile_counts" in options:
        options["tile_counts"] = options["tile_counts"][1:]
    alone = mono.generate(input_ids=batch["input_ids"][1:, 1:], pixel_values=batch["pixel_values"][2:], **options)
    assert torch.equal(together[1, 1:], alone[0])


@torch.no_grad()
def test_a_prompt_in_pieces_and_a_new_image_in_a_later_turn(mono):
    first, second = prompt(2), prompt(1, length=20)
    whole_ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    whole = mono(input_ids=whole_ids, pixel_values=pixels).logits
    cache = DynamicCache(config=mono.config.text_config)
    mono(**{**first, "attention_mask": None}, past_key_values=cache)
    later = mono(**{**second, "attention_mask": None}, past_key_values=cache).logits
    assert torch.allclose(later, whole[:, 24:], atol=1e-4)
    embeddings, mask = mono.encode_images(whole_ids, pixels), whole_ids == IMAGE_TOKEN
    cache, pieces = DynamicCache(config=mono.config.text_config), []
    for start in range(0, whole_ids.shape[1], 9):
        part = slice(start, start + 9)
        output = mono(inputs_embeds=embeddings[:, part], visual_token_mask=mask[:, part], past_key_values=cache)
        pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("new_image", [False, True])
def test_generation_goes_on_from_the_cache_of_a_prefix(mono, new_image):
    first, second = prompt(2), prompt(1, length=20)
    ids, pixels, cached = first["input_ids"], first["pixel_values"], 17
    if new_image:
        ids, pixels, cached = (
            torch.cat([ids, second["input_ids"]], dim=1),
            torch.cat([pixels, second["pixel_values"]]),
            24,
        )
    cache = DynamicCache(config=mono.config.text_config)
    mono(input_ids=ids[:, :cached], pixel_values=first["pixel_values"], past_key_values=cache)
    output = mono.generate(input_ids=ids, pixel_values=pixels, past_key_values=cache, **GREEDY)
    assert torch.equal(output, mono.generate(input_ids=ids, pixel_values=pixels, **GREEDY))


def test_embeddings_need_a_mask_of_the_image_tokens(mono):
    for model in (mono, mono.model):
        with pytest.raises(ValueError, match="visual_token_mask"):
            model(inputs_embeds=torch.zeros(1, 5, 32))


@torch.no_grad()
def test_the_model_without_its_head_knows_the_image_tokens(mono):
    batch = prompt(2, 1)
    expected = mono(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(mono.model(**batch).last_hidden_state, expected)


@torch.no_grad()
def test_compression_scores_with_the_experts(mono):
    """The judge is the attention that the whole model reports."""
    batch, counts = prompt(4), torch.tensor([[2, 1, 1]])
    (kept,) = mono.kept_positions(**batch, tile_counts=counts)
    model = tiny_mono()
    model.set_attn_implementation("eager")
    attention = model(**batch, output_attentions=True).attentions[1]
    scores = attention[0, :, 12:, 4:12].mean(dim=1).mean(dim=0)
    best = scores.topk(4).indices + 4
    assert kept.tolist() == sorted([*range(4), *best.tolist(), *range(12, 24)])


def test_save_and_reload_is_bit_equal(mono, tmp_path):
    mono.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32)
    for name, tensor in mono.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name


def test_gradients_reach_the_block_that_was_used():
    model, batch = tiny_mono().train(), prompt(2)
    enable_activation_checkpointing(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    layer = model.model.language_model.layers[0]
    assert layer.visual_mlp.up_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    text = torch.arange(3, 20)[None]
    model(input_ids=text, labels=text).loss.backward()
    assert layer.visual_mlp.up_proj.weight.grad is None
    assert layer.mlp.up_proj.weight.grad.abs().sum() > 0


def test_mixed_precision():
    model, batch = tiny_mono().train(), prompt(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    layer = model.model.language_model.layers[0]
    for block in (layer.mlp, layer.visual_mlp):
        gradient = block.up_proj.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_experts_of_another_family_are_refused():
    with pytest.raises(ValueError, match="'qwen2'"):
        MiniMonkeyForConditionalGeneration(
            MiniMonkeyConfig(
                vision_config=TINY_VISION,
                text_config={"model_type": "qwen2", **TINY_TEXT},
                image_token_id=IMAGE_TOKEN,
                visual_experts=True,
            )
        )


@torch.no_grad()
def test_one_image_token_stands_for_a_square_of_patches(mono):
    """A constant 2x2 patch block changes its own token and no other."""
    tiles = random_tiles(0, 1, 3, 28, 28)
    changed = tiles.clone()
    changed[:, :, 14:, :14] += 1
    before, after = (mono.get_image_features(pixels, return_dict=True).pooler_output for pixels in (tiles, changed))
    assert [(before[0, i] - after[0, i]).abs().max().item() > 1e-3 for i in range(4)] == [False, False, True, False]
