"""`model.chat` and `model.batch_chat`: one call from question to answer, with history.

    answer, history = model.chat(processor, "receipt.png", "What is the total?", return_history=True)
    answer, history = model.chat(processor, "receipt.png", "And the date?", history=history, return_history=True)

The ways to call are in chat_arguments.py, where pictures belong in chat_media.py, what comes back in chat_answer.py, what a
history remembers in prompt_memory.py.
Knows prompts and the model's `generate`; pictures and videos are the processor's business.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from .chat_answer import AnswerStream, ChatAnswer, ChatHistory, trim
from .chat_arguments import ChatArguments, bind_arguments
from .chat_media import Conversation, Picture, conversation_of, conversations_of, counts_of_tiles
from .conversation import (
    GROUNDING_TOKENS,
    IMAGE_END,
    IMAGE_PLACEHOLDER,
    IMAGE_START,
    IMAGE_TOKEN,
    begins_with_bos,
    build_prompt,
    control_tokens,
    encode,
    get_template,
    protect,
)
from .generation_options import check_generation_options
from .processing_minimonkey import count_placeholders, cut_pictures, expand_placeholders
from .prompt_memory import PromptMemory, Turn, common_length, forget_the_oldest, picture_key


DEFAULT_MAX_NEW_TOKENS = 1024


@dataclass
class CutPictures:
    """The tiles of all pictures of a call, and how many of each picture's tiles are detailed, adaptive and thumbnail tiles
    (pictures, 3).

    With a memory there is a `turn`, and `pixel_values` hold those pictures alone that are new to it.
    """

    pixel_values: torch.Tensor | None = None
    tile_counts: torch.Tensor | None = None
    turn: Turn | None = None

    @property
    def tiles(self) -> list[int]:
        """How many tiles each picture has."""
        return [] if self.tile_counts is None else self.tile_counts.sum(dim=1).tolist()


@dataclass
class _Inputs:
    """What `generate` is called with, and what the answers are made of."""

    options: dict[str, Any]
    conversations: list[Conversation]
    memory: PromptMemory | None
    ends: list[str]


class ChatMixin:
    """`chat` and `batch_chat` for a model that has `generate` and a MiniMonkeyConfig."""

    # Of how many conversations the key/value caches are kept; the one that was longest without a turn goes first.
    remembered_conversations = 1

    def chat(self, *args, **kwargs) -> str | tuple[str, ChatHistory] | ChatAnswer | AnswerStream:
        """Ask a question about pictures and videos, or without any.

        Called as `chat(processor, images, question, history=None, ...)`, or in one of the two published orders with tiles
        that the caller cut: `chat(tokenizer, pixel_values, [target_aspect_ratio,] question, generation_config, ...)`.

        A history that `chat` returned remembers what was computed: the next turn costs only what is new, as long as it is
        passed on as it is, with the same pictures. Memory: the key/value cache of `model.remembered_conversations`
        conversations (1), freed with the history, by `history.forget()`, or not kept with `remember=False`.

        Args:
            processor: A `MiniMonkeyProcessor`; a tokenizer will do for tiles or text alone.
            images: None, a picture (PIL image, array, path, URL, data URI) or a list: all of the conversation, in order. A
                floating-point tensor of four dimensions is taken as tiles.
            pixel_values: (T, 3, S, S) tiles instead, `num_patches_list` saying how many belong to each picture.
            question: May say with `<image>` and `<video>` where each picture and video belongs; without, new ones come first.
            history: The (question, answer) pairs of earlier turns.
            return_history: Return (answer, history) instead of the answer.
            return_dict: Return a `ChatAnswer`, with the probabilities of the answer's tokens. Meanwhile the logits of every
                token are kept (92,553 x 4 bytes each for the 2B model).
            stream: Return an `AnswerStream`, which yields the answer's text while it is made.
            generation_config: A dict or a GenerationConfig; it is not changed.
            system_message: Instead of the configured one.
            images_kwargs: Options of the image processor, `{"preset": "docvqa"}` for example.
            tile_budget: Most tiles of all images of the prompt together; each gets the same share.
            videos: None, a video (path, URL, frames) or a list, all of the conversation, in order. A video becomes numbered
                frames of one tile each.
            videos_kwargs: How frames are chosen and cut: num_frames, fps, start, end (seconds), video_backend, see
                `video_frames.load_frames`, and frame_tiles, most tiles of a frame (1).
            max_prompt_tokens: Longest prompt that is not refused; by default the context length of the language model.
            use_scm: Compress the pictures' tokens, see `generate`, which takes `scm_keep_ratio` and its other settings. A
                picture is scored by the turn that brought it, also when a later turn computes it anew.
            target_aspect_ratio: For SCM with tiles: (columns, rows) of the detailed grid, or a list of one for each picture.
            tile_order: Whether the detailed or the adaptive tiles come first in `pixel_values`: "detailed_first", or
                "adaptive_first" as in the published demo.
            grounding_tokens: `<ref>`, `<box>` and `<quad>` in questions and answers are the model's own tokens, as for models
                that answer with boxes. By default they are plain text in questions and left out of answers.
            skip_special_tokens: False leaves all special tokens in the answer.
            remember: False computes everything anew and keeps nothing for the next turn.
            **generation: What `generate` takes: max_new_tokens, do_sample, num_beams, stop_strings, streamer, ... The answer
                ends before a stop string, and with the template's separator beside any `eos_token_id`.

        Raises:
            ValueError: Arguments that do not fit together, a prompt that is too long, with what to pass instead.
        """
        bound = bind_arguments(args, kwargs)
        inputs = self._prepare(bound, self._memory(bound))
        if bound.stream:
            return self._stream(bound, inputs)
        (answer,) = self._answers(bound, inputs)
        if bound.return_dict:
            return answer
        return (answer.text, answer.history) if bound.return_history else answer.text

    def batch_chat(self, *args, **kwargs) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Ask several questions at once, each about its own pictures.

        Called as `batch_chat(processor, images, questions, history=None, ...)` with one entry of `images` (and of `videos`)
        for each question (None, a picture or a list), or in the published order `batch_chat(tokenizer, pixel_values,
        questions, generation_config, num_patches_list, ...)` with one picture for each question that does not say `<image>`
        itself. Other arguments as in `chat`. Histories are taken and returned, and computed from the start.

        Returns:
            The answers, and with `return_history=True` also one history for each.

        Raises:
            ValueError: See `chat`.
        """
        bound = bind_arguments(args, kwargs, batch=True)
        answers = self._answers(bound, self._prepare(bound, None))
        texts = [answer.text for answer in answers]
        return (texts, [list(answer.history) for answer in answers]) if bound.return_history else texts

    def _memory(self, bound: ChatArguments) -> PromptMemory | None:
        """The memory that came with the history, a fresh one for a history to be returned, or none."""
        if not bound.remember or self.remembered_conversations < 1:
            forget_the_oldest(self)
            return None
        memory = getattr(bound.history, "memory", None)
        if memory is not None and memory.belongs_to(self):
            return memory
        keeps_history = bound.return_history or bound.return_dict or bound.stream
        return PromptMemory(self) if keeps_history else None

    # --- pictures ----------------------------------------------------------------------------------------------------

    def _cut(self, bound: ChatArguments, conversations: list[Conversation], memory: PromptMemory | None) -> CutPictures:
        """The tiles of all pictures, cut here or by the caller; with a memory, of those that it does not know."""
        pictures = [picture for conversation in conversations for picture in conversation.pictures]
        if not pictures:
            return CutPictures(turn=None if memory is None else memory.begin_turn([]))
        counts, settings = None, ""
        if bound.pixel_values is not None:
            counts, settings = counts_of_tiles(bound, pictures), bound.tile_order
        elif memory is not None:
            settings = bound.processor.image_processor.to_json_string()
        if memory is None:
            return CutPictures(*self._tiles(bound, pictures, counts))
        per_picture = [picture.options for picture in pictures] if counts is None else counts.tolist()
        keys = [picture_key(picture.source, (settings, of)) for picture, of in zip(pictures, per_picture)]
        turn = memory.begin_turn(keys)
        known, pixel_values = dict(turn.tile_counts), None
        new = {key: i for i, key in reversed([*enumerate(keys)]) if key not in turn.features}
        if new:
            first = sorted(new.values())
            counts = None if counts is None else counts[first]
            pixel_values, counts = self._tiles(bound, [pictures[i] for i in first], counts)
            known |= {keys[i]: count for i, count in zip(first, counts.tolist())}
        return CutPictures(pixel_values, torch.tensor([known[key] for key in keys]), turn)

    def _tiles(
        self, bound: ChatArguments, pictures: list[Picture], counts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """pixel_values (T, 3, S, S) on the model's device and tile_counts (pictures, 3)."""
        if counts is not None:
            return torch.cat([picture.source for picture in pictures]).to(self.device, self.dtype), counts
        sources = [(picture.source, picture.options) for picture in pictures]
        cut = cut_pictures(bound.processor.image_processor, sources, return_tensors="pt")
        # uint8 tiles are normalised by the model, see encode_images.
        dtype = self.dtype if cut["pixel_values"].is_floating_point() else cut["pixel_values"].dtype
        return cut["pixel_values"].to(self.device, dtype), cut["tile_counts"]

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prompt(self, bound: ChatArguments, question: str, history: list[tuple[str, str]]) -> str:
        """The prompt with placeholders; what people wrote is protected from acting as control tokens."""
        # Only questions hold placeholders; with pictures, `<image>` in an answer would be taken for one.
        spellings = control_tokens(bound.tokenizer, bound.grounding_tokens)
        words = [*spellings, IMAGE_PLACEHOLDER]
        system = self.config.system_message if bound.system_message is None else bound.system_message
        return build_prompt(
            get_template(self.config.template),
            protect(question, spellings),
            [(protect(asked, spellings), protect(answered, words)) for asked, answered in history],
            None if system is None else protect(system, words),
        )

    def _encode(
        self, bound: ChatArguments, prompts: list[str], tiles: list[int], tokens_per_tile: int
    ) -> list[list[int]]:
        """The token ids of prompts, image tokens in the places of the pictures."""
        image_token_id = bound.tokenizer.convert_tokens_to_ids(bound.IMG_CONTEXT_TOKEN)
        if tiles and image_token_id != self.config.image_token_id:
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
        texts = expand_placeholders(prompts, tiles, tokens_per_tile)
        return [encode(bound.tokenizer, bos + text) for text in texts]

    def _tokens_per_tile(self, pictures: CutPictures) -> int:
        if pictures.pixel_values is not None:
            return self.tokens_per_tile(pictures.pixel_values)
        turn = pictures.turn
        if turn is None or not turn.keys:
            return self.config.image_seq_length
        return len(turn.features[turn.keys[0]]) // sum(turn.tile_counts[turn.keys[0]])

    def _prepare(self, bound: ChatArguments, memory: PromptMemory | None) -> _Inputs:
        """Everything up to the model: prompts, tiles and settings, checked."""
        template = get_template(self.config.template)
        options = self._generation_options(bound, template.separator)
        check_generation_options(self, None, options)
        conversations = [conversation_of(bound)] if bound.questions is None else conversations_of(bound)
        pictures = self._cut(bound, conversations, memory)
        per_tile = self._tokens_per_tile(pictures)
        prompts = [self._prompt(bound, row.prompt_question, row.prompt_history) for row in conversations]
        rows = self._encode(bound, prompts, pictures.tiles, per_tile)
        self._check_lengths(bound, conversations, rows, pictures.tiles, per_tile)
        inputs = bound.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self.device)
        options |= {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        options |= {"pixel_values": pictures.pixel_values, "use_scm": bound.use_scm}
        if bound.use_scm and pictures.tiles:
            ends = self._query_ends(bound, conversations, rows, pictures.tiles, per_tile)
            options |= {"tile_order": bound.tile_order, "scm_query_ends": ends, "tile_counts": pictures.tile_counts}
        if memory is not None:
            options |= {"turn": pictures.turn, "tile_counts": pictures.tile_counts}
        stops = options.get("stop_strings") or self.generation_config.stop_strings or []
        ends = [template.separator, *([stops] if isinstance(stops, str) else stops)]
        if not bound.skip_special_tokens:
            end_ids = _token_ids(options["eos_token_id"], "eos_token_id")
            known = range(len(bound.tokenizer))
            ends += bound.tokenizer.convert_ids_to_tokens([index for index in end_ids if index in known])
        return _Inputs(options, conversations, memory, ends)

    def _check_lengths(
        self,
        bound: ChatArguments,
        conversations: list[Conversation],
        rows: list[list[int]],
        tiles: list[int],
        per_tile: int,
    ) -> None:
        """Raise `ValueError` for a prompt that is too long, with a tile budget that would fit."""
        limit = self.config.context_length if bound.max_prompt_tokens is None else bound.max_prompt_tokens
        what = "the context length of the model" if bound.max_prompt_tokens is None else "max_prompt_tokens"
        remaining = iter(tiles)
        for conversation, row in zip(conversations, rows):
            own = [next(remaining) for _ in conversation.pictures]
            if limit is None or len(row) <= limit:
                continue
            budget = (limit - len(row)) // per_tile + sum(own)
            can_cut_less = bound.images is not None and bound.videos is None and len(own) <= budget < sum(own)
            fewer = f"fewer tiles (tile_budget={budget}, or another preset in images_kwargs), " if can_cut_less else ""
            raise ValueError(
                f"The prompt has {len(row)} tokens, of which {sum(own)} tiles of pictures take {sum(own) * per_tile}, but "
                f"the limit is {limit} ({what}). Use {fewer}fewer pictures, a shorter history or question."
            )

    def _query_ends(
        self,
        bound: ChatArguments,
        conversations: list[Conversation],
        rows: list[list[int]],
        tiles: list[int],
        tokens_per_tile: int,
    ) -> list[int]:
        """For each picture the index into its padded row where the prompt of the turn that brought it ended."""
        length, ends = max(map(len, rows)), []
        for conversation, row in zip(conversations, rows):
            history = conversation.prompt_history
            turns = [*history, (conversation.prompt_question, "")]
            pictures_seen = 0
            for turn, (asked, _) in enumerate(turns):
                new = count_placeholders([asked])
                pictures_seen += new
                if new:
                    end = len(row)
                    if turn < len(history):
                        prompt = self._prompt(bound, asked, history[:turn])
                        end = common_length(
                            self._encode(bound, [prompt], tiles[:pictures_seen], tokens_per_tile)[0], row
                        )
                    ends += [length - len(row) + end] * new
            tiles = tiles[pictures_seen:]
        return ends

    def _generation_options(self, bound: ChatArguments, separator: str) -> dict[str, Any]:
        """The caller's settings in a fresh dict; an answer ends with the template's separator, whatever other ends it has."""
        options = dict(bound.generation)
        config = bound.generation_config
        if isinstance(config, GenerationConfig):
            options = {**config.to_diff_dict(), **options}
            options.pop("transformers_version", None)
        elif config is not None:
            options = {**config, **options}
        end = bound.tokenizer.convert_tokens_to_ids(separator)
        ends = options.get("eos_token_id")
        ends = self.generation_config.eos_token_id if ends is None else ends
        others = {*_token_ids(ends, "eos_token_id")} - {end}
        options["eos_token_id"] = [end, *sorted(others)] if others else end
        if options.get("pad_token_id") is None:
            options["pad_token_id"] = end if bound.tokenizer.pad_token_id is None else bound.tokenizer.pad_token_id
        limits = ("max_new_tokens", "max_length")
        if not any(options.get(name) for name in limits) and not self.generation_config.max_new_tokens:
            options["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        if options.get("stop_strings") or self.generation_config.stop_strings:
            options.setdefault("tokenizer", bound.tokenizer)
        if bound.return_dict:
            options |= {"return_dict_in_generate": True, "output_logits": True}
        return options

    # --- answers -----------------------------------------------------------------------------------------------------

    def _stream(self, bound: ChatArguments, inputs: _Inputs) -> AnswerStream:
        device = self.device.type
        is_autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def run(streamer, stop) -> ChatAnswer:
            criteria = StoppingCriteriaList([*(inputs.options.get("stopping_criteria") or []), stop])
            inputs.options |= {"streamer": streamer, "stopping_criteria": criteria}
            with torch.autocast(device, dtype, enabled=is_autocast):  # which is the thread's own
                return self._answers(bound, inputs)[0]

        return AnswerStream(run, lambda ids: self._decode(bound, ids), inputs.ends)

    def _answers(self, bound: ChatArguments, inputs: _Inputs) -> list[ChatAnswer]:
        output = self.generate(**inputs.options)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        rows, length = inputs.options["input_ids"].shape
        first = range(0, len(sequences), len(sequences) // rows)  # of several returned sequences the best
        probabilities = self._log_probabilities(output) if bound.return_dict else None
        answers = []
        for conversation, row in zip(inputs.conversations, first):
            ids = _up_to_end(sequences[row, length:].tolist(), inputs.options["eos_token_id"])
            text = trim(self._decode(bound, ids), inputs.ends)
            history = ChatHistory([*conversation.history, (conversation.question, text)], inputs.memory)
            answer = ChatAnswer(text, history, ids)
            if probabilities is not None:
                answer.log_probabilities = probabilities[row, : len(ids)].tolist()
            answers.append(answer)
        return answers

    def _log_probabilities(self, output) -> torch.Tensor:
        """Of each new token (rows, new), before sampling's settings."""
        beams = getattr(output, "beam_indices", None)
        return self.compute_transition_scores(output.sequences, output.logits, beams, normalize_logits=True)

    @staticmethod
    def _decode(bound: ChatArguments, ids: list[int]) -> str:
        if not bound.grounding_tokens:
            return bound.tokenizer.decode(ids, skip_special_tokens=bound.skip_special_tokens)
        skipped = set(bound.tokenizer.all_special_ids) if bound.skip_special_tokens else set()
        skipped -= set(bound.tokenizer.convert_tokens_to_ids(list(GROUNDING_TOKENS)))
        return bound.tokenizer.decode([index for index in ids if index not in skipped])


def _up_to_end(ids: list[int], ends: int | list[int]) -> list[int]:
    """Ids up to and with the first end token; padding may follow it."""
    ends = _token_ids(ends, "eos_token_id")
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), None)]


def _token_ids(value: int | list[int] | torch.Tensor | None, name: str) -> list[int]:
    """One id, several or none as a list.

    Raises:
        ValueError: Anything else.
    """
    ids = torch.atleast_1d(value).tolist() if isinstance(value, torch.Tensor) else value
    ids = [] if ids is None else ids if isinstance(ids, (list, tuple, set)) else [ids]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise ValueError(f"{name} must be a token's id or a list of ids, got {value!r}.")
    return list(ids)
