"""Messages and images to model inputs: chat template, placeholders, token ids, padding.

    processor = AutoProcessor.from_pretrained("path/of/this/repository", trust_remote_code=True)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    model.generate(**inputs)

Knows no model. An image's place in the text is `<image>`; it becomes `<img>`, one `<IMG_CONTEXT>` for each image token of
its tiles, `</img>`. This happens in one place, `expand_placeholders`, from the tile counts of the image processor.
"""

import re
from collections.abc import Iterable
from math import isqrt
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature, ProcessingKwargs, ProcessorMixin, VideosKwargs

from .conversation import (
    IMAGE_END,
    IMAGE_PLACEHOLDER,
    IMAGE_START,
    IMAGE_TOKEN,
    VIDEO_PLACEHOLDER,
    check_messages,
    check_placeholders,
    check_text,
    control_tokens,
    encode_parts,
    expand_placeholders,
    has_images,
    has_protected_text,
    image_text,
    image_tokens,
    protect_messages,
)
from .grounding import draw_boxes, parse_boxes
from .guided_generation import generation_prompt
from .image_inputs import image_layouts
from .image_processing_minimonkey import EMPTY, MiniMonkeyImageProcessorKwargs, cut_images, list_images
from .multi_view import stitch_views
from .tiling import RANGE_NAMES, SLICES
from .transformers_bridge import MultiModalData, custom_object_save
from .video_frames import load_frames


VIDEO_OPTIONS = ("num_frames", "fps", "start", "end", "video_backend", "frame_tiles", "untrusted_sources")


class MiniMonkeyVideosKwargs(VideosKwargs, total=False):
    r"""
    start, end (`float`, *optional*):
        The part of the video that is shown, in seconds.
    video_backend (`str`, *optional*):
        What reads the file: "pyav", "decord", "torchcodec" or "opencv"; by default the first that is installed.
    frame_tiles (`int`, *optional*, defaults to 1):
        Most tiles of a frame, in one grid; of more than one, a thumbnail is added.
    untrusted_sources (`bool`, *optional*, defaults to that of the image processor):
        For servers: whether paths are refused, and URLs of addresses that are not public.
    """

    start: float | None
    end: float | None
    video_backend: str | None
    frame_tiles: int
    untrusted_sources: bool


class MiniMonkeyProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MiniMonkeyImageProcessorKwargs
    videos_kwargs: MiniMonkeyVideosKwargs
    _defaults = {
        "text_kwargs": {"padding": True, "return_mm_token_type_ids": False},
        "common_kwargs": {"return_tensors": "pt"},
    }


def placeholder_spans(texts: list[str], images: list[str]) -> list[list[dict[str, Any]]]:
    """Return where each `<image>` stood, where what is written of it stands now, in characters, and what that is, as
    transformers and vLLM ask for it.

    Args:
        images: What is written in the place of each `<image>`, in order.
    """
    remaining, spans = iter(images), []
    for text in texts:
        moved, own = 0, []
        for match in re.finditer(re.escape(IMAGE_PLACEHOLDER), text):
            written, start = next(remaining), match.start() + moved
            moved += len(written) - len(match[0])
            span = {"type": "image", "span": match.span(), "new_span": (start, start + len(written))}
            own.append({**span, "text": match[0], "replacement": written})
        spans.append(own)
    return spans


def expand_videos(texts: Iterable[str], frames: list[int]) -> tuple[list[str], list[str]]:
    """Put numbered frames where each `<video>` stands, `Frame1: <image>` and so on, as the published demo writes them.

    Args:
        texts: With one `<video>` for each video.
        frames: How many frames each video has.

    Returns:
        The texts, and for each of their images in order whether it is an `<image>` or a frame of a `<video>`.
    """
    videos, kinds = iter(frames), []

    def write(match: re.Match) -> str:
        if match[0] == IMAGE_PLACEHOLDER:
            kinds.append(IMAGE_PLACEHOLDER)
            return match[0]
        count = next(videos)
        kinds.extend([VIDEO_PLACEHOLDER] * count)
        return "\n".join(f"Frame{i + 1}: {IMAGE_PLACEHOLDER}" for i in range(count))

    pattern = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")
    return [pattern.sub(write, text) for text in texts], kinds


