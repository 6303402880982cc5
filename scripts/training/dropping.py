"""Detailed tokens left out in training, so that a model that reads compressed images has seen some.

    drop_tokens: {steps: 0.33, share: [0.25, 1.0], by: [random, blocks, scm]}

In that share of the steps, drawn by the seed, every image with detailed tiles loses a random share of their tokens: single ones
or blocks at random, or those that scale compression would drop by the model's weights of the moment. Ids and labels are
shortened where the sample is made, so that lengths, packing and padding are those of what the language model reads; which
features fill the places is decided in the model. Positions close up, as in SCM. An image that shows itself in no other tiles
loses nothing. What is drawn depends on the seed and the place in the run alone.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch

from minimonkey.compression import CompressionSettings, find_images, kept_positions
from minimonkey.token_selection import SELECTIONS, TileMap, best_blocks, highest, read_selection


RANDOM, BLOCKS, SCM = "random", "blocks", "scm"
# Those whose tokens close up, which keep as many as they are told to, by scores alone.
SCORED = tuple(
    name
    for name, selection in SELECTIONS.items()
    if selection.positions == "renumbered" and selection.mass is None and selection.blank == "scored"
)
WAYS = (RANDOM, BLOCKS, SCM, *SCORED)
WINDOWS = ((1, 4), (2, 2), (2, 4), (3, 3), (1, 7), (7, 7))  # tokens, (height, width) of blocks


@dataclass(frozen=True)
class Dropping:
    """How often tokens are left out, how many, and by what.

    Args:
        steps: Share of the steps in which it happens.
        share: Least and most of the detailed tokens that an image loses; drawn for each sample.
        by: Some of WAYS, each as likely; `scm` is the published choice, as is `token`.
    """

    steps: float = 1 / 3
    share: tuple[float, float] = (0.25, 1.0)
    by: tuple[str, ...] = (RANDOM, BLOCKS, SCM)

    @property
    def needs_scores(self) -> bool:
        """Whether the language model is asked which tokens go."""
        return any(way not in (RANDOM, BLOCKS) for way in self.by)


def read_dropping(options: Mapping[str, Any]) -> Dropping:
    """Return `drop_tokens` of a recipe.

    Raises:
        ValueError: Unknown names, or values that cannot be.
    """
    unknown = sorted(map(str, options.keys() - {"steps", "share", "by"}))
    if unknown:
        raise ValueError(f"drop_tokens has no {', '.join(unknown)}; known are steps, share, by.")
    steps, share, by = (options.get(name, default) for name, default in vars(Dropping()).items())
    if not _is_number(steps) or not 0 < steps <= 1:
        raise ValueError(f"drop_tokens: steps is a share of the steps, above 0 and at most 1, got {steps!r}.")
    is_pair = isinstance(share, list | tuple) and len(share) == 2 and all(map(_is_number, share))
    if not is_pair or not 0 < share[0] <= share[1] <= 1:
        raise ValueError(f"drop_tokens: share is [least, most] of the tokens, above 0 and at most 1, got {share!r}.")
    by = [by] if isinstance(by, str) else by
    if not isinstance(by, list | tuple) or not by or any(way not in WAYS for way in by):
        raise ValueError(f"drop_tokens: by is one or more of {', '.join(WAYS)}, got {by!r}.")
    return Dropping(steps, tuple(share), tuple(by))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- samples ---------------------------------------------------------------------------------------------------------


def shorten(sample: dict, dropping: Dropping, place: tuple[int, int, int], image_token_id: int, per_tile: int) -> dict:
    """Return a sample with fewer image tokens, or as it is, if its step or its images drop none.

    Args:
        sample: input_ids, labels (N,), and with images tile_counts (I, 3), tile_grids (I, 4).
        place: Seed, step and position in the run.
        per_tile: Tokens of a tile.

    Returns:
        Also `kept_features` (T * per_tile,) bool, which of the tiles' features are read; and, where the model is to choose
        them, `scored`: whole_ids (N,), tile_counts, keep_ratio, query_end (before the first answer), and the selection.
    """
    seed, step, position = place
    if "tile_counts" not in sample or random.Random(f"{seed}/drop/{step}").random() >= dropping.steps:
        return sample
    rng = random.Random(f"{seed}/drop/{step}/{position}")
    way, keep_ratio = rng.choice(dropping.by), 1 - rng.uniform(*dropping.share)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    parts, is_shorter = [], False
    for counts, grids in zip(sample["tile_counts"].tolist(), sample["tile_grids"].tolist()):
        detailed, others = counts[0] * per_tile, sum(counts[1:]) * per_tile
        kept = torch.ones(detailed + others, dtype=torch.bool)
        if detailed and others:
            kept[:detailed] = False
            columns, rows = grids[:2] if grids[0] * grids[1] == counts[0] else (1, counts[0])
            tile_map = TileMap(columns, rows, isqrt(per_tile))
            kept[_choose(way, int(detailed * keep_ratio), tile_map, rng, generator)] = True
            is_shorter = True
        parts.append(kept)
    if not is_shorter:
        return sample
    kept, ids, labels = torch.cat(parts), sample["input_ids"], sample["labels"]
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[ids == image_token_id] = kept
    shorter = {**sample, "input_ids": ids[stays], "labels": labels[stays], "kept_features": kept}
    if way in (RANDOM, BLOCKS) or keep_ratio <= 0:
        return shorter
    answers = (labels >= 0).nonzero().flatten()
    shorter["scored"] = {
        "whole_ids": ids,
        "tile_counts": torch.stack([_only_if_others(counts) for counts in sample["tile_counts"]]),
        "tile_grids": sample["tile_grids"],
        "keep_ratio": keep_ratio,
        "query_end": int(answers[0]) if len(answers) else len(ids),
        "selection": "token" if way == SCM else way,
    }
    return shorter


def _choose(way: str, count: int, tile_map: TileMap, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
    """Return which `count` of an image's detailed tokens stay; where the model will choose, the first."""
    tokens = tile_map.columns * tile_map.rows * tile_map.side**2
    if way == BLOCKS:
        window = rng.choice(WINDOWS)
        return best_blocks(torch.rand(tokens, generator=generator), tile_map, window, count)
    return highest(torch.rand(tokens, generator=generator), count) if way == RANDOM else torch.arange(count)


