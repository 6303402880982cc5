"""Parts between vision tower and language model besides transformers' own projector: a resampler, and patch mining.

    Resampler(kv_width=1024, width=2048, queries=64)(patches)              (T, h, w, 1024) -> (T, 64, 2048)
    PatchMining(width=1024)(thumbnail, tiles)                             (h, w, 1024) -> (h, w, 1024)

Deal with features, not with pixels or prompts.

Shapes: T tiles or slices, h x w patches of one, C width of the vision tower, D width of the language model, Q queries.
"""

import torch
from torch import nn

from .transformers_bridge import initialization


HEAD_WIDTH = 128


def plane_sinusoids(rows: int, columns: int, width: int, device=None) -> torch.Tensor:
    """Return sines and cosines of the places of a grid, (rows, columns, width) in float32.

    The first half of the channels tells the column, the second the row, each with sines first and base 10,000.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"Places in a plane need a width that is a multiple of 4, got {width}.")
    frequencies = 10_000 ** -(torch.arange(width // 4, device=device) / (width // 4))

    def along(places: int) -> torch.Tensor:
        angles = torch.arange(places, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = along(columns)[None].expand(rows, -1, -1)
    down = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=2)


class Resampler(nn.Module):
    """Learned queries that attend to the patches of a view once: as many tokens, whatever its size.

    Names of weights are those of MiniCPM-V 2.5 (arXiv 2408.01800).

    Args:
        kv_width: C.
        width: D.
        queries: Q.
    """

    def __init__(self, kv_width: int, width: int, queries: int):
        super().__init__()
        heads = next(count for count in range(max(1, width // HEAD_WIDTH), 0, -1) if width % count == 0)
        self.query = nn.Parameter(torch.empty(queries, width))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.kv_proj = nn.Identity() if kv_width == width else nn.Linear(kv_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what is its own; its modules are initialised as any other."""
        initialization.trunc_normal_(self.query, std=0.02)
        initialization.normal_(self.proj, std=len(self.proj) ** -0.5)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return what the language model sees of patches (T, h, w, C): (T, Q, D)."""
        rows, columns = patches.shape[1:3]
        value = self.ln_kv(self.kv_proj(patches.flatten(1, 2)))
        places = plane_sinusoids(rows, columns, value.shape[-1], value.device).flatten(0, 1).to(value.dtype)
        query = self.ln_q(self.query).expand(len(patches), -1, -1)
        read, _ = self.attn(query, value + places, value, need_weights=False)
        return self.ln_post(read) @ self.proj


class ZeroLinear(nn.Linear):
    """A linear layer that begins at zero, so that what it is put into begins without it."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        initialization.zeros_(self.weight)
        initialization.zeros_(self.bias)


class PatchMining(nn.Module):
    """Every patch of a thumbnail asks the patches of its region in the detailed tiles, and adds what they answer.

    The projection of the answers begins at zero: a model that it is put into begins with the thumbnail alone.

    Source: Mini-Gemini (arXiv 2403.18814), section 3.2, whose second vision tower the detailed tiles stand in for.

    Args:
        width: C.
    """

    def __init__(self, width: int):
        super().__init__()
        linear = (nn.Linear, nn.Linear, ZeroLinear)
        self.query, self.key, self.value = (nn.Sequential(nn.LayerNorm(width), kind(width, width)) for kind in linear)

    def forward(self, thumbnail: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """Return the patches (h, w, C) of a thumbnail with what they found in the tiles (rows, columns, h, w, C)."""
        rows, columns, height, width, _ = tiles.shape
        # The patch at (y, x) is `rows` x `columns` patches of the tiles, stitched together.
        stitched = tiles.permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, -1)
        regions = stitched.reshape(height, rows, width, columns, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
        query, key = self.query(thumbnail), self.key(regions)
        similarity = torch.einsum("hwc,hwmc->hwm", query, key) * query.shape[-1] ** -0.5
        weights = similarity.float().softmax(dim=-1).to(thumbnail.dtype)
        return thumbnail + torch.einsum("hwm,hwmc->hwc", weights, self.value(regions))
