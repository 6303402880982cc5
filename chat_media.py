"""The conversations of a call of `chat`: which picture stands at which place of the text.

Questions get placeholders for pictures and videos that have none, histories are checked, videos become frames, tiles that
the caller cut are split by picture. Knows text and pictures; no tokens and no model.
"""

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from .chat_arguments import ChatArguments
from .conversation import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, check_history
from .processing_minimonkey import (
    check_placeholders,
    count_placeholders,
    flatten_pictures,
    list_videos,
    place_frames,
    with_pages,
)
from .tiling import RANGE_NAMES, SINGLE_TILE, share_tile_budget


@dataclass
class Picture:
    """A picture to cut, and the image processor's options for it; or the tiles (t, 3, S, S) that the caller cut."""

    source: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Conversation:
    """One row of a call: the turns as the history keeps them, and as the prompt has them, with the frames of videos."""

    question: str
    history: list[tuple[str, str]]
    pictures: list[Picture]
    prompt_question: str = ""
    prompt_history: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self.prompt_question, self.prompt_history = self.question, self.history

    def questions(self) -> list[str]:
        """What may hold placeholders; in an answer `<image>` and `<video>` are words."""
        return [*(asked for asked, _ in self.history), self.question]


def conversation_of(bound: ChatArguments) -> Conversation:
    """The one conversation of a call of `chat`.

    Raises:
        ValueError: Placeholders and pictures or videos of different number, a video that cannot be read.
    """
    history = check_history(bound.history)
    if bound.pixel_values is None:
        pictures = flatten_pictures(bound.images)
        return _with_media(bound, bound.question, history, pictures, list_videos(bound.videos), "The text")
    pictures = [Picture(tiles) for tiles in _split_tiles(bound)]
    question = bound.question if history else _place_images(bound.question, history, len(pictures))
    conversation = Conversation(question, history, pictures)
    _check(conversation, len(pictures), "The text")
    return conversation


def conversations_of(bound: ChatArguments) -> list[Conversation]:
    """The conversations of a call of `batch_chat`; raises `ValueError` as `conversation_of` does."""
    rows = len(bound.questions)
    histories = [check_history(history) for history in bound.history or [None] * rows]
    if len(histories) != rows:
        raise ValueError(f"{rows} questions were given, but {len(histories)} histories.")
    if bound.pixel_values is not None:
        return _rows_of_tiles(bound, histories)
    images, videos = _rows(bound.images, rows, "images"), _rows(bound.videos, rows, "videos")
    return [
        _with_media(
            bound,
            question,
            history,
            flatten_pictures(row_images),
            list_videos(row_videos),
            f"Row {row}",
        )
        for row, (question, history, row_images, row_videos) in enumerate(
            zip(bound.questions, histories, images, videos)
        )
    ]


def _with_media(
    bound: ChatArguments, question: str, history: list[tuple[str, str]], images: list, videos: list, subject: str
) -> Conversation:
    """A conversation whose placeholders are filled: each image and each frame of a video is one of its pictures."""
    videos_kwargs = bound.videos_kwargs
    if images:
        texts = [*(asked for asked, _ in history), question]
        images = with_pages(images, texts, bound.processor.image_processor, bound.images_kwargs)
    if videos:
        untrusted = bound.processor.image_processor.untrusted_sources
        videos_kwargs = {"untrusted_sources": untrusted, **videos_kwargs}
    if images or not history:
        question = _place_images(question, history, len(images))
    if videos:
        question = _place_videos(question, history, len(videos))
    conversation = Conversation(question, history, [])
    _check(conversation, len(images), subject)
    _check(conversation, len(videos), subject, VIDEO_PLACEHOLDER)
    expanded, pictures = place_frames(
        conversation.questions(), images, _picture_options(bound, len(images)), videos, videos_kwargs
    )
    conversation.pictures = [Picture(*picture) for picture in pictures]
    conversation.prompt_question = expanded[-1]
    conversation.prompt_history = [(asked, answered) for asked, (_, answered) in zip(expanded, history)]
    return conversation


def _tile_counts(target_aspect_ratio, tiles: list[int]) -> torch.Tensor:
    """Detailed, adaptive and thumbnail tiles (pictures, 3) of pictures that the caller cut.

    Raises:
        ValueError: Not one (columns, rows) for each picture, or a grid of more tiles than the picture has.
    """
    ratios = torch.as_tensor(target_aspect_ratio)
    ratios = ratios[None] if ratios.ndim == 1 else ratios
    if tuple(ratios.shape) != (len(tiles), 2) or ratios.is_floating_point() or (ratios < 1).any():
        raise ValueError(
            f"target_aspect_ratio must be (columns, rows) of the detailed grid for each of {len(tiles)} pictures, got "
            f"{target_aspect_ratio!r}."
        )
    counts = []
    for grid, total in zip(map(tuple, ratios.tolist()), tiles):
        detailed = 0 if grid == SINGLE_TILE else grid[0] * grid[1]  # a grid of one tile gives none, see tiling.py
        if detailed > total:
            raise ValueError(
                f"target_aspect_ratio {grid} means {detailed} detailed tiles, but the picture has {total}."
            )
        thumbnail = min(total - detailed, 1)
        counts.append((detailed, total - detailed - thumbnail, thumbnail))
    return torch.tensor(counts)


