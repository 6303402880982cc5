"""Several samples as one row of tokens: fewer steps, no padding. Samples in a row do not see each other.

The positions of each sample begin at 0; from that, transformers' attention (SDPA, eager, flash, flex) keeps them apart. Planned
from lengths alone, before anything is read, so that any process and a resumed run make the same rows.

    [*pack([(300, 1), (500, 2), (250, 1)], most_tokens=800, most_tiles=3, buffer=20)]       # [[0, 1], [2]]

Source: InternVL's packed dataset (48 tiles, 16,384 tokens, 20 open rows), as published for Mini-InternVL's adaptation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from minimonkey.scripts.training.encode import IGNORED


# The weight of a token of an answer with n tokens is n ** -POWER, so that "token" counts long answers fully, "sample" each
# answer alike, and "square" in between. Source: InternVL's `loss_reduction`.
POWERS = {"token": 0.0, "square": 0.5, "sample": 1.0}


@dataclass
class _Row:
    tokens: int = 0
    tiles: int = 0
    positions: list[int] = field(default_factory=list)

    def add(self, position: int, tokens: int, tiles: int) -> None:
        self.positions.append(position)
        self.tokens += tokens
        self.tiles += tiles


def pack(sizes: Iterable[tuple[int, int]], most_tokens: int, most_tiles: int, buffer: int) -> Iterator[list[int]]:
    """Yield rows of positions in `sizes`, each within both limits.

    A sample goes into the fullest open row in which it fits; if there is none, the fullest row of a full buffer is closed.

    Args:
        sizes: (tokens, tiles) of the samples, in order.
        buffer: Rows that are open at a time.

    Raises:
        ValueError: A sample that fits in no row.
    """
    rows: list[_Row] = []
    for position, (tokens, tiles) in enumerate(sizes):
        if tokens > most_tokens or tiles > most_tiles:
            raise ValueError(
                f"A sample of {tokens} tokens and {tiles} tiles fits in no row of {most_tokens} and {most_tiles}."
            )
        fitting = [row for row in rows if row.tokens + tokens <= most_tokens and row.tiles + tiles <= most_tiles]
        if not fitting:
            if len(rows) == buffer:
                fullest = max(rows, key=lambda row: row.tokens)
                rows.remove(fullest)
                yield fullest.positions
            fitting = [_Row()]
            rows += fitting
        max(fitting, key=lambda row: row.tokens).add(position, tokens, tiles)
    for row in rows:
        yield row.positions


def loss_weights(labels: torch.Tensor, reduction: str) -> torch.Tensor:
    """Return the weight of each token of one sample: 0 for what is no answer, for the others n ** -power, see POWERS.

    Args:
        labels: (N,)
        reduction: One of POWERS.

    Returns:
        (N,) float32
    """
    is_answer = labels != IGNORED
    return is_answer * is_answer.sum().clamp(min=1).float() ** -POWERS[reduction]


def weighted_loss(model, inputs: dict, weights: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Return the weighted cross entropy of a batch, divided by `total`, and the model's output.

    Logits are computed where an answer follows and nowhere else; of a row of 16,384 tokens, all would take gigabytes.

    Args:
        inputs: The model's, with labels (B, N).
        weights: (B, N), see `loss_weights`.
        total: The sum of weights over all batches of the step.
    """
    inputs = dict(inputs)
    labels, weights = inputs.pop("labels")[:, 1:], weights[:, 1:]
    places = (labels != IGNORED).any(dim=0).nonzero().flatten()
    output = model(**inputs, logits_to_keep=places)
    losses = torch.nn.functional.cross_entropy(
        output.logits.float().flatten(0, 1), labels[:, places].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses * weights[:, places].flatten()).sum() / total, output
