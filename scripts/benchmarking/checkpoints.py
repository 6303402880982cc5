"""Checkpoints with random weights in the published format, to measure loading."""

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from minimonkey.checkpoint import fuse_wqkv


# From our names to the published ones; each is applied wherever it matches, in this order.
_LANGUAGE = (
    ("lm_head.", "language_model.output."),
    ("model.language_model.embed_tokens.", "language_model.model.tok_embeddings."),
    ("model.language_model.", "language_model.model."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)
_VISION = (
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("model.vision_tower.embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
    (".attention.projection_layer.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
)


def save_published(model: torch.nn.Module, folder: Path, shard_size: str = "3GB") -> None:
    """Save the weights of a model whose language model is a Llama, under InternLM2's names."""
    weights = {}
    state = model.state_dict()
    for name, tensor in state.items():
        parts = name.rsplit("q_proj.", 1)
        if len(parts) == 2:
            q, k, v = (state[f"{letter}_proj.".join(parts)] for letter in "qkv")
            is_text = ".self_attn." in name
            tensor = fuse_wqkv(q, k, v, model.config.text_config) if is_text else torch.cat([q, k, v])
            name = name.replace(".self_attn.q_proj.", ".attention.wqkv.").replace(".attention.q_proj.", ".attn.qkv.")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for ours, published in _VISION if "vision" in name or "projector" in name else _LANGUAGE:
            name = name.replace(ours, published)
        weights[name] = tensor
    save_torch_state_dict(weights, folder, max_shard_size=shard_size)


def published_config(model: torch.nn.Module) -> dict:
    """Return a `config.json` in the published format for a model whose language model is a Llama."""
    text, vision = model.config.text_config, model.config.vision_config
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
    names += ["vocab_size", "max_position_embeddings", "rms_norm_eps"]
    vision_names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    return {
        "model_type": "internvl_chat",
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "rope_theta": text.rope_parameters["rope_theta"],
            "tie_word_embeddings": False,
            **{name: getattr(text, name) for name in names},
        },
        "vision_config": {
            "model_type": "intern_vit_6b",
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            **{name: getattr(vision, name) for name in vision_names},
        },
        "ps_version": "v2",
        "template": "internlm2-chat",
        "force_image_size": model.config.tile_size,
    }
