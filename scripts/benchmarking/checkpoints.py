"""Checkpoints with random weights in the published format, to measure loading."""

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from minimonkey.checkpoint import published_name, published_tensor


def save_published(model: torch.nn.Module, folder: Path, shard_size: str = "3GB") -> None:
    """Save the weights of a model whose language model is a Llama, under InternLM2's names."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():  # q, k and v follow each other
        parts.setdefault(published_name(name, as_internlm2=True), []).append(tensor)
    text_config = model.config.text_config
    weights = {name: published_tensor(name, tensors, text_config) for name, tensors in parts.items()}
    save_torch_state_dict(weights, folder, max_shard_size=shard_size)
