"""Models of the published sizes with random weights, so that speed can be measured without a download."""

import torch
from accelerate import init_empty_weights
from torch import nn

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.repository import ROOT


_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "attention_bias": True,
}
SIZES = {
    "1B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151655,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
    "2B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 92553,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "attention_bias": False,
    },
    "4B": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "vocab_size": 32020,
        "rope_theta": 1e4,
        "max_position_embeddings": 131072,
        "pad_token_id": 0,
    },
}


def random_config(size: str, layers: int | None = None):
    """Return the configuration of a published size ("Nano": this repository's), its language model cut to `layers` layers."""
    if size == "Nano":
        config = MiniMonkeyConfig.from_pretrained(ROOT)
    else:
        config = MiniMonkeyConfig(
            vision_config=dict(_VISION), text_config={**SIZES[size], "tie_word_embeddings": False}
        )
    if layers is not None:
        fields = {**config.to_dict(), "scm_layer": None}
        fields["text_config"] = {**config.text_config.to_dict(), "num_hidden_layers": layers}
        fields["text_config"].pop("layer_types", None)
        config = MiniMonkeyConfig(**fields)
    return config


def published_config(name: str):
    """Return the configuration of the published size that a model's name tells: Nano, 1B, 2B, 4B, or Mono (2B).

    Raises:
        ValueError: It tells none of them.
    """
    if "mono" in name.lower():
        text = {**SIZES["2B"], "tie_word_embeddings": False}
        return MiniMonkeyConfig(
            vision_config={**_VISION, "num_hidden_layers": 0}, text_config=text, visual_experts=True
        )
    size = next((size for size in ("Nano", *SIZES) if size.lower() in name.lower()), None)
    if size is None:
        raise ValueError(f"There is no folder {name}, and its name tells no published size ({', '.join(SIZES)}, Mono).")
    return random_config(size)


def random_model(config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a model of this configuration with random weights, directly on the device and in the requested type."""
    with init_empty_weights(include_buffers=False):
        model = MiniMonkeyForConditionalGeneration(config)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                value = value.fill_(1.0) if value.ndim == 1 else value.normal_(std=0.02, generator=generator)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.to(device).eval()


def random_tiles(tiles: int, model: nn.Module) -> torch.Tensor:
    """Return random pixel values (tiles, 3, S, S), on the device and in the type of a model."""
    size, generator = model.config.tile_size, torch.Generator(model.device).manual_seed(2)
    values = torch.empty(tiles, 3, size, size, device=model.device, dtype=model.dtype)
    return values.normal_(generator=generator)
