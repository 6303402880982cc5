"""Visual experts: decoder layers with a second feed-forward block that only image tokens go through.

That is how Mono-InternVL (arXiv 2410.08202) sees without a vision tower: `mlp` is the feed-forward block of the language
model, `visual_mlp` was trained alongside it on images, attention and norms are shared. Which token takes which is given by
`visual_token_mask`, not learned. Builds on transformers' Llama, which InternLM2 is.
"""

import torch
from torch import nn
from transformers import LlamaConfig

from .transformers_bridge import LlamaDecoderLayer, LlamaMLP


class VisualExpertDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose image tokens have a feed-forward block of their own."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.visual_mlp = LlamaMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, visual_token_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """Run the layer as transformers does.

        Args:
            hidden_states: (B, N, D)
            visual_token_mask: (B, N) bool, true for the image tokens among these N; None: there are none.
            **kwargs: What transformers passes to its layers; attention uses it.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.post_attention_layernorm(hidden_states), visual_token_mask)

    def feed_forward(self, hidden_states: torch.Tensor, visual_token_mask: torch.Tensor | None) -> torch.Tensor:
        """Send each token of (B, N, D) through the one block that is its own, and return (B, N, D)."""
        if visual_token_mask is None:
            return self.mlp(hidden_states)
        is_visual = visual_token_mask.to(hidden_states.device)
        visual, text = self.visual_mlp(hidden_states[is_visual]), self.mlp(hidden_states[~is_visual])
        output = visual.new_empty(hidden_states.shape)  # under autocast of another type than what came in
        output[is_visual], output[~is_visual] = visual, text
        return output


def add_visual_experts(language_model: nn.Module) -> None:
    """Give each layer of a Llama its visual expert, in place.

    Raises:
        ValueError: A language model of another family.
    """
    config = language_model.config
    if config.model_type != "llama":
        raise ValueError(
            f"Visual experts stand on Llama (InternLM2); the language model here is {config.model_type!r}."
        )
    language_model.layers = nn.ModuleList(
        VisualExpertDecoderLayer(config, index) for index in range(config.num_hidden_layers)
    )