def counts_of_tiles(bound: ChatArguments, pictures: list[Picture]) -> torch.Tensor:
    """tile_counts (pictures, 3) of pictures that the caller cut; which tiles are detailed only SCM needs to know."""
    tiles = [len(picture.source) for picture in pictures]
    return _tile_counts(bound.target_aspect_ratio, tiles) if bound.use_scm else torch.tensor([[0, 0, n] for n in tiles])


def _split_tiles(bound: ChatArguments) -> tuple[torch.Tensor, ...]:
    """The tiles of each picture that the caller cut."""
    tiles = bound.num_patches_list
    tiles = [len(bound.pixel_values)] if tiles is None else [int(count) for count in tiles]
    if not tiles or min(tiles) < 1:
        raise ValueError(
            f"Each picture needs at least one tile, but there are {tiles}; pass None for pixel_values to ask without a picture."
        )
    if sum(tiles) != len(bound.pixel_values):
        raise ValueError(
            f"num_patches_list {tiles} adds up to {sum(tiles)}, but pixel_values hold {len(bound.pixel_values)} tiles."
        )
    return bound.pixel_values.split(tiles)


def _rows_of_tiles(bound: ChatArguments, histories: list[list[tuple[str, str]]]) -> list[Conversation]:
    """The rows of a batch of tiles: the pictures belong to the rows by their placeholders."""
    pictures = [Picture(tiles) for tiles in _split_tiles(bound)]
    remaining, rows = iter(pictures), []
    for question, history in zip(bound.questions, histories):
        question = question if IMAGE_PLACEHOLDER in question else _place_images(question, history, 1)
        conversation = Conversation(question, history, [])
        conversation.pictures = list(islice(remaining, count_placeholders(conversation.questions())))
        rows.append(conversation)
    check_placeholders([text for conversation in rows for text in conversation.questions()], len(pictures))
    return rows


def _check(conversation: Conversation, given: int, subject: str, placeholder: str = IMAGE_PLACEHOLDER) -> None:
    """`check_placeholders`, with what is most often forgotten."""
    try:
        check_placeholders(conversation.questions(), given, subject, placeholder)
    except ValueError as error:
        in_history = count_placeholders([asked for asked, _ in conversation.history], placeholder)
        if given >= in_history:
            raise
        raise ValueError(
            f"{error} The history is about {in_history} of them: every turn is given those of the whole conversation, in order."
        ) from error


def _rows(media, rows: int, name: str) -> list:
    """One entry of pictures or videos for each row of a batch."""
    if media is None:
        return [None] * rows
    if not isinstance(media, (list, tuple)) or len(media) != rows:
        raise ValueError(f"{name} must be a list with one entry for each of the {rows} questions.")
    return list(media)


def _picture_options(bound: ChatArguments, images: int) -> dict[str, Any]:
    """The image processor's options, with what each picture gets of a tile budget."""
    if bound.tile_budget is None or not images:
        return bound.images_kwargs
    image_processor = bound.processor.image_processor
    use_thumbnail = bound.images_kwargs.get("use_thumbnail", image_processor.use_thumbnail)
    ranges = image_processor.tile_ranges(**bound.images_kwargs)
    options = {name: value for name, value in bound.images_kwargs.items() if name != "preset"}
    return {**options, **dict(zip(RANGE_NAMES, share_tile_budget(bound.tile_budget, images, ranges, use_thumbnail)))}


def _place_images(question: str, history: list[tuple[str, str]], images: int) -> str:
    """`question` with placeholders in front for pictures that have none; several new ones are numbered."""
    in_history = count_placeholders([asked for asked, _ in history])
    missing = images - in_history
    if missing < 1 or IMAGE_PLACEHOLDER in question:
        return question
    if missing == 1:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    first = in_history + 1
    return "".join(f"Image-{first + i}: {IMAGE_PLACEHOLDER}\n" for i in range(missing)) + question


def _place_videos(question: str, history: list[tuple[str, str]], videos: int) -> str:
    """`question` with placeholders in front for videos that have none."""
    missing = videos - count_placeholders([asked for asked, _ in history], VIDEO_PLACEHOLDER)
    return question if VIDEO_PLACEHOLDER in question else f"{VIDEO_PLACEHOLDER}\n" * max(missing, 0) + question