def place_frames(
    texts: list[str], images: list, images_kwargs: dict[str, Any], videos: list, videos_kwargs: dict[str, Any]
) -> tuple[list[str], list[tuple[Any, dict[str, Any]]]]:
    """Read videos and put their frames in their places.

    Args:
        texts: With one `<image>` for each image and one `<video>` for each video.
        images_kwargs: Options of the image processor.
        videos_kwargs: Of VIDEO_OPTIONS.

    Returns:
        The texts with `<image>` for every frame too, and in this order the images, each with the image processor's options.

    Raises:
        ValueError: See `video_options` and `video_frames.load_frames`.
    """
    sampling, frame_options = video_options(images_kwargs, videos_kwargs)
    frames = [load_frames(video, **sampling) for video in videos]
    texts, kinds = expand_videos(texts, [len(video) for video in frames])
    remaining = {
        IMAGE_PLACEHOLDER: iter([(image, images_kwargs) for image in images]),
        VIDEO_PLACEHOLDER: iter([(frame, frame_options) for video in frames for frame in video]),
    }
    return texts, [next(remaining[kind]) for kind in kinds]


def video_options(images_kwargs: dict[str, Any], videos_kwargs: dict[str, Any]) -> tuple[dict, dict]:
    """Return how frames of videos are chosen, and the image processor's options for them: one tile each, else as for images.

    Raises:
        ValueError: An option that videos do not have.
    """
    unknown = videos_kwargs.keys() - set(VIDEO_OPTIONS)
    if unknown:
        known = ", ".join(VIDEO_OPTIONS)
        raise ValueError(f"Unknown options of videos: {', '.join(sorted(map(str, unknown)))}; known are {known}.")
    sampling = dict(videos_kwargs)
    ranges = dict(zip(RANGE_NAMES, (1, sampling.pop("frame_tiles", 1), 1, 1)))
    if "video_backend" in sampling:
        sampling["backend"] = sampling.pop("video_backend")
    return sampling, {**images_kwargs, **ranges}  # which a preset leaves as they are


def _of_the_same_kind(mask, ids):
    """Return a mask (B, N) as a tensor, an array or lists, whichever the ids (B, N) are."""
    if isinstance(ids, torch.Tensor):
        return torch.as_tensor(mask)
    return np.asarray(mask) if isinstance(ids, np.ndarray) else mask


def list_videos(videos) -> list:
    """List the videos of a (nested) list, each a path, a URL or frames; a list of images is one video.

    Raises:
        ValueError: A list of nothing: None or an empty list in it, or an array that is not videos.
    """
    if videos is None or (isinstance(videos, (list, tuple)) and not videos):
        return []
    if 0 in getattr(videos, "shape", ()):
        raise ValueError(EMPTY.format("videos", f"an array of shape {tuple(videos.shape)}"))
    if getattr(videos, "ndim", 4) == 5:
        return [*videos]
    is_list = isinstance(videos, (list, tuple))
    if not is_list or all(isinstance(item, Image.Image) or getattr(item, "ndim", 4) < 4 for item in videos):
        return [videos]
    for item in videos:
        if item is None or (isinstance(item, (list, tuple)) and not item):
            raise ValueError(EMPTY.format("videos", repr(item)))
    return [video for item in videos for video in list_videos(item)]


