"""Vision towers whose layers share weights (MiniViT): identities, which layer uses whose weights, sizes, saving."""

import pytest
import torch
from conftest import enable_activation_checkpointing
from model_helpers import IMAGE_TOKEN, TINY_TEXT, TINY_VISION, prompt, tiny_model
from transformers import AutoModel

from minimonkey.configuration_minimonkey import VISION_SHARE_TRANSFORMS, MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.distill_vision import make_student
from minimonkey.shared_vision_layers import HeadMixer, PatchConvolution


LAYERS = 4
TEXT = {"model_type": "llama", **TINY_TEXT}
INTERNVIT_300M = {
    **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    **{"image_size": 448, "patch_size": 14, "attention_bias": True},
}


def shared(group_size: int = 2, transform: str = "heads", vision: dict | None = None):
    torch.manual_seed(0)
    config = MiniMonkeyConfig(
        vision_config={**TINY_VISION, "num_hidden_layers": LAYERS} if vision is None else vision,
        text_config=dict(TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_share_layers=group_size,
        vision_share_transform=transform,
    )
    return MiniMonkeyForConditionalGeneration(config).eval()


def set_eager(model):
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("transform", VISION_SHARE_TRANSFORMS[1:])
@torch.no_grad()
def test_groups_of_one_are_the_plain_tower_bit_for_bit(transform):
    plain = set_eager(tiny_model())
    student = set_eager(make_student(plain, None, 1, transform)).eval()
    batch = prompt(2)
    assert torch.equal(plain(**batch).logits, student(**batch).logits)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize(
    ("transform", "own"), [("none", 0), ("heads", 2 * (16 * 16 + 16)), ("heads+conv", 544 + 51_200 + 2048)]
)
def test_parameters_at_the_size_of_internvit_300m(group_size, transform, own):
    with torch.device("meta"):
        tower = shared(group_size, transform, INTERNVIT_300M).model.vision_tower
    in_group, in_layer, around = 12_592_128, 4096 + 2048, 304_012_288 - 24 * 12_598_272
    expected = -(-24 // group_size) * in_group + 24 * (in_layer + own) + around
    assert sum(parameter.numel() for parameter in tower.parameters()) == expected


@torch.no_grad()
def test_a_group_uses_the_weights_of_its_first_layer():
    model = shared(2)
    layers = model.model.vision_tower.encoder.layer
    assert not any("attention" in name for name in layers[1].state_dict()) and layers[3].leader[0] is layers[2]
    hidden = torch.randn(1, 17, TINY_VISION["hidden_size"])
    before = [layer(hidden) for layer in layers]
    layers[0].attention.q_proj.weight.add_(torch.randn_like(layers[0].attention.q_proj.weight))
    changed = [not torch.equal(layer(hidden), old) for layer, old in zip(layers, before)]
    assert changed == [True, True, False, False]


@torch.no_grad()
def test_heads_are_mixed():
    mixer, scores = HeadMixer(4), torch.randn(2, 4, 5, 5)
    assert torch.equal(mixer(scores), scores)
    order = torch.tensor([2, 0, 3, 1])
    mixer.weight.copy_(torch.eye(4)[order])
    assert torch.equal(mixer(scores), scores[:, order])


@torch.no_grad()
def test_the_convolution_skips_the_class_token_and_wants_squares():
    convolution = PatchConvolution(8, 1e-6)
    torch.nn.init.normal_(convolution.convolution.weight)
    added = convolution(torch.randn(2, 17, 8))
    assert added.shape == (2, 17, 8) and not added[:, 0].any() and added[:, 1:].any()
    with pytest.raises(ValueError, match="square tiles, got 6"):
        convolution(torch.randn(2, 7, 8))


@pytest.mark.parametrize("transform", VISION_SHARE_TRANSFORMS)
@torch.no_grad()
def test_saved_loaded_and_copied(transform, tmp_path):
    model, batch = shared(3, transform), prompt(2)
    for name, parameter in model.named_parameters():
        if "mixer" in name or "convolution" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert loaded.model.vision_tower.encoder.layer[1].leader[0] is loaded.model.vision_tower.encoder.layer[0]


@torch.no_grad()
def test_what_a_plain_checkpoint_lacks_begins_as_identity(tmp_path):
    plain, batch = set_eager(tiny_model()), prompt(1)
    plain.save_pretrained(tmp_path)
    loaded = MiniMonkeyForConditionalGeneration.from_pretrained(
        tmp_path, vision_share_transform="heads+conv", attn_implementation="eager"
    )
    assert torch.equal(loaded.eval()(**batch).logits, plain(**batch).logits)


def test_gradients_reach_the_shared_weights_from_each_layer():
    model = shared(4, "heads+conv")
    enable_activation_checkpointing(model.train())
    model.encode_tiles(prompt(1)["pixel_values"]).sum().backward()
    layers = model.model.vision_tower.encoder.layer
    assert layers[0].attention.q_proj.weight.grad.any() and all(
        layer.weight_mixer.weight.grad.any() for layer in layers
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_share_layers": 0}, "1 to 2, the tower's layers, got 0"),
        ({"vision_share_layers": 3}, "got 3"),
        ({"vision_share_transform": "conv"}, "none, heads, heads"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MiniMonkeyConfig(
            vision_config={**TINY_VISION, "num_hidden_layers": 2}, text_config=dict(TEXT), image_token_id=1, **options
        )
