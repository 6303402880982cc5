"""What a call of `chat` asks for, whichever of the ways to call it was used.

    model.chat(processor, images, question, history=None, **generation)
    model.chat(tokenizer, pixel_values, target_aspect_ratio, question, generation_config, ...)    published Mini-Monkey
    model.chat(tokenizer, pixel_values, question, generation_config, ...)                         published InternVL

Gives every argument its name and refuses what does not fit together; opens no picture and knows no model.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from .compression import TILE_ORDERS
from .conversation import IMAGE_END, IMAGE_START, IMAGE_TOKEN
from .processing_minimonkey import VIDEO_OPTIONS, video_options
from .tiling import RANGE_NAMES


PROCESSOR_ORDER = ("processor", "images", "question", "history")
BATCH_PROCESSOR_ORDER = ("processor", "images", "questions", "history")
_IMAGE_TOKEN_NAMES = ("IMG_START_TOKEN", "IMG_END_TOKEN", "IMG_CONTEXT_TOKEN")
_TILES = ("tokenizer", "pixel_values")
_TURN = ("history", "return_history", "num_patches_list", *_IMAGE_TOKEN_NAMES, "verbose")
MINI_MONKEY_ORDER = (*_TILES, "target_aspect_ratio", "question", "generation_config", "use_scm", *_TURN)
INTERNVL_ORDER = (*_TILES, "question", "generation_config", *_TURN)
BATCH_ORDER = (
    *_TILES,
    "questions",
    "generation_config",
    "num_patches_list",
    "history",
    "return_history",
    *_IMAGE_TOKEN_NAMES,
    "verbose",
)
# What `generate` returns beside tokens.
NOT_IN_ANSWERS = ("output_hidden_states", "output_attentions", "output_scores", "output_logits")


@dataclass
class ChatArguments:
    """The arguments of a call, whichever way it was made."""

    processor: Any = None
    tokenizer: Any = None
    images: Any = None
    pixel_values: torch.Tensor | None = None
    question: str | None = None
    questions: list[str] | None = None
    history: list | None = None
    return_history: bool = False
    generation_config: GenerationConfig | dict | None = None
    system_message: str | None = None
    num_patches_list: list[int] | None = None
    target_aspect_ratio: Any = None
    tile_order: str = "detailed_first"
    use_scm: bool = False
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    tile_budget: int | None = None
    videos: Any = None
    videos_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    grounding_tokens: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    return_dict: bool = False
    remember: bool = True
    IMG_START_TOKEN: str = IMAGE_START
    IMG_END_TOKEN: str = IMAGE_END
    IMG_CONTEXT_TOKEN: str = IMAGE_TOKEN
    verbose: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


def is_processor(candidate) -> bool:
    """Whether this is a processor and not a bare tokenizer."""
    return hasattr(candidate, "image_processor")


def is_tiles(candidate) -> bool:
    """Whether this is a tensor of normalised tiles, cut by the caller, and not a picture."""
    return isinstance(candidate, torch.Tensor) and candidate.ndim == 4 and candidate.is_floating_point()


def bind_arguments(args: tuple, kwargs: dict[str, Any], batch: bool = False) -> ChatArguments:
    """Give each argument its name, from the order in which it was passed.

    Raises:
        ValueError: Arguments that fit none of the orders, an argument given twice, or pictures with a bare tokenizer.
    """
    order = _order(args, kwargs, batch)
    if len(args) > len(order):
        raise ValueError(f"chat takes at most {len(order)} positional arguments ({', '.join(order)}), got {len(args)}.")
    named = dict(zip(order, args))
    twice = named.keys() & kwargs.keys()
    if twice:
        raise ValueError(f"chat got {', '.join(sorted(twice))} twice, by position and by keyword.")
    named |= kwargs
    known = {name: named.pop(name) for name in list(named) if name in ChatArguments.__dataclass_fields__}
    bound = ChatArguments(**known, generation=named)
    for name in ("images_kwargs", "videos_kwargs"):
        options = getattr(bound, name)
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"{name} is a dict of options, got {options!r}.")
        setattr(bound, name, options or {})
    bound.processor = bound.processor if bound.processor is not None else bound.tokenizer
    if bound.processor is None:
        raise ValueError("chat needs a processor (or, for tiles or text alone, a tokenizer) as its first argument.")
    bound.tokenizer = bound.processor.tokenizer if is_processor(bound.processor) else bound.processor
    if bound.images is not None and bound.pixel_values is not None:
        raise ValueError("chat takes pictures (images) or tiles (pixel_values), not both.")
    shown = bound.pixel_values if bound.images is None else bound.images
    bound.pixel_values, bound.images = (shown, None) if is_tiles(shown) else (None, shown)
    if bound.images is not None and not is_processor(bound.processor):
        raise ValueError(
            "A bare tokenizer cannot cut pictures: pass the processor (AutoProcessor.from_pretrained) as the first "
            f"argument, or normalised floating-point tiles (tiles, 3, S, S) instead of {_describe(bound.images)}."
        )
    _check(bound, batch)
    _check_answer_options(bound, batch)
    if is_processor(bound.processor):
        bound.processor.image_processor.check_options(bound.images_kwargs)
    return bound


def _describe(value) -> str:
    is_tensor = isinstance(value, torch.Tensor)
    return f"a {value.dtype} tensor of {tuple(value.shape)}" if is_tensor else type(value).__name__


def _order(args: tuple, kwargs: dict[str, Any], batch: bool) -> tuple[str, ...]:
    has_settings = len(args) > 3 and isinstance(args[3], (dict, GenerationConfig))
    is_ours = bool(kwargs.keys() & {"processor", "images"}) or (
        bool(args) and is_processor(args[0]) and not has_settings and not kwargs.keys() & {"pixel_values"}
    )
    if batch:
        return BATCH_PROCESSOR_ORDER if is_ours else BATCH_ORDER
    if len(args) > 2 and not isinstance(args[2], str):
        return MINI_MONKEY_ORDER
    if is_ours and "target_aspect_ratio" not in kwargs:
        return PROCESSOR_ORDER
    # With a keyword for it, what stands third in the Mini-Monkey order is not there by position.
    return MINI_MONKEY_ORDER if "target_aspect_ratio" in kwargs and len(args) < 3 else INTERNVL_ORDER


def _check(bound: ChatArguments, batch: bool) -> None:
    if batch:
        questions = bound.questions
        if (
            isinstance(questions, str)
            or not questions
            or not all(isinstance(text, str) and text.strip() for text in questions)
        ):
            raise ValueError(f"`questions` must be a list of strings that are not empty, got {questions!r}.")
        if bound.history is not None and not isinstance(bound.history, (list, tuple)):
            raise ValueError(
                f"`history` is a list with one history for each question, got {type(bound.history).__name__}."
            )
    elif not isinstance(bound.question, str) or not bound.question.strip():
        raise ValueError(f"`question` must be text that is not empty, got {bound.question!r}.")
    if bound.num_patches_list is not None and bound.images is not None:
        raise ValueError("num_patches_list belongs to tiles; pictures are counted when they are cut.")
    if bound.tile_order not in TILE_ORDERS:
        raise ValueError(f"tile_order is 'detailed_first' or 'adaptive_first', got {bound.tile_order!r}.")
    if bound.images is not None and bound.tile_order != "detailed_first":
        raise ValueError(f"tile_order={bound.tile_order!r} belongs to tiles that you cut yourself; leave it out here.")
    if bound.use_scm and bound.pixel_values is not None and bound.target_aspect_ratio is None:
        raise ValueError(
            "use_scm=True needs to know which tiles are detailed: pass target_aspect_ratio=(columns, rows) of the detailed "
            "grid, a list of them for several pictures, or pass the pictures themselves and a processor."
        )
    if "scm_query_ends" in bound.generation:
        raise ValueError("chat knows where each turn ended and sets scm_query_ends itself; leave it out.")
    config = bound.generation_config
    if config is not None and not isinstance(config, (dict, GenerationConfig)):
        raise ValueError(f"generation_config must be a dict or a GenerationConfig, got {type(config).__name__}.")
    settings = {**(vars(config) if isinstance(config, GenerationConfig) else config or {}), **bound.generation}
    dropped = [name for name in NOT_IN_ANSWERS if settings.get(name)]
    if dropped:
        raise ValueError(
            f"An answer of chat does not hold what {', '.join(dropped)} asks for; leave it out, or call "
            "model.generate(**inputs, return_dict_in_generate=True) with the processor's inputs. return_dict=True gives the "
            "probabilities of the answer's tokens."
        )


def _check_answer_options(bound: ChatArguments, batch: bool) -> None:
    given = [name for name in ("stream", "return_dict") if getattr(bound, name)]
    if batch and given:
        raise ValueError(f"{' and '.join(given)} works with chat, one conversation at a time, not with batch_chat.")
    if bound.stream and bound.generation.get("streamer") is not None:
        raise ValueError("stream=True makes a streamer of its own; leave out streamer, or stream.")
    for names, where in (((*RANGE_NAMES, "preset"), "images_kwargs"), (VIDEO_OPTIONS, "videos_kwargs")):
        misplaced = [name for name in names if name in bound.generation]
        if misplaced:
            raise ValueError(f"{', '.join(misplaced)} goes into {where}: {where}={{{misplaced[0]!r}: ...}}.")
    video_options({}, bound.videos_kwargs)
    if bound.system_message is not None and not isinstance(bound.system_message, str):
        raise ValueError(f"system_message must be text, got {type(bound.system_message).__name__}.")
    if bound.videos is not None and bound.pixel_values is not None:
        raise ValueError("videos go with pictures (images), not with tiles; pass their frames as tiles instead.")
    if bound.videos is not None and not is_processor(bound.processor):
        raise ValueError("A bare tokenizer cannot read videos: pass the processor as the first argument.")
    if bound.tile_budget is not None and bound.images is None:
        raise ValueError("tile_budget is shared by pictures; there are none here.")
    for name in ("tile_budget", "max_prompt_tokens"):
        value = getattr(bound, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
