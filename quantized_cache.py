"""Keys and values of earlier tokens in 8 bits, as BlueLM-V-3B (arXiv 2411.10640) keeps them.

    model.config.kv_cache_dtype = "int8"        chat and generate then use this cache; a config.json may say it too

Each head's key and value of a token has a scale of its own, so that what is stored never changes afterwards: a cache can be
cropped, repeated, selected from and appended to like any other, and it does not matter in which pieces a prompt was read.
transformers' `QuantizedCache` cannot be cropped, and needs a package whose 8-bit form wants a GPU.
"""

import torch
from transformers import Cache, DynamicCache, DynamicLayer


SCALE_BYTES = 4  # of float32, behind the numbers


def to_int8(states: torch.Tensor) -> torch.Tensor:
    """Return states (..., width) as int8 (..., width + 4): whole numbers from -127 to 127, then their scale's bytes."""
    states = states.float()
    scale = (states.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (states / scale).round().to(torch.int8)
    return torch.cat([numbers, scale.contiguous().view(torch.int8)], dim=-1)


def from_int8(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what `to_int8` stored (..., width + 4) as states (..., width)."""
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return stored[..., :-SCALE_BYTES].to(dtype) * scale.to(dtype)


class Int8Layer(DynamicLayer):
    """The keys and values of a layer: int8 tensors (B, heads, N, width + 4)."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note type and device of the states that come; see transformers' `DynamicLayer`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], 0, states.shape[3] + SCALE_BYTES), dtype=torch.int8)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append states (B, heads, n, width); return all of them as they are remembered, in their type."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, to_int8(key_states)], dim=-2)
        self.values = torch.cat([self.values, to_int8(value_states)], dim=-2)
        return self.states()

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values (B, heads, N, width)."""
        return from_int8(self.keys, self.dtype), from_int8(self.values, self.dtype)


def empty_cache(config) -> Cache:
    """Return an empty cache of the type that a MiniMonkey's configuration names.

    Raises:
        ValueError: Its language model has layers that remember something else than all keys and values.
    """
    text_config = config.get_text_config(decoder=True)
    if config.kv_cache_dtype is None:
        return DynamicCache(config=text_config)
    others = {*(getattr(text_config, "layer_types", None) or ["full_attention"])} - {"full_attention"}
    if others:
        raise ValueError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} is for layers with full attention, not {', '.join(sorted(others))}; "
            "leave it None."
        )
    return Cache(layer_class_to_replicate=Int8Layer)
