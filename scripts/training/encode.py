"""A conversation as token ids and labels, with the prompts that `model.chat` builds.

The ids of a training example up to an answer are those of the prompt that `chat` would ask this turn with: the same template,
the same protection of text that spells a control token, the answers of earlier turns stripped of spaces. Labels are the
answers and the separator that ends each; everything else is masked.
"""

from dataclasses import dataclass

import torch

from minimonkey.conversation import ImageLayout, encode_parts, get_template, image_text, render
from minimonkey.tiling import RANGE_NAMES, share_tile_budget


IGNORED = -100  # of torch's cross entropy
# Tiles stay bytes until the model normalises them on its device: a quarter of the memory to transfer.
AS_BYTES = {"do_rescale": False, "do_normalize": False}


@dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer); in questions `<image>` stands where an image belongs."""

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    """Instead of the model's own system message."""


class Encoder:
    """Encodes conversations and images as samples for one model.

    Args:
        processor: The model's `MiniMonkeyProcessor`.
        config: The model's configuration; its template and system message are used.
        grounding_tokens: Whether <ref>, <box> and <quad> in the text are control tokens.
    """

    def __init__(self, processor, config, grounding_tokens: bool = False):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_processor = processor.image_processor
        self.tokens_per_tile, self.image_token_id = processor.image_seq_length, config.image_token_id
        self.template = get_template(config.template)
        self.system_message = config.system_message
        self.patches_per_side = config.tile_size // config.vision_config.patch_size[0]
        self.grounding_tokens = grounding_tokens

    def ids_and_labels(self, conversation: Conversation, tiles: list[ImageLayout]) -> tuple[list[int], list[int]]:
        """Return token ids (N) and labels (N) of a conversation whose images have this many tiles each, or these slices.

        Raises:
            ValueError: The numbers of placeholders and images differ, or an answer whose first letters the tokenizer joins to
                the prompt, so that the prompt of training would not be that of `chat`.
        """
        system = self.system_message if conversation.system is None else conversation.system
        turns = [(asked, answered.strip()) for asked, answered in conversation.turns]
        whole = render(self.tokenizer, self.template, turns, system, tiles, self.tokens_per_tile, self.grounding_tokens)
        labels = [IGNORED] * len(whole.token_ids)
        for start, stop in whole.answers:
            labels[start:stop] = whole.token_ids[start:stop]
        return whole.token_ids, labels

    def text_length(self, conversation: Conversation, pictures: int) -> int:
        """Count the tokens of a conversation without those of its tiles."""
        return len(self.ids_and_labels(conversation, [0] * pictures)[0])

    def image_size(
        self, sizes: list[tuple[int, int]], ranges: tuple[int, int, int, int], use_thumbnail: bool | None = None
    ) -> tuple[int, int]:
        """Count the tokens and the tiles of images of these (height, width); `use_thumbnail` is the processor's if None.

        Text that is written between slices counts as tokens of their image.
        """
        options = self._tile_options(ranges, len(sizes), use_thumbnail)
        tiles = sum(self.image_processor.get_number_of_image_patches(*size, options) for size in sizes)
        if not self.has_layouts:
            return tiles * self.tokens_per_tile, tiles
        layouts = [self.processor.image_layout(*size, options) for size in sizes]
        return sum(map(self._written_tokens, layouts)), tiles

    @property
    def has_layouts(self) -> bool:
        """Whether an image is written otherwise than by all of its square tiles."""
        return self.processor.mining or self.image_processor.cuts_slices()

    def _written_tokens(self, layout: ImageLayout) -> int:
        """Count the tokens of an image beyond its first start and its last end, which `text_length` counts."""
        if isinstance(layout, int):
            return self.tokens_per_tile * layout
        return len(encode_parts(self.tokenizer, [image_text(layout, self.tokens_per_tile)])[0]) - 2

    def __call__(
        self,
        conversation: Conversation,
        pictures: list,
        ranges: tuple[int, int, int, int],
        use_thumbnail: bool | None = None,
        with_counts: bool = False,
    ) -> dict:
        """Return a sample: input_ids, labels (N) and, with images, uint8 pixel_values (T, 3, S, S), tile_grids (images, 4).

        For slices and patch mining, or `with_counts`, there are also tile_counts (images, 3); of slices slice_values and
        slice_sizes stand for pixel_values.
        """
        sample, tiles = {}, []
        if pictures:
            options = {**self._tile_options(ranges, len(pictures), use_thumbnail), **AS_BYTES}
            cut = self.image_processor(pictures, return_tensors="pt", **options)
            tiles, sample = self.processor.image_layouts(cut), dict(cut)
            if not (self.has_layouts or with_counts):
                sample.pop("tile_counts")
        ids, labels = self.ids_and_labels(conversation, tiles)
        return {**sample, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _tile_options(self, ranges: tuple[int, int, int, int], pictures: int, use_thumbnail: bool | None) -> dict:
        if use_thumbnail is None:
            use_thumbnail = self.image_processor.use_thumbnail
        return {**tile_options(ranges, pictures, use_thumbnail), "use_thumbnail": use_thumbnail}


def tile_options(ranges: tuple[int, int, int, int], pictures: int, use_thumbnail: bool = True) -> dict[str, int]:
    """Return tile ranges as options of the image processor.

    Several images of an example share the tiles of one, each of them with at least one; `chat` does the same with that
    `tile_budget`.
    """
    if pictures > 1:
        _, most, _, adaptive_most = ranges
        budget = max(pictures, most + adaptive_most + use_thumbnail)
        ranges = share_tile_budget(budget, pictures, ranges, use_thumbnail)
    return dict(zip(RANGE_NAMES, ranges))
