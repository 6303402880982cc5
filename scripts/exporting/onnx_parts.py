"""The parts of a MiniMonkey as modules of tensors alone, which torch can write as ONNX, with the names that programs expect.

Shapes: T tiles, S tile size in pixels, K tokens a tile, D width, n new tokens, p tokens before them, H heads, G key/value
heads, d head width.
"""

import copy

import torch
from torch import nn
from torch.export import Dim
from transformers import AttentionInterface, DynamicCache

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.transformers_bridge import CACHE_NAME


VISION, EMBEDDING, DECODER, SCORER = "vision_encoder", "embed_tokens", "decoder_model", "scorer"
LANGUAGE_MODELS = ("llama", "qwen2", "phi3")
_CAPTURE = "minimonkey_capture"


class VisionEncoder(nn.Module):
    """Vision tower and projector: `pixel_values` (T, 3, S, S) to `image_features` (T, K, D)."""

    def __init__(self, model: MiniMonkeyForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


class Decoder(nn.Module):
    """The language model with its cache.

    Takes `inputs_embeds` (1, n, D), `position_ids` (1, n), `logits_of` (m,) (which of the n tokens are to have logits), and a
    key and a value (1, G, p, d) for each layer. Gives `logits` (1, m, vocabulary), and keys and values (1, G, p + n, d).
    """

    def __init__(self, model: MiniMonkeyForConditionalGeneration):
        super().__init__()
        self.language_model, self.head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds, position_ids, logits_of, past: list[torch.Tensor]):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        count, before = inputs_embeds.shape[1], past[0].shape[2]
        keys = torch.arange(before + count, device=inputs_embeds.device)
        is_seen = keys[None] <= keys[before:, None]
        hidden = torch.finfo(inputs_embeds.dtype).min
        mask = torch.zeros_like(is_seen, dtype=inputs_embeds.dtype).masked_fill(~is_seen, hidden)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=mask[None, None],
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        logits = self.head(output.last_hidden_state[:, logits_of])
        return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _capture(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **_):
    module.captured.append((query[0], key[0]))
    return query.transpose(1, 2), None  # what follows in the layer is not used


AttentionInterface.register(_CAPTURE, _capture)


class Scorer(nn.Module):
    """What scale compression scores by: `inputs_embeds` (1, n, D) to the queries (H, n, d) and keys (G, n, d) of one layer."""

    def __init__(self, model: MiniMonkeyForConditionalGeneration):
        super().__init__()
        layer = model.config.scm_layer
        language_model = copy.copy(model.model.language_model)
        last = copy.copy(language_model.layers[layer])
        attention = copy.copy(last.self_attn)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = _CAPTURE
        attention.captured = self.captured = []
        last._modules = {**last._modules, "self_attn": attention}
        layers = nn.ModuleList([*language_model.layers[:layer], last])
        language_model._modules = {**language_model._modules, "layers": layers}
        self.language_model, self.scaling = language_model, float(attention.scaling)

    def forward(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.captured.clear()
        places = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        is_seen = places[None] <= places[:, None]
        hidden = torch.finfo(inputs_embeds.dtype).min
        mask = torch.zeros_like(is_seen, dtype=inputs_embeds.dtype).masked_fill(~is_seen, hidden)
        self.language_model(
            inputs_embeds=inputs_embeds, position_ids=places[None], attention_mask=mask[None, None], use_cache=False
        )
        return self.captured.pop()


def check_onnx(config) -> None:
    """Raise `ValueError` for a model whose language model these parts would not compute.

    Args:
        config: A `MiniMonkeyConfig`.
    """
    text = config.text_config
    if text.model_type not in LANGUAGE_MODELS or config.visual_experts:
        raise ValueError(
            f"A language model {text.model_type!r}{' with visual experts' if config.visual_experts else ''} is not written as "
            f"ONNX; {', '.join(LANGUAGE_MODELS)} are."
        )
    if config.projector != "mlp" or config.mining:
        raise ValueError(
            "Of projectors the perceptron of two layers is written as ONNX, no resampler and no patch mining."
        )
    kinds = {*(getattr(text, "layer_types", None) or []), "full_attention"}
    if getattr(text, "use_sliding_window", False) or kinds != {"full_attention"}:
        raise ValueError("A language model whose layers see a window of the tokens is not written as ONNX.")


def with_fixed_positions(model: MiniMonkeyForConditionalGeneration) -> MiniMonkeyForConditionalGeneration:
    """Let rotary angles no longer change with the prompt's length, in place; up to `cacheable_length` they do not anyway."""
    rotary = model.model.language_model.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope"):
        rotary.rope_type = "default"
    return model


def cache_names(layers: int, prefix: str) -> list[str]:
    """Return the names of the keys and values of all layers, as other exporters call them."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def parts(model: MiniMonkeyForConditionalGeneration) -> dict[str, tuple]:
    """Return for each part its module, example inputs, the names of inputs and outputs, and which dimensions may change."""
    config, text = model.config, model.config.text_config
    size, dtype, free = config.tile_size, model.dtype, Dim.DYNAMIC
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = text.num_hidden_layers
    past = [torch.zeros(1, text.num_key_value_heads, 4, width, dtype=dtype) for _ in range(2 * layers)]
    embeddings = torch.zeros(1, 5, text.hidden_size, dtype=dtype)
    positions = torch.arange(4, 9)[None]
    return {
        VISION: (
            VisionEncoder(model),
            (torch.zeros(2, config.vision_config.num_channels, size, size, dtype=dtype),),
            (["pixel_values"], ["image_features"]),
            ({0: free},),
        ),
        EMBEDDING: (
            model.get_input_embeddings(),
            (torch.zeros(1, 5, dtype=torch.long),),
            (["input_ids"], ["inputs_embeds"]),
            ({1: free},),
        ),
        DECODER: (
            Decoder(model),
            (embeddings, positions, torch.arange(3), past),
            (
                ["inputs_embeds", "position_ids", "logits_of", *cache_names(layers, "past_key_values")],
                ["logits", *cache_names(layers, "present")],
            ),
            ({1: free}, {1: free}, {0: free}, [{2: free} for _ in past]),
        ),
        SCORER: (Scorer(model), (embeddings,), (["inputs_embeds"], ["query", "key"]), ({1: free},)),
    }
