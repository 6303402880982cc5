"""What happens between a question on the demo page and its answer: conversations, the model's stream, and what is shown of it.

    answerer = Answerer(processor, model)
    for step in answerer.ask(Conversation(), "What is the total?", read_file("receipt.png"), Settings(use_scm=True)):
        print(step.answer, step.figures)

Knows nothing of the browser. A conversation is one visitor's own and changes only when an answer is complete.
"""

import copy
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from minimonkey.chat_answer import AnswerStream, ChatAnswer
from minimonkey.conversation import get_template
from minimonkey.scripts.demonstration.media import Medium
from minimonkey.scripts.reading.confidence import part_confidence, token_spans
from minimonkey.scripts.visualize import draw, lit_tokens


MOST_IMAGES = 16  # of a conversation, frames of videos among them; they stay in memory
MOST_PIXELS = 64_000_000  # of all of them
DRAWN_SIDE = 1600  # pixels, at most
MOST_QUESTION = 4000  # characters
MOST_TURNS = 50

Lit = list[list[bool]] | None
"""Which detailed tokens of an image are read, by rows over the whole image; None: it has none, or all are."""


@dataclass(frozen=True)
class Settings:
    """What a visitor chose for the next answer.

    Args:
        preset: Tile ranges by their name in `tiling.PRESETS`; empty: those of the processor.
        scm_keep_ratio: Share of the detailed tokens that stay with `use_scm`.
    """

    preset: str = ""
    use_scm: bool = False
    scm_keep_ratio: float = 0.5
    max_new_tokens: int = 256

    @property
    def images_kwargs(self) -> dict[str, Any]:
        return {"preset": self.preset} if self.preset else {}


@dataclass(frozen=True)
class Drawing:
    """An image with the seams of its grids, and of its detailed tokens those bright that the model read."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Figures:
    """What an answer took. Tokens of the prompt are those of the whole conversation; the model read `read_tokens` of them, the
    beginning of which it may have remembered. Seconds are from the question on."""

    first_seconds: float
    seconds: float
    answer_tokens: int = 0
    prompt_tokens: int = 0
    read_tokens: int = 0
    tiles: int = 0
    confidence: float | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Step:
    """The answer so far; `figures` and `words` come with the last step, `drawings` whenever they changed.

    `words` are the words of the answer with the confidence of each, see `reading.confidence`.
    """

    answer: str
    drawings: list[Drawing] | None = None
    figures: Figures | None = None
    words: list[tuple[str, float]] | None = None


@dataclass(eq=False)
class Conversation:
    """One visitor's turns, as messages for `chat`, with their images and videos, and how these were last drawn."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    _stream: AnswerStream | None = None

    def stop(self) -> None:
        """End the answer that is being made, if there is one; what there is of it stays."""
        if self._stream is not None:
            self._stream.close()


