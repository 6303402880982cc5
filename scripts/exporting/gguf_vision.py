"""The vision tower and projector as llama.cpp's `--mmproj` reads them, for people who run llama.cpp by itself.

llama.cpp cuts one grid of tiles by a rule of its own: no MSAC, no SCM. Deals with configurations and tensors, not with files.
"""

import re

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
NAMES = {
    r"model\.vision_tower\.embeddings\.cls_token": "v.class_embd",
    r"model\.vision_tower\.embeddings\.position_embeddings": "v.position_embd.weight",
    r"model\.vision_tower\.embeddings\.patch_embeddings\.projection\.(weight|bias)": r"v.patch_embd.\1",
    r"model\.multi_modal_projector\.layer_norm\.(weight|bias)": r"mm.model.mlp.0.\1",
    r"model\.multi_modal_projector\.linear_1\.(weight|bias)": r"mm.model.mlp.1.\1",
    r"model\.multi_modal_projector\.linear_2\.(weight|bias)": r"mm.model.mlp.3.\1",
}
LAYER_NAMES = {
    r"attention\.q_proj\.(weight|bias)": r"attn_q.\1",
    r"attention\.k_proj\.(weight|bias)": r"attn_k.\1",
    r"attention\.v_proj\.(weight|bias)": r"attn_v.\1",
    r"attention\.q_norm\.weight": "attn_q_norm.weight",
    r"attention\.k_norm\.weight": "attn_k_norm.weight",
    r"attention\.projection_layer\.(weight|bias)": r"attn_out.\1",
    r"layernorm_before\.(weight|bias)": r"ln1.\1",
    r"layernorm_after\.(weight|bias)": r"ln2.\1",
    r"mlp\.fc1\.(weight|bias)": r"ffn_up.\1",
    r"mlp\.fc2\.(weight|bias)": r"ffn_down.\1",
    r"lambda_1": "ls1.weight",
    r"lambda_2": "ls2.weight",
}
# The one size of tower that llama.cpp computes with RMS norms: InternViT-6B.
RMS_SIZE = (3200, 45)
DEFAULT_TILES = (1, 12)


def check_vision(config) -> None:
    """Raise `ValueError` for a vision tower that llama.cpp would not compute as it is computed here.

    Args:
        config: A `MiniMonkeyConfig`.
    """
    vision = config.vision_config
    size = (vision.hidden_size, vision.num_hidden_layers)
    wrong = [
        (not vision.num_hidden_layers, "has no layers (Mono-InternVL)"),
        (config.vision_feature_layer != -1, f"gives features of layer {config.vision_feature_layer}, not of the last"),
        (config.projector != "mlp" or config.mining, "has another projector than a perceptron of two layers"),
        (config.vision_share_layers > 1, "has layers that share their weights"),
        (config.pixel_shuffle_version != "v2", f"has pixel shuffle {config.pixel_shuffle_version}, not v2"),
        (vision.hidden_act not in ("gelu", "silu"), f"has the activation {vision.hidden_act}, not gelu or silu"),
        (config.projector_hidden_act != "gelu", f"has a projector with {config.projector_hidden_act}, not gelu"),
        (
            (vision.norm_type == "rms_norm") != (size == RMS_SIZE),
            f"has {vision.norm_type} at {size[0]} dimensions and {size[1]} layers, where llama.cpp has the other norm",
        ),
        (vision.image_size[0] != config.tile_size, f"has tiles of {config.tile_size} and a tower of another size"),
    ]
    reasons = [reason for is_wrong, reason in wrong if is_wrong]
    if reasons:
        raise ValueError(f"llama.cpp's own image reader cannot have this vision part: it {'; it '.join(reasons)}.")


def write_vision_settings(writer, config) -> None:
    """Write what llama.cpp needs to know of a vision tower into a `gguf.GGUFWriter`."""
    vision = config.vision_config
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("internvl")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_patch_size(vision.patch_size[0])
    writer.add_vision_image_size(vision.image_size[0])
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(IMAGENET_DEFAULT_MEAN))
    writer.add_vision_image_std(list(IMAGENET_DEFAULT_STD))
    getattr(writer, f"add_vision_use_{vision.hidden_act}")(True)
    writer.add_vision_projector_scale_factor(round(1 / config.downsample_ratio))
    least, most = DEFAULT_TILES
    writer.add_vision_preproc_min_tiles(least)
    writer.add_vision_preproc_max_tiles(most)


def vision_name(name: str) -> str | None:
    """Return GGUF's name for one of our weights, None for what is no part of tower or projector.

    Raises:
        ValueError: A weight of them that GGUF has no name for.
    """
    if not name.startswith((TOWER, PROJECTOR)):
        return None
    for ours, theirs in NAMES.items():
        if re.fullmatch(ours, name):
            return re.sub(ours, theirs, name)
    layer = re.fullmatch(r"model\.vision_tower\.encoder\.layer\.(\d+)\.(.+)", name)
    for ours, theirs in LAYER_NAMES.items():
        if layer and re.fullmatch(ours, layer[2]):
            return f"v.blk.{layer[1]}." + re.sub(ours, theirs, layer[2])
    raise ValueError(f"llama.cpp has no name for {name} of the vision part.")


def for_clip(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight as llama.cpp reads it: it puts the class token behind the patches.

    Args:
        name: GGUF's.
    """
    if name == "v.class_embd":
        return tensor.flatten()
    if name == "v.position_embd.weight":
        return tensor[0].roll(-1, dims=0)  # (1, 1 + patches, D) to (patches + 1, D)
    return tensor
