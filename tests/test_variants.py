"""Variants of the published family that no recorded case covers, against plain implementations of the published code."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, random_tiles
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration


IMAGE_TOKEN = 500


def published_variant(folder: Path, change_config, change_weights=lambda weights: None) -> Path:
    """The recorded InternLM2 checkpoint with another configuration and other weights."""
    config = json.loads((FIXTURES / "models" / "internlm2" / "config.json").read_text())
    weights = load_file(FIXTURES / "models" / "internlm2" / "model.safetensors")
    change_config(config)
    change_weights(weights)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path):
    model, info = MiniMonkeyForConditionalGeneration.from_pretrained(
        folder, image_token_id=IMAGE_TOKEN, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)


def published_vision_tower(weights: dict[str, torch.Tensor], config: dict, pixels: torch.Tensor) -> torch.Tensor:
    """InternViT as published: (T, 3, S, S) -> (T, 1 + patches, width)."""
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    heads, epsilon, patch = config["num_attention_heads"], config["layer_norm_eps"], config["patch_size"]

    def norm(hidden, name):
        if config["norm_type"] == "rms_norm":
            return rms_norm(hidden, weights[f"{name}.weight"], epsilon)
        return nn.functional.layer_norm(
            hidden, hidden.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon
        )

    embedded = nn.functional.conv2d(
        pixels, weights["embeddings.patch_embedding.weight"], weights["embeddings.patch_embedding.bias"], stride=patch
    )
    classes = weights["embeddings.class_embedding"].expand(len(pixels), -1, -1)
    hidden = torch.cat([classes, embedded.flatten(2).transpose(1, 2)], dim=1) + weights["embeddings.position_embedding"]
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        qkv = nn.functional.linear(
            norm(hidden, f"{layer}.norm1"), weights[f"{layer}.attn.qkv.weight"], weights.get(f"{layer}.attn.qkv.bias")
        )
        query, key, value = qkv.chunk(3, dim=-1)
        if config["qk_normalization"]:  # over all heads together
            query = rms_norm(query, weights[f"{layer}.attn.q_norm.weight"], epsilon)
            key = rms_norm(key, weights[f"{layer}.attn.k_norm.weight"], epsilon)
        query, key, value = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key, value))
        attention = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value
        projected = nn.functional.linear(
            attention.transpose(1, 2).flatten(2),
            weights[f"{layer}.attn.proj.weight"],
            weights[f"{layer}.attn.proj.bias"],
        )
        hidden = hidden + projected * weights[f"{layer}.ls1"]
        inner = nn.functional.linear(
            norm(hidden, f"{layer}.norm2"), weights[f"{layer}.mlp.fc1.weight"], weights[f"{layer}.mlp.fc1.bias"]
        )
        outer = nn.functional.linear(
            nn.functional.gelu(inner), weights[f"{layer}.mlp.fc2.weight"], weights[f"{layer}.mlp.fc2.bias"]
        )
        hidden = hidden + outer * weights[f"{layer}.ls2"]
    return hidden


def as_6b(config: dict) -> None:
    config["vision_config"] |= {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}


def weights_as_6b(weights: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    for name in list(weights):
        if not name.startswith("vision_model.encoder"):
            continue
        if name.endswith((".norm1.bias", ".norm2.bias", ".attn.qkv.bias")):
            del weights[name]
        elif name.endswith(".norm1.weight"):
            for norm in ("q_norm", "k_norm"):
                weights[name.replace("norm1", f"attn.{norm}")] = torch.rand_like(weights[name]) + 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    ("change_config", "change_weights"),
    [(lambda config: None, lambda weights: None), (as_6b, weights_as_6b)],
    ids=["300m_style", "6b_style"],
)
def test_vision_tower_is_the_published_one(change_config, change_weights, tmp_path):
    folder = published_variant(tmp_path / "published", change_config, change_weights)
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    pixels = random_tiles(3, 2, 3, 112, 112)
    expected = published_vision_tower(load_file(folder / "model.safetensors"), config, pixels)
    actual = load(folder).model.vision_tower(pixels).last_hidden_state
    assert torch.allclose(actual, expected, atol=1e-4)


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_dim: int) -> torch.Tensor:
    """InternLM2's order of rows, written out head by head."""
    per_key, rows = query.shape[0] // key.shape[0], []
    for index in range(key.shape[0] // head_dim):
        first = index * per_key * head_dim
        rows += [query[first : first + per_key * head_dim]]
        rows += [key[index * head_dim : (index + 1) * head_dim], value[index * head_dim : (index + 1) * head_dim]]
    return torch.cat(rows)


PUBLISHED_LAYER_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def internlm2_weights(llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A Llama under InternLM2's names."""
    state, head_dim = llama.state_dict(), llama.config.head_dim
    weights = {
        "language_model.model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "language_model.model.norm.weight": state["model.norm.weight"],
        "language_model.output.weight": state["lm_head.weight"],
    }
    for index in range(llama.config.num_hidden_layers):
        source, target = f"model.layers.{index}", f"language_model.model.layers.{index}"
        for kind in ("weight", "bias"):
            parts = [state.get(f"{source}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            if parts[0] is not None:
                weights[f"{target}.attention.wqkv.{kind}"] = fused(*parts, head_dim)
            for ours, theirs in PUBLISHED_LAYER_NAMES.items():
                if f"{source}.{ours}.{kind}" in state:
                    weights[f"{target}.{theirs}.{kind}"] = state[f"{source}.{ours}.{kind}"]
    return {name: tensor.clone() for name, tensor in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(
    "scaling", [None, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}], ids=str
)
@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "LlamaForCausalLM"])
def test_language_model_variants_are_llama(architecture, scaling, bias, tmp_path):
    torch.manual_seed(0)
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": scaling["type"], "factor": scaling["factor"]}
    published = json.loads((FIXTURES / "models" / "internlm2" / "config.json").read_text())["llm_config"]
    published["max_position_embeddings"] = 64
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
    names += ["vocab_size", "rms_norm_eps", "max_position_embeddings"]
    rope["rope_theta"] = published["rope_theta"]
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: published[name] for name in names}, rope_parameters=rope, attention_bias=bias)
    ).eval()
    for parameter in llama.parameters():
        nn.init.normal_(parameter, std=0.2)

    def change_config(config):
        config["llm_config"] |= {"architectures": [architecture], "rope_scaling": scaling}
        config["llm_config"] |= {"bias": bias, "attention_bias": bias, "max_position_embeddings": 64}

    def change_weights(weights):
        for name in [name for name in weights if name.startswith("language_model.")]:
            del weights[name]
        if architecture == "LlamaForCausalLM":
            weights |= {f"language_model.{name}": tensor.clone() for name, tensor in llama.state_dict().items()}
        else:
            weights |= internlm2_weights(llama)

    model = load(published_variant(tmp_path / "published", change_config, change_weights))
    ids = torch.randint(3, 400, (1, 84))  # dynamic scaling begins at 64
    for length in (60, 84):
        assert torch.equal(model(input_ids=ids[:, :length]).logits, llama(input_ids=ids[:, :length]).logits)


def test_an_unknown_architecture_says_what_is_known(tmp_path):
    def change_config(config):
        config["llm_config"]["architectures"] = ["BaichuanForCausalLM"]

    with pytest.raises(ValueError, match=r"BaichuanForCausalLM.*known are InternLM2ForCausalLM.*text_config"):
        load(published_variant(tmp_path / "published", change_config))
