"""`generate` for prompts with images: vision runs once, scale compression shortens the prompt, padding may be on either side.

What transformers' generation gets is a prompt of embeddings and a mask, rewritten before its first step; greedy, beams,
sampling, streaming and static caches then work as for any model. The ids that are returned begin with the whole prompt.

Shapes: B rows, N tokens of a row, T tiles of all images of the batch, S tile size in pixels, I images, D width of the
language model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList

from .attention_probe import attention_inputs
from .compression import AttentionInputs, CompressionSettings, find_images, kept_positions, pack
from .generation_options import check_generation_options
from .prompt_memory import Prompt, PromptMemory, Recalled, Turn, new_cache
from .transformers_bridge import (
    CACHE_NAME,
    CACHE_NAMES,
    PaddedRepetitionPenalty,
    cache_of,
    extends,
    with_both_cache_names,
    with_one_cache_name,
)


# On a cache: its positions are not those of the ids that were returned with it.
REPACKED = "prompt_was_repacked"


# What transformers cannot do, or ignores, when a prompt is embeddings; and the value of each that changes nothing.
NEED_PROMPT_IDS = {
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "prefill_chunk_size": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}


@dataclass
class _Embedded:
    """A prompt (B, N) as embeddings (B, N, D), and which positions of each row the language model reads.

    `kept` is None where a mask of another shape than (B, N) decides that. With a memory there is one row, of which the
    `cache` holds the first of the `kept` positions already.
    """

    embeddings: torch.Tensor
    kept: list[torch.Tensor] | None
    prompt: Prompt | None = None
    cache: Cache | None = None


class GenerateMixin:
    """`generate` and `kept_positions` for a model that has `encode_images` and a MiniMonkeyConfig."""

    @torch.no_grad()
    def kept_positions(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        **scm_options: Any,
    ) -> list[torch.Tensor]:
        """The positions of a prompt that scale compression keeps; see `generate` for the arguments.

        Returns:
            For each row the indices into the padded row that stay, ascending int64, padding left out.

        Raises:
            ValueError: See `generate`.
        """
        settings = self._compression_settings(**scm_options)
        mask = _whole_mask(attention_mask, input_ids)
        return self._encode_and_compress(input_ids, mask, pixel_values, tile_counts, settings)[1]

    @extends(GenerationMixin.generate)
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_scm: bool = False,
        scm_keep_ratio: float | None = None,
        scm_layer: int | None = None,
        scm_queries: str | None = None,
        scm_query_ends: list[int] | None = None,
        tile_order: str = "detailed_first",
        turn: Turn | None = None,
        **kwargs: Any,
    ):
        """Generate as any transformers model does; returns the prompt's ids and the new ones (B, N + new).

        Vision runs once, before the first step, whatever the number of beams or returned sequences. Prompts with images may
        be padded on either side.

        Args:
            inputs: The prompt's ids (B, N); `input_ids=` works too.
            generation_config: Settings, as for any transformers model.
            pixel_values: (T, 3, S, S) tiles of all images.
            tile_counts: (I, 3) detailed, adaptive and thumbnail tiles of each image; scale compression needs them.
            tile_grids, mm_token_type_ids: Accepted so that a processor's whole output can be passed; not used.
            use_scm: Scale compression: of an image's detailed tokens the language model reads only those that the image's
                other tokens and the text attend to most. The ids returned begin with the whole prompt all the same.
            scm_keep_ratio: Share of the detailed tokens that stay, above 0 and at most 1.
            scm_layer: The layer whose attention decides.
            scm_queries: "all" as in the paper, or "visual" for scores that depend on nothing but the image.
            scm_query_ends: For each image the index into its padded row before which the text that scores it ends; the
                row's end by default. `chat` gives the end of the turn that brought the image.
            tile_order: Whether an image's detailed or its adaptive tiles come first, which only compression needs to know;
                the processor's is "detailed_first".
            turn: What `chat` hands over so that a turn costs only what is new, see prompt_memory.py. `pixel_values` are then
                the tiles of those images alone whose features it does not hold, and `tile_counts` those of all. One row
                without padding.
            **kwargs: Everything `GenerationMixin.generate` takes.

        `scm_keep_ratio`, `scm_layer` and `scm_queries` are by default those of the configuration.

        Raises:
            ValueError: See `encode_images`; settings of SCM out of range or given without `use_scm=True`; with images or
                SCM also `assistant_model`, `prompt_lookup_num_tokens` and `prefill_chunk_size`; with SCM `position_ids` and
                a cache, and later on the cache that it returned.
        """
        scm_options = {
            "scm_keep_ratio": scm_keep_ratio,
            "scm_layer": scm_layer,
            "scm_queries": scm_queries,
            "scm_query_ends": scm_query_ends,
        }
        given = [name for name, value in scm_options.items() if value is not None]
        if given and not use_scm:
            raise ValueError(f"{', '.join(given)} works only with use_scm=True.")
        settings = self._compression_settings(**scm_options, tile_order=tile_order) if use_scm else None
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("The prompt's ids were given twice, by position and as input_ids.")
            kwargs["input_ids"] = inputs
        has_images = pixel_values is not None or bool(turn is not None and turn.keys)
        self._check_what_fits(generation_config, kwargs, has_images, use_scm)
        kwargs = with_one_cache_name(kwargs)
        check_generation_options(self, generation_config, kwargs)
        can_remember = turn is not None and self._can_remember(generation_config, kwargs)
        if turn is not None and (turn.keys or can_remember):
            settings = settings or self._compression_settings(scm_keep_ratio=1.0)
            embedded = self._embed_turn(kwargs, pixel_values, tile_counts, settings, turn, can_remember)
        elif pixel_values is not None or (use_scm and kwargs.get("input_ids") is not None):
            embedded = self._embed_prompt(kwargs, pixel_values, tile_counts, settings)
        else:
            if all(kwargs.get(name) is None for name in ("inputs_embeds", CACHE_NAME)):
                self._check_no_image_tokens(kwargs.get("input_ids"))
            return with_both_cache_names(super().generate(generation_config=generation_config, **kwargs))
        prompt_ids = kwargs["input_ids"]
        generation_config, repacked = self._use_embedded(generation_config, kwargs, embedded)
        output = super().generate(generation_config=generation_config, **kwargs)
        if embedded.cache is not None:
            self._remember(turn.memory, embedded, output)
        elif repacked:
            output = _with_prompt(output, prompt_ids)
            if cache_of(output) is not None:
                setattr(cache_of(output), REPACKED, True)
        return with_both_cache_names(output)

    @extends(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, visual_token_mask: torch.Tensor | None = None, **kwargs):
        """As in transformers; image tokens are only in the prompt, so no later step is told where they are."""
        inputs = super().prepare_inputs_for_generation(**kwargs)
        embeddings = inputs.get("inputs_embeds")
        if visual_token_mask is not None and embeddings is not None:
            inputs["visual_token_mask"] = visual_token_mask[:, -embeddings.shape[1] :]  # what is not cached yet
        return inputs

    def _compression_settings(
        self,
        scm_keep_ratio: float | None = None,
        scm_layer: int | None = None,
        scm_queries: str | None = None,
        scm_query_ends: list[int] | None = None,
        tile_order: str = "detailed_first",
    ) -> CompressionSettings:
        config = self.config
        return CompressionSettings(
            keep_ratio=config.scm_keep_ratio if scm_keep_ratio is None else scm_keep_ratio,
            layer=config.scm_layer if scm_layer is None else scm_layer,
            num_layers=config.text_config.num_hidden_layers,
            queries=config.scm_queries if scm_queries is None else scm_queries,
            query_ends=scm_query_ends,
            tile_order=tile_order,
        )

    def _embed_prompt(
        self,
        options: dict[str, Any],
        pixel_values: torch.Tensor | None,
        tile_counts: torch.Tensor | None,
        settings: CompressionSettings | None,
    ) -> _Embedded:
        """The prompt of `options` as embeddings, and what of it stays."""
        input_ids, mask = options["input_ids"], options.get("attention_mask")
        if settings is not None:
            mask = _whole_mask(mask, input_ids)
            return _Embedded(*self._encode_and_compress(input_ids, mask, pixel_values, tile_counts, settings))
        kept = [row.nonzero().squeeze(1) for row in mask] if mask is not None and mask.ndim == 2 else None
        return _Embedded(self.encode_images(input_ids, pixel_values), kept)

    def _embed_turn(
        self,
        options: dict[str, Any],
        pixel_values: torch.Tensor | None,
        tile_counts: torch.Tensor | None,
        settings: CompressionSettings,
        turn: Turn,
        can_remember: bool,
    ) -> _Embedded:
        """As `_embed_prompt`, with what is remembered of the prompt: features, kept positions and, if it can serve, a cache."""
        input_ids = options["input_ids"]
        mask = _whole_mask(options.get("attention_mask"), input_ids)
        if len(input_ids) != 1 or not bool(mask.all()):
            raise ValueError("A turn is of one conversation: pass one row without padding.")
        counts = torch.empty(0, 3, dtype=torch.long) if tile_counts is None else torch.as_tensor(tile_counts)
        features = self._recall_features(turn, counts, pixel_values)
        tokens_per_tile = len(features) // int(counts.sum()) if turn.keys else 1
        (images,) = find_images(input_ids, mask, counts, self.config.image_token_id, tokens_per_tile, settings)
        embeddings = self.place_features(input_ids, features)
        prompt = Prompt(input_ids[0].tolist(), list(zip(turn.keys, images)), settings)
        recalled, cache = Recalled(), None
        if can_remember:
            recalled = turn.memory.take_cache(prompt)
            cache = recalled.cache or new_cache(self)
        # What is in the cache was scored by the turn that brought it; it still routes image tokens to visual experts.
        scored = [
            replace(image, detailed_stop=image.detailed_start) if image.start < recalled.start else image
            for image in images
        ]
        (kept,) = kept_positions(embeddings, mask, [scored], settings, self._probe(settings))
        kept = torch.cat([recalled.kept.to(kept.device), kept[kept >= recalled.start]])
        return _Embedded(embeddings, [kept], prompt, cache)

    def _recall_features(self, turn: Turn, counts: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """The features (tokens, D) of all images of a conversation; only those of unseen images are computed."""
        tiles = {key: int(count.sum()) for key, count in zip(turn.keys, counts)}
        unseen = [key for key in tiles if key not in turn.features]
        given, expected = 0 if pixel_values is None else len(pixel_values), sum(tiles[key] for key in unseen)
        if given != expected:
            raise ValueError(
                f"pixel_values hold {given} tiles, but the images that are new in this turn have {expected}."
            )
        features = dict(turn.features)
        if unseen:
            encoded = self.encode_tiles(pixel_values).flatten(0, 1)
            per_tile = len(encoded) // given
            features |= zip(unseen, encoded.split([tiles[key] * per_tile for key in unseen]))
        counts_and_features = {key: (count.tolist(), features[key]) for key, count in zip(turn.keys, counts)}
        turn.memory.remember_pictures(counts_and_features)
        if not turn.keys:
            return torch.empty(0, self.config.text_config.hidden_size, device=self.device)
        return torch.cat([features[key] for key in turn.keys])

    def _can_remember(self, generation_config: GenerationConfig | None, options: dict[str, Any]) -> bool:
        """Whether this generation can go on from a cache and leave one: one row, an ordinary cache, no other decoding."""
        asked = partial(self._setting, generation_config=generation_config, options=options)
        is_one_row = all((asked(name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
        others = ("cache_implementation", "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
        others = (*CACHE_NAMES, *others, "custom_generate")
        is_ordinary = all(asked(name) is None for name in others) and asked("use_cache") is not False
        fits = options["input_ids"].shape[1] <= self.config.cacheable_length
        return is_one_row and is_ordinary and fits

    def _remember(self, memory: PromptMemory, embedded: _Embedded, output) -> None:
        """Leave the cache to the next turn, unless the answer went beyond what stays right in it."""
        if embedded.cache.get_seq_length() <= self.config.cacheable_length:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            new_ids = sequences[0, embedded.embeddings.shape[1] :].tolist()
            memory.remember(embedded.prompt, embedded.kept[0], embedded.cache, new_ids)

    def _use_embedded(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], embedded: _Embedded
    ) -> tuple[GenerationConfig | None, bool]:
        """Put the prompt's embeddings into `options`, without what is left out and padded on the left.

        Returns:
            The generation configuration for it, and whether tokens were left out or moved.
        """
        input_ids, embeddings = options["input_ids"], embedded.embeddings
        is_image = (input_ids == self.config.image_token_id).to(embeddings.device)
        mask = options.get("attention_mask")
        mask = _whole_mask(mask, input_ids) if embedded.kept is not None else mask
        repacked = embedded.kept is not None and _needs_packing(mask, embedded.kept)
        if repacked:
            generation_config = self._lengths_in_new_tokens(generation_config, options, input_ids.shape[1])
            self._move_padding_left(generation_config, options, mask)
            (embeddings, is_image), options["attention_mask"] = pack((embeddings, is_image), embedded.kept)
        options["inputs_embeds"] = embeddings
        if embedded.cache is not None:
            options[CACHE_NAME] = embedded.cache
        if self.config.visual_experts:
            options["visual_token_mask"] = is_image
        return generation_config, repacked

    def _move_padding_left(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], mask: torch.Tensor
    ) -> None:
        """Let what reads the ids of `options` find each row's own: all padding comes first, and none is penalised."""
        order = mask.ne(0).to(torch.uint8).argsort(dim=1, stable=True).to(options["input_ids"].device)
        options["input_ids"] = options["input_ids"].gather(1, order)
        penalty = self._setting("repetition_penalty", generation_config, options)
        if penalty is not None and penalty != 1:
            padding = mask.eq(0).sum(dim=1)
            processors = [PaddedRepetitionPenalty(penalty, padding), *(options.get("logits_processor") or [])]
            options |= {"logits_processor": LogitsProcessorList(processors), "repetition_penalty": 1.0}

    def _encode_and_compress(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None,
        tile_counts: torch.Tensor | None,
        settings: CompressionSettings,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The prompt's embeddings (B, N, D), and the positions of each row that stay."""
        if pixel_values is None:
            self._check_no_image_tokens(input_ids)
            return self.get_input_embeddings()(input_ids), [row.nonzero().squeeze(1) for row in attention_mask]
        if tile_counts is None:
            raise ValueError(
                "Scale compression needs to know an image's detailed tiles: pass tile_counts (images, 3), which the "
                "processor returns beside pixel_values; chat needs target_aspect_ratio for tiles that you cut yourself."
            )
        self._check_pixel_values(pixel_values)
        tokens_per_tile = self.tokens_per_tile(pixel_values)
        images = find_images(
            input_ids, attention_mask, tile_counts, self.config.image_token_id, tokens_per_tile, settings
        )
        embeddings = self.encode_images(input_ids, pixel_values)
        return embeddings, kept_positions(embeddings, attention_mask, images, settings, self._probe(settings))

    def _probe(self, settings: CompressionSettings) -> Callable[[torch.Tensor, torch.Tensor], AttentionInputs]:
        def probe(sequence: torch.Tensor, is_image: torch.Tensor) -> AttentionInputs:
            routing = {"visual_token_mask": is_image[None]} if self.config.visual_experts else {}
            return attention_inputs(self.model.language_model, sequence, settings.layer, **routing)

        return probe

    def _check_no_image_tokens(self, input_ids: torch.Tensor | None) -> None:
        tokens = 0 if input_ids is None else int((input_ids == self.config.image_token_id).sum())
        if tokens:
            raise ValueError(f"The prompt has {tokens} image tokens, but no pixel_values were given.")

    def _check_what_fits(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], has_images: bool, use_scm: bool
    ) -> None:
        """Refuse what transformers would do with other tokens than the model saw; it gives other answers."""
        cache_name = next((name for name in CACHE_NAMES if options.get(name) is not None), CACHE_NAME)
        if getattr(options.get(cache_name), REPACKED, False):
            raise ValueError(
                f"{cache_name} comes from a generation whose prompt was shortened by scale compression, or moved because it "
                "was padded on the right; it does not fit its input_ids. Leave it out."
            )
        if use_scm and options.get("inputs_embeds") is not None:
            raise ValueError(
                "use_scm=True compresses images: pass pixel_values and input_ids instead of inputs_embeds."
            )
        if not has_images and not use_scm:
            return
        if options.get("inputs_embeds") is not None or options.get("input_ids") is None:
            raise ValueError("pixel_values need input_ids and no inputs_embeds.")
        mask = options.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be (rows, tokens) where images are, got {tuple(mask.shape)}; forward takes others."
            )
        for name in NEED_PROMPT_IDS:
            if self._setting(name, generation_config, options) not in (None, NEED_PROMPT_IDS[name]):
                raise ValueError(f"{name} does not work with images or use_scm=True; leave it out.")
        for name in ("position_ids", cache_name):
            if use_scm and options.get(name) is not None:
                raise ValueError(
                    f"{name} counts tokens that scale compression leaves out; leave it out or set use_scm=False."
                )

    def _setting(self, name: str, generation_config: GenerationConfig | None, options: dict[str, Any]):
        """What a generation is told by its options, its configuration or the model's own, in this order."""
        sources = (options, vars(generation_config or GenerationConfig()), vars(self.generation_config))
        return next((source[name] for source in sources if source.get(name) is not None), None)

    def _lengths_in_new_tokens(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], prompt_length: int
    ) -> GenerationConfig | None:
        """Say limits that count the prompt as limits of new tokens: what is embedded is shorter than the prompt's ids.

        Moves them in `options` and returns the configuration without them; that of the caller is not changed.
        """
        generation_config = copy.copy(generation_config)
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = self._setting(total, generation_config, options)
            says_none = new in options and options[new] is None
            if length is None or (not says_none and self._setting(new, generation_config, options) is not None):
                continue
            if total == "max_length" and length <= prompt_length:
                raise ValueError(
                    f"The prompt has {prompt_length} tokens, but max_length is {length}; raise it or pass max_new_tokens."
                )
            options.pop(total, None)
            options[new] = max(length - prompt_length, 0)
            if generation_config is not None:
                setattr(generation_config, total, None)
        return generation_config


def _whole_mask(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    """The mask of a prompt (B, N), ones where there is none."""
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)} for scale compression, got "
            f"{tuple(attention_mask.shape)}."
        )
    return attention_mask


def _with_prompt(output, prompt_ids: torch.Tensor):
    """What `generate` returned, its sequences beginning with the prompt as it was given, padding in its place."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = prompt_ids.repeat_interleave(len(sequences) // len(prompt_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, prompts.shape[1] :]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


def _needs_packing(attention_mask: torch.Tensor, kept: list[torch.Tensor]) -> bool:
    """Whether tokens were left out, or rows end with padding, where generation would go on."""
    return sum(map(len, kept)) < int(attention_mask.sum()) or not bool(attention_mask[:, -1].all())
