"""What the tests of scale compression share: prompts of several images, and attention weights as the judge of what stays."""

import copy

import torch
from conftest import random_tiles
from model_helpers import IMAGE_TOKEN


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
IMAGE = (4, 2, 1)  # detailed, adaptive, thumbnail tiles
LANGUAGE_MODELS = {
    "llama": {},
    "qwen2": {},
    "phi3": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 12},
    "mistral": {"head_dim": 16, "sliding_window": 12},
    "gpt_oss": {"head_dim": 16, "sliding_window": 12, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ROWS = [(3, IMAGE, 9), (5, IMAGE, 2, (2, 3, 1), 4), (2, (0, 0, 1), 6), (11,), (4, (6, 0, 1), 3)]


def batch(*rows, side: str = "left", seed: int = 3) -> dict[str, torch.Tensor]:
    """Padded prompts; a row lists how many text tokens come, and for an image its (detailed, adaptive, thumbnail) tiles."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for row in rows:
        parts = [
            torch.full((4 * sum(part),), IMAGE_TOKEN)
            if isinstance(part, tuple)
            else torch.randint(3, 50, (part,), generator=generator)
            for part in row
        ]
        sequences.append(torch.cat(parts))
    length = max(map(len, sequences))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[number, place], mask[number, place] = sequence, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    counts = [part for row in rows for part in row if isinstance(part, tuple)]
    if counts:
        tiles = sum(map(sum, counts))
        inputs |= {"pixel_values": random_tiles(seed, tiles, 3, 28, 28), "tile_counts": torch.tensor(counts)}
    return inputs


def alone(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of a batch by itself, without padding."""
    ids = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ends = ((inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1) // 4).cumsum(0).tolist()
    first, last = (ends[row - 1] if row else 0), ends[row]
    if first < last:
        image_ends = inputs["tile_counts"].sum(dim=1).cumsum(0)
        mine = (image_ends > first) & (image_ends <= last)
        one |= {"pixel_values": inputs["pixel_values"][first:last], "tile_counts": inputs["tile_counts"][mine]}
    return one


def without_padding(kept: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Positions in a padded row as positions in the row alone."""
    return (mask.cumsum(0) - 1)[kept].tolist()


def image_positions(one: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Positions of the detailed and of the other tokens of each image of one row, detailed tiles first."""
    left = (one["input_ids"][0] == IMAGE_TOKEN).nonzero().squeeze(1).tolist()
    positions = []
    for detailed, adaptive, thumbnail in one["tile_counts"].tolist():
        tokens, left = left[: 4 * (detailed + adaptive + thumbnail)], left[4 * (detailed + adaptive + thumbnail) :]
        positions.append((tokens[: 4 * detailed], tokens[4 * detailed :]))
    return positions


@torch.no_grad()
def eager_weights(model, one: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The attention weights (heads, n, n) of each layer for one row, as the model returns them, in float64 where it can."""
    judge = copy.deepcopy(model)
    if not hasattr(model.config.text_config, "num_local_experts"):  # experts know no float64
        judge.double()
    judge.set_attn_implementation("eager")
    embeddings = judge.encode_images(one["input_ids"], one["pixel_values"].to(judge.dtype))
    output = judge.model.language_model(inputs_embeds=embeddings, output_attentions=True, use_cache=False)
    return [weights[0] for weights in output.attentions]


@torch.no_grad()
def eager_scores(model, one: dict[str, torch.Tensor], layer: int = 1) -> list[tuple[list[int], torch.Tensor]]:
    """For each image of one row its detailed positions and their scores, from the attention weights the model returns."""
    weights = eager_weights(model, one)
    images = image_positions(one)
    scores = []
    for number, (detailed, _) in enumerate(images):
        others = {
            position for other, parts in enumerate(images) if other != number for part in parts for position in part
        }
        start = detailed[-1] + 1 if detailed else 0
        queries = [position for position in range(start, one["input_ids"].shape[1]) if position not in others]
        scores.append((detailed, weights[layer][:, queries][:, :, detailed].mean(dim=1).mean(dim=0)))
    return scores


def eager_kept(model, one: dict[str, torch.Tensor], layer: int = 1, ratio: float = 0.5) -> list[int]:
    lost = set()
    for detailed, scores in eager_scores(model, one, layer):
        order = scores.argsort(descending=True).tolist()
        lost |= {detailed[index] for index in order[int(len(detailed) * ratio) :]}
    return [position for position in range(one["input_ids"].shape[1]) if position not in lost]
