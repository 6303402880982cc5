"""Parts of a language model, for any decoder of transformers: queries and keys of one layer as they enter its attention, and
a pass from one layer on with fewer tokens.

The layers before run as they are, with the attention back end they have. Of the requested layer only what comes before its
attention runs: its norm, projections and rotations. The language model itself is not touched: the pass is made
on shallow copies that share its weights, so other threads can use the model meanwhile.

    inputs = attention_inputs(model.model.language_model, embeddings, layer=1)
"""

import copy
from functools import partial
from types import MethodType

import torch
from torch import nn
from transformers import AttentionInterface

from .compression import AttentionInputs
from .transformers_bridge import CACHE_NAME


# Tokens that go through a feed-forward block at a time; whole prompts would need more memory here than the scores do.
CHUNK_TOKENS = 512
TOKENWISE_BLOCKS = ("mlp", "visual_mlp")

_PROBE = "minimonkey_probe"


class _Shortened(nn.Module):
    """A layer that reads only some of the tokens, the first of its kind out of all of them."""

    def __init__(self, layer: nn.Module, kept: torch.Tensor, keys: torch.Tensor, is_first: bool):
        super().__init__()
        self.layer, self.kept, self.keys, self.is_first = layer, kept, keys, is_first

    def forward(self, hidden_states, *args, attention_mask=None, position_ids=None, position_embeddings=None, **kwargs):
        if isinstance(attention_mask, torch.Tensor):
            attention_mask = attention_mask[..., self.kept, :][..., self.keys]
        if kwargs.get("visual_token_mask") is not None:
            kwargs["visual_token_mask"] = kwargs["visual_token_mask"][:, self.kept]
        return self.layer(
            hidden_states[:, self.kept] if self.is_first else hidden_states,
            *args,
            attention_mask=attention_mask,
            position_ids=position_ids[:, self.kept],
            position_embeddings=tuple(angles[:, self.kept] for angles in position_embeddings),
            **kwargs,
        )


class _Reached(Exception):  # noqa: N818 - it is not an error
    """Ends a pass whose remaining layers are not needed; its argument are the `AttentionInputs`."""


def _in_chunks(block: nn.Module, hidden_states: torch.Tensor):
    """Run a block that treats each token by itself on a few tokens at a time."""
    parts = hidden_states.split(CHUNK_TOKENS, dim=-2)
    first = block(parts[0])
    if not isinstance(first, torch.Tensor) or len(parts) == 1:  # some mixtures of experts also return router logits
        return first if len(parts) == 1 else block(hidden_states)
    return torch.cat([first, *(block(part) for part in parts[1:])], dim=-2)


def _hand_over(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value, attention_mask, **options):
    # Stateless, since the name is registered once for all copies of this file that a process may have loaded.
    module.receive_attention_inputs(query, key, attention_mask, **options)


AttentionInterface.register(_PROBE, _hand_over)


def _receive(query, key, attention_mask, scaling, softcap=None, sliding_window=None, s_aux=None, **_):
    mask = attention_mask[0] if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 else None
    raise _Reached(AttentionInputs(query[0], key[0], scaling, softcap, sliding_window, s_aux, mask))


def _uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, which can be copied in parts; return any other as it is."""
    return getattr(module, "_orig_mod", module)


def _copy(module: nn.Module, **children: nn.Module) -> nn.Module:
    """Return a copy that shares weights and children with `module`, except for the children that are given."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    forward = vars(module).get("forward")
    if getattr(forward, "__self__", None) is module:  # put there by an engine that fused parts of it, for the original
        copied.forward = MethodType(forward.__func__, copied)
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        # accelerate's, which moves weights and inputs; the `forward` that it made is bound to the original.
        copied.forward = partial(_hooked_forward, copied, hook)
    return copied


def _with_attention(module: nn.Module, attention: str, **children: nn.Module) -> nn.Module:
    """Return a copy, see `_copy`, that uses this attention back end."""
    copied = _copy(module, **children)
    copied.config = copy.copy(module.config)
    copied.config._attn_implementation = attention
    return copied


def _hooked_forward(module: nn.Module, hook, *args, **kwargs):
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        output = type(module).forward(module, *args, **kwargs)
    except _Reached:
        hook.post_forward(module, None)
        raise
    return hook.post_forward(module, output)


