"""`model.chat` and `model.batch_chat`: one call from question to answer, with history.

Three ways to call are in use and all work, by position and by keyword:

    model.chat(processor, images, question, history=None, **generation)
    model.chat(tokenizer, pixel_values, target_aspect_ratio, question, generation_config, ...)    published Mini-Monkey
    model.chat(tokenizer, pixel_values, question, generation_config, ...)                         published InternVL

Knows prompts and the model's `generate`; pictures are the processor's business.
"""

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig

from .compression import TILE_ORDERS
from .conversation import (
    IMAGE_END,
    IMAGE_PLACEHOLDER,
    IMAGE_START,
    IMAGE_TOKEN,
    begins_with_bos,
    build_prompt,
    check_history,
    control_tokens,
    encode,
    get_template,
    protect,
)
from .processing_minimonkey import check_placeholders, count_pictures, count_placeholders, expand_placeholders
from .tiling import SINGLE_TILE


DEFAULT_MAX_NEW_TOKENS = 1024

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


Conversation = tuple[str, list[tuple[str, str]]]  # a question and the (question, answer) pairs before it


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
    IMG_START_TOKEN: str = IMAGE_START
    IMG_END_TOKEN: str = IMAGE_END
    IMG_CONTEXT_TOKEN: str = IMAGE_TOKEN
    verbose: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pictures:
    """The tiles of all pictures of a call: pixel_values (T, 3, S, S), how many tiles each picture has, and how many of them
    are detailed, adaptive and thumbnail tiles (pictures, 3), where that is known."""

    pixel_values: torch.Tensor | None = None
    tiles: list[int] = field(default_factory=list)
    tile_counts: torch.Tensor | None = None


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


