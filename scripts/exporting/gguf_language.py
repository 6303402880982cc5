"""A MiniMonkey's language model as llama.cpp knows it: its settings, and its weights under GGUF's names.

Deals with configurations and tensors, not with files.
"""

import copy

import torch
from transformers import AutoModel


# model_type: GGUF's architecture. InternLM2 is a Llama here, so it is written as one.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "phi3": "phi3"}
# Kinds of rope that change nothing below the length at which `cacheable_length` ends.
PLAIN_ROPES = ("default", "dynamic")
WEIGHTS = "model.language_model."
HEAD = "lm_head."


def check_language_model(config) -> None:
    """Raise `ValueError` for a language model that llama.cpp would not compute as it is computed here.

    Args:
        config: A `MiniMonkeyConfig`.
    """
    text = config.text_config
    if text.model_type not in ARCHITECTURES:
        raise ValueError(
            f"A language model {text.model_type!r} is not written as GGUF; {', '.join(ARCHITECTURES)} are (InternLM2 among "
            "the Llamas)."
        )
    if config.visual_experts:
        raise ValueError(
            "llama.cpp has no visual experts (Mono-InternVL): its layers have one feed-forward block for all tokens."
        )
    if text.hidden_act not in ("silu", "swish"):
        raise ValueError(f"llama.cpp computes these language models with silu, this one has {text.hidden_act!r}.")
    if getattr(text, "use_sliding_window", False):
        raise ValueError("llama.cpp has no sliding window in a Qwen2; this one has use_sliding_window=True.")
    kind = rope_type(text)
    known = {
        "llama": (*PLAIN_ROPES, "linear", "llama3"),
        "qwen2": (*PLAIN_ROPES, "linear"),
        "phi3": ("default", "longrope"),
    }[text.model_type]
    if kind not in known:
        raise ValueError(
            f"Positions of the kind {kind!r} in a {text.model_type!r} are not written as GGUF; {', '.join(known)} are."
        )


def rope_type(text_config) -> str:
    """Return the kind of rotary positions that a language model has."""
    return (text_config.rope_parameters or {}).get("rope_type", "default")


def longest_exact(config) -> int:
    """Return the number of tokens up to which llama.cpp computes what the language model computes here.

    Beyond it some kinds of positions are stretched in another way, and Phi-3 has a window that llama.cpp leaves out.
    """
    text = config.text_config
    lengths = [text.max_position_embeddings, config.cacheable_length]
    if text.model_type == "phi3" and text.sliding_window:
        lengths.append(text.sliding_window)
    return int(min(lengths))


def write_language_settings(writer, config) -> None:
    """Write what llama.cpp needs to know of a language model into a `gguf.GGUFWriter`."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = text.rope_parameters or {}
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope_type(text) == "linear" and text.model_type == "qwen2":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope_type(text) == "longrope":
        writer.add_rope_scaling_orig_ctx_len(_original_length(text))
        writer.add_rope_scaling_attn_factors(float(_rotary(text).attention_scaling))


def language_tensors(config) -> dict[str, torch.Tensor]:
    """Return the tensors that GGUF has besides the weights: by how much slower rotary angles turn, (head width / 2,) each."""
    text = config.text_config
    rope = text.rope_parameters or {}
    if rope_type(text) == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    if text.model_type == "llama" and rope_type(text) in ("linear", "llama3"):
        turned = _rotary(text).inv_freq.double()
        plain = rope["rope_theta"] ** -(torch.arange(len(turned), dtype=torch.float64) / len(turned))
        return {"rope_freqs.weight": (plain / turned).float()}
    return {}


def _rotary(text_config):
    """Return transformers' own rotary module of a language model, from one without layers."""
    empty = copy.deepcopy(text_config)
    empty.num_hidden_layers, empty.vocab_size, empty.pad_token_id, empty.layer_types = 0, 1, None, None
    return AutoModel.from_config(empty).rotary_emb


def _original_length(text_config) -> int:
    rope = text_config.rope_parameters
    return rope.get("original_max_position_embeddings") or text_config.original_max_position_embeddings


def published_language_name(name: str) -> str | None:
    """Return what a language model by itself calls one of our weights, None for what is no part of it."""
    if name.startswith(WEIGHTS):
        return "model." + name.removeprefix(WEIGHTS)
    return name if name.startswith(HEAD) else None


def for_llama_cpp(name: str, tensor: torch.Tensor, text_config) -> torch.Tensor:
    """Return a weight as llama.cpp reads it: it turns neighbouring dimensions of a Llama's queries and keys together.

    Args:
        name: Ours.
        tensor: (heads * head width, ...) for queries and keys.
    """
    heads = {"q_proj": text_config.num_attention_heads, "k_proj": text_config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if text_config.model_type != "llama" or count is None:
        return tensor
    return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