class Answerer:
    """A model that answers visitors, several at once.

    Args:
        conversations: How many of them the model remembers, so that later turns cost only what is new.
        remembered_bytes: What these may take together.
    """

    def __init__(self, processor, model, conversations: int = 8, remembered_bytes: int = 2 * 2**30):
        self.processor, self.model = copy.deepcopy(processor), model
        self.processor.image_processor.untrusted_sources = True  # messages hold images, never paths
        model.remembered_conversations, model.remembered_bytes = conversations, remembered_bytes

    def ask(self, conversation: Conversation, question: str, media: list[Medium], settings: Settings) -> Iterator[Step]:
        """Answer a question about new images and videos and all earlier ones, step by step.

        Raises:
            ValueError: No question, one that is too long, more than the conversation may hold, or a prompt that the model
                cannot take.
        """
        everything = [*conversation.media, *media]
        _check(conversation, question, everything)
        content = [*(medium.item for medium in media), {"type": "text", "text": question}]
        messages = [*conversation.messages, {"role": "user", "content": content}]
        yield Step("", self._draw(everything, settings) if media else None)
        start, first = time.perf_counter(), None
        scm = {"use_scm": True, "scm_keep_ratio": settings.scm_keep_ratio} if settings.use_scm else {}
        with self.model.chat(
            self.processor,
            messages=messages,
            images_kwargs=settings.images_kwargs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            stop_repetition=True,
            return_dict=True,
            stream=True,
            **scm,
        ) as stream:
            conversation._stream = stream
            for _ in stream:
                first = first or time.perf_counter() - start
                yield Step(stream.text)
            answer = stream.result
        seconds = time.perf_counter() - start
        conversation._stream = None
        counts, lit = self._look_into(messages, settings)
        outcome = {"confidence": answer.confidence, "finish_reason": answer.finish_reason}
        figures = Figures(first or seconds, seconds, len(answer.token_ids), **counts, **outcome)
        drawings = self._draw(everything, settings, lit)
        if answer.text:
            conversation.messages = [*messages, {"role": "assistant", "content": answer.text}]
            conversation.media, conversation.drawings = everything, drawings
        yield Step(answer.text, drawings, figures, words_of(answer, self.processor.tokenizer))

    def _draw(self, media: list[Medium], settings: Settings, lit: list[Lit] = ()) -> list[Drawing]:
        """Draw images with their seams, and frames of videos as they are.

        Args:
            lit: Of each of them, which detailed tokens the model read; by default all.
        """
        processor, drawings, lit = self.processor.image_processor, [], iter(lit)
        for medium in media:
            for number, image in enumerate(medium.shown, 1):
                own = next(lit, None)
                if medium.is_video:
                    drawings.append(Drawing(image, f"{medium.name}, frame {number}: 1 tile"))
                    continue
                grids = processor.choose_grids(image.height, image.width, settings.images_kwargs)
                tiles = processor.count_tiles(image.height, image.width, settings.images_kwargs)
                parts = [f"{columns}×{rows}" for (columns, rows), count in zip(grids, tiles) if count]
                caption = f"{medium.name}: {' + '.join([*parts, '1'])} tile{'s' if parts else ''}"
                if own is not None:
                    caption += f", {sum(map(sum, own))} of {len(own) * len(own[0])} kept"
                small = image.copy()
                small.thumbnail((DRAWN_SIDE, DRAWN_SIDE))
                drawings.append(Drawing(draw(small, *grids, own or [[True]]), caption))
        return drawings

    def _look_into(self, messages: list[dict], settings: Settings) -> tuple[dict[str, int], list[Lit]]:
        """Count the tiles and tokens of a prompt, and say which detailed tokens of each of its images were read.

        This is a second look at the prompt, after the answer, so that nobody waits for it.
        """
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images_kwargs": settings.images_kwargs},
        ).to(self.model.device, self.model.dtype)
        ids = inputs["input_ids"][0]
        tokens = len(ids)
        if "pixel_values" not in inputs:
            return {"prompt_tokens": tokens, "read_tokens": tokens, "tiles": 0}, []
        tiles, per_tile = inputs["tile_counts"], self.model.tokens_per_tile(inputs["pixel_values"])
        counts = {"prompt_tokens": tokens, "read_tokens": tokens, "tiles": int(tiles.sum())}
        if not (settings.use_scm and int(tiles[:, 0].sum())):
            return counts, []
        # An image is scored by the turn that brought it, up to where that turn's answer begins: as far behind the end of its
        # question as this prompt goes on behind the last question.
        separator = self.processor.tokenizer.convert_tokens_to_ids(get_template(self.model.config.template).separator)
        separators = (ids == separator).nonzero().flatten().cpu()
        ends = separators.flip(0)[::2].flip(0) + tokens - separators[-1]
        positions = (ids == self.model.config.image_token_id).nonzero().flatten().cpu()
        first = positions[torch.cat([torch.tensor([0]), (tiles.sum(dim=1).cpu() * per_tile).cumsum(0)[:-1]])]
        (kept,) = self.model.kept_positions(
            **inputs,
            scm_keep_ratio=settings.scm_keep_ratio,
            scm_query_ends=ends[torch.searchsorted(ends, first)].tolist(),
        )
        counts["read_tokens"] = len(kept)
        is_transposed = self.model.config.pixel_shuffle_version == "v1"
        return counts, [
            lit_tokens(kept.cpu(), start, (grid[0], grid[1]), per_tile, is_transposed) if count else None
            for start, grid, count in zip(first.tolist(), inputs["tile_grids"].tolist(), tiles[:, 0].tolist())
        ]


def words_of(answer: ChatAnswer, tokenizer) -> list[tuple[str, float]]:
    """Return the words of an answer, white space after them included, with the confidence of each."""
    text, spans = token_spans(tokenizer, answer.token_ids)
    return [
        (match[0], part_confidence(match.span(1), spans, answer.log_probabilities or []))
        for match in re.finditer(r"(\S+)\s*", text)
    ]


def _check(conversation: Conversation, question: str, media: list[Medium]) -> None:
    """Raise `ValueError` for what one conversation cannot hold."""
    if not question.strip():
        raise ValueError("Write a question about what you uploaded, for example: Read the text.")
    if len(question) > MOST_QUESTION:
        raise ValueError(f"The question has {len(question)} characters, the limit is {MOST_QUESTION}.")
    if len(conversation.messages) >= 2 * MOST_TURNS:
        raise ValueError(f"This conversation has {MOST_TURNS} turns, the limit; start a new one.")
    images = [image for medium in media for image in medium.shown]
    pixels = sum(image.width * image.height for image in images)
    if len(images) > MOST_IMAGES or pixels > MOST_PIXELS:
        raise ValueError(
            f"That makes {len(images)} images of {pixels / 10**6:.0f} million pixels in this conversation, pages and frames "
            f"counted; the limits are {MOST_IMAGES} and {MOST_PIXELS // 10**6} million. Start a new one, or choose fewer pages."
        )