class ChatMixin:
    """`chat` and `batch_chat` for a model that has `generate` and a MiniMonkeyConfig."""

    def chat(self, *args, **kwargs) -> str | tuple[str, list[tuple[str, str]]]:
        """Ask a question about pictures, or without any.

        Called as `chat(processor, images, question, history=None, ...)`, or in one of the two published orders with tiles
        that the caller cut: `chat(tokenizer, pixel_values, [target_aspect_ratio,] question, generation_config, ...)`.

        Args:
            processor: A `MiniMonkeyProcessor`; a tokenizer will do for tiles or text alone.
            images: None, a picture (PIL image, array, path, URL, data URI) or a list: all of the conversation, in order. A
                floating-point tensor of four dimensions is taken as tiles.
            pixel_values: (T, 3, S, S) tiles instead, `num_patches_list` saying how many belong to each picture.
            question: May say with `<image>` where each picture belongs; without, new pictures come first.
            history: The (question, answer) pairs of earlier turns.
            return_history: Return (answer, history) instead of the answer.
            generation_config: A dict or a GenerationConfig; it is not changed.
            system_message: Instead of the configured one.
            images_kwargs: Options of the image processor, `{"preset": "docvqa"}` for example.
            use_scm: Compress the pictures' tokens, see `generate`, which takes `scm_keep_ratio` and its other settings. A
                picture is scored by the turn that brought it, also when a later turn computes it anew.
            target_aspect_ratio: For SCM with tiles: (columns, rows) of the detailed grid, or a list of one for each picture.
            tile_order: Whether the detailed or the adaptive tiles come first in `pixel_values`: "detailed_first", or
                "adaptive_first" as in the published demo.
            **generation: Everything `generate` takes: max_new_tokens, do_sample, num_beams, streamer, ...

        Raises:
            ValueError: Arguments that do not fit together, with what to pass instead.
        """
        bound = bind_arguments(args, kwargs)
        history = check_history(bound.history)
        pictures = _count_pictures(bound)
        may_insert = not history or bound.images is not None
        question = _place_images(bound.question, history, pictures) if may_insert else bound.question
        check_placeholders(_texts(question, history), pictures)
        (answer,) = self._answers(bound, [(question, history)], self._cut(bound))
        history.append((question, answer))
        return (answer, history) if bound.return_history else answer

    def batch_chat(self, *args, **kwargs) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Ask several questions at once, each about its own pictures.

        Called as `batch_chat(processor, images, questions, history=None, ...)` with one entry of `images` for each question
        (None, a picture or a list), or in the published order `batch_chat(tokenizer, pixel_values, questions,
        generation_config, num_patches_list, ...)` with one picture for each question that does not say `<image>` itself.

        Returns:
            The answers, and with `return_history=True` also one history for each.

        Raises:
            ValueError: See `chat`.
        """
        bound = bind_arguments(args, kwargs, batch=True)
        rows = len(bound.questions)
        histories = [check_history(history) for history in bound.history or [None] * rows]
        if len(histories) != rows:
            raise ValueError(f"{rows} questions were given, but {len(histories)} histories.")
        counts = self._pictures_of_rows(bound)
        questions = [
            question if count is None else _place_images(question, history, count)
            for question, history, count in zip(bound.questions, histories, counts)
        ]
        for row, (question, history, count) in enumerate(zip(questions, histories, counts)):
            if count is not None:
                check_placeholders(_texts(question, history), count, f"Row {row}")
        answers = self._answers(bound, list(zip(questions, histories)), self._cut(bound))
        for history, question, answer in zip(histories, questions, answers):
            history.append((question, answer))
        return (answers, histories) if bound.return_history else answers

    @staticmethod
    def _pictures_of_rows(bound: ChatArguments) -> list[int | None]:
        """How many pictures each row gets; None where there are none or the question says it."""
        rows = len(bound.questions)
        if bound.images is not None:
            if not isinstance(bound.images, (list, tuple)) or len(bound.images) != rows:
                raise ValueError(f"images must be a list with one entry for each of the {rows} questions.")
            counts = [count_pictures(row) for row in bound.images]
            nested = [row if isinstance(row, (list, tuple)) else [row] for row in bound.images]
            bound.images = [image for row in nested for image in row if image is not None] or None
            return counts
        if bound.pixel_values is None:
            return [None] * rows
        return [None if IMAGE_PLACEHOLDER in question else 1 for question in bound.questions]

    def _cut(self, bound: ChatArguments) -> Pictures:
        """The tiles of all pictures, cut here or by the caller."""
        if bound.images is not None:
            inputs = bound.processor.image_processor(bound.images, return_tensors="pt", **bound.images_kwargs)
            pixel_values, counts = inputs["pixel_values"], inputs["tile_counts"]
            # uint8 tiles are normalised by the model, see encode_images.
            dtype = self.dtype if pixel_values.is_floating_point() else pixel_values.dtype
            return Pictures(pixel_values.to(self.device, dtype), counts.sum(dim=1).tolist(), counts)
        if bound.pixel_values is None:
            return Pictures()
        tiles = bound.num_patches_list
        tiles = [bound.pixel_values.shape[0]] if tiles is None else [int(count) for count in tiles]
        if sum(tiles) != bound.pixel_values.shape[0]:
            raise ValueError(
                f"num_patches_list {tiles} adds up to {sum(tiles)}, but pixel_values hold {bound.pixel_values.shape[0]} "
                "tiles."
            )
        counts = _tile_counts(bound.target_aspect_ratio, tiles) if bound.use_scm else None
        return Pictures(bound.pixel_values.to(self.device, self.dtype), tiles, counts)

    def _prompt(self, bound: ChatArguments, question: str, history: list[tuple[str, str]]) -> str:
        """The prompt with placeholders; what people wrote is protected from acting as control tokens."""
        spellings = control_tokens(bound.tokenizer)
        system = self.config.system_message if bound.system_message is None else bound.system_message
        return build_prompt(
            get_template(self.config.template),
            protect(question, spellings),
            [(protect(asked, spellings), protect(answered, spellings)) for asked, answered in history],
            None if system is None else protect(system, spellings),
        )

    def _encode(self, bound: ChatArguments, prompts: list[str], pictures: Pictures) -> list[list[int]]:
        """The token ids of prompts, image tokens in the places of the pictures."""
        image_token_id = bound.tokenizer.convert_tokens_to_ids(bound.IMG_CONTEXT_TOKEN)
        if pictures.tiles and image_token_id != self.config.image_token_id:
            raise ValueError(
                f"{bound.IMG_CONTEXT_TOKEN} has id {image_token_id} in the tokenizer, but the model's image_token_id is "
                f"{self.config.image_token_id}; they belong to different checkpoints."
            )
        if (bound.IMG_START_TOKEN, bound.IMG_END_TOKEN, bound.IMG_CONTEXT_TOKEN) != (
            IMAGE_START,
            IMAGE_END,
            IMAGE_TOKEN,
        ):
            raise ValueError(f"The image tokens of this model are {IMAGE_START}, {IMAGE_END} and {IMAGE_TOKEN}.")
        bos = bound.tokenizer.bos_token if begins_with_bos(bound.tokenizer) else ""
        tokens = self.config.image_seq_length
        if pictures.pixel_values is not None:
            tokens = self.tokens_per_tile(pictures.pixel_values)
        return [encode(bound.tokenizer, bos + text) for text in expand_placeholders(prompts, pictures.tiles, tokens)]

    def _answers(self, bound: ChatArguments, conversations: list[Conversation], pictures: Pictures) -> list[str]:
        prompts = [self._prompt(bound, question, history) for question, history in conversations]
        rows = self._encode(bound, prompts, pictures)
        inputs = bound.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self.device)
        scm = {}
        if bound.use_scm and pictures.tiles:
            ends = self._query_ends(bound, conversations, rows, pictures)
            scm = {"tile_counts": pictures.tile_counts, "tile_order": bound.tile_order, "scm_query_ends": ends}
        separator = get_template(self.config.template).separator
        options = self._generation_options(bound, separator)
        output = self.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=pictures.pixel_values,
            use_scm=bound.use_scm,
            **scm,
            **options,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        per_row = sequences.shape[0] // len(rows)
        new_tokens = sequences[::per_row, inputs["input_ids"].shape[1] :]
        texts = bound.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return [text.split(separator)[0].strip() for text in texts]

    def _query_ends(
        self, bound: ChatArguments, conversations: list[Conversation], rows: list[list[int]], pictures: Pictures
    ) -> list[int]:
        """For each picture the index into its padded row where the prompt of the turn that brought it ended."""
        length, ends, tiles = max(map(len, rows)), [], list(pictures.tiles)
        for (question, history), row in zip(conversations, rows):
            turns = [*history, (question, "")]
            said_before = ["", *(answer for _, answer in history)]
            pictures_seen = 0
            for turn, (asked, _) in enumerate(turns):
                new = count_placeholders([said_before[turn], asked])
                pictures_seen += new
                if new:
                    end = len(row)
                    if turn < len(history):
                        prompt = self._prompt(bound, asked, history[:turn])
                        seen = replace(pictures, tiles=tiles[:pictures_seen])
                        end = _common_start(self._encode(bound, [prompt], seen)[0], row)
                    ends += [length - len(row) + end] * new
            tiles = tiles[pictures_seen:]
        return ends

    def _generation_options(self, bound: ChatArguments, separator: str) -> dict[str, Any]:
        """The caller's settings in a fresh dict; an answer ends with the template's separator."""
        options = dict(bound.generation)
        config = bound.generation_config
        if isinstance(config, GenerationConfig):
            options = {**config.to_diff_dict(), **options}
            options.pop("transformers_version", None)
        elif config is not None:
            options = {**config, **options}
        end = bound.tokenizer.convert_tokens_to_ids(separator)
        if options.get("eos_token_id") is None:
            options["eos_token_id"] = end
        if options.get("pad_token_id") is None:
            options["pad_token_id"] = end if bound.tokenizer.pad_token_id is None else bound.tokenizer.pad_token_id
        limits = ("max_new_tokens", "max_length")
        if not any(options.get(name) for name in limits) and not self.generation_config.max_new_tokens:
            options["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        return options


def _common_start(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences have in common from the start on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


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


def _texts(question: str, history: list[tuple[str, str]]) -> list[str]:
    """Everything in a conversation that may hold a placeholder."""
    return [*(text for turn in history for text in turn), question]


def _count_pictures(bound: ChatArguments) -> int:
    """How many pictures a conversation is about, before any of them is opened."""
    if bound.images is not None:
        return count_pictures(bound.images)
    if bound.pixel_values is None:
        return 0
    return 1 if bound.num_patches_list is None else len(bound.num_patches_list)


def _place_images(question: str, history: list[tuple[str, str]], images: int) -> str:
    """`question` with placeholders in front for pictures that have none; several new ones are numbered."""
    in_history = count_placeholders([text for turn in history for text in turn])
    missing = images - in_history
    if missing < 1 or IMAGE_PLACEHOLDER in question:
        return question
    if missing == 1:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    first = in_history + 1
    return "".join(f"Image-{first + i}: {IMAGE_PLACEHOLDER}\n" for i in range(missing)) + question
