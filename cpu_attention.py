"""Attention for CPUs, as a back end of transformers: attn_implementation="minimonkey_cpu".

torch's kernel multiplies in float32 where a processor has units for bfloat16 but no AMX, in float32 with a library that is
slow on AMD's, and one new token of a language model with fewer key heads than query heads takes it many times what the products
take. Here products are by themselves, a few hundred rows of queries at a time so that their scores stay in the processor's
cache. What this does not concern goes to "sdpa".
"""

import itertools

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .packed_weights import can_pack, multiply


CPU_ATTENTION = "minimonkey_cpu"
ROWS = 256  # of scores at a time, for each head of keys


def cpu_attention(module, query, key, value, attention_mask=None, scaling=None, is_causal=None, **options):
    """Attend as transformers' back ends do.

    Args:
        query: (B, H, M, D)
        key, value: (B, K, N, D) with H a multiple of K.
        attention_mask: (B, 1, M, N) or broadcastable to it, True or added; None: all keys, or by `is_causal`.

    Returns:
        (B, M, H, D), and None in the place of the weights.
    """
    rows, columns = query.shape[2], key.shape[2]
    causal = attention_mask is None and rows > 1 and (module.is_causal if is_causal is None else is_causal)
    fits = not causal or rows == columns
    if not fits or not _pays(query, rows) or not _is_plain(attention_mask, query, key, value, options):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if rows == 1:
        return _attend_one(query, key, value, attention_mask, scaling), None
    return _attend(query, key, value, attention_mask, scaling, causal), None


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, AttentionMaskInterface()["sdpa"])


def _pays(query: torch.Tensor, rows: int) -> bool:
    """Tell whether plain products are faster than torch's kernel."""
    if query.device.type != "cpu":
        return False
    if query.dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and (rows == 1 or not torch.cpu._is_amx_tile_supported())
    return query.dtype == torch.float32 and (rows == 1 or can_pack(query.dtype))


def _is_plain(mask, query, key, value, options) -> bool:
    """Tell whether nothing but a mask is wanted, and no gradients, which would keep all scores."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or (mask is not None and mask.shape[1] != 1):
        return False
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")) or options.get("dropout"):
        return False
    return not torch.is_grad_enabled() or not any(states.requires_grad for states in (query, key, value))


def _attend_one(query, key, value, mask, scaling: float) -> torch.Tensor:
    """Return the attended values (B, 1, H, D) of one query a row; the heads that share a key head are rows of one product."""
    queries = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    scores = (queries @ key.transpose(2, 3)).mul_(scaling)
    if mask is not None:
        _apply(mask, scores)
    return (scores.softmax(-1) @ value).flatten(1, 2)[:, None]


def _attend(query, key, value, mask, scaling: float, causal: bool) -> torch.Tensor:
    """Return the attended values (B, M, H, D); the queries of the heads that share a key head are rows of one product."""
    batch, heads, rows, width = query.shape
    key_heads, group = key.shape[1], heads // key.shape[1]
    attended = query.new_empty(batch, rows, heads, width)
    key, value = key.contiguous(), value.contiguous()  # oneDNN is slow with rows that are far apart
    step = max(1, ROWS // group)
    # A product of several heads has work for as many threads; oneDNN's in float32 is of one.
    together = 1 if query.dtype == torch.float32 else min(key_heads, torch.get_num_threads())
    for number, first, start in _parts((batch, 1), (key_heads, together), (rows, step)):
        count, end = min(together, key_heads - first), min(start + step, rows)
        seen = end if causal else key.shape[2]
        own = slice(first * group, (first + count) * group)
        queries = query[number, own, start:end].reshape(count, -1, width).contiguous()
        scores = _product(queries, key[number, first : first + count, :seen])
        scores = scores.mul_(scaling).view(count, group, end - start, seen)
        if causal:
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(future, torch.finfo(scores.dtype).min)
        elif mask is not None:
            _apply(mask[number % len(mask), :, start:end], scores)
        weights = scores.view(count, -1, seen).softmax(-1)
        values = _product(weights, value[number, first : first + count, :seen].transpose(1, 2))
        values = values.view(count * group, end - start, -1)
        attended[number, start:end, own] = values.transpose(0, 1)
    return attended


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (K, M, I) times (K, O, I) transposed: (K, M, O)."""
    if left.dtype == torch.float32:
        return multiply(left[0], right[0])[None]
    return left @ right.transpose(1, 2)


def _parts(*sizes_and_steps: tuple[int, int]):
    """Yield where each part begins, in all dimensions."""
    return itertools.product(*(range(0, size, step) for size, step in sizes_and_steps))


def _apply(mask: torch.Tensor, scores: torch.Tensor) -> None:
    """Hide scores (..., M, N) by a mask that broadcasts to them; a row that sees nothing gets equal weights, not NaN."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        scores.add_(mask).clamp_(min=torch.finfo(scores.dtype).min)
