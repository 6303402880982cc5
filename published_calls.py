"""The argument orders of the published `chat` and `batch_chat`, as arguments of ours.

    model.chat(tokenizer, pixel_values, target_aspect_ratio, question, generation_config, ...)    published Mini-Monkey
    model.chat(tokenizer, pixel_values, question, generation_config, ...)                         published InternVL
    model.batch_chat(tokenizer, pixel_values, questions, generation_config, ...)                  published InternVL

No other file knows them. Source: `InternVLChatModel` of InternVL2 and Mini-Monkey.
"""

from typing import Any

from transformers import GenerationConfig

from .conversation import IMAGE_END, IMAGE_START, IMAGE_TOKEN


IMAGE_TOKEN_NAMES = {"IMG_START_TOKEN": IMAGE_START, "IMG_END_TOKEN": IMAGE_END, "IMG_CONTEXT_TOKEN": IMAGE_TOKEN}
_TURN = ("history", "return_history", "num_patches_list", *IMAGE_TOKEN_NAMES, "verbose")
MINI_MONKEY_ORDER = (
    "tokenizer",
    "pixel_values",
    "target_aspect_ratio",
    "question",
    "generation_config",
    "use_scm",
    *_TURN,
)
INTERNVL_ORDER = ("tokenizer", "pixel_values", "question", "generation_config", *_TURN)
BATCH_ORDER = (
    *("tokenizer", "pixel_values", "questions", "generation_config", "num_patches_list", "history", "return_history"),
    *(*IMAGE_TOKEN_NAMES, "verbose"),
)
# By keyword they say that a call is a published one, or may be.
PUBLISHED_NAMES = {"tokenizer", "pixel_values", "target_aspect_ratio", "verbose", *IMAGE_TOKEN_NAMES}


def name_arguments(args: tuple, kwargs: dict[str, Any], is_batch: bool) -> dict[str, Any]:
    """Give the arguments of a call in any order the names that `chat` and `batch_chat` have for them.

    Raises:
        ValueError: Too many arguments, one given twice, or image tokens that are not the model's.
    """
    order = _order(args, kwargs, is_batch)
    if len(args) > len(order):
        raise ValueError(f"chat takes at most {len(order)} positional arguments ({', '.join(order)}), got {len(args)}.")
    named = dict(zip(order, args))
    twice = named.keys() & kwargs.keys()
    if twice:
        raise ValueError(f"chat got {', '.join(sorted(twice))} twice, by position and by keyword.")
    named |= kwargs
    if any(named.pop(name, token) != token for name, token in IMAGE_TOKEN_NAMES.items()):
        raise ValueError(f"The image tokens of this model are {IMAGE_START}, {IMAGE_END} and {IMAGE_TOKEN}.")
    named.pop("verbose", None)
    for published, ours in (("tokenizer", "processor"), ("pixel_values", "images")):
        given = named.pop(published, None)
        if given is not None and named.get(ours) is not None:
            raise ValueError(f"chat takes {ours} or {published}, not both.")
        if given is not None:
            named[ours] = given
    return named


def _order(args: tuple, kwargs: dict[str, Any], is_batch: bool) -> tuple[str, ...]:
    has_settings = len(args) > 3 and isinstance(args[3], (dict, GenerationConfig))
    is_ours = bool(kwargs.keys() & {"processor", "images"}) or (
        bool(args) and hasattr(args[0], "image_processor") and not has_settings and "pixel_values" not in kwargs
    )
    if is_batch:
        return ("processor", "images", "questions", "history") if is_ours else BATCH_ORDER
    if len(args) > 2 and not isinstance(args[2], str):
        return MINI_MONKEY_ORDER
    if is_ours and "target_aspect_ratio" not in kwargs:
        return ("processor", "images", "question", "history")
    # With a keyword for it, what stands third in the Mini-Monkey order is not there by position.
    return MINI_MONKEY_ORDER if "target_aspect_ratio" in kwargs and len(args) < 3 else INTERNVL_ORDER
