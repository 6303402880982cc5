"""MiniMonkey-Nano before training: configuration, tokenizer, processor, and weights to start from."""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.conversation import DEFAULT_SYSTEM_MESSAGE, chat_template_jinja, get_template
from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.processing_minimonkey import MiniMonkeyProcessor
from minimonkey.scripts.synthetic.byte_tokenizer import build_byte_tokenizer
from minimonkey.tiling import RANGE_NAMES


TILE_SIZE = 112
ONE_TILE = (1, 1, 1, 1)


def write_untrained(out: Path, vision: dict[str, int] | None = None, text: dict[str, int] | None = None) -> None:
    """Write configuration, tokenizer, processor and chat template of Nano, and weights to start from.

    Args:
        vision: Fields of `vision_config` that differ from Nano's, to try another design.
        text: The same of `text_config`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_byte_tokenizer(DEFAULT_SYSTEM_MESSAGE)
    template = chat_template_jinja(get_template("internlm2-chat"))
    config = MiniMonkeyConfig(
        vision_config={
            "hidden_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 576,
            "image_size": TILE_SIZE,
            "patch_size": 8,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            **(vision or {}),
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 512,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
            **(text or {}),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    image_processor = MiniMonkeyImageProcessor(
        size={"height": TILE_SIZE, "width": TILE_SIZE}, **dict(zip(RANGE_NAMES, ONE_TILE))
    )
    processor = MiniMonkeyProcessor(
        image_processor, tokenizer, image_seq_length=config.image_seq_length, chat_template=template
    )
    processor.save_pretrained(out)
    model = MiniMonkeyForConditionalGeneration(config)
    initialize(model)
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        max_new_tokens=256,
    )
    model.save_pretrained(out)


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Initialise weights from which a small vision tower learns letters quickly.

    Each attention head of the vision tower begins by looking at one neighbour of its patch (left, right, above, below):
    sines and cosines as position embeddings, a rotation of them as query projection.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in ("vision_tower", "projector", "layers")):
            nn.init.xavier_uniform_(parameter)
    tower, config = model.model.vision_tower, model.config.vision_config
    projection = tower.embeddings.patch_embeddings.projection
    nn.init.normal_(projection.weight, std=0.6 / math.sqrt(projection.weight[0].numel()))
    side, heads = TILE_SIZE // config.patch_size[0], config.num_attention_heads
    quarter = config.hidden_size // heads // 4
    frequencies = torch.logspace(math.log10(0.2), math.log10(2.4), quarter)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles_x, angles_y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies
    waves = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    tower.embeddings.position_embeddings.zero_()
    tower.embeddings.position_embeddings[0, 1:] = 0.7 * waves.repeat(1, heads)
    neighbours = ((-1, 0), (1, 0), (0, -1), (0, 1))
    query = torch.block_diag(
        *(_rotation(frequencies * offset) for head in range(heads) for offset in neighbours[head % 4])
    )
    for layer in tower.encoder.layer:
        noise = torch.randn(2, config.hidden_size, config.hidden_size) * 0.01
        layer.attention.q_proj.weight.copy_(1.4 * query + noise[0])
        layer.attention.k_proj.weight.copy_(1.4 * torch.eye(config.hidden_size) + noise[1])


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """Return the matrix that turns (sin a, cos a) into (sin(a + angle), cos(a + angle))."""
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])
