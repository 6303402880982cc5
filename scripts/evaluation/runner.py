"""A model answers a suite: in batches, counting tokens and seconds, resumable."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from minimonkey.chat_answer import ChatAnswer
from minimonkey.conversation import image_tokens
from minimonkey.scripts.evaluation.dropping import selection
from minimonkey.scripts.evaluation.encoded import EncodedOnce
from minimonkey.scripts.evaluation.metrics import METRICS, nearest_reference
from minimonkey.scripts.evaluation.predictions import Predictions
from minimonkey.scripts.evaluation.suites import Item, Suite
from minimonkey.scripts.evaluation.ways import SMALLER
from minimonkey.tiling import RANGE_NAMES, share_tile_budget


@dataclass(frozen=True)
class Answering:
    """A model and how it is asked.

    Args:
        images_kwargs: Options of the image processor: preset, tile ranges.
        scm_keep_ratio: Share of the detailed tokens that stay; None: no compression.
        compressor: Which tokens are dropped, see ways.py; None: as published. "smaller-TILING" drops none, but cuts
            the image in so few tiles by TILING that there are no more tokens.
        scm_layer: The layer whose attention decides; None: the configuration's.
        stop_repetition: Whether answers that repeat themselves are ended.
    """

    model: Any
    processor: Any
    max_new_tokens: int
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    scm_keep_ratio: float | None = None
    compressor: str | None = None
    scm_layer: int | None = None
    stop_repetition: bool = False

    @property
    def _smaller_tiling(self) -> str | None:
        is_smaller = self.scm_keep_ratio is not None and (self.compressor or "").startswith(SMALLER)
        return self.compressor.removeprefix(SMALLER) if is_smaller else None

    def __call__(self, items: list[Item], images: list[list[Image.Image]]) -> list[ChatAnswer]:
        """Answer a batch."""
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "images_kwargs": self.images_kwargs}
        if self.scm_layer is not None:
            options["scm_layer"] = self.scm_layer
        options |= {"stop_repetition": self.stop_repetition, "return_dict": True}
        if self._smaller_tiling is not None:
            return self._answer_by_budget(items, images, options)
        if self.scm_keep_ratio is not None:
            choice, _, queries = (self.compressor or "scm").partition("@")
            select = selection(choice, [item.id for item in items])
            options |= {"use_scm": True, "scm_keep_ratio": self.scm_keep_ratio, "scm_select": select}
            options |= {"scm_queries": queries} if queries else {}
        return self.model.batch_chat(self.processor, images, [item.question for item in items], **options)

    def _answer_by_budget(self, items: list[Item], images: list[list[Image.Image]], options: dict) -> list[ChatAnswer]:
        """Answer those items together whose images have as many tiles to share."""
        options = {name: value for name, value in options.items() if name != "scm_layer"}
        options["images_kwargs"] = {**self.images_kwargs, "tiling": self._smaller_tiling}
        budgets, answers = [self._tile_budget(pictures) for pictures in images], [None] * len(items)
        for budget in sorted(set(budgets)):
            rows = [row for row, own in enumerate(budgets) if own == budget]
            questions = [items[row].question for row in rows]
            own = self.model.batch_chat(
                self.processor, [images[row] for row in rows], questions, tile_budget=budget, **options
            )
            for row, answer in zip(rows, own):
                answers[row] = answer
        return answers

    def _tile_budget(self, images: list[Image.Image]) -> int:
        """Return how many tiles have no more tokens than these images have when compressed."""
        _, read = self._count(images)
        return max(len(images), read // self.model.config.image_seq_length)

    def open(self, item: Item) -> list[Image.Image]:
        """Open the images of an item, upright."""
        reader = self.processor.image_processor
        return [reader.process_image(reader.fetch_images(image)) for image in item.images]

    def count_tokens(self, images: list[Image.Image]) -> tuple[int, int]:
        """Count the image tokens of the prompt, and how many of them the language model reads."""
        if self._smaller_tiling is None:
            return self._count(images)
        reader, budget = self.processor.image_processor, self._tile_budget(images)
        options = {**self.images_kwargs, "tiling": self._smaller_tiling}
        ranges = share_tile_budget(budget, len(images), reader.tile_ranges(**options), reader.use_thumbnail)
        options |= dict(zip(RANGE_NAMES, ranges))
        tiles = sum(sum(reader.count_tiles(image.height, image.width, options)) for image in images)
        return (tiles * self.model.config.image_seq_length,) * 2

    def _count(self, images: list[Image.Image]) -> tuple[int, int]:
        reader, per_tile = self.processor.image_processor, self.model.config.image_seq_length
        if self.images_kwargs.get("drop_blank"):  # which depends on the pixels
            counts = reader(images, **self.images_kwargs)["tile_counts"]
        else:
            counts = [reader.count_tiles(image.height, image.width, self.images_kwargs) for image in images]
        tokens = per_tile * int(sum(map(sum, counts)))
        if self.model.config.mining or reader.cuts_slices(self.images_kwargs):
            layouts = [self.processor.image_layout(image.height, image.width, self.images_kwargs) for image in images]
            tokens = sum(image_tokens(layout, per_tile) for layout in layouts)
        if self.scm_keep_ratio is None:
            return tokens, tokens
        detailed = [per_tile * int(count[0]) for count in counts]
        return tokens, tokens - sum(count - int(count * self.scm_keep_ratio) for count in detailed)


@dataclass(frozen=True)
class Asked:
    """A way to ask a suite, and where its answers go; `noted` is added to each that is new."""

    answering: Answering
    predictions: Predictions
    noted: dict[str, Any] = field(default_factory=dict)


def answer_suite(suite: Suite, ways: list[Asked], batch_size: int) -> list[list[dict]]:
    """Return one prediction for each item, in order, by each way; items that already have one are not asked again.

    The ways take turns at every batch, and tiles that several of them show are encoded once; `seconds` count as if each had
    encoded its own. A batch of which some are missing is asked as a whole, since the other items change the last bits of an
    item's numbers.
    """
    for start in range(0, len(suite), batch_size):
        indices = range(start, min(start + batch_size, len(suite)))
        ids = {suite.ids[index] for index in indices}
        missing = [(way, ids - way.predictions.lines.keys()) for way in ways]
        if any(lacking for _, lacking in missing):
            items = [suite.item(index) for index in indices]
            encoded = EncodedOnce(ways[0].answering.model)
            with encoded.in_place() if len(ways) > 1 else nullcontext():
                for way, lacking in missing:
                    lines = _answer_batch(items, way.answering, encoded) if lacking else []
                    way.predictions.add([line | way.noted for line in lines if line["id"] in lacking])
        print(f"{indices.stop}/{len(suite)}", end="\r", file=sys.stderr)
    return [[way.predictions.lines[item_id] for item_id in suite.ids] for way in ways]


def _answer_batch(items: list[Item], answering: Answering, encoded: EncodedOnce) -> list[dict]:
    started, saved = time.perf_counter(), encoded.seconds_saved
    images = [answering.open(item) for item in items]
    answers = answering(items, images)
    seconds = (time.perf_counter() - started + encoded.seconds_saved - saved) / len(items)
    return [
        prediction(item, answer.text, answering.count_tokens(pictures))
        | {"seconds": round(seconds, 4), "finish_reason": answer.finish_reason}
        for item, answer, pictures in zip(items, answers, images)
    ]


def prediction(item: Item, answer: str, tokens: tuple[int, int] = (0, 0)) -> dict:
    """Return what a predictions file says about an item."""
    reference, edits = nearest_reference(answer, item.answers)
    return {
        "id": item.id,
        "question": item.question,
        "answers": item.answers,
        "reference": reference,
        "answer": answer,
        "metric": item.metric,
        "score": METRICS[item.metric](answer, item.answers),
        "edits": edits,
        "image_tokens": tokens[0],
        "image_tokens_read": tokens[1],
    }