def attention_inputs(
    language_model: nn.Module, embeddings: torch.Tensor, layer: int, back_end: str | None = None, **kwargs
) -> AttentionInputs:
    """Run one sequence through a language model, up to the attention of a layer.

    Args:
        language_model: A transformers decoder without its head.
        embeddings: (n, D)
        layer: Index of the layer.
        back_end: The attention of the layers before, if not the one they have: that of an engine wants its caches.
        **kwargs: Other arguments of the language model.

    Raises:
        ValueError: The language model is not built as transformers' decoders usually are.
    """
    language_model = _uncompiled(language_model)
    layers = [_uncompiled(one) for one in getattr(language_model, "layers", [])[: layer + 1]]
    attention = _uncompiled(getattr(layers[layer], "self_attn", None)) if layers else None
    config = getattr(attention, "config", None)
    if config is None:
        raise ValueError(
            f"Scale compression looks for layers[{layer}].self_attn with a configuration, which "
            f"{type(language_model).__name__} does not have; call with use_scm=False or choose another scm_layer."
        )
    attention = _with_attention(attention, _PROBE)
    attention.receive_attention_inputs = _receive
    before = []
    for one in layers[:layer]:
        blocks = {name: nn.Module() for name in TOKENWISE_BLOCKS if hasattr(one, name)}
        for name, block in blocks.items():
            block.forward = partial(_in_chunks, getattr(one, name))
        if back_end is not None:
            blocks["self_attn"] = _with_attention(_uncompiled(one.self_attn), back_end)
        before.append(_copy(one, **blocks))
    # Dynamic rotary embeddings remember the longest sequence they saw; they must not remember this one.
    parts = {name: copy.deepcopy(child) for name, child in language_model.named_children() if "rotary" in name}
    parts["layers"] = nn.ModuleList([*before, _copy(layers[layer], self_attn=attention)])
    beginning = (
        _copy(language_model, **parts) if back_end is None else _with_attention(language_model, back_end, **parts)
    )
    try:
        # Not called as a module, which an engine that compiles it has changed.
        beginning.forward(inputs_embeds=embeddings[None], use_cache=False, **kwargs)
    except _Reached as reached:
        (inputs,) = reached.args
    else:
        raise ValueError(
            f"{type(attention).__name__} of {type(language_model).__name__} does not go through transformers' attention "
            "interface, where scale compression reads its queries and keys; call with use_scm=False."
        )
    kinds = getattr(config, "layer_types", None) or []
    kind = kinds[layer] if layer < len(kinds) else "full_attention"
    # A back end that gets no mask must hide nothing beyond what causality and the window hide.
    if inputs.mask is None and kind not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"Layer {layer} has {kind}, which scale compression can read only with attn_implementation 'eager' or 'sdpa'; "
            "choose one of them or another scm_layer."
        )
    return inputs


def rotary_means(language_model: nn.Module, tokens: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cosine and the mean sine (n,) of the rotary angles of the first `tokens` positions.

    Raises:
        ValueError: The language model has no rotary angles, or those of several kinds of layers.
    """
    rotary = getattr(_uncompiled(language_model), "rotary_emb", None)
    try:
        cosines, sines = copy.deepcopy(rotary)(like[:1, None], torch.arange(tokens, device=like.device)[None])
    except TypeError as error:
        raise ValueError(
            f"{type(language_model).__name__} has no rotary angles that are the same in every layer, which scm_select with "
            "coordinates needs; leave them out."
        ) from error
    return cosines[0].float().mean(dim=-1), sines[0].float().mean(dim=-1)


def read_dropping(
    language_model: nn.Module, embeddings: torch.Tensor, start: int, layer: int, kept: torch.Tensor, cache, **kwargs
) -> None:
    """Read tokens on top of a cache, all of them in the layers before `layer`, in it and after it only those that are kept.

    Args:
        embeddings: (n, D)
        start: The position of the first of them; those of the others follow.
        kept: (m,) ascending indices of those that stay; afterwards `cache` holds only them, in every layer.
        cache: A `DynamicCache`; it is changed.

    Raises:
        ValueError: The language model is not built as transformers' decoders usually are.
    """
    language_model = _uncompiled(language_model)
    layers = [_uncompiled(one) for one in getattr(language_model, "layers", [])]
    if not layers or not hasattr(layers[0], "self_attn"):
        raise ValueError(
            f"{type(language_model).__name__} has no layers that can be read one by one, which scm_select with "
            "stage='layer' needs; leave it out."
        )
    past, kept = cache.get_seq_length(), kept.to(embeddings.device)
    remaining = torch.cat([torch.arange(past, device=kept.device), past + kept])
    shortened = [_Shortened(one, kept, remaining, i == 0) for i, one in enumerate(layers[layer:])]
    positions = torch.arange(start, start + len(embeddings), device=embeddings.device)[None]
    shorter = _copy(language_model, layers=nn.ModuleList([*layers[:layer], *shortened]))
    options = {CACHE_NAME: cache, "use_cache": True, "position_ids": positions, **kwargs}
    shorter(inputs_embeds=embeddings[None], **options)
    for one in cache.layers[:layer]:
        one.keys, one.values = one.keys[:, :, remaining], one.values[:, :, remaining]
