"""Collate samples of different lengths into one batch."""

import torch
from torch.nn.utils.rnn import pad_sequence

from minimonkey.scripts.training.dropping import collate_kept
from minimonkey.scripts.training.encode import IGNORED
from minimonkey.scripts.training.packing import loss_weights


# What the model is told of images that are more or less than all of their square tiles.
LAYOUT = ("tile_counts", "tile_grids", "slice_values", "slice_sizes")


class Collator:
    """Pads token ids on the right and joins the tiles of all samples.

    Args:
        pad_token_id: What fills the ids; its labels are ignored.
        image_token_id, tokens_per_tile, tile_size: The model's, for `always_with_tile`.
        always_with_tile: Give a batch without images one black tile after the end of a row, where nothing sees it.
            All processes of a distributed run then run the same modules, which sharding needs.
        pad_to_multiple_of: What the length of a batch is a multiple of.
        loss_reduction: How much the tokens of answers weigh, see packing.py; "token" gives no weights.
        is_mined: Whether the model mines patches, and is told how tiles lie.
    """

    def __init__(
        self,
        pad_token_id: int,
        image_token_id: int,
        tokens_per_tile: int,
        tile_size: int,
        always_with_tile: bool,
        pad_to_multiple_of: int = 1,
        loss_reduction: str = "token",
        is_mined: bool = False,
    ):
        self.loss_reduction = loss_reduction
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.tokens_per_tile, self.tile_size = tokens_per_tile, tile_size
        self.always_with_tile, self.is_mined = always_with_tile, is_mined

    def __call__(self, samples: list[dict]) -> dict:
        """Return input_ids, labels (B, N), pixel_values (T, 3, S, S) as uint8, and how many were redrawn; of slices, LAYOUT.

        A packed row comes as one of B = 1, with position_ids (1, N) that begin anew with each sample. loss_weights (B, N) come
        with packing, and where tokens do not weigh alike, kept_features and scored where image tokens are left out
        (dropping.py). No attention_mask: a causal language model sees no padding behind its
        tokens, attention needs no mask in memory, and the samples of a row are told by their positions.
        """
        is_packed = "row" in samples[0]
        samples = [sample for entry in samples for sample in entry["row"]] if is_packed else samples
        weights = [loss_weights(s["labels"], self.loss_reduction) for s in samples]
        if is_packed:
            ids, labels, weights = (
                torch.cat(parts)[None]
                for parts in ([s["input_ids"] for s in samples], [s["labels"] for s in samples], weights)
            )
            positions = torch.cat([torch.arange(len(s["input_ids"])) for s in samples])[None]
        else:
            ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True, padding_value=self.pad_token_id)
            labels = pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORED)
            weights = pad_sequence(weights, batch_first=True)
            positions = None
        tiles = [s["pixel_values"] for s in samples if "pixel_values" in s]
        images = {name: [s[name] for s in samples if name in s and "tile_counts" in s] for name in LAYOUT}
        has_images = bool(tiles or images["tile_counts"])
        length, needs_tile = ids.shape[1], not has_images and self.always_with_tile
        more = self.tokens_per_tile if needs_tile else 0
        more += -(length + more) % self.pad_to_multiple_of
        ids = torch.nn.functional.pad(ids, (0, more), value=self.pad_token_id)
        labels = torch.nn.functional.pad(labels, (0, more), value=IGNORED)
        weights = torch.nn.functional.pad(weights, (0, more))
        if positions is not None:
            positions = torch.cat([positions, torch.arange(more)[None]], dim=1)
        if needs_tile:
            ids[0, length : length + self.tokens_per_tile] = self.image_token_id
            tiles = [torch.zeros(1, 3, self.tile_size, self.tile_size, dtype=torch.uint8)]
            if self.is_mined:
                images |= {
                    "tile_counts": [torch.tensor([[0, 0, 1]])],
                    "tile_grids": [torch.ones(1, 4, dtype=torch.long)],
                }
        batch = {"input_ids": ids, "labels": labels}
        if positions is not None:
            batch["position_ids"] = positions
        if is_packed or self.loss_reduction != "token":
            batch["loss_weights"] = weights
        if tiles:
            batch["pixel_values"] = torch.cat(tiles)
        batch |= collate_kept(samples, self.tokens_per_tile)
        batch |= {name: torch.cat(parts) for name, parts in images.items() if parts}
        labelled = [s["cell_labels"] for s in samples if "cell_labels" in s]
        if labelled:
            batch["cell_labels"] = torch.cat([_cell_labels(s, labelled[0]) for s in samples if "pixel_values" in s])
        return {**batch, "redrawn": sum(s.get("redrawn", 0) for s in samples)}


def _cell_labels(sample: dict, like: torch.Tensor) -> torch.Tensor:
    """Return the sample's cell labels; masked ones for images whose characters are not known."""
    if "cell_labels" in sample:
        return sample["cell_labels"]
    return like.new_full((len(sample["pixel_values"]), *like.shape[1:]), IGNORED)
