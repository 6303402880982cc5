"""Published weight names and ours: one table, used when a checkpoint is loaded on the fly, imported and exported.

Published: InternVL2, Mini-InternVL and Mini-Monkey (`vision_model`, `mlp1`, `language_model` with InternLM2, Qwen2, Phi3 or
Llama), and transformers' own InternVL (`InternVL3-1B-hf`). Ours are the names of transformers' modules.

Deals with tensors and names, not with files or models.
"""

import re
from typing import Any

import torch

from .transformers_bridge import Chunk, ConversionOps, WeightConverter, WeightRenaming


def _in_layer(layers: str, fragment: str) -> str:
    """Return a pattern for `fragment` right behind a layer number of `layers`, and nowhere else.

    A language model of another family may use the same words for other things. (Python wants lookbehinds of one width.)
    """
    numbers = (r"\d", r"\d\d", r"\d\d\d")
    return "(?:" + "|".join(f"(?<={layers}{number})" for number in numbers) + ")" + fragment


_TEXT_LAYERS = r"language_model\.model\.layers\."
_VISION_LAYERS = r"vision_model\.encoder\.layers\."

# (published, ours) behind the number of a layer, and at the beginning of a name.
_INTERNLM2_LAYER = (
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward_ve.w1.", ".visual_mlp.gate_proj."),  # the visual experts of Mono-InternVL
    (".feed_forward_ve.w3.", ".visual_mlp.up_proj."),
    (".feed_forward_ve.w2.", ".visual_mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)
_INTERNLM2 = (
    ("language_model.model.tok_embeddings.", "model.language_model.embed_tokens."),
    ("language_model.output.", "lm_head."),
)
_LANGUAGE = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
)
# transformers' InternVL as it is stored on the Hub; read only.
_NATIVE = (
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_PROJECTOR = (
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
)
_VISION_LAYER = (
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
_VISION = (
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    ("vision_model.encoder.layers.", "model.vision_tower.encoder.layer."),
)


def _in_layers(layers: str, names: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(_in_layer(layers, re.escape(published)), ours) for published, ours in names]


def _at_the_beginning(names: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [("^" + re.escape(published), ours) for published, ours in names]


# Applied in this order, each at most once to a name. Patterns are regular expressions, replacements plain text: the
# same pairs are given to transformers.
RENAMINGS: tuple[tuple[str, str], ...] = (
    *_in_layers(_TEXT_LAYERS, _INTERNLM2_LAYER),
    *_at_the_beginning((*_INTERNLM2, *_LANGUAGE, *_NATIVE, *_PROJECTOR)),
    *_in_layers(_VISION_LAYERS, _VISION_LAYER),
    *_at_the_beginning(_VISION),
)
FUSED_VISION_QKV = ".attn.qkv."
VISION_QKV = (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")
FUSED_TEXT_QKV = ".attention.wqkv."
TEXT_QKV = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")


def split_wqkv(wqkv: torch.Tensor, text_config) -> list[torch.Tensor]:
    """Split InternLM2's fused weight or bias into q, k and v.

    Its rows are grouped by key/value head: for each, all query heads that share it, then its key, then its value.

    Args:
        wqkv: ((heads + 2 * kv_heads) * head_dim, ...)
        text_config: Gives `num_attention_heads` and `num_key_value_heads`.

    Returns:
        q (heads * head_dim, ...), k and v (kv_heads * head_dim, ...)

    Raises:
        ValueError: The number of rows does not fit the heads.
    """
    kv_heads = text_config.num_key_value_heads
    queries_per_group = text_config.num_attention_heads // kv_heads
    if wqkv.shape[0] % (kv_heads * (queries_per_group + 2)):
        raise ValueError(
            f"A fused q, k, v of {wqkv.shape[0]} rows does not fit {text_config.num_attention_heads} heads and "
            f"{kv_heads} key/value heads."
        )
    grouped = wqkv.unflatten(0, (kv_heads, queries_per_group + 2, -1))
    parts = grouped.split([queries_per_group, 1, 1], dim=1)
    return [part.flatten(0, 2).contiguous() for part in parts]


def fuse_wqkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text_config) -> torch.Tensor:
    """Fuse q, k and v again, the reverse of `split_wqkv`."""
    kv_heads = text_config.num_key_value_heads
    head_dim = k.shape[0] // kv_heads
    return torch.cat([part.unflatten(0, (kv_heads, -1, head_dim)) for part in (q, k, v)], dim=1).flatten(0, 2)


class SplitFusedQKV(ConversionOps):
    """`split_wqkv` as an operation of transformers' weight loading."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns, config, **kwargs):
        (value,) = input_dict.values()
        wqkv = value[0] if isinstance(value, list) else value
        return dict(zip(target_patterns, split_wqkv(wqkv, config.get_text_config())))

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseQKV()


class FuseQKV(ConversionOps):
    """`fuse_wqkv` as an operation of transformers' weight loading."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns, config, **kwargs):
        q, k, v = (
            value[0] if isinstance(value, list) else value
            for value in (input_dict[pattern] for pattern in source_patterns)
        )
        return {target_patterns[0]: fuse_wqkv(q, k, v, config.get_text_config())}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitFusedQKV()


def weight_conversions() -> list:
    """Return the table as transformers wants it, for `register_checkpoint_conversion_mapping`."""
    conversions: list = [WeightRenaming(source, target) for source, target in RENAMINGS]
    for suffix in ("weight", "bias"):
        conversions.append(
            WeightConverter(
                re.escape(FUSED_VISION_QKV) + suffix,
                [name + suffix for name in VISION_QKV],
                operations=[Chunk(dim=0)],
            )
        )
        conversions.append(
            WeightConverter(
                re.escape(FUSED_TEXT_QKV) + suffix,
                [name + suffix for name in TEXT_QKV],
                operations=[SplitFusedQKV()],
            )
        )
    return conversions


def convert_tensor(name: str, tensor: torch.Tensor, text_config) -> dict[str, torch.Tensor]:
    """Convert one published tensor into the tensor or tensors of ours that it becomes; unknown names stay as they are.

    Works on meta tensors, so names and shapes can be checked before a byte is read.
    """
    for pattern, replacement in RENAMINGS:
        name = re.sub(pattern, replacement, name, count=1)
    if FUSED_TEXT_QKV in name:
        return {
            name.replace(FUSED_TEXT_QKV, part): piece for part, piece in zip(TEXT_QKV, split_wqkv(tensor, text_config))
        }
    if FUSED_VISION_QKV in name:
        return {
            name.replace(FUSED_VISION_QKV, part): piece.contiguous()
            for part, piece in zip(VISION_QKV, tensor.chunk(3, dim=0))
        }
    return {name: tensor}


def published_name(name: str, as_internlm2: bool) -> str:
    """Return the published name of one of our weights; q, k and v that are stored fused have one name.

    Args:
        as_internlm2: Whether a Llama is written with InternLM2's names and fused q, k, v.
    """
    beginnings = (*(_INTERNLM2 if as_internlm2 else ()), *_LANGUAGE, *_PROJECTOR, *_VISION)
    for published, ours in beginnings:
        if name.startswith(ours):
            name = published + name.removeprefix(ours)
            break
    layers = [(_VISION_LAYERS, _VISION_LAYER, VISION_QKV, FUSED_VISION_QKV)]
    layers += [(_TEXT_LAYERS, _INTERNLM2_LAYER, TEXT_QKV, FUSED_TEXT_QKV)] if as_internlm2 else []
    for layer, names, qkv, fused in layers:
        for published, ours in (*names, *((fused, part) for part in qkv)):
            name = re.sub(f"(^{layer}\\d+){re.escape(ours)}", rf"\g<1>{published}", name)
    return name


def published_tensor(name: str, parts: list[torch.Tensor], text_config) -> torch.Tensor:
    """Return the tensor of a published name, the reverse of `convert_tensor`: of one part, or of q, k and v to be fused."""
    if len(parts) == 1:
        return parts[0]
    return fuse_wqkv(*parts, text_config) if FUSED_TEXT_QKV in name else torch.cat(parts)
