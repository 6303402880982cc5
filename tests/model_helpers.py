"""Small models with random weights, their prompts, and the ways to generate that every one of them knows."""

import torch
from conftest import random_tiles

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration


TINY_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 7,
    "attention_bias": True,
}
TINY_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
IMAGE_TOKEN = 60
GENERATION_MODES = [
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 4},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    {"cache_implementation": "static"},
]


def tiny_model(model_type: str = "llama", **options):
    torch.manual_seed(0)
    config = MiniMonkeyConfig(
        vision_config=dict(TINY_VISION),
        text_config={"model_type": model_type, **TINY_TEXT, **options},
        image_token_id=IMAGE_TOKEN,
    )
    model = MiniMonkeyForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # larger than a usual initialisation, so that answers differ
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_mono(visual_experts: bool = True):
    """A Mono-InternVL: patch embeddings in the place of a vision tower, and feed-forward blocks for image tokens."""
    torch.manual_seed(0)
    config = MiniMonkeyConfig(
        vision_config={**TINY_VISION, "num_hidden_layers": 0},
        text_config={"model_type": "llama", **TINY_TEXT},
        image_token_id=IMAGE_TOKEN,
        visual_experts=visual_experts,
    )
    model = MiniMonkeyForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompt(*tiles: int, length: int = 24) -> dict[str, torch.Tensor]:
    """Left-padded rows, the image tokens of `tiles` tiles in each (four a tile)."""
    rows = torch.randint(3, 50, (len(tiles), length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(rows)
    for row, count in enumerate(tiles):
        rows[row, 4 + row : 4 + row + 4 * count] = IMAGE_TOKEN
        rows[row, :row], mask[row, :row] = 0, 0
    return {"input_ids": rows, "attention_mask": mask, "pixel_values": random_tiles(5, sum(tiles), 3, 28, 28)}