def _only_if_others(counts: torch.Tensor) -> torch.Tensor:
    """Return the tiles of an image, its detailed ones counted as adaptive where there are no others: all of them stay."""
    return counts if counts[1:].any() else counts[[1, 0, 2]]


def collate_kept(samples: list[dict], per_tile: int) -> dict:
    """Return `kept_features` (T * per_tile,) of a batch, and `scored`: those of its samples whose tokens the model chooses."""
    samples = [sample for sample in samples if "pixel_values" in sample]
    if not any("kept_features" in sample for sample in samples):
        return {}
    kept, scored = [], []
    for sample in samples:
        if "scored" in sample:
            scored.append({**sample["scored"], "first_feature": sum(map(len, kept))})
        features = len(sample["pixel_values"]) * per_tile
        kept.append(sample.get("kept_features", torch.ones(features, dtype=torch.bool)))
    return {"kept_features": torch.cat(kept), "scored": scored}


# --- model -----------------------------------------------------------------------------------------------------------


def with_dropping(model_class: type) -> type:
    """Return the model's class that also reads the batches of `collate_kept`; it keeps name and module, see letters.py."""

    class WithDropping(model_class):
        def forward(self, input_ids=None, pixel_values=None, kept_features=None, scored=(), **inputs):
            """Run as the model does, with features (T * K, D) only where `kept_features`, or scores, say so."""
            if kept_features is None:
                return super().forward(input_ids=input_ids, pixel_values=pixel_values, **inputs)
            features = self.encode_tiles(pixel_values).flatten(0, 1)
            kept_features = kept_features.clone()
            for one in scored:
                chosen = self._chosen(one, features.detach())
                kept_features[one["first_feature"] : one["first_feature"] + len(chosen)] = chosen
            is_image = input_ids == self.config.image_token_id
            if is_image.sum() != kept_features.sum():
                raise ValueError(
                    f"The batch has {int(is_image.sum())} image tokens, but {int(kept_features.sum())} features are to stay."
                )
            if self.config.visual_experts:
                inputs["visual_token_mask"] = is_image
            return super().forward(inputs_embeds=self.place_features(input_ids, features[kept_features]), **inputs)

        @torch.no_grad()
        def _chosen(self, one: dict, features: torch.Tensor) -> torch.Tensor:
            """Return which features of a sample's tiles scale compression keeps, (its tiles * K,) bool."""
            ids = one["whole_ids"].to(features.device)[None]
            is_image = ids[0] == self.config.image_token_id
            own = features[one["first_feature"] : one["first_feature"] + int(is_image.sum())]
            settings = CompressionSettings(
                keep_ratio=one["keep_ratio"],
                layer=self.config.scm_layer,
                num_layers=self.config.text_config.num_hidden_layers,
                queries=self.config.scm_queries,
                query_ends=[one["query_end"]] * len(one["tile_counts"]),
                selection=read_selection(one["selection"]),
            )
            counts, per_tile = one["tile_counts"], len(own) // int(one["tile_counts"].sum())
            mask = torch.ones_like(ids)
            token = self.config.image_token_id
            images = find_images(ids, mask, counts, token, per_tile, settings, one["tile_grids"])
            probe = partial(self._probe, settings.layer)
            kept, _ = kept_positions(self.place_features(ids, own), mask, images, settings, probe)
            stays = torch.zeros_like(is_image)
            stays[kept[0].to(stays.device)] = True
            return stays[is_image]

    WithDropping.__name__ = WithDropping.__qualname__ = model_class.__name__
    WithDropping.__module__ = model_class.__module__
    return WithDropping