class MiniMonkeyProcessor(ProcessorMixin):
    r"""
    The image processor and the tokenizer of a MiniMonkey as one.

    Args:
        image_processor: A `MiniMonkeyImageProcessor` or `MiniMonkeyImageProcessorPil`.
        tokenizer: A tokenizer that has `<img>`, `</img>` and `<IMG_CONTEXT>`. It gets `padding_side` "left" unless it was
            loaded with one.
        image_seq_length (int): Image tokens of one tile.
        chat_template (str, *optional*): A jinja template, see `conversation.chat_template_jinja`.
        projector (str): The model's, see `MiniMonkeyConfig`: with a "resampler" slices of any size have `image_seq_length`.
        mining (bool): Whether the model mines patches, so that an image has the tokens of its thumbnail alone.

    Raises:
        ValueError: The tokenizer lacks an image token.
    """

    valid_processor_kwargs = MiniMonkeyProcessorKwargs

    # Functions that users of a loaded processor could not import otherwise.
    load_frames = staticmethod(load_frames)
    parse_boxes = staticmethod(parse_boxes)
    draw_boxes = staticmethod(draw_boxes)
    stitch_views = staticmethod(stitch_views)
    generation_prompt = staticmethod(generation_prompt)

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template=None,
        projector: str = "mlp",
        mining: bool = False,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"  # as generation needs it; what is set there later is obeyed
        self.image_seq_length, self.projector, self.mining = image_seq_length, projector, mining
        if projector == "mlp" and image_processor.slice_multiple is None:
            image_processor.slice_multiple = self._token_side()
        self.image_token = IMAGE_PLACEHOLDER  # what stands in a prompt's text, as vLLM looks for it
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (IMAGE_START, IMAGE_END, IMAGE_TOKEN) if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {', '.join(missing)}; take that of a MiniMonkey folder, or import the checkpoint with "
                "scripts/import_checkpoint.py."
            )

    def __call__(self, images=None, text=None, videos=None, **kwargs: Any) -> BatchFeature:
        """Return the token ids of ready prompts and the tiles of their images.

        Args:
            images: As the image processor takes them; nested lists give each text its own.
            text: A prompt or a list of prompts with one `<image>` for each image and one `<video>` for each video. Control
                tokens in them count; text that is not to be trusted goes through `apply_chat_template(tokenize=True)`.
            videos: A path, a URL or frames, or a (nested) list of them. `<video>` becomes numbered frames of one tile each;
                `num_frames`, `fps`, `start` and `end` choose them, see `video_frames.load_frames`.
            **kwargs: Options of tokenizer, image processor and videos, flat or as `text_kwargs`, `images_kwargs` and
                `videos_kwargs`. By default rows are padded as `tokenizer.padding_side` says, "left" unless set, and tensors
                are returned; `return_tensors=None` leaves token ids as lists.

        Returns:
            input_ids, attention_mask (B, N) and, with images, pixel_values, tile_counts, tile_grids, or with slices
            slice_values and slice_sizes instead of pixel_values (see `MiniMonkeyImageProcessor.preprocess`).

        Raises:
            ValueError: No text, numbers of placeholders and of images or videos that differ, a video that cannot be read, or
                a limit that would cut an image.
        """
        if text is None:
            raise ValueError("text is missing; to cut pictures alone, call processor.image_processor(images).")
        as_lists = "return_tensors" in kwargs and kwargs["return_tensors"] is None
        merged = self._merged_options(kwargs)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str) for entry in texts):
            raise ValueError(
                f"text must be a string or a list of strings, got {type(text).__name__}; images come first."
            )
        for entry in texts:
            check_text(entry)
        images = self._check_images(texts, images, merged["images_kwargs"])
        image_inputs, layouts = {}, []
        prompts = texts
        if videos is not None and not (isinstance(videos, (list, tuple)) and not videos):  # chat windows send []
            prompts, image_inputs = self._with_frames(texts, images, videos, merged)
        elif images:
            image_inputs = self.image_processor(images, **merged["images_kwargs"])
        if image_inputs:
            layouts = self.image_layouts(image_inputs)
        expanded = expand_placeholders(prompts, layouts, self.image_seq_length)
        options = merged["text_kwargs"]
        text_inputs = self._encode(expanded, options)
        if options.get("return_text_replacement_offsets"):
            written = [image_text(layout, self.image_seq_length) for layout in layouts]
            text_inputs["text_replacement_offsets"] = placeholder_spans(prompts, written)
            if layouts:  # how many tiles are whose, in the words of other models, where vLLM looks for it
                text_inputs["image_grid_thw"] = [[int(sum(counts)), 1, 1] for counts in image_inputs["tile_counts"]]
        return BatchFeature(
            {**text_inputs, **image_inputs},
            tensor_type=None if as_lists else options.get("return_tensors"),
            skip_tensor_conversion=["text_replacement_offsets"],
        )

    def _token_side(self) -> int | None:
        """Return the side in pixels of what becomes one token; None if tokens are no squares of a tile."""
        side, tokens = self.image_processor.size["height"], isqrt(self.image_seq_length)
        return side // tokens if tokens**2 == self.image_seq_length and side % tokens == 0 else None

    def view_tokens(self, width: int, height: int) -> int:
        """Count the image tokens of a slice of this size in pixels."""
        if self.projector == "resampler":
            return self.image_seq_length
        return width // self._token_side() * (height // self._token_side())

    def image_layouts(self, image_inputs: dict[str, Any]) -> list:
        """Return how each image of the image processor's output is written, see `image_inputs.image_layouts`."""
        if image_inputs.get("slice_sizes") is None and not self.mining:
            return [int(sum(counts)) for counts in image_inputs["tile_counts"]]
        given = [image_inputs.get(name) for name in ("tile_counts", "tile_grids", "slice_sizes")]
        return image_layouts(*given, view_tokens=self.view_tokens, is_mined=self.mining)

    def image_layout(self, height: int, width: int, images_kwargs: dict | None = None):
        """Return how an image of this size is written, without its pixels."""
        reader, options = self.image_processor, images_kwargs or {}
        counts = [reader.count_tiles(height, width, options)]
        grids = [sum(reader.choose_grids(height, width, options), ())]
        sizes = [reader.slice_sizes(height, width, options)] if reader.cuts_slices(options) else None
        (layout,) = self.image_layouts({"tile_counts": counts, "tile_grids": grids, "slice_sizes": sizes})
        return layout

    def _merged_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Check the options of a call and return them by what they are for: text, images or videos."""
        for name in ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs"):
            if not isinstance(options.get(name, {}), dict):
                raise ValueError(f"{name} is a dict of options, got {options[name]!r}.")
        self.image_processor.check_options(options.get("images_kwargs", {}))  # says more than merging does
        try:
            merged = self._merge_kwargs(
                MiniMonkeyProcessorKwargs,
                tokenizer_init_kwargs={**self.tokenizer.init_kwargs, "padding_side": self.tokenizer.padding_side},
                **options,
            )
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"An option cannot work. {error}") from error
        self.image_processor.check_options(merged["images_kwargs"])
        return merged

    def _with_frames(
        self, texts: list[str], images, videos, merged: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Return the texts with the frames of their videos, and the tiles of images and frames in the order of the texts."""
        is_by_text = isinstance(videos, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in videos)
        if is_by_text and len(videos) == len(texts) > 1:
            videos = [video for row in videos for video in list_videos(row)]
        else:
            videos = list_videos(videos)
        check_placeholders(texts, len(videos), placeholder=VIDEO_PLACEHOLDER)
        given = {name: merged["videos_kwargs"].get(name) for name in VIDEO_OPTIONS}
        given = {name: value for name, value in given.items() if value is not None}
        given.setdefault("untrusted_sources", self.image_processor.untrusted_sources)
        texts, images = place_frames(texts, images, merged["images_kwargs"], videos, given)
        return texts, cut_images(self.image_processor, images)

    def _check_images(self, texts: list[str], images, options: dict[str, Any]) -> list:
        """Return the images in one list, with pages as images of their own; check that each has its placeholder."""
        is_by_text = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
        if is_by_text:
            if len(images) != len(texts):
                raise ValueError(f"{len(images)} lists of images were given for {len(texts)} texts.")
            rows = images if len(texts) > 1 else [list_images(images)]  # of several texts some may have no images
            found = []
            for row, (text, given) in enumerate(zip(texts, rows)):
                placeholders = text.count(IMAGE_PLACEHOLDER)
                of_row = self.image_processor.with_pages(list_images(given), placeholders, **options)
                check_placeholders([text], len(of_row), f"Row {row}")
                found += of_row
            return found
        placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
        images = self.image_processor.with_pages(list_images(images), placeholders, **options)
        check_placeholders(texts, len(images))
        return images

    def _encode(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Return token ids, padded as `options` say; nothing is added in front or behind."""
        ignored = ("add_special_tokens", "return_tensors", "return_text_replacement_offsets")
        options = {name: value for name, value in options.items() if name not in ignored and value is not None}
        with_types = options.pop("return_mm_token_type_ids", False)
        max_length = options.get("max_length", self.tokenizer.model_max_length)
        truncation = options.pop("truncation", False)
        padding = options.pop("padding", False)
        if padding != "max_length":
            options.pop("max_length", None)
        if options.pop("return_offsets_mapping", False):
            inputs = self._encode_with_offsets(texts, padding, options)
            if truncation and any(self._truncate(row, max_length) != row for row in inputs["input_ids"]):
                raise ValueError("Offsets cannot be given for prompts that are truncated.")
        else:
            rows = [encode_parts(self.tokenizer, [text])[0] for text in texts]
            rows = [self._truncate(row, max_length) for row in rows] if truncation else rows
            inputs = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
            if padding:
                known = ("max_length", "padding_side", "pad_to_multiple_of")
                options = {name: options[name] for name in known if name in options}
                inputs = dict(self.tokenizer.pad(inputs, padding=padding, return_attention_mask=True, **options))
        if with_types:
            inputs["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in inputs["input_ids"]]
        return inputs

    def _encode_with_offsets(self, texts: list[str], padding, options: dict[str, Any]) -> dict[str, Any]:
        if any(has_protected_text(text) for text in texts):
            raise ValueError("Offsets cannot be given for text that spells a control token.")
        return dict(
            self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, padding=padding, **options)
        )

    def _truncate(self, row: list[int], max_length: int) -> list[int]:
        if self.image_token_id in row[max_length:]:
            raise ValueError(
                f"max_length {max_length} would cut an image of a prompt of {len(row)} tokens; raise it, or use fewer "
                "tiles (max_tiles, adaptive_max_tiles)."
            )
        return row[:max_length]

    def apply_chat_template(self, conversation, *args, tokenize: bool = False, **kwargs):
        """Apply the chat template as transformers does, after a check of the messages.

        With `tokenize=True`, text of the messages that spells a control token, or `<image>`, is encoded as plain text;
        `sanitize_control_tokens=False` turns that off, and `grounding_tokens=True` turns it off for `<ref>`, `<box>` and
        `<quad>`.

        Raises:
            ValueError: No messages, an unknown role, or content that is neither text nor an image nor a video.
        """
        sanitize, grounding_tokens = kwargs.pop("sanitize_control_tokens", True), kwargs.pop("grounding_tokens", False)
        check_messages(conversation)
        allows_for_images = hasattr(ProcessorMixin, "_adjust_assistant_masks_indices")
        if kwargs.get("return_assistant_tokens_mask") and not allows_for_images and has_images(conversation):
            raise ValueError("With images, return_assistant_tokens_mask needs a newer transformers, 5.23 for example.")
        if tokenize and sanitize:
            spellings = [*control_tokens(self.tokenizer, grounding_tokens), IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER]
            conversation = protect_messages(conversation, spellings)
        prompt = super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)
        if isinstance(prompt, BatchFeature) and "assistant_masks" in prompt:
            prompt["assistant_masks"] = _of_the_same_kind(prompt["assistant_masks"], prompt["input_ids"])
        return prompt

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Count the tokens and tiles of images of (height, width) `image_sizes`, for serving engines.

        Raises:
            ValueError: `drop_blank`, with which the number depends on the pixels, or slices.
        """
        if image_sizes is None:
            return MultiModalData()
        options = kwargs.get("images_kwargs", kwargs)
        if options.get("drop_blank", self.image_processor.drop_blank):
            raise ValueError("drop_blank=True leaves out tiles by their pixels, which are not here; set it to False.")
        if self.image_processor.cuts_slices(options):
            raise ValueError(
                f"tiling={SLICES!r} writes text between the tokens of an image, which engines cannot count; use another tiling."
            )
        tiles = [self.image_processor.get_number_of_image_patches(*size, options) for size in image_sizes]
        layouts = [self.image_layout(*size, options) for size in image_sizes]
        tokens = [image_tokens(layout, self.image_seq_length) + 2 for layout in layouts]  # with <img> and </img>
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers returns, with the class to load it by."""
        return {**super().to_dict(), "auto_map": {"AutoProcessor": "processing_minimonkey.MiniMonkeyProcessor"}}

    def save_pretrained(self, save_directory, **kwargs):
        """Save as transformers does, always with the code that loads the processor beside it."""
        saved = super().save_pretrained(save_directory, **kwargs)
        custom_object_save(self, save_directory)
        return saved

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["MiniMonkeyProcessor"]
