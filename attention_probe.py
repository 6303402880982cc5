"""Queries and keys of one layer of a language model, as they enter its attention, for any decoder of transformers.

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


# Tokens that go through a feed-forward block at a time; whole prompts would need more memory here than the scores do.
CHUNK_TOKENS = 512
TOKENWISE_BLOCKS = ("mlp", "visual_mlp")

_PROBE = "minimonkey_probe"


class _Reached(Exception):  # noqa: N818 - it is not an error
    """Ends a pass whose remaining layers are not needed."""

    def __init__(self, inputs: AttentionInputs):
        self.inputs = inputs


class _InChunks(nn.Module):
    """A block that treats each token by itself, run on a few tokens at a time."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor):
        parts = hidden_states.split(CHUNK_TOKENS, dim=-2)
        first = self.block(parts[0])
        if not isinstance(first, torch.Tensor) or len(parts) == 1:  # some mixtures of experts also return router logits
            return first if len(parts) == 1 else self.block(hidden_states)
        return torch.cat([first, *(self.block(part) for part in parts[1:])], dim=-2)


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
    language_model: nn.Module, embeddings: torch.Tensor, layer: int, attention: str | None = None, **kwargs
) -> AttentionInputs:
    """Run one sequence through a language model, up to the attention of a layer.

    Args:
        language_model: A transformers decoder without its head.
        embeddings: (n, D)
        layer: Index of the layer.
        attention: The attention back end of the layers before, if not the one they have: that of an engine wants its caches.
        **kwargs: Other arguments of the language model.

    Raises:
        ValueError: The language model is not built as transformers' decoders usually are.
    """
    language_model = _uncompiled(language_model)
    layers = getattr(language_model, "layers", None)
    layers = None if layers is None else [_uncompiled(one) for one in layers[: layer + 1]]
    scoring = None if layers is None else _uncompiled(getattr(layers[layer], "self_attn", None))
    config = getattr(scoring, "config", None)
    if config is None:
        raise ValueError(
            f"Scale compression looks for layers[{layer}].self_attn with a configuration, which "
            f"{type(language_model).__name__} does not have; call with use_scm=False or choose another scm_layer."
        )
    scoring = _with_attention(scoring, _PROBE)
    scoring.receive_attention_inputs = _receive
    before = []
    for one in layers[:layer]:
        changed = {name: _InChunks(getattr(one, name)) for name in TOKENWISE_BLOCKS if hasattr(one, name)}
        if attention is not None:
            changed["self_attn"] = _with_attention(_uncompiled(one.self_attn), attention)
        before.append(_copy(one, **changed))
    # Dynamic rotary embeddings remember the longest sequence they saw; they must not remember this one.
    changed = {name: copy.deepcopy(child) for name, child in language_model.named_children() if "rotary" in name}
    changed["layers"] = nn.ModuleList([*before, _copy(layers[layer], self_attn=scoring)])
    beginning = (
        _copy(language_model, **changed) if attention is None else _with_attention(language_model, attention, **changed)
    )
    try:
        # Not called as a module, which an engine that compiles it has changed.
        beginning.forward(inputs_embeds=embeddings[None], use_cache=False, **kwargs)
    except _Reached as reached:
        _check_mask_is_known(reached.inputs, config, layer)
        return reached.inputs
    raise ValueError(
        f"{type(scoring).__name__} of {type(language_model).__name__} does not go through transformers' attention "
        "interface, where scale compression reads its queries and keys; call with use_scm=False."
    )


def _check_mask_is_known(inputs: AttentionInputs, config, layer: int) -> None:
    """Check that a back end which gets no mask hides nothing beyond what causality and the window hide."""
    kinds = getattr(config, "layer_types", None) or []
    kind = kinds[layer] if layer < len(kinds) else "full_attention"
    if inputs.mask is None and kind not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"Layer {layer} has {kind}, which scale compression can read only with attn_implementation 'eager' or 'sdpa'; "
            "choose one of them or another scm_layer."
        )
