"""A MiniMonkey's configuration in the published layout, the reverse of what configuration_minimonkey.py reads."""

from typing import Any

from minimonkey.configuration_minimonkey import MiniMonkeyConfig


ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi3": "Phi3ForCausalLM"}
VISION_NAMES = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "hidden_dropout_prob",
    "initializer_factor": "layer_scale_init_value",
}
VISION_FIELDS = (
    *(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "attention_dropout",
    ),
    *("initializer_range", "norm_type", "layer_norm_eps", "num_channels"),
)
OWN_FIELDS = ("image_token_id", "system_message", "scm_keep_ratio", "scm_layer", "scm_queries")  # others ignore them
CONFIG_CODE = "configuration_internvl_chat"


def published_config(config: MiniMonkeyConfig, as_internlm2: bool) -> dict[str, Any]:
    """Return `config.json` in the published layout.

    Args:
        as_internlm2: Whether a Llama is called InternLM2, see `checkpoint.published_name`.

    Raises:
        ValueError: A part that the layout cannot express.
    """
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": f"{CONFIG_CODE}.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": config.tile_size,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": config.pixel_shuffle_version,
        "select_layer": config.vision_feature_layer,
        "template": config.template,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": _dtype(config),
        "use_thumbnail": True,
        **{name: getattr(config, name) for name in OWN_FIELDS},
        "llm_config": _language_model(config, as_internlm2),
        "vision_config": _vision_tower(config),
    }


def _dtype(config) -> str:
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _language_model(config: MiniMonkeyConfig, as_internlm2: bool) -> dict[str, Any]:
    text = config.text_config
    if text.model_type not in ARCHITECTURES:
        raise ValueError(
            f"The published layout has no language model {text.model_type!r}; it has {', '.join(ARCHITECTURES)}."
        )
    if as_internlm2 and text.model_type != "llama":
        raise ValueError(f"Only a Llama can be written as InternLM2, not {text.model_type!r}; leave out --internlm2.")
    if config.visual_experts and not as_internlm2:
        raise ValueError("Visual experts (Mono-InternVL) have names in InternLM2 alone; add --internlm2.")
    fields = text.to_dict()
    rope = dict(fields.pop("rope_parameters", None) or {})
    for name in ("dtype", "architectures", "transformers_version", "_name_or_path", "layer_types"):
        fields.pop(name, None)
    fields |= {"architectures": [ARCHITECTURES[text.model_type]], "torch_dtype": _dtype(config)}
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.get("rope_type", "default")
    fields["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    if as_internlm2:
        name = "InternLM2VEForCausalLM" if config.visual_experts else "InternLM2ForCausalLM"
        fields |= {"architectures": [name], "model_type": "internlm2", "bias": fields["attention_bias"]}
    return fields


def _vision_tower(config: MiniMonkeyConfig) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b" if vision.num_hidden_layers else "intern_vit_patch",
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "drop_path_rate": 0.0,
        "use_flash_attn": False,
        "torch_dtype": _dtype(config),
        **{name: getattr(vision, name) for name in VISION_FIELDS},
        **{theirs: getattr(vision, ours) for theirs, ours in VISION_NAMES.items()},
    }
