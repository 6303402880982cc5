"""`model.chat` and `model.batch_chat`: one call from question to answer, with history.

    answer, history = model.chat(processor, "receipt.png", "What is the total?", return_history=True)
    answer, history = model.chat(processor, "receipt.png", "And the date?", history=history, return_history=True)
    answer = model.chat(processor, messages=[{"role": "user", "content": [{"type": "image", "path": "receipt.png"}, ...]}])

A call is read into one `Conversation` per row, cut into tiles, rendered to token ids, generated and decoded. What is returned
is in chat_answer.py, what a history remembers in prompt_memory.py, the published argument orders in published_calls.py.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .chat_answer import AnswerStream, ChatAnswer, ChatHistory, TokenProbabilities
from .compression import TILE_ORDERS
from .conversation import (
    GROUNDING_TOKENS,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN,
    VIDEO_PLACEHOLDER,
    ChatTemplate,
    RenderedPrompt,
    check_history,
    check_placeholders,
    get_template,
    image_tokens,
    read_messages,
    render,
    unprotect,
)
from .generation_minimonkey import check_generation_options
from .image_inputs import ImageInputs
from .image_processing_minimonkey import cut_images, expand_preset, list_images
from .processing_minimonkey import (
    VIDEO_OPTIONS,
    list_videos,
    place_frames,
    video_options,
)
from .prompt_memory import PromptMemory, Turn, forget_all, forget_the_oldest, image_key, recall
from .published_calls import PUBLISHED_NAMES, name_arguments
from .repetition import RepetitionGuard, read_guard
from .tiling import BUDGET_TILING, MOST_TILES, RANGE_NAMES, SINGLE_TILE, SLICES, share_tile_budget
from .token_selection import asks_for_blank, read_selection
from .transformers_bridge import CACHE_NAME


DEFAULT_MAX_NEW_TOKENS = 1024
SCM_OPTIONS = ("scm_keep_ratio", "scm_layer", "scm_queries", "scm_select")
# What `generate` returns besides tokens.
NOT_IN_ANSWERS = ("output_hidden_states", "output_attentions", "output_scores", "output_logits")


@dataclass
class Conversation:
    """One row of a call: its turns as the history keeps them and as the prompt has them, and its images.

    An image is (source, the image processor's options for it), or (tiles (t, 3, S, S) that the caller cut, None).
    """

    history: list[tuple[str, str]]
    question: str
    turns: list[tuple[str, str | None]] = field(default_factory=list)
    images: list[tuple[Any, dict[str, Any] | None]] = field(default_factory=list)


@dataclass
class _Cut:
    """The tiles or slices of all images of a call; of slices `tokens_per_tile` is not used.

    With a memory there is a `turn`, and the pixels are only those of the images that are new to it.
    """

    images: ImageInputs = ImageInputs()
    tokens_per_tile: int = 0
    turn: Turn | None = None


@dataclass
class _Request:
    """What `generate` is called with, and what is needed to read its answers."""

    tokenizer: Any
    template: ChatTemplate
    grounding_tokens: bool
    skip_special_tokens: bool
    options: dict[str, Any] = field(default_factory=dict)
    conversations: list[Conversation] = field(default_factory=list)
    memory: PromptMemory | None = None
    ends: list[str] = field(default_factory=list)
    guard: RepetitionGuard | None = None
    probabilities: TokenProbabilities | None = None

    def decode(self, ids: list[int]) -> str:
        """Return the text of an answer, special tokens left out unless they are asked for."""
        if not self.grounding_tokens:
            return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens)
        skipped = set(self.tokenizer.all_special_ids) if self.skip_special_tokens else set()
        skipped -= set(self.tokenizer.convert_tokens_to_ids(list(GROUNDING_TOKENS)))
        return self.tokenizer.decode([index for index in ids if index not in skipped])


def _also_published(method: Callable) -> Callable:
    """Let a method be called in the published argument orders too; calls that are plainly ours pass through."""

    order = list(inspect.signature(method).parameters)[1:]

    @wraps(method)
    def call(self, *args, **kwargs):
        processor, _, question = (*args[:3], *[None] * (3 - len(args)))
        is_ours = hasattr(processor, "image_processor") and isinstance(question, (str, list, tuple, type(None)))
        if is_ours and not args[3:] and not kwargs.keys() & {*PUBLISHED_NAMES, *order[: len(args)]}:
            return method(self, *args, **kwargs)
        return method(self, **name_arguments(args, kwargs, is_batch=method.__name__ == "batch_chat"))

    return call


class ChatMixin:
    """`chat` and `batch_chat` for a model that has `generate` and a MiniMonkeyConfig."""

    # Of how many conversations the key/value caches and image features are kept, and how many bytes these may hold together
    # (None: any number); the least recently used one goes first.
    remembered_conversations = 1
    remembered_bytes: int | None = None

    @_also_published
    def chat(
        self,
        processor=None,
        images=None,
        question: str | None = None,
        history: list[tuple[str, str]] | None = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        videos=None,
        return_history: bool = False,
        return_dict: bool = False,
        stream: bool = False,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        system_message: str | None = None,
        images_kwargs: dict[str, Any] | None = None,
        videos_kwargs: dict[str, Any] | None = None,
        tile_budget: int | None = None,
        token_budget: int | None = None,
        max_prompt_tokens: int | None = None,
        use_scm: bool = False,
        num_patches_list: list[int] | None = None,
        target_aspect_ratio=None,
        tile_order: str = "detailed_first",
        grounding_tokens: bool = False,
        skip_special_tokens: bool = True,
        stop_repetition: bool | dict[str, int] | None = None,
        remember: bool = True,
        **generation: Any,
    ) -> str | tuple[str, ChatHistory] | ChatAnswer | AnswerStream:
        """Ask a question about images and videos, or without any.

        The two published argument orders, `chat(tokenizer, pixel_values, [target_aspect_ratio,] question, generation_config,
        ...)`, work too.

        A history that `chat` returned remembers what was computed: the next turn costs only what is new, as long as it is
        passed on as it is, with the same images; so does a list of messages that grows. Memory: the key/value cache and
        image features of `model.remembered_conversations` conversations (1), at most `model.remembered_bytes` (None: any
        number), freed with the history, by `history.forget()` or `model.forget_conversations()`, or not kept with
        `remember=False`.

        Args:
            processor: A `MiniMonkeyProcessor`; a tokenizer will do for tiles or text alone.
            images: None, an image (PIL image, array, path, URL, data URI) or a list: all of the conversation, in order. A
                floating-point tensor of four dimensions (T, 3, S, S) is taken as tiles that the caller cut.
            question: May say with `<image>` and `<video>` where each image and video belongs; without, new ones come first.
            history: The (question, answer) pairs of earlier turns.
            messages: Instead of images, question, history and videos: the conversation in the form of transformers or OpenAI,
                see `conversation.read_messages`. What its texts spell is text, `<image>` too.
            videos: None, a video (path, URL, frames) or a list, all of the conversation, in order. A video becomes numbered
                frames of one tile each.
            return_history: Return (answer, history) instead of the answer.
            return_dict: Return a `ChatAnswer`, with the probabilities of the answer's tokens. Meanwhile the logits of every
                token are kept (92,553 x 4 bytes each for the 2B model).
            stream: Return an `AnswerStream`, which yields the answer's text while it is made.
            generation_config: A dict or a GenerationConfig; it is not changed.
            system_message: Instead of the configured one.
            images_kwargs: Options of the image processor, `{"preset": "docvqa"}` for example.
            videos_kwargs: How frames are chosen and cut: num_frames, fps, start, end (seconds), video_backend, see
                `video_frames.load_frames`, and frame_tiles, most tiles of a frame (1).
            tile_budget: Most tiles of all images of the prompt together; each gets the same share.
            token_budget: Most image tokens of the prompt, instead of tile_budget: images are cut in as many tiles as that
                holds, by the rule that reads most of so many (`tiling.BUDGET_TILING`) unless images_kwargs say otherwise.
            max_prompt_tokens: Longest prompt that is not refused; by default the context length of the language model.
            use_scm: Compress the images' tokens, see `generate`, which takes `scm_keep_ratio` and its other settings. An
                image is scored by the turn that brought it, even when a later turn computes it again.
            num_patches_list: For tiles: how many belong to each image; by default all to one.
            target_aspect_ratio: For SCM with tiles: (columns, rows) of the detailed grid, or a list of one for each image.
            tile_order: Whether the detailed or the adaptive tiles come first in tiles that the caller cut: "detailed_first",
                or "adaptive_first" as in the published demo.
            grounding_tokens: `<ref>`, `<box>` and `<quad>` in questions and answers are the model's own tokens, as for models
                that answer with boxes. By default they are plain text in questions and left out of answers.
            skip_special_tokens: False leaves all special tokens in the answer.
            stop_repetition: True ends an answer that repeats itself, with the `finish_reason` "repetition"; a dict does so with
                settings of `repetition.RepetitionGuard`. By default what the generation configuration says, or False.
            remember: False computes everything from the start and keeps nothing for the next turn.
            **generation: What `generate` takes: max_new_tokens, do_sample, num_beams, stop_strings, streamer, ... The answer
                ends before a stop string, and with the template's separator besides any `eos_token_id`.

        Raises:
            ValueError: Arguments that do not fit together, or a prompt that is too long; the message says what to pass instead.
        """
        if messages is not None:
            given = {"images": images, "question": question, "history": history, "videos": videos}
            given = [name for name, value in (given | {"system_message": system_message}).items() if value is not None]
            if given:
                raise ValueError(f"messages hold the whole conversation; leave out {', '.join(given)}.")
            system_message, history, question, images, videos = read_messages(messages)
            images, videos = images or None, videos or None
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`question` must be text that is not empty, got {question!r}.")
        if stream and generation.get("streamer") is not None:
            raise ValueError("stream=True makes a streamer of its own; leave out streamer, or stream.")
        if token_budget is not None:
            tile_budget, images_kwargs = self._tiles_for(token_budget, tile_budget, images_kwargs)
        tiles = _check_media(processor, images, videos, images_kwargs, videos_kwargs, tile_budget)
        tokenizer, is_listed = getattr(processor, "tokenizer", processor), messages is not None
        request = _Request(tokenizer, get_template(self.config.template), grounding_tokens, skip_special_tokens)
        _check_settings(
            tiles, num_patches_list, target_aspect_ratio, tile_order, use_scm, system_message, max_prompt_tokens
        )
        request.options = self._generation_options(request, generation_config, generation, use_scm, return_dict)
        if use_scm or self.config.mining:
            self._check_compression(use_scm, request.options, processor if tiles is None else None, images_kwargs)
        self._set_guard(request, stop_repetition)
        turns = [] if history is None else check_history(history)
        if tiles is None:
            media = (images, videos, images_kwargs or {}, videos_kwargs or {}, tile_budget)
            request.conversations = [_read(processor, question, turns, *media, is_placed=is_listed)]
        else:
            request.conversations = _read_tiles(tiles, num_patches_list, [question], [turns], is_batch=False)
        keys = None
        if not remember or self.remembered_conversations < 1:
            forget_the_oldest(self)
        elif is_listed or return_history or return_dict or stream or hasattr(history, "memory"):
            knows_grids = use_scm or self.config.mining
            keys = _image_keys(processor, request.conversations[0], tile_order, knows_grids, target_aspect_ratio)
            if use_scm and asks_for_blank(request.options.get("scm_select")):
                keys = [key + b" blank" for key in keys]  # told by the pixels, which are not kept
            beginning = _beginning(request.conversations[0], system_message, keys) if is_listed else None
            keeps_history = return_history or return_dict or stream
            request.memory = recall(self, getattr(history, "memory", None), beginning, keeps_history)
        cut = self._cut(processor, request, target_aspect_ratio if use_scm or self.config.mining else None, keys)
        self._prepare(
            request, cut, system_message, max_prompt_tokens, tile_order if use_scm else None, videos is not None
        )
        if stream:
            return self._stream(request)
        (answer,) = self._answers(request)
        if return_dict:
            return answer
        return (answer.text, answer.history) if return_history else answer.text

    @_also_published
    def batch_chat(
        self,
        processor=None,
        images=None,
        questions: list[str] | None = None,
        history: list[list[tuple[str, str]] | None] | None = None,
        *,
        videos=None,
        return_history: bool = False,
        return_dict: bool = False,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        system_message: str | None = None,
        images_kwargs: dict[str, Any] | None = None,
        videos_kwargs: dict[str, Any] | None = None,
        tile_budget: int | None = None,
        token_budget: int | None = None,
        max_prompt_tokens: int | None = None,
        use_scm: bool = False,
        num_patches_list: list[int] | None = None,
        target_aspect_ratio=None,
        tile_order: str = "detailed_first",
        grounding_tokens: bool = False,
        skip_special_tokens: bool = True,
        stop_repetition: bool | dict[str, int] | None = None,
        **generation: Any,
    ) -> list[str] | list[ChatAnswer] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Ask several questions at once, each about its own images.

        Called with one entry of `images` (and of `videos`) for each question (None, an image or a list), or in the published
        order `batch_chat(tokenizer, pixel_values, questions, generation_config, num_patches_list, ...)` with one image for
        each question that does not say `<image>` itself. Other arguments as in `chat`. Histories are taken and returned, but
        computed from the start.

        Returns:
            The answers, and with `return_history=True` also one history for each; with `return_dict=True` a `ChatAnswer` for
            each, for which, unlike in `chat`, the logits of one step at a time are kept, and penalties count.

        Raises:
            ValueError: See `chat`.
        """
        is_text = isinstance(questions, (list, tuple)) and all(
            isinstance(text, str) and text.strip() for text in questions
        )
        if not is_text or not questions:
            raise ValueError(f"`questions` must be a list of strings that are not empty, got {questions!r}.")
        given = [name for name in ("stream", "messages", "remember") if generation.pop(name, None)]
        if given:
            raise ValueError(f"{' and '.join(given)} works with chat, one conversation at a time, not with batch_chat.")
        count = len(questions)
        if token_budget is not None:
            tile_budget, images_kwargs = self._tiles_for(token_budget, tile_budget, images_kwargs)
        tiles = _check_media(processor, images, videos, images_kwargs, videos_kwargs, tile_budget)
        tokenizer = getattr(processor, "tokenizer", processor)
        request = _Request(tokenizer, get_template(self.config.template), grounding_tokens, skip_special_tokens)
        _check_settings(
            tiles, num_patches_list, target_aspect_ratio, tile_order, use_scm, system_message, max_prompt_tokens
        )
        request.options = self._generation_options(request, generation_config, generation, use_scm)
        if use_scm or self.config.mining:
            self._check_compression(use_scm, request.options, processor if tiles is None else None, images_kwargs)
        self._set_guard(request, stop_repetition)
        if return_dict:
            request.probabilities = self._record_probabilities(request.options)
        histories = [check_history(one) for one in _rows(history or None, count, "`history`", "history")]
        if tiles is None:
            shared = (images_kwargs or {}, videos_kwargs or {}, tile_budget)
            media = zip(_rows(images, count, "images", "entry"), _rows(videos, count, "videos", "entry"))
            request.conversations = [
                _read(processor, question, turns, *own, *shared, subject=f"Row {row}")
                for row, (question, turns, own) in enumerate(zip(questions, histories, media))
            ]
        else:
            request.conversations = _read_tiles(tiles, num_patches_list, questions, histories, is_batch=True)
        cut = self._cut(processor, request, target_aspect_ratio if use_scm or self.config.mining else None)
        self._prepare(
            request, cut, system_message, max_prompt_tokens, tile_order if use_scm else None, videos is not None
        )
        answers = self._answers(request)
        if return_dict:
            return answers
        texts = [answer.text for answer in answers]
        return (texts, [list(answer.history) for answer in answers]) if return_history else texts

    def encode_ahead(
        self,
        processor,
        images,
        images_kwargs: dict[str, Any] | None = None,
        tile_budget: int | None = None,
    ) -> ChatHistory:
        """Encode images while their question is still being typed; `chat` about them then begins with the language model.

            history = model.encode_ahead(processor, "page.png")
            answer, history = model.chat(processor, "page.png", question, history=history, return_history=True)

        Args:
            processor, images, images_kwargs, tile_budget: As `chat` will be given them; no tiles that the caller cut.

        Returns:
            The history of a conversation that has not begun, which remembers the images' features.

        Raises:
            ValueError: See `chat`; or the model remembers nothing (`remembered_conversations` is 0).
        """
        if self.remembered_conversations < 1:
            raise ValueError(
                "encode_ahead needs a model that remembers: set model.remembered_conversations to 1 or more."
            )
        if _check_media(processor, images, None, images_kwargs, None, tile_budget) is not None or images is None:
            raise ValueError("encode_ahead takes images, not tiles: encode those by model.encode_tiles.")
        conversation = _read(processor, "?", [], images, None, images_kwargs or {}, {}, tile_budget)
        request = _Request(processor.tokenizer, get_template(self.config.template), False, True)
        request.conversations, request.memory = [conversation], PromptMemory(self)
        keys = _image_keys(processor, conversation, "detailed_first", False, None)
        cut = self._cut(processor, request, None, keys)
        with torch.no_grad():
            self._recall_features(cut.turn, cut.images)
        history = ChatHistory([])
        history.memory = request.memory
        return history

    def forget_conversations(self) -> None:
        """Free the key/value caches and image features of all conversations that are remembered."""
        forget_all(self)

    # --- images ------------------------------------------------------------------------------------------------------

    def _check_compression(
        self, use_scm: bool, options: dict[str, Any], processor, images_kwargs: dict[str, Any] | None
    ) -> None:
        """Raise `ValueError` for what compression, or patch mining, would refuse, before an image is opened."""
        reader = getattr(processor, "image_processor", None)
        is_sliced = reader is not None and reader.cuts_slices(images_kwargs)
        if is_sliced and self.config.mining:
            raise ValueError(
                "Patch mining looks into square tiles of a grid; slices of their own size do not lie in one."
            )
        if not use_scm:
            return
        self._compression_settings(is_sliced, **{name: options.get(name) for name in SCM_OPTIONS})
        drops = reader is not None and expand_preset(images_kwargs or {}).get("drop_blank", reader.drop_blank)
        selection = options.get("scm_select")
        if drops and read_selection(selection).needs_grid:
            raise ValueError(
                f"scm_select={selection!r} needs all tiles of a grid, of which drop_blank=True leaves some out; choose one."
            )

    def _tiles_for(
        self, token_budget: int, tile_budget: int | None, images_kwargs: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        """Return how many tiles so many image tokens are, and the image processor's options to make the best of them."""
        if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < 1:
            raise ValueError(f"token_budget must be a whole number of at least 1, got {token_budget!r}.")
        options = dict(images_kwargs or {})
        if self.config.mining or options.get("tiling") == SLICES:
            raise ValueError(
                "token_budget counts square tiles; an image of patch mining has the tokens of one, and slices have tokens of "
                "their own. Choose max_tiles in images_kwargs, or tile_budget."
            )
        if tile_budget is not None or "size" in options:
            raise ValueError(
                "token_budget goes neither with tile_budget nor with a tile size of your own; pass one of them."
            )
        tiles, per_tile = token_budget // self.config.image_seq_length, self.config.image_seq_length
        if not tiles:
            raise ValueError(f"A token_budget of {token_budget} holds no tile; one has {per_tile} tokens.")
        if not options.keys() & {*RANGE_NAMES, "preset"}:
            options |= dict(zip(RANGE_NAMES, (1, min(max(tiles - 1, 1), MOST_TILES), 1, 1)))
        return tiles, {"tiling": BUDGET_TILING, **options}

    def _cut(self, processor, request: _Request, grids, keys: list[bytes] | None = None) -> _Cut:
        """Cut the images of all conversations into tiles; with a memory, those that it does not know.

        Args:
            grids: Of tiles that the caller cut, the detailed grid of each image, if scale compression needs it.
        """
        images = [image for conversation in request.conversations for image in conversation.images]
        memory = request.memory
        turn = None if memory is None else Turn(memory, keys, memory.tile_counts, memory.tile_grids, memory.features)
        if not images:
            return _Cut(turn=turn)
        new, known = range(len(images)), {}
        if turn is not None:
            known = {key: [*counts, *turn.tile_grids[key]] for key, counts in turn.tile_counts.items()}
            new = sorted({key: i for i, key in reversed([*enumerate(keys)]) if key not in turn.features}.values())
        pixels: dict[str, torch.Tensor] = {}
        if new:
            wanted = [images[i] for i in new]
            if isinstance(wanted[0][0], torch.Tensor) and wanted[0][1] is None:
                layout = _tile_layout(grids, [len(tiles) for tiles, _ in images])[list(new)]
                pixels = {"pixel_values": torch.cat([tiles for tiles, _ in wanted]).to(self.device, self.dtype)}
            else:
                cut = cut_images(processor.image_processor, wanted, return_tensors="pt")
                (name,) = cut.keys() & {"pixel_values", "slice_values"}
                sizes = [cut["slice_sizes"]] if name == "slice_values" else []
                layout = torch.cat([cut["tile_counts"], cut["tile_grids"], *sizes], dim=1)
                # uint8 tiles are normalised by the model, see encode_images.
                dtype = self.dtype if cut[name].is_floating_point() else cut[name].dtype
                pixels = {name: cut[name].to(self.device, dtype)}
            if turn is not None:
                known |= {keys[i]: own for i, own in zip(new, layout.tolist())}
            tokens_per_tile = self.tokens_per_tile(pixels["pixel_values"]) if "pixel_values" in pixels else 0
        else:
            written = 1 if self.config.mining else sum(turn.tile_counts[keys[0]])
            tokens_per_tile = len(turn.features[keys[0]]) // written
        if turn is not None:
            layout = torch.tensor([known[key] for key in keys])
        sizes = {"slice_sizes": layout[:, 7:]} if layout.shape[1] > 7 else {}
        images = ImageInputs(**pixels, tile_counts=layout[:, :3], tile_grids=layout[:, 3:7], **sizes)
        return _Cut(images, tokens_per_tile, turn)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _generation_options(
        self,
        request: _Request,
        config: GenerationConfig | dict | None,
        generation: dict[str, Any],
        use_scm: bool,
        return_dict: bool = False,
    ) -> dict[str, Any]:
        """Return the caller's settings in a fresh dict, checked; an answer ends with the template's separator, whatever other
        ends there are."""
        if config is not None and not isinstance(config, (dict, GenerationConfig)):
            raise ValueError(f"generation_config must be a dict or a GenerationConfig, got {type(config).__name__}.")
        if isinstance(config, GenerationConfig):
            config = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
        options = {**(config or {}), **generation}
        if "scm_query_ends" in options:
            raise ValueError("chat knows where each turn ended and sets scm_query_ends itself; leave it out.")
        given = [name for name in SCM_OPTIONS if options.get(name) is not None]
        if given and not use_scm:
            raise ValueError(f"{', '.join(given)} works only with use_scm=True.")
        dropped = [name for name in NOT_IN_ANSWERS if options.get(name)]
        if dropped:
            raise ValueError(
                f"An answer of chat does not hold what {', '.join(dropped)} asks for; leave it out, or call "
                "model.generate(**inputs, return_dict_in_generate=True) with the processor's inputs. return_dict=True gives "
                "the probabilities of the answer's tokens."
            )
        for names, where in (((*RANGE_NAMES, "preset", "tiling"), "images_kwargs"), (VIDEO_OPTIONS, "videos_kwargs")):
            misplaced = [name for name in names if name in options]
            if misplaced:
                raise ValueError(f"{', '.join(misplaced)} goes into {where}: {where}={{{misplaced[0]!r}: ...}}.")
        tokenizer = request.tokenizer
        end = tokenizer.convert_tokens_to_ids(request.template.separator)
        ends = options.get("eos_token_id")
        others = {*_token_ids(self.generation_config.eos_token_id if ends is None else ends, "eos_token_id")} - {end}
        options["eos_token_id"] = [end, *sorted(others)] if others else end
        if options.get("pad_token_id") is None:
            options["pad_token_id"] = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        has_limit = any(options.get(name) for name in ("max_new_tokens", "max_length"))
        if not has_limit and not self.generation_config.max_new_tokens:
            options["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        if options.get("stop_strings") or self.generation_config.stop_strings:
            options.setdefault("tokenizer", tokenizer)
        if return_dict:
            options |= {"return_dict_in_generate": True, "output_logits": True}
        check_generation_options(self, None, options)
        return options

    def _set_guard(self, request: _Request, stop_repetition: bool | dict[str, int] | None) -> None:
        """Make the guard here, since it tells later on why an answer ended; `generate` is to make none."""
        by_default = getattr(self.generation_config, "stop_repetition", None)
        asked = (stop_repetition, request.options.get("stop_repetition"), by_default)
        wanted = next((value for value in asked if value is not None), None)
        if wanted is not None:
            request.guard, request.options["stop_repetition"] = read_guard(wanted, 0, request.decode), False

    def _record_probabilities(self, options: dict[str, Any]) -> TokenProbabilities:
        """Put what records the probabilities of tokens before the caller's logits processors in `options`."""
        for name in ("num_beams", "num_return_sequences"):
            if (self._setting(name, None, options) or 1) != 1:
                raise ValueError(f"return_dict=True of batch_chat needs {name}=1; use chat.")
        recorder = TokenProbabilities()
        options["logits_processor"] = LogitsProcessorList([recorder, *(options.get("logits_processor") or [])])
        return recorder

    def _prepare(
        self,
        request: _Request,
        cut: _Cut,
        system_message: str | None,
        max_prompt_tokens: int | None,
        scm_tile_order: str | None,
        has_videos: bool,
    ) -> None:
        """Render the prompts into the request's options for `generate`, and what its answers end with."""
        tokenizer, template, options = request.tokenizer, request.template, request.options
        has_images = cut.images.tile_counts is not None
        tiles = iter(self.image_layouts(cut.images) if has_images else [])
        known = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if has_images and known != self.config.image_token_id:
            raise ValueError(
                f"{IMAGE_TOKEN} has id {known} in the tokenizer, but the model's image_token_id is "
                f"{self.config.image_token_id}; they belong to different checkpoints."
            )
        system = self.config.system_message if system_message is None else system_message
        prompts = []
        longest = getattr(self.config.text_config, "max_position_embeddings", None) or 0
        for conversation in request.conversations:
            own = [next(tiles) for _ in conversation.images]
            prompt = render(
                tokenizer, template, conversation.turns, system, own, cut.tokens_per_tile, request.grounding_tokens
            )
            if len(prompt.token_ids) > (longest if max_prompt_tokens is None else max_prompt_tokens):
                can_cut_less = not has_videos and all(options is not None for _, options in conversation.images)
                self._check_length(len(prompt.token_ids), own, cut.tokens_per_tile, max_prompt_tokens, can_cut_less)
            prompts.append(prompt)
        rows = {"input_ids": [prompt.token_ids for prompt in prompts]}
        inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(self.device)
        options |= {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        options |= {**vars(cut.images), "use_scm": scm_tile_order is not None}
        if scm_tile_order is not None and has_images:
            ends = _query_ends(request.conversations, prompts)
            options |= {"tile_order": scm_tile_order, "scm_query_ends": ends}
        if cut.turn is not None:
            options[CACHE_NAME] = cut.turn
        if request.guard is not None:
            request.guard.prompt_length = options["input_ids"].shape[1]
            criteria = [*(options.get("stopping_criteria") or []), request.guard]
            options["stopping_criteria"] = StoppingCriteriaList(criteria)
        stops = options.get("stop_strings") or self.generation_config.stop_strings or []
        request.ends = [template.separator, *([stops] if isinstance(stops, str) else stops)]
        if not request.skip_special_tokens:
            ids = [index for index in _token_ids(options["eos_token_id"], "eos_token_id") if index < len(tokenizer)]
            request.ends += tokenizer.convert_ids_to_tokens(ids)

    def _check_length(
        self, length: int, tiles: list, per_tile: int, max_prompt_tokens: int | None, can_cut_less: bool
    ) -> None:
        """Raise `ValueError` for a prompt that is too long, with a tile budget that would fit."""
        limit = self.config.context_length if max_prompt_tokens is None else max_prompt_tokens
        if limit is None or length <= limit:
            return
        what = "the context length of the model" if max_prompt_tokens is None else "max_prompt_tokens"
        if self.config.mining or not all(isinstance(layout, int) for layout in tiles):
            taken = sum(image_tokens(layout, per_tile) for layout in tiles)
            raise ValueError(
                f"The prompt has {length} tokens, {taken} of them of {len(tiles)} pictures, but the limit is {limit} ({what}). "
                "Use fewer pictures, fewer slices (max_tiles in images_kwargs), a shorter history or question."
            )
        budget = (limit - length) // per_tile + sum(tiles) if tiles else 0
        can_cut_less = can_cut_less and len(tiles) <= budget < sum(tiles)
        fewer = f"fewer tiles (tile_budget={budget}, or another preset in images_kwargs), " if can_cut_less else ""
        raise ValueError(
            f"The prompt has {length} tokens, of which {sum(tiles)} tiles of pictures take {sum(tiles) * per_tile}, but "
            f"the limit is {limit} ({what}). Use {fewer}fewer pictures, a shorter history or question."
        )

    # --- answers -----------------------------------------------------------------------------------------------------

    def _stream(self, request: _Request) -> AnswerStream:
        device = self.device.type
        is_autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def run(streamer, stop) -> ChatAnswer:
            criteria = StoppingCriteriaList([*(request.options.get("stopping_criteria") or []), stop])
            request.options |= {"streamer": streamer, "stopping_criteria": criteria}
            with torch.autocast(device, dtype, enabled=is_autocast):  # which is the thread's own
                return self._answers(request)[0]

        return AnswerStream(run, request.decode, request.ends)

    def _answers(self, request: _Request) -> list[ChatAnswer]:
        rows, length = request.options["input_ids"].shape
        limit = self._setting("max_new_tokens", None, request.options)
        limit = limit or (self._setting("max_length", None, request.options) or 0) - length
        output = self.generate(**request.options)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        first = range(0, len(sequences), len(sequences) // rows)  # of several returned sequences the best
        end_ids = _token_ids(request.options["eos_token_id"], "eos_token_id")
        probabilities = None
        if request.options.get("output_logits"):  # of each new token (rows, new), before sampling's settings
            beams = getattr(output, "beam_indices", None)
            probabilities = self.compute_transition_scores(
                output.sequences, output.logits, beams, normalize_logits=True
            )
        elif request.probabilities is not None:
            probabilities = request.probabilities.of(sequences)
        answers = []
        for conversation, row in zip(request.conversations, first):
            ids = sequences[row, length:].tolist()
            length_said = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
            looped = None if request.guard is None else request.guard.find(ids[:length_said])
            is_ended = looped is None and length_said < len(ids)
            ids = ids[: length_said + 1 if looped is None else looped]  # padding may follow
            text = request.decode(ids)
            is_ended |= any(end in text for end in request.ends)
            for end in request.ends:
                text = text.partition(end)[0]
            history = ChatHistory([*conversation.history, (conversation.question, text.strip())])
            history.memory = request.memory
            answer = ChatAnswer(text.strip(), history, ids)
            if looped is not None:
                answer.finish_reason = "repetition"
            elif is_ended or len(ids) >= limit:
                answer.finish_reason = "stop" if is_ended else "length"
            if probabilities is not None:
                answer.log_probabilities = probabilities[row, : len(ids)].tolist()
            answers.append(answer)
        if request.memory is not None:
            request.memory.extend_beginning(answers[0].text)
        return answers


# --- reading a call --------------------------------------------------------------------------------------------------


def _check_media(processor, images, videos, images_kwargs, videos_kwargs, tile_budget) -> torch.Tensor | None:
    """Check that images, videos and their options go together, without opening any.

    Returns:
        The images, if they are tiles (T, 3, S, S) that the caller cut.

    Raises:
        ValueError: They do not.
    """
    is_cut = isinstance(images, torch.Tensor) and images.ndim == 4 and images.is_floating_point()
    if processor is None:
        raise ValueError("chat needs a processor (or, for tiles or text alone, a tokenizer) as its first argument.")
    for name, options in (("images_kwargs", images_kwargs), ("videos_kwargs", videos_kwargs)):
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"{name} is a dict of options, got {options!r}.")
    if not hasattr(processor, "image_processor"):
        if videos is not None:
            raise ValueError("A bare tokenizer cannot read videos: pass the processor as the first argument.")
        if images is not None and not is_cut:
            is_tensor = isinstance(images, torch.Tensor)
            what = f"a {images.dtype} tensor of {tuple(images.shape)}" if is_tensor else type(images).__name__
            raise ValueError(
                "A bare tokenizer cannot cut pictures: pass the processor (AutoProcessor.from_pretrained) as the first "
                f"argument, or normalised floating-point tiles (tiles, 3, S, S) instead of {what}."
            )
    else:
        processor.image_processor.check_options(images_kwargs or {})
    if videos_kwargs:
        video_options({}, videos_kwargs)
    if videos is not None and is_cut:
        raise ValueError("videos go with pictures (images), not with tiles; pass their frames as tiles instead.")
    if tile_budget is not None and (images is None or is_cut):
        raise ValueError("tile_budget is shared by pictures; there are none here.")
    if tile_budget is not None and (
        isinstance(tile_budget, bool) or not isinstance(tile_budget, int) or tile_budget < 1
    ):
        raise ValueError(f"tile_budget must be a whole number of at least 1, got {tile_budget!r}.")
    return images if is_cut else None


def _check_settings(
    tiles: torch.Tensor | None,
    num_patches_list,
    target_aspect_ratio,
    tile_order,
    use_scm: bool,
    system_message,
    max_prompt_tokens,
) -> None:
    """Raise `ValueError` for what is said of tiles and does not fit, and for options of the prompt that cannot be."""
    if num_patches_list and tiles is None:
        raise ValueError("num_patches_list belongs to tiles; pictures are counted when they are cut.")
    if tile_order not in TILE_ORDERS:
        raise ValueError(f"tile_order is 'detailed_first' or 'adaptive_first', got {tile_order!r}.")
    if tiles is None and tile_order != "detailed_first":
        raise ValueError(f"tile_order={tile_order!r} belongs to tiles that you cut yourself; leave it out here.")
    if use_scm and tiles is not None and target_aspect_ratio is None:
        raise ValueError(
            "use_scm=True needs to know which tiles are detailed: pass target_aspect_ratio=(columns, rows) of the detailed "
            "grid, a list of them for several pictures, or pass the pictures themselves and a processor."
        )
    longest = 1 if max_prompt_tokens is None else max_prompt_tokens
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise ValueError(f"max_prompt_tokens must be a whole number of at least 1, got {longest!r}.")
    if system_message is not None and not isinstance(system_message, str):
        raise ValueError(f"system_message must be text, got {type(system_message).__name__}.")


def _rows(values, count: int, name: str, what: str) -> list:
    """Return one entry for each row of a batch."""
    if values is None:
        return [None] * count
    if not isinstance(values, (list, tuple)) or len(values) != count:
        given = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(f"{name} must be a list with one {what} for each of the {count} questions, got {given}.")
    return list(values)


def _read(
    processor,
    question: str,
    history: list[tuple[str, str]],
    images,
    videos,
    images_kwargs: dict[str, Any],
    videos_kwargs: dict[str, Any],
    tile_budget: int | None,
    subject: str = "The text",
    is_placed: bool = False,
) -> Conversation:
    """Read one row: placeholders where there are none, pages of files, frames of videos in their places.

    Args:
        is_placed: Whether the question says where everything belongs.

    Raises:
        ValueError: The numbers of placeholders and of images or videos differ, or a video that cannot be read.
    """
    images, videos = list_images(images), [] if videos is None else list_videos(videos)
    asked = [text for text, _ in history]
    if images:
        placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in (*asked, question))
        images = processor.image_processor.with_pages(images, placeholders, **images_kwargs)
    if not is_placed:
        question = _placed(question, asked, images, videos)
    for given, placeholder in ((images, IMAGE_PLACEHOLDER), (videos, VIDEO_PLACEHOLDER)):
        check_placeholders([*asked, question], len(given), subject, placeholder, earlier=len(asked))
    options = images_kwargs
    if tile_budget is not None and images:
        use_thumbnail = options.get("use_thumbnail", processor.image_processor.use_thumbnail)
        ranges = processor.image_processor.tile_ranges(**options)
        ranges = share_tile_budget(tile_budget, len(images), ranges, use_thumbnail)
        options = options | dict(zip(RANGE_NAMES, ranges))  # which a preset leaves as they are
    texts = [*asked, question]
    if videos:
        sampling = {"untrusted_sources": processor.image_processor.untrusted_sources, **videos_kwargs}
        texts, images = place_frames(texts, images, options, videos, sampling)
    else:
        images = [(image, options) for image in images]
    answers = [*(answer for _, answer in history), None]
    turns = list(zip(texts, answers))
    if is_placed:  # what spells a placeholder in messages is marked for the prompt alone
        history, question = [(unprotect(text), answer) for text, answer in history], unprotect(question)
    return Conversation(history, question, turns, images)


def _placed(question: str, asked: list[str], images: list, videos: list) -> str:
    """Return the question with placeholders in front for what has none; several new images are numbered."""
    known = sum(text.count(IMAGE_PLACEHOLDER) for text in asked)
    missing = len(images) - known
    if IMAGE_PLACEHOLDER not in question and missing == 1:
        question = f"{IMAGE_PLACEHOLDER}\n{question}"
    elif IMAGE_PLACEHOLDER not in question and missing > 1:
        numbers = range(known + 1, known + missing + 1)
        question = "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in numbers) + question
    if VIDEO_PLACEHOLDER not in question and videos:
        missing = len(videos) - sum(text.count(VIDEO_PLACEHOLDER) for text in asked)
        question = f"{VIDEO_PLACEHOLDER}\n" * max(missing, 0) + question
    return question


def _read_tiles(
    tiles: torch.Tensor,
    num_patches_list: list[int] | None,
    questions: list[str],
    histories: list[list[tuple[str, str]]],
    is_batch: bool,
) -> list[Conversation]:
    """Read rows about tiles that the caller cut: the images belong to the rows by their placeholders.

    A question that has none is about one image in a batch; else the first of a conversation is about all.
    """
    counts = [len(tiles)] if num_patches_list is None else [int(count) for count in num_patches_list]
    if not counts or min(counts) < 1:
        raise ValueError(
            f"Each picture needs at least one tile, but there are {counts}; pass None for pixel_values to ask without "
            "a picture."
        )
    if sum(counts) != len(tiles):
        raise ValueError(
            f"num_patches_list {counts} adds up to {sum(counts)}, but pixel_values hold {len(tiles)} tiles."
        )
    images, rows, texts = [(part, None) for part in tiles.split(counts)], [], []
    remaining = iter(images)
    for question, history in zip(questions, histories):
        asked = [text for text, _ in history]
        if is_batch or not history:
            question = _placed(question, asked, [None] if is_batch else images, [])
        count = sum(text.count(IMAGE_PLACEHOLDER) for text in (*asked, question))
        rows.append(Conversation(history, question, [*history, (question, None)], [*islice(remaining, count)]))
        texts += [*asked, question]
    check_placeholders(texts, len(images), earlier=0 if is_batch else len(texts) - 1)
    return rows


def _tile_layout(grids, tiles: list[int]) -> torch.Tensor:
    """Return the tile counts of images that the caller cut and, as far as they are known, their grids: (images, 3 + 4).

    Args:
        grids: (columns, rows) of the detailed grid of each image; None: which tiles are detailed does not matter.

    Raises:
        ValueError: Not one (columns, rows) for each image, or a grid of more tiles than the image has.
    """
    if grids is None:
        return torch.tensor([[0, 0, count, 1, 1, 1, 1] for count in tiles])
    ratios = torch.as_tensor(grids)
    ratios = ratios[None] if ratios.ndim == 1 else ratios
    if tuple(ratios.shape) != (len(tiles), 2) or ratios.is_floating_point() or (ratios < 1).any():
        raise ValueError(
            f"target_aspect_ratio must be (columns, rows) of the detailed grid for each of {len(tiles)} pictures, got "
            f"{grids!r}."
        )
    counts = []
    for grid, total in zip(map(tuple, ratios.tolist()), tiles):
        detailed = 0 if grid == SINGLE_TILE else grid[0] * grid[1]  # a grid of one tile gives none, see tiling.py
        if detailed > total:
            raise ValueError(
                f"target_aspect_ratio {grid} means {detailed} detailed tiles, but the picture has {total}."
            )
        thumbnail = min(total - detailed, 1)
        counts.append((detailed, total - detailed - thumbnail, thumbnail, *grid, 1, 1))
    return torch.tensor(counts)


def _image_keys(processor, conversation: Conversation, tile_order: str, knows_grids: bool, grids) -> list[bytes]:
    """Return what tells the images of a conversation apart, with how they are cut."""
    images = conversation.images
    if images and images[0][1] is None:
        counts = _tile_layout(grids if knows_grids else None, [len(tiles) for tiles, _ in images]).tolist()
        return [image_key(tiles, (tile_order, count)) for (tiles, _), count in zip(images, counts)]
    settings = processor.image_processor.to_json_string() if images else ""
    return [image_key(source, (settings, options)) for source, options in images]


def _beginning(conversation: Conversation, system_message: str | None, keys: list[bytes]) -> list[tuple]:
    """Return what was said so far, a tuple for each message, for `recall`."""
    remaining, beginning = iter(keys), [("system", system_message)]
    for question, answer in conversation.turns:
        images = tuple(next(remaining) for _ in range(question.count(IMAGE_PLACEHOLDER)))
        beginning += [("user", question, images), ("assistant", answer)]
    return beginning[:-1]


def _query_ends(conversations: list[Conversation], prompts: list[RenderedPrompt]) -> list[int]:
    """Return for each image the index into its padded row where the prompt of the turn that brought it ended."""
    length, ends = max(len(prompt.token_ids) for prompt in prompts), []
    for conversation, prompt in zip(conversations, prompts):
        if prompt.answers is None and len(conversation.turns) > 1:
            raise ValueError(
                "use_scm=True with a history needs a fast tokenizer (tokenizer.json), which knows where turns end."
            )
        stops = [*(start for start, _ in prompt.answers or []), len(prompt.token_ids)]
        for (question, _), stop in zip(conversation.turns, stops):
            ends += [length - len(prompt.token_ids) + stop] * question.count(IMAGE_PLACEHOLDER)
    return ends


def _token_ids(value: int | list[int] | torch.Tensor | None, name: str) -> list[int]:
    """Return one id, several or none as a list.

    Raises:
        ValueError: Anything else.
    """
    ids = torch.atleast_1d(value).tolist() if isinstance(value, torch.Tensor) else value
    ids = [] if ids is None else ids if isinstance(ids, (list, tuple, set)) else [ids]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise ValueError(f"{name} must be a token's id or a list of ids, got {value!r}.")
    return list(ids)
