"""Queries and keys of one layer of a language model, as they enter its attention, for any decoder of transformers.

The layers before run as they are, with the attention back end they have. Of the requested layer only what comes before its
attention runs: its norm, projections and rotations. The language model itself is not touched: the pass is made
on shallow copies that share its weights, so other threads can use the model meanwhile.

    inputs = attention_inputs(model.model.language_model, embeddings, layer=1)
"""

import copy
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface

from .compression import AttentionInputs


# Tokens that go through a feed-forward block at a time; whole prompts would need more memory here than the scores do.
CHUNK_TOKENS = 512
TOKENWISE_BLOCKS = ("mlp", "visual_mlp")

_PROBE = "minimonkey_probe"


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


def _copy(module: nn.Module, **children: nn.Module) -> nn.Module:
    """Return a copy that shares weights and children with `module`, except for the children that are given."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        # accelerate's, which moves weights and inputs; the `forward` that it made is bound to the original.
        copied.forward = partial(_hooked_forward, copied, hook)
    return copied


def _hooked_forward(module: nn.Module, hook, *args, **kwargs):
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        output = type(module).forward(module, *args, **kwargs)
    except _Reached:
        hook.post_forward(module, None)
        raise
    return hook.post_forward(module, output)


def attention_inputs(language_model: nn.Module, embeddings: torch.Tensor, layer: int, **kwargs) -> AttentionInputs:
    """Run one sequence through a language model, up to the attention of a layer.

    Args:
        language_model: A transformers decoder without its head.
        embeddings: (n, D)
        layer: Index of the layer.
        **kwargs: Other arguments of the language model.

    Raises:
        ValueError: The language model is not built as transformers' decoders usually are.
    """
    # torch.compile wraps modules, which can be copied in parts only without it.
    language_model = getattr(language_model, "_orig_mod", language_model)
    layers = [getattr(one, "_orig_mod", one) for one in getattr(language_model, "layers", [])[: layer + 1]]
    attention = getattr(layers[layer], "self_attn", None) if layers else None
    attention = getattr(attention, "_orig_mod", attention)
    config = getattr(attention, "config", None)
    if config is None:
        raise ValueError(
            f"Scale compression looks for layers[{layer}].self_attn with a configuration, which "
            f"{type(language_model).__name__} does not have; call with use_scm=False or choose another scm_layer."
        )
    attention = _copy(attention)
    attention.config = copy.copy(config)
    attention.config._attn_implementation = _PROBE
    attention.receive_attention_inputs = _receive
    before = []
    for one in layers[:layer]:
        blocks = {name: nn.Module() for name in TOKENWISE_BLOCKS if hasattr(one, name)}
        for name, block in blocks.items():
            block.forward = partial(_in_chunks, getattr(one, name))
        before.append(_copy(one, **blocks))
    beginning = nn.ModuleList([*before, _copy(layers[layer], self_attn=attention)])
    # Dynamic rotary embeddings remember the longest sequence they saw; they must not remember this one.
    rotary = {name: copy.deepcopy(child) for name, child in language_model.named_children() if "rotary" in name}
    try:
        _copy(language_model, layers=beginning, **rotary)(inputs_embeds=embeddings[None], use_cache=False, **kwargs)
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
