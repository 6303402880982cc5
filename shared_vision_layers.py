"""A vision tower whose layers share their weights in groups, as in MiniViT (arXiv 2204.07154, weight multiplexing).

The first layer of a group holds its attention and feed-forward block, which the others of the group use too. Every layer keeps
its own norms and scales and, if wanted, what makes it differ from its group: linear maps over the attention heads, before and
after softmax, and a depth-wise convolution over the patches. These begin as identities, so that a tower whose groups have one
layer is the plain tower; published, they begin as noise, and the convolution's input replaces the hidden states.

Shapes: T tiles, N tokens of a tile (the class token and its patches), W width, H heads.
"""

import math

import torch
from torch import nn
from transformers import InternVLVisionModel
from transformers import initialization as init

from .transformers_bridge import InternVLVisionLayer


CONVOLUTION_SIZE = 7


class HeadMixer(nn.Module):
    """A linear map over the heads of attention scores or weights (T, H, N, N)."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(heads))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Return each head's sum of all heads (T, H, N, N)."""
        return torch.einsum("gh,thij->tgij", self.weight, scores) + self.bias[:, None, None]


class PatchConvolution(nn.Module):
    """A depth-wise convolution over the grid of a tile's patches; the class token gets zeros."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.convolution = nn.Conv2d(width, width, CONVOLUTION_SIZE, padding=CONVOLUTION_SIZE // 2, groups=width)
        nn.init.zeros_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what is added to (T, N, W).

        Raises:
            ValueError: The patches are no square grid.
        """
        patches = self.norm(hidden_states[:, 1:])
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise ValueError(
                f"The convolution between shared layers takes square tiles, got {patches.shape[1]} patches."
            )
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return nn.functional.pad(self.convolution(grid).flatten(2).transpose(1, 2), (0, 0, 1, 0))


class SharedVisionLayer(InternVLVisionLayer):
    """A layer of the vision tower that has its attention and feed-forward block, or uses those of its group's first layer."""

    def __init__(self, config, leader: "SharedVisionLayer | None", transform: str):
        super().__init__(config)
        self.leader = (self if leader is None else leader,)  # in a tuple, where no weights are looked for
        if leader is not None:
            del self.attention, self.mlp
        heads = config.num_attention_heads
        self.score_mixer = HeadMixer(heads) if transform != "none" else None
        self.weight_mixer = HeadMixer(heads) if transform != "none" else None
        self.convolution = (
            PatchConvolution(config.hidden_size, config.layer_norm_eps) if transform == "heads+conv" else None
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the layer on (T, N, W) as transformers does, with what the group shares."""
        attention, mlp = self.leader[0].attention, self.leader[0].mlp
        attend = attention if self.score_mixer is None else self._attend_with_mixed_heads
        attended, _ = attend(self.layernorm_before(hidden_states))
        hidden_states = self.lambda_1 * attended + hidden_states
        if self.convolution is not None:
            hidden_states = hidden_states + self.convolution(hidden_states)
        return self.lambda_2 * self.dropout(mlp(self.layernorm_after(hidden_states))) + hidden_states

    def _attend_with_mixed_heads(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend as transformers' eager attention does: scores and weights are needed, which faster ones do not give."""
        attention = self.leader[0].attention
        query, key, value = (
            states.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for states in (
                attention.q_norm(attention.q_proj(hidden_states)),
                attention.k_norm(attention.k_proj(hidden_states)),
                attention.v_proj(hidden_states),
            )
        )
        weights = self.score_mixer(query @ key.transpose(2, 3) * attention.scale).softmax(dim=-1)
        weights = nn.functional.dropout(self.weight_mixer(weights), attention.attention_dropout, self.training)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return attention.projection_dropout(attention.projection_layer(attended)), weights


class SharedVisionModel(InternVLVisionModel):
    """transformers' InternVL vision tower with weights that groups of consecutive layers share.

    Args:
        config: Of the tower.
        group_size: Layers of a group; the last group may be smaller.
        transform: One of `configuration_minimonkey.VISION_SHARE_TRANSFORMS`.
    """

    # A group's layers use one layer's weights, so that they stay on one device.
    _no_split_modules = ["InternVLVisionEncoder"]

    def __init__(self, config, group_size: int = 1, transform: str = "none"):
        super().__init__(config)
        layers: list[SharedVisionLayer] = []
        for number in range(config.num_hidden_layers):
            leader = layers[number - number % group_size] if number % group_size else None
            layers.append(SharedVisionLayer(config, leader, transform))
        self.encoder.layer = nn.ModuleList(layers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadMixer):
            init.eye_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:  # that of PatchConvolution
            init.zeros_(module.weight)
            init.zeros_(module.bias)
