"""The order of the samples, and the samples themselves.

The whole run is laid out before it begins, as a list of slots that ends with the last step. What a slot gives depends on
nothing but the slot and the seed, so that any worker, any process and a resumed run make the same sample.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from minimonkey.scripts.training.data import Example, FileSource, Source
from minimonkey.scripts.training.dropping import shorten
from minimonkey.scripts.training.encode import Encoder
from minimonkey.scripts.training.letters import cell_labels
from minimonkey.scripts.training.packing import pack
from minimonkey.scripts.training.recipe import Recipe
from minimonkey.tiling import layer_grids


@dataclass(frozen=True)
class Slot:
    """One place in a run."""

    source: int
    index: int
    round: int
    """Counts the repetitions and epochs of this example."""


class Samples(torch.utils.data.Dataset):
    """The samples of a run in their order.

    Args:
        sources: The datasets.
        encoder: Makes samples of conversations and images.
        recipe: Order, steps, lengths and seed.
        is_evaluation: One pass in the order of the files; a last partial batch is not filled up.

    Attributes:
        skipped: Examples of files that are left out because they are too long for `max_seq_length`.

    Raises:
        ValueError: An example that is too long with `too_long: raise`, or nothing left to train on.
    """

    def __init__(self, sources: list[Source], encoder: Encoder, recipe: Recipe, is_evaluation: bool = False):
        self.sources, self.encoder, self.recipe, self.is_evaluation = sources, encoder, recipe, is_evaluation
        self.rows: list[list[int]] | None = None  # of positions in slots, where samples are packed
        self.fitting = [self._fitting(source) for source in sources]
        self.skipped = sum(source.size - len(fitting) for source, fitting in zip(sources, self.fitting))
        self.epoch_size = sum(len(fitting) * source.repeats for source, fitting in zip(sources, self.fitting))
        if not self.epoch_size:
            raise ValueError(f"No example fits max_seq_length {recipe.max_seq_length}; raise it or use fewer tiles.")
        needs_lengths = "order: grouped" if recipe.order == "grouped" else "packing" if recipe.pack_tokens else None
        if needs_lengths and not is_evaluation and not all(isinstance(source, FileSource) for source in sources):
            raise ValueError(f"{needs_lengths} needs lengths beforehand, which documents drawn on demand do not have.")
        if is_evaluation:
            self.slots = self._epoch(0)
        elif recipe.pack_tokens is not None:
            self.rows = self._lay_out_rows()
            self.steps = len(self.rows) // recipe.batch_size
        else:
            total = int(self.epoch_size * recipe.num_train_epochs)
            self.steps = recipe.max_steps if recipe.max_steps > 0 else max(1, -(-total // recipe.batch_size))
            self.slots = self._lay_out(self.steps * recipe.batch_size)

    def _fitting(self, source: Source) -> np.ndarray:
        """Return the indices of the examples that fit with each of their tile ranges."""
        if not isinstance(source, FileSource):
            return np.arange(source.size)  # known when a document is drawn
        limit = self._limit()
        fits = np.ones(source.size, dtype=bool)
        for index, row in enumerate(source.rows.select(range(source.size)).select_columns(["text_tokens", "sizes"])):
            length, tiles = max(self._size(row, ranges, source.use_thumbnail) for ranges in source.ranges)
            fits[index] = length <= limit and not (self.recipe.pack_tokens and tiles > self.recipe.pack_tiles)
            if length <= limit and not fits[index] and self.recipe.too_long == "raise":
                raise ValueError(
                    f"Dataset {source.name}, line {index + 1}: {tiles} tiles do not fit pack_tiles {self.recipe.pack_tiles}. "
                    "Raise it, use fewer tiles (tile_ranges), or skip such examples with too_long: skip."
                )
            if length > limit and self.recipe.too_long == "raise":
                raise ValueError(
                    f"Dataset {source.name}, line {index + 1}: {length} tokens, {length - row['text_tokens']} of them of "
                    f"images, do not fit max_seq_length {limit}. Raise it, use fewer tiles (tile_ranges), or skip such "
                    "examples with too_long: skip."
                )
        return np.flatnonzero(fits)

    def _limit(self) -> int:
        """Return the most tokens of a sample."""
        return min(self.recipe.max_seq_length, self.recipe.pack_tokens or self.recipe.max_seq_length)

    def _size(self, row: dict, ranges: tuple[int, int, int, int], use_thumbnail: bool) -> tuple[int, int]:
        """Return tokens and tiles of an example."""
        image_tokens, tiles = self.encoder.image_size(row["sizes"], ranges, use_thumbnail)
        return row["text_tokens"] + image_tokens, tiles

    def _lay_out(self, total: int) -> np.ndarray:
        """Return (total, 3), source, index and round of every slot: epoch after epoch, the last one cut off."""
        epochs = range(-(-total // self.epoch_size))
        slots = np.concatenate([self._ordered(self._epoch(epoch), epoch) for epoch in epochs])[:total]
        return self._like_length(slots) if self.recipe.order == "curriculum" else slots

    def _lay_out_rows(self) -> list[list[int]]:
        """Pack epoch after epoch into rows for whole steps, and set the slots; return the positions in them of each row."""
        recipe, limits = self.recipe, (self.recipe.pack_tokens, self.recipe.pack_tiles, self.recipe.pack_buffer)
        wanted = recipe.max_steps * recipe.batch_size
        left = int(self.epoch_size * recipe.num_train_epochs) if recipe.max_steps <= 0 else 0
        rows, parts, begin = [], [], 0
        for epoch in itertools.count():
            slots = self._ordered(self._epoch(epoch), epoch)
            slots = slots[: left - begin] if left else slots
            rows += [[begin + place for place in row] for row in pack(self._sizes(slots.tolist()), *limits)]
            parts.append(slots)
            begin += len(slots)
            if left and begin >= left:  # all samples are laid out; rows of one more epoch fill the last step
                wanted, left = -(-len(rows) // recipe.batch_size) * recipe.batch_size, 0
            if not left and len(rows) >= wanted:
                break
        self.slots = np.concatenate(parts)
        return rows[:wanted]

    def _sizes(self, slots: Iterable) -> Iterator[tuple[int, int]]:
        """Yield tokens and tiles of samples, each example measured once for each of its tile ranges."""
        known: dict[tuple, tuple[int, int]] = {}
        for number, index, round_ in slots:
            source = self.sources[number]
            ranges = source.tile_range(index, round_, self.recipe.seed)
            key = (number, index, ranges)
            if key not in known:
                known[key] = self._size(source.rows[index], ranges, source.use_thumbnail)
            yield known[key]

    def _like_length(self, slots: np.ndarray) -> np.ndarray:
        """Sort the samples within each step by their tiles, fewest first, so that its micro batches are padded less."""
        step = np.arange(len(slots)) // self.recipe.batch_size
        tiles = [self._most_tiles(Slot(*slot)) for slot in slots.tolist()]
        return slots[np.lexsort((slots[:, 0], tiles, step))]

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return (slots, 3) of one epoch, dataset after dataset."""
        parts = []
        for number, (source, fitting) in enumerate(zip(self.sources, self.fitting)):
            for repeat in range(source.repeats):
                rounds = np.full_like(fitting, epoch * source.repeats + repeat)
                parts.append(np.stack([np.full_like(fitting, number), fitting, rounds], axis=1))
        return np.concatenate(parts)

    def _ordered(self, slots: np.ndarray, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.recipe.seed, epoch])
        if self.recipe.order == "grouped":
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            lengths = [self._slot_length(Slot(*slot)) for slot in slots.tolist()]
            return slots[get_length_grouped_indices(lengths, self.recipe.batch_size, generator=generator)]
        if self.recipe.order == "curriculum":  # a dataset keeps its order, and all of them are spread evenly
            sizes = np.array([len(fitting) for fitting in self.fitting])[slots[:, 0]]
            within = np.concatenate(
                [np.arange(len(f)) for source, f in zip(self.sources, self.fitting) for _ in range(source.repeats)]
            )
            return slots[np.argsort((within + rng.random(len(slots))) / sizes, kind="stable")]
        return slots[rng.permutation(len(slots))]

    def _most_tiles(self, slot: Slot) -> int:
        """Return an upper bound of the tiles of an image, which may not be drawn yet."""
        source = self.sources[slot.source]
        _, most, _, adaptive_most = source.tile_range(slot.index, slot.round, self.recipe.seed)
        return most + adaptive_most

    def _slot_length(self, slot: Slot) -> int:
        source = self.sources[slot.source]
        ranges = source.tile_range(slot.index, slot.round, self.recipe.seed)
        return self._size(source.rows[slot.index], ranges, source.use_thumbnail)[0]

    def _with_letters(self, sample: dict, example: Example, use_thumbnail: bool) -> dict:
        if "tile_counts" in sample:  # which the model needs, and letters do not go with
            return sample
        grids = sample.pop("tile_grids", None)
        if not self.recipe.names_letters or not example.characters:
            return sample
        columns, rows, adaptive_columns, adaptive_rows = grids[0].tolist()
        layers = layer_grids((columns, rows), (adaptive_columns, adaptive_rows), use_thumbnail)
        patches = self.encoder.patches_per_side
        return {**sample, "cell_labels": cell_labels(example.pictures[0], example.characters, layers, patches)}

    def _shortened(self, sample: dict, position: int, step: int) -> dict:
        """Return the sample, fewer of its image tokens where step and seed say so, without its counts of tiles."""
        if not self.is_evaluation:
            place, encoder = (self.recipe.seed, step, position), self.encoder
            sample = shorten(sample, self.recipe.dropping, place, encoder.image_token_id, encoder.tokens_per_tile)
        return {name: value for name, value in sample.items() if name != "tile_counts"}

    @property
    def shown(self) -> int:
        """How many samples the run shows, packed or not."""
        return len(self.slots) if self.rows is None else sum(map(len, self.rows))

    def __len__(self) -> int:
        return len(self.slots) if self.rows is None else len(self.rows)

    def __getitem__(self, position: int) -> dict:
        """Return a sample, or with packing `{"row": [samples]}`; see `sample`."""
        step = position // self.recipe.batch_size
        if self.rows is None:
            return self.sample(position, step)
        return {"row": [self.sample(place, step) for place in self.rows[position]]}

    def sample(self, position: int, step: int) -> dict:
        """Return the sample of a slot (see `Encoder`), with `redrawn`: how many documents before it were too long.

        Args:
            step: Of the run, which decides whether tokens are left out, see dropping.py.

        Raises:
            ValueError: It is too long (a document with `too_long: raise`, or an image of another size than its header said).
        """
        slot = Slot(*self.slots[position].tolist())
        source, limit = self.sources[slot.source], self._limit()
        ranges = source.tile_range(slot.index, slot.round, self.recipe.seed)
        attempts = getattr(source, "MOST_ATTEMPTS", 1) if self.recipe.too_long == "skip" else 1
        for attempt in range(attempts):
            example = source.example(slot.index, slot.round, attempt)
            drops = self.recipe.dropping is not None
            sample = self.encoder(example.conversation, example.pictures, ranges, source.use_thumbnail, drops)
            if len(sample["input_ids"]) <= limit:
                sample = self._shortened(sample, position, step) if drops else sample
                return {**self._with_letters(sample, example, source.use_thumbnail), "redrawn": attempt}
        raise ValueError(
            f"Dataset {source.name}, example {slot.index}: {len(sample['input_ids'])} tokens do not fit max_seq_length "
            f"{limit} ({attempts} drawn). Raise it, use fewer tiles (tile_ranges), or too_long: skip."
        )
