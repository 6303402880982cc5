"""Attention for CPUs, as a back end of transformers: attn_implementation="minimonkey_cpu".

torch's kernel multiplies in float32 where a processor has units for bfloat16 but no AMX, in float32 with a library that is
slow on AMD's, and one new token of a language model with fewer key heads than query heads takes it many times what the products
take. Here products are by themselves, a few hundred rows of queries at a time so that their scores stay in the processor's
cache. In bfloat16 scores are rounded to it, as in "eager". What this does not concern goes to "sdpa".
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .packed_weights import can_pack, multiply


CPU_ATTENTION = "minimonkey_cpu"
ROWS = 256  # of scores at a time, for each head of keys
FEW_SCORES = 2**16  # of a product; fewer take torch's kernel less time


def cpu_attention(module, query, key, value, attention_mask=None, scaling=None, is_causal=None, **options):
    """Attend as transformers' back ends do.

    Args:
        query: (B, H, M, D)
        key, value: (B, K, N, D) with H a multiple of K.
        attention_mask: (B, 1, M, N) or broadcastable to it, True or added; None: all keys, or by `is_causal`.

    Returns:
        (B, M, H, D), and None in the place of the weights.

    Raises:
        ValueError: The model chooses keys for each query by itself.
    """
    if options.get("indices") is not None:
        raise ValueError(
            f"{CPU_ATTENTION} attends to all keys; this model chooses some: take attn_implementation='sdpa'."
        )
    rows = query.shape[2]
    causal = attention_mask is None and rows > 1
    causal = causal and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    is_plain = _is_plain(attention_mask, query, key, value, options) and (not causal or rows == key.shape[2])
    if not is_plain or not _pays(query, key):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if rows == 1:
        return _attend_one(query, key, value, attention_mask, scaling), None
    return _attend(query, key, value, attention_mask, scaling, causal), None


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, AttentionMaskInterface()["sdpa"])


def _is_plain(mask, query, key, value, options) -> bool:
    """Tell whether nothing but a mask is wanted, and no gradients, which would keep all scores."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1):
        return False
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")) or options.get("dropout"):
        return False
    return not torch.is_grad_enabled() or not any(states.requires_grad for states in (query, key, value))


def _pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Tell whether plain products are faster than torch's kernel."""
    if query.device.type != "cpu":
        return False
    has_units = torch.cpu._is_avx512_bf16_supported()
    rows = query.shape[2]
    if rows == 1:
        return query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and has_units)
    if rows * key.shape[2] * query.shape[1] // key.shape[1] < FEW_SCORES:
        return False
    if query.dtype == torch.bfloat16:
        return has_units and not torch.cpu._is_amx_tile_supported()
    return query.dtype == torch.float32 and can_pack(query.dtype)


def _attend_one(query, key, value, mask, scaling: float) -> torch.Tensor:
    """Return the attended values (B, 1, H, D) of one query a row; the heads that share a key head are rows of one product."""
    queries = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    scores = (queries @ key.transpose(2, 3)).mul_(scaling)
    if mask is not None:
        _apply(mask, scores)
    return (scores.softmax(-1) @ value).flatten(1, 2)[:, None]


def _attend(query, key, value, mask, scaling: float, causal: bool) -> torch.Tensor:
    """Return the attended values (B, M, H, D); the queries of the heads that share a key head are rows of one product."""
    batch, heads, rows, _ = query.shape
    key_heads, group = key.shape[1], heads // key.shape[1]
    attended = query.new_empty(batch, rows, heads, value.shape[3])
    key, value = key.contiguous(), value.contiguous()
    mask = None if mask is None else mask.expand(batch, 1, rows, -1)
    step = max(1, ROWS // group)
    # A product of several heads has work for as many threads; oneDNN's in float32 is of one.
    together = 1 if query.dtype == torch.float32 else min(key_heads, torch.get_num_threads())
    for start in range(0, rows, step):
        end = min(start + step, rows)
        seen = end if causal else key.shape[2]
        visible = _visible(end - start, query.device) if causal else None
        for number in range(batch):
            for first in range(0, key_heads, together):
                some = slice(first, min(first + together, key_heads))
                own = slice(some.start * group, some.stop * group)
                scores = _product(_rows(query[number, own, start:end], group), key[number, some, :seen]).mul_(scaling)
                of_heads = scores.unflatten(1, (group, end - start))
                if causal:
                    _apply(visible, of_heads[..., start:])
                elif mask is not None:
                    _apply(mask[number, :, start:end], of_heads)
                values = _product(scores.softmax(-1), value[number, some, :seen].transpose(1, 2))
                attended[number, start:end, own] = values.view(-1, end - start, value.shape[3]).transpose(0, 1)
    return attended


def _rows(query: torch.Tensor, group: int) -> torch.Tensor:
    """Return queries (K G, M, D) as rows (K, G M, D), which lie together."""
    return query.unflatten(0, (-1, group)).flatten(1, 2).contiguous()


def _visible(rows: int, device: torch.device) -> torch.Tensor:
    """Return which of as many keys each of the last rows may see."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (K, M, I) times (K, O, I) transposed: (K, M, O)."""
    if left.dtype == torch.float32:
        return multiply(left[0], right[0])[None]
    return left @ right.transpose(1, 2)


def _apply(mask: torch.Tensor, scores: torch.Tensor) -> None:
    """Hide scores (..., M, N) by a mask that broadcasts to them; a row that sees nothing gets equal weights, not NaN."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        scores.add_(mask).clamp_(min=torch.finfo(scores.dtype).min)
