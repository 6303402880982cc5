"""A conversation as token ids and labels, with the prompts that `model.chat` builds.

The ids of a training example up to an answer are those of the prompt that `chat` would ask this turn with: the same template,
the same protection of text that spells a control token, the answers of earlier turns without spaces around. Labels are the
answers and the separator that ends each; everything else is masked.
"""

from dataclasses import dataclass

import torch

from minimonkey.conversation import (
    IMAGE_PLACEHOLDER,
    begins_with_bos,
    build_prompt,
    control_tokens,
    encode,
    get_template,
    protect,
)
from minimonkey.processing_minimonkey import count_placeholders, expand_placeholders
from minimonkey.tiling import RANGE_NAMES, share_tile_budget


IGNORED = -100  # of torch's cross entropy
# Tiles stay bytes until the model normalises them on its device: a quarter of the memory to hand over.
AS_BYTES = {"do_rescale": False, "do_normalize": False}


@dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer); in questions `<image>` stands where a picture belongs."""

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    """Instead of the model's own system message."""


class Encoder:
    """Conversations and pictures to samples for one model.

    Args:
        processor: The model's `MiniMonkeyProcessor`.
        config: The model's configuration; its template and system message are used.
        grounding_tokens: Whether <ref>, <box> and <quad> in the text are control tokens.
    """

    def __init__(self, processor, config, grounding_tokens: bool = False):
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.tokens_per_tile = processor.image_seq_length
        self.template = get_template(config.template)
        self.system_message = config.system_message
        self.patches_per_side = config.tile_size // config.vision_config.patch_size[0]
        self.bos = self.tokenizer.bos_token if begins_with_bos(self.tokenizer) else ""
        self._spellings = control_tokens(self.tokenizer, grounding_tokens)
        # Only questions hold placeholders; elsewhere `<image>` is a word, as in `chat`.
        self._words = [*self._spellings, IMAGE_PLACEHOLDER]

    def ids_and_labels(self, conversation: Conversation, tiles: list[int]) -> tuple[list[int], list[int]]:
        """Token ids (N) and labels (N) of a conversation whose pictures have this many tiles each.

        Raises:
            ValueError: Placeholders and pictures of different number, or an answer whose first letters the tokenizer joins to
                the prompt, so that the prompt of training would not be that of `chat`.
        """
        ids, labels = [], []
        for turn, (_, answer) in enumerate(conversation.turns):
            prompt = self._prompt(conversation, turn)
            whole = prompt + protect(answer.strip(), self._words) + self.template.separator
            is_last = turn == len(conversation.turns) - 1
            prompt_ids, whole_ids = self._encode(prompt, tiles), self._encode(whole, tiles, is_last)
            if whole_ids[: len(prompt_ids)] != prompt_ids or prompt_ids[: len(ids)] != ids:
                raise ValueError(f"The tokenizer joins the answer {answer[:40]!r} to the prompt before it.")
            labels += [IGNORED] * (len(prompt_ids) - len(ids)) + whole_ids[len(prompt_ids) :]
            ids = whole_ids
        return ids, labels

    def _prompt(self, conversation: Conversation, turn: int) -> str:
        """The prompt of a turn, as `chat` writes it."""
        system = self.system_message if conversation.system is None else conversation.system
        history = [
            (protect(asked, self._spellings), protect(answered.strip(), self._words))
            for asked, answered in conversation.turns[:turn]
        ]
        question = protect(conversation.turns[turn][0], self._spellings)
        system = None if system is None else protect(system, self._words)
        return self.bos + build_prompt(self.template, question, history, system)

    def _encode(self, text: str, tiles: list[int], is_last: bool = False) -> list[int]:
        tiles = tiles if is_last else tiles[: count_placeholders([text])]
        return encode(self.tokenizer, expand_placeholders([text], tiles, self.tokens_per_tile)[0])

    def text_length(self, conversation: Conversation, pictures: int) -> int:
        """Tokens of a conversation without those of its tiles."""
        return len(self.ids_and_labels(conversation, [0] * pictures)[0])

    def image_length(
        self, sizes: list[tuple[int, int]], ranges: tuple[int, int, int, int], use_thumbnail: bool | None = None
    ) -> int:
        """Tokens that the tiles of pictures of these (height, width) take; `use_thumbnail` is the processor's if None."""
        options = self._tile_options(ranges, len(sizes), use_thumbnail)
        tiles = [self.image_processor.get_number_of_image_patches(*size, options) for size in sizes]
        return sum(tiles) * self.tokens_per_tile

    def __call__(
        self,
        conversation: Conversation,
        pictures: list,
        ranges: tuple[int, int, int, int],
        use_thumbnail: bool | None = None,
    ) -> dict:
        """One sample: input_ids, labels (N) and, with pictures, pixel_values (T, 3, S, S) as uint8, tile_grids (images, 4)."""
        sample, tiles = {}, []
        if pictures:
            options = {**self._tile_options(ranges, len(pictures), use_thumbnail), **AS_BYTES}
            cut = self.image_processor(pictures, return_tensors="pt", **options)
            tiles = cut.pop("tile_counts").sum(dim=1).tolist()
            sample = dict(cut)
        ids, labels = self.ids_and_labels(conversation, tiles)
        return {**sample, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _tile_options(self, ranges: tuple[int, int, int, int], pictures: int, use_thumbnail: bool | None) -> dict:
        if use_thumbnail is None:
            use_thumbnail = self.image_processor.use_thumbnail
        return {**tile_options(ranges, pictures, use_thumbnail), "use_thumbnail": use_thumbnail}


def tile_options(ranges: tuple[int, int, int, int], pictures: int, use_thumbnail: bool = True) -> dict[str, int]:
    """Tile ranges as options of the image processor. Several pictures of an example share the tiles of one, each of them
    with at least one; `chat` does the same with that `tile_budget`."""
    if pictures > 1:
        _, most, _, adaptive_most = ranges
        budget = max(pictures, most + adaptive_most + use_thumbnail)
        ranges = share_tile_budget(budget, pictures, ranges, use_thumbnail)
    return dict(zip(RANGE_NAMES, ranges))
