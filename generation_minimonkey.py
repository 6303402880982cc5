"""`generate` for prompts with images: vision runs once, scale compression shortens the prompt, padding may be on either side.

What transformers' generation gets is a prompt of embeddings and a mask, rewritten before its first step; greedy, beams,
sampling, streaming and static caches then work as for any model. The ids that are returned begin with the whole prompt.

Shapes: B rows, N tokens of a row, T tiles of all images of the batch, S tile size in pixels, I images, D width of the
language model.
"""

import copy
import inspect
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .attention_probe import attention_inputs, read_dropping, rotary_means
from .blank_tiles import blank_tokens
from .compression import (
    NO_COMPRESSION,
    AttentionInputs,
    CompressionSettings,
    ImageSpan,
    find_images,
    kept_positions,
    pack,
)
from .conversation import image_tokens
from .image_inputs import ImageInputs
from .prompt_memory import Prompt, PromptMemory, Recalled, Turn, joined_caches, new_cache
from .repetition import read_guard
from .token_selection import Select, read_selection
from .transformers_bridge import (
    CACHE_NAME,
    CACHE_NAMES,
    IS_CACHE_RENAMED,
    OTHER_CACHE_NAME,
    PaddedRepetitionPenalty,
    extends,
    with_both_cache_names,
    with_one_cache_name,
)


# Set on a cache whose positions are not those of the ids that were returned with it.
REPACKED = "prompt_was_repacked"


# What transformers cannot do, or ignores, when a prompt is embeddings; and the value of each that changes nothing.
NEED_PROMPT_IDS = {
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}


COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens", "max_length")
# Each refuses the values that it cannot work with; 0 turns some of them off.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
OFF_AT_ZERO = ("no_repeat_ngram_size", "top_k")
# Taken by `generate` without being in its signature.
ALSO_TAKEN = ("tokenizer", "assistant_tokenizer", "trust_remote_code")


def check_generation_options(model, generation_config: GenerationConfig | None, options: dict[str, Any]) -> None:
    """Raise `ValueError` for settings that cannot work and for arguments that nothing takes.

    Args:
        model: Whose `generate` is called.
        generation_config: As `generate` takes it.
        options: The other arguments of `generate`; they are not changed.
    """
    if options.get("custom_generate") is not None:
        return  # which may take anything
    taken = {*inspect.signature(type(model).generate).parameters, *ALSO_TAKEN} - vars(GenerationConfig()).keys()
    settings = {name: value for name, value in options.items() if name not in taken}
    for name in COUNTS:
        value = settings.get(name, getattr(generation_config, name, None))
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    try:
        unused = config.update(**settings)
        config.validate()
    except TypeError as error:
        raise ValueError(f"A setting of the generation has the wrong type: {error}") from error
    for name, processor in {**PROCESSORS, **(WARPERS if config.do_sample else {})}.items():
        value = getattr(config, name, None)
        if value is not None and not (value == 0 and name in OFF_AT_ZERO):
            processor(value)
    model._validate_model_kwargs(unused)


@dataclass
class _Embedded:
    """A prompt (B, N) as embeddings (B, N, D), its mask (B, N), and which positions of each row the language model reads.

    Mask and `kept` are None where all are read. A `cache` holds the first of the `kept` positions already: with a
    memory those of one row, without `cached` of each.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor | None
    kept: list[torch.Tensor] | None
    settings: CompressionSettings | None = None
    prompt: Prompt | None = None
    cache: Cache | None = None
    images: list[list[ImageSpan]] = field(default_factory=list)
    start: int = 0
    cached: list[int] | None = None


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
        slice_values: torch.Tensor | None = None,
        slice_sizes: torch.Tensor | None = None,
        **scm_options: Any,
    ) -> list[torch.Tensor]:
        """Return the positions of a prompt that scale compression keeps; see `generate` for the arguments.

        Returns:
            For each row the indices into the padded row that stay, ascending int64, padding left out.

        Raises:
            ValueError: See `generate`.
        """
        images = ImageInputs(pixel_values, tile_counts, tile_grids, slice_values, slice_sizes)
        are_slices = slice_values is not None or slice_sizes is not None
        settings = self._compression_settings(are_slices, **scm_options)
        return self._embed(input_ids, attention_mask, images, settings).kept

    @extends(GenerationMixin.generate)
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        slice_values: torch.Tensor | None = None,
        slice_sizes: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_scm: bool = False,
        scm_keep_ratio: float | None = None,
        scm_layer: int | None = None,
        scm_queries: str | None = None,
        scm_query_ends: list[int] | None = None,
        scm_select: str | dict[str, Any] | Select | None = None,
        tile_order: str = "detailed_first",
        stop_repetition: bool | dict[str, int] | None = None,
        **kwargs: Any,
    ):
        """Generate as any transformers model does; return the prompt's ids and the new ones (B, N + new).

        Vision runs once, before the first step, whatever the number of beams or returned sequences. Prompts with images may
        be padded on either side.

        Args:
            inputs: The prompt's ids (B, N); `input_ids=` works too.
            generation_config: Settings, as for any transformers model.
            pixel_values: (T, 3, S, S) tiles of all images.
            tile_counts: (I, 3) detailed, adaptive and thumbnail tiles of each image; scale compression needs them.
            tile_grids: (I, 4) columns and rows of the detailed and the adaptive grid of each image; for some of `scm_select`,
                for slices and for patch mining.
            slice_values, slice_sizes: Of slices of their own size instead of `pixel_values`, see `image_inputs.ImageInputs`.
            mm_token_type_ids: Accepted so that a processor's whole output can be passed; not used.
            use_scm: Scale compression: of an image's detailed tokens the language model reads only those that the image's
                other tokens and the text attend to most. The ids returned begin with the whole prompt all the same.
            scm_keep_ratio: Share of the detailed tokens that stay, above 0 and at most 1.
            scm_layer: The layer whose attention decides.
            scm_queries: "all" as in the paper, "visual" for scores that depend on nothing but the image; "balanced",
                "question" and "last" are explained in `compression.CompressionSettings`.
            scm_query_ends: For each image the index into its padded row before which the text that scores it ends; the
                row's end by default. `chat` gives the end of the turn that brought the image.
            tile_order: Whether an image's detailed or its adaptive tiles come first, which only compression needs to know;
                the processor's is "detailed_first".
            scm_select: How the detailed tokens that stay are chosen: a name of `token_selection.SELECTIONS` ("smooth",
                "block", "tile", ...), or a dict of what `token_selection.Selection` takes. A function, alone or as its
                `select`, chooses instead of attention.
            stop_repetition: True ends rows that repeat themselves; a dict does so with settings of
                `repetition.RepetitionGuard`, which sees letters if `tokenizer` is given. By default what the generation
                configuration says (`"stop_repetition": true` in generation_config.json, for servers).
            **kwargs: Everything `GenerationMixin.generate` takes. A cache may also be a `Turn` of prompt_memory.py, as `chat`
                hands it over; `pixel_values` are then only the tiles of the images whose features it does not hold, and
                `tile_counts` those of all; one row without padding.

        `scm_keep_ratio`, `scm_layer` and `scm_queries` are by default those of the configuration.

        Raises:
            ValueError: See `encode_images`; settings of SCM out of range or given without `use_scm=True`; with images or
                SCM also `assistant_model` and `prompt_lookup_num_tokens`; with SCM `position_ids` and a cache, and later on
                the cache that it returned.
        """
        scm_options = {
            "scm_keep_ratio": scm_keep_ratio,
            "scm_layer": scm_layer,
            "scm_queries": scm_queries,
            "scm_query_ends": scm_query_ends,
            "scm_select": scm_select,
        }
        given = [name for name, value in scm_options.items() if value is not None]
        if given and not use_scm:
            raise ValueError(f"{', '.join(given)} works only with use_scm=True.")
        images = ImageInputs(pixel_values, tile_counts, tile_grids, slice_values, slice_sizes)
        settings = None
        if use_scm:
            are_slices = slice_values is not None or slice_sizes is not None
            ends = self._setting("eos_token_id", generation_config, kwargs)
            settings = self._compression_settings(are_slices, **scm_options, tile_order=tile_order, end_ids=ends)
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("The prompt's ids were given twice, by position and as input_ids.")
            kwargs["input_ids"] = inputs
        if logits_processor is not None:
            kwargs["logits_processor"] = logits_processor
        turn = kwargs.pop(CACHE_NAME) if isinstance(kwargs.get(CACHE_NAME), Turn) else None
        has_pixels = pixel_values is not None or slice_values is not None
        has_images = has_pixels or bool(turn is not None and turn.keys)
        self._check_what_fits(generation_config, kwargs, has_images, use_scm)
        if OTHER_CACHE_NAME in kwargs:
            kwargs = with_one_cache_name(kwargs)
        check_generation_options(self, generation_config, kwargs)
        wanted = self._setting("stop_repetition", generation_config, {"stop_repetition": stop_repetition})
        if wanted is not None:
            self._guard_against_loops(wanted, kwargs)
        can_remember = turn is not None and self._can_remember(generation_config, kwargs)
        input_ids = kwargs.get("input_ids")
        if self.config.kv_cache_dtype is not None and not can_remember:
            self._use_quantized_cache(generation_config, kwargs)
        if not (has_images or can_remember or (use_scm and input_ids is not None)):
            if all(kwargs.get(name) is None for name in ("inputs_embeds", CACHE_NAME)):
                self._check_no_image_tokens(input_ids)
            return with_both_cache_names(super().generate(generation_config=generation_config, **kwargs))
        embedded = self._embed(input_ids, kwargs.get("attention_mask"), images, settings, turn, can_remember)
        if settings is not None and settings.selection.stage == "layer":
            self._read_to_layer(generation_config, kwargs, embedded)
        kwargs["inputs_embeds"], mask, kept = embedded.embeddings, embedded.mask, embedded.kept
        if embedded.cache is not None:
            kwargs[CACHE_NAME] = embedded.cache
        if self.config.visual_experts:
            is_image = input_ids == self.config.image_token_id
            kwargs["visual_token_mask"] = is_image.to(embedded.embeddings.device)
        # Tokens were left out, or rows end with padding, where generation would go on.
        repacked = kept is not None and (sum(map(len, kept)) < int(mask.sum()) or not bool(mask[:, -1].all()))
        repacked = repacked or embedded.cached is not None
        if repacked:
            generation_config = self._repack(generation_config, kwargs, embedded)
        if (chunk_size := self._setting("prefill_chunk_size", generation_config, kwargs)) is not None:
            generation_config = self._read_in_chunks(generation_config, kwargs, chunk_size)
        output = super().generate(generation_config=generation_config, **kwargs)
        if embedded.prompt is not None:
            self._remember(turn.memory, embedded, output)
        elif repacked:
            output = _with_prompt(output, input_ids)
            cache = getattr(output, CACHE_NAME, None)
            if cache is not None:
                setattr(cache, REPACKED, True)
        return with_both_cache_names(output) if IS_CACHE_RENAMED else output

    def _compression_settings(
        self,
        are_slices: bool = False,
        scm_keep_ratio: float | None = None,
        scm_layer: int | None = None,
        scm_queries: str | None = None,
        scm_query_ends: list[int] | None = None,
        scm_select: str | dict[str, Any] | Select | None = None,
        tile_order: str = "detailed_first",
        end_ids: int | list[int] | None = None,
    ) -> CompressionSettings:
        """Return what compression is asked to do; refuse images that have no detailed tokens in the prompt."""
        if are_slices:
            raise ValueError(
                "use_scm=True leaves out tokens of square tiles that an overview behind them asks about; slices of their own "
                "size come after theirs. Have fewer of them (max_tiles), or a resampler of fewer queries."
            )
        config, selection = self.config, read_selection(scm_select)
        if config.mining:
            raise ValueError(
                "use_scm=True has nothing to leave out: with patch mining an image's thumbnail is all there is."
            )
        if scm_keep_ratio is not None and selection.mass is not None:
            raise ValueError(
                f"scm_select with mass={selection.mass} decides itself how many tokens stay; leave out scm_keep_ratio, and set "
                "the bounds least and most instead."
            )
        if config.projector == "resampler" and selection.needs_places:
            raise ValueError(
                "The tokens of a resampler have no place in the image: scm_select goes by scores alone there ('token', "
                "'original', 'mass', 'markers', 'layer', 'features'), without windows, tile budgets, coordinates, blank cells."
            )
        queries = config.scm_queries if scm_queries is None else scm_queries
        ends = self.generation_config.eos_token_id if end_ids is None else end_ids
        ends = [] if ends is None else torch.atleast_1d(torch.as_tensor(ends)).tolist()
        return CompressionSettings(
            keep_ratio=config.scm_keep_ratio if scm_keep_ratio is None else scm_keep_ratio,
            layer=config.scm_layer if scm_layer is None else scm_layer,
            num_layers=config.text_config.num_hidden_layers,
            queries=queries,
            query_ends=scm_query_ends,
            tile_order=tile_order,
            selection=selection,
            end_ids=tuple(ends) if queries in ("question", "balanced") else (),
        )

    def _embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: ImageInputs,
        settings: CompressionSettings | None = None,
        turn: Turn | None = None,
        can_remember: bool = False,
    ) -> _Embedded:
        """Embed a prompt (B, N), and say which positions the language model reads.

        Args:
            settings: None: no compression.
            turn: What is remembered of the prompt's images, and, if `can_remember`, of its beginning.
        """
        if settings is None and turn is None:
            kept = None if attention_mask is None else [row.nonzero().squeeze(1) for row in attention_mask]
            embeddings = self.place_features(input_ids, self.image_features(images, input_ids))
            return _Embedded(embeddings, attention_mask, kept)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)} for scale compression, got "
                f"{tuple(mask.shape)}."
            )
        if turn is not None and (len(input_ids) != 1 or not bool(mask.all())):
            raise ValueError("A turn is of one conversation: pass one row without padding.")
        settings = settings or NO_COMPRESSION
        spans: list[list[ImageSpan]] = [[] for _ in input_ids]
        features = input_ids.new_empty(0, self.config.text_config.hidden_size, dtype=self.dtype)
        tile_counts, per_tile, is_whole = images.tile_counts, 1, images.slice_sizes is None and not self.config.mining
        if turn is not None and turn.keys:
            features = self._recall_features(turn, images)
            if is_whole:
                per_tile = len(features) // int(torch.as_tensor(tile_counts).sum())
        elif images.pixel_values is None:
            self._check_no_image_tokens(input_ids)
        elif tile_counts is None:
            raise ValueError(
                "Scale compression needs to know an image's detailed tiles: pass tile_counts (images, 3), which the "
                "processor returns beside pixel_values; chat needs target_aspect_ratio for tiles that you cut yourself."
            )
        else:
            per_tile = self.tokens_per_tile(images.pixel_values)
        if tile_counts is not None and (images.pixel_values is not None or len(features)):
            if not is_whole:  # only remembered, never compressed: each token is a tile that stays
                tile_counts = torch.tensor([(0, 0, len(turn.memory.features[key])) for key in turn.keys])
            spans = find_images(
                input_ids,
                mask,
                tile_counts,
                self.config.image_token_id,
                per_tile,
                settings,
                images.tile_grids,
                is_whole,
            )
            if not len(features):
                features = self.image_features(images, input_ids)
        embeddings = self.place_features(input_ids, features)
        prompt, recalled, cache = None, Recalled(), None
        if can_remember:
            prompt = Prompt(input_ids[0].tolist(), list(zip(turn.keys, spans[0])), settings)
            recalled = turn.memory.take_cache(prompt)
            cache = recalled.cache or new_cache(self)
            # What is in the cache was scored by the turn that brought it; it still routes image tokens to visual experts.
            spans = [
                [
                    replace(image, detailed_stop=image.detailed_start) if image.start < recalled.start else image
                    for image in spans[0]
                ]
            ]
        if settings is NO_COMPRESSION:
            kept = [row.nonzero().squeeze(1) for row in mask]
        else:
            kept = self._compress(embeddings, mask, spans, settings, images, turn)
        if recalled.start:
            kept = [torch.cat([recalled.kept.to(kept[0].device), kept[0][kept[0] >= recalled.start]])]
        return _Embedded(embeddings, mask, kept, settings, prompt, cache, spans, recalled.start)

    def _compress(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        spans: list[list[ImageSpan]],
        settings: CompressionSettings,
        images: ImageInputs,
        turn: Turn | None,
    ) -> list[torch.Tensor]:
        """Return the positions of each row that stay, see `compression.kept_positions`; markers get their run's embedding."""
        blank = None
        if settings.selection.blank != "scored" and any(spans):
            blank = self._blank_tokens(spans, images, turn)
        rotary = partial(rotary_means, self.model.language_model, like=embeddings[0])
        probe = partial(self._probe, settings.layer)
        kept, runs = kept_positions(embeddings, mask, spans, settings, probe, rotary, blank)
        for row, row_runs in enumerate(runs):
            for place, first, stop in row_runs:
                embeddings[row, place] = embeddings[row, first:stop].mean(dim=0)
        return kept

    def _blank_tokens(
        self, spans: list[list[ImageSpan]], images: ImageInputs, turn: Turn | None
    ) -> list[list[torch.Tensor]]:
        """Return which detailed tokens of each image show nothing; of images that a turn remembers, what it knows."""
        counts = torch.as_tensor(images.tile_counts).tolist()
        numbers, flat = range(len(counts)), [span for row in spans for span in row]
        known = {} if turn is None else turn.memory.blank
        keys = [*numbers] if turn is None else turn.keys
        if images.pixel_values is not None:
            new = [number for number in numbers if keys[number] not in known and keys[number] not in keys[:number]]
            tiles = images.pixel_values.split([sum(counts[number]) for number in new])
            for number, own in zip(new, tiles):
                adaptive = counts[number][1] if flat[number].detailed_start > flat[number].start else 0
                known[keys[number]] = self._blank_cells(own[adaptive:][: counts[number][0]], flat[number])
        if missing := [number for number in numbers if keys[number] not in known]:
            raise ValueError(
                f"scm_select with blank tokens needs the pixels of image {missing[0]}, which are not here."
            )
        remaining = iter(keys)
        return [[known[next(remaining)] for _ in row] for row in spans]

    def _blank_cells(self, tiles: torch.Tensor, span: ImageSpan) -> torch.Tensor:
        if not len(tiles):
            return torch.zeros(0, dtype=torch.bool)
        if tiles.is_floating_point():
            mean, std = (
                torch.tensor(values, device=tiles.device).view(-1, 1, 1)
                for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            )
            tiles = ((tiles.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        grid = span.tile_map
        blank = torch.from_numpy(blank_tokens(tiles.cpu().numpy(), (grid.columns, grid.rows), grid.side))
        if self.config.pixel_shuffle_version == "v1":  # whose tokens of a tile are column by column
            blank = blank.unflatten(0, (-1, grid.side, grid.side)).transpose(1, 2).flatten()
        return blank

    def _probe(self, layer: int, sequence: torch.Tensor, is_image: torch.Tensor) -> AttentionInputs:
        routing = {"visual_token_mask": is_image[None]} if self.config.visual_experts else {}
        return attention_inputs(self.model.language_model, sequence, layer, **routing)

    def _read_to_layer(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], embedded: _Embedded
    ) -> None:
        """Read prompts to where their images are scored: all tokens in the layers before, what stays in the others.

        Puts into `embedded` a cache of what was read. The last token of a turn that brought an image, and all after it, is
        left to the generation and sees what stays alone, so that a later turn that is computed anew is the same.
        """
        copies = self._check_own_cache("scm_select with stage='layer'", generation_config, options)
        mask, layer = embedded.mask, embedded.settings.layer
        if not embedded.settings.compresses:
            return
        caches, cached = [], []
        for row, images in enumerate(embedded.images):
            positions = mask[row].nonzero().squeeze(1).to(embedded.embeddings.device)
            tokens, start = embedded.embeddings[row, positions], embedded.start
            is_kept = torch.isin(positions, embedded.kept[row].to(positions.device))
            is_image = (options["input_ids"][row].to(positions.device) == self.config.image_token_id)[positions]
            cache = embedded.cache or new_cache(self)
            for stop in sorted({image.query_stop for image in images if image.detailed_tokens}):
                part, start = slice(start, stop - 1), stop - 1
                kept = is_kept[part].nonzero().squeeze(1)
                routing = {"visual_token_mask": is_image[None, part]} if self.config.visual_experts else {}
                read_dropping(self.model.language_model, tokens[part], part.start, layer, kept, cache, **routing)
            caches.append(cache)
            cached.append(cache.get_seq_length())
        if embedded.prompt is None and any(cached):
            embedded.cache, embedded.cached = joined_caches(caches, new_cache(self), copies), cached

    def _read_in_chunks(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], chunk_size: int
    ) -> GenerationConfig | None:
        """Read the embeddings in `options` a chunk at a time into a cache, all but the last chunk; the logits are the same.

        transformers splits ids, which a prompt with images is no longer when it gets there.

        Returns:
            The generation configuration without the chunk's size.
        """
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral) or chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be a whole number of at least 1, got {chunk_size!r}.")
        if getattr(self.generation_config, "prefill_chunk_size", None) is not None:
            raise ValueError(
                "prefill_chunk_size of model.generation_config would be applied twice; pass it to generate."
            )
        copies = self._check_own_cache("prefill_chunk_size with images", generation_config, options)
        embeddings, mask = options["inputs_embeds"], options.get("attention_mask")
        mask = embeddings.new_ones(embeddings.shape[:2], dtype=torch.long) if mask is None else mask
        places = options.get("position_ids")
        places = (mask.long().cumsum(dim=1) - 1).clamp(min=0) if places is None else places
        is_fresh = options.get(CACHE_NAME) is None
        cache = new_cache(self) if is_fresh else options[CACHE_NAME]
        start = past = cache.get_seq_length()
        while start + chunk_size < embeddings.shape[1]:
            part, start = slice(start, start + chunk_size), start + chunk_size
            routing = {"visual_token_mask": options["visual_token_mask"][:, part]} if self.config.visual_experts else {}
            reading = {CACHE_NAME: cache, "use_cache": True, "position_ids": places[:, part], **routing}
            self.model.language_model(inputs_embeds=embeddings[:, part], attention_mask=mask[:, :start], **reading)
        if start > past and is_fresh and copies > 1:
            cache.batch_repeat_interleave(copies)
        options |= {CACHE_NAME: cache}
        options.pop("prefill_chunk_size", None)
        generation_config = copy.copy(generation_config)
        if generation_config is not None:
            generation_config.prefill_chunk_size = None
        return generation_config

    def _check_own_cache(self, what: str, generation_config: GenerationConfig | None, options: dict[str, Any]) -> int:
        """Refuse settings beside which `what` cannot make a cache; return how many copies of a row the generation needs."""
        if self._setting("cache_implementation", generation_config, options) is not None or (
            self._setting("use_cache", generation_config, options) is False
        ):
            raise ValueError(f"{what} makes a cache of its own; leave out cache_implementation and use_cache=False.")
        return max(
            self._setting(name, generation_config, options) or 1 for name in ("num_beams", "num_return_sequences")
        )

    def _recall_features(self, turn: Turn, images: ImageInputs) -> torch.Tensor:
        """Return the features (tokens, D) of all images of a conversation; compute only those of unseen images."""
        counts = torch.as_tensor(images.tile_counts)
        unseen = {key: number for number, key in reversed([*enumerate(turn.keys)]) if key not in turn.features}
        unseen = dict(sorted(unseen.items(), key=lambda pair: pair[1]))
        features = dict(turn.features)
        if unseen or images.pixel_values is not None:
            new = images.of([*unseen.values()])
            given, expected = 0 if new.pixel_values is None else len(new.pixel_values), int(new.tile_counts.sum())
            if given != expected and not new.are_slices:
                raise ValueError(
                    f"pixel_values hold {given} tiles, but the images that are new in this turn have {expected}."
                )
            per_tile = 1 if new.are_slices else self.tokens_per_tile(new.pixel_values)
            tokens = [image_tokens(layout, per_tile) for layout in self.image_layouts(new)]
            features |= zip(unseen, self.image_features(new).flatten(0, -2).split(tokens))
        grids = counts.new_ones(len(counts), 4) if images.tile_grids is None else torch.as_tensor(images.tile_grids)
        if images.slice_sizes is not None:
            grids = torch.cat([grids, torch.as_tensor(images.slice_sizes)], dim=1)
        tiles_and_features = zip(turn.keys, counts.tolist(), grids.tolist())
        turn.memory.remember_images({key: (count, grid, features[key]) for key, count, grid in tiles_and_features})
        return torch.cat([features[key] for key in turn.keys])

    def _can_remember(self, generation_config: GenerationConfig | None, options: dict[str, Any]) -> bool:
        """Tell whether this generation can go on from a cache and leave one: one row, an ordinary cache, no other decoding."""
        asked = partial(self._setting, generation_config=generation_config, options=options)
        is_one_row = all((asked(name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
        others = ("cache_implementation", "assistant_model", "prompt_lookup_num_tokens")
        others = (*CACHE_NAMES, *others, "custom_generate")
        is_ordinary = all(asked(name) is None for name in others) and asked("use_cache") is not False
        fits = options["input_ids"].shape[1] <= self.config.cacheable_length
        return is_one_row and is_ordinary and fits

    def _use_quantized_cache(self, generation_config: GenerationConfig | None, options: dict[str, Any]) -> None:
        """Put an empty cache of the configuration's type into `options`, where no other cache is asked for."""
        names = (*CACHE_NAMES, "cache_implementation", "custom_generate")
        is_asked = any(self._setting(name, generation_config, options) is not None for name in names)
        if not is_asked and self._setting("use_cache", generation_config, options) is not False:
            options[CACHE_NAME] = new_cache(self)

    def _remember(self, memory: PromptMemory, embedded: _Embedded, output) -> None:
        """Leave the cache to the next turn, unless the answer went beyond what stays right in it."""
        if embedded.cache.get_seq_length() <= self.config.cacheable_length:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            new_ids = sequences[0, embedded.embeddings.shape[1] :].tolist()
            memory.remember(embedded.prompt, embedded.kept[0], embedded.cache, new_ids)

    def _repack(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], embedded: _Embedded
    ) -> GenerationConfig | None:
        """Leave out of the prompt in `options` what is not kept, and pad it on the left; return the configuration for that."""
        input_ids, mask, kept = options["input_ids"], embedded.mask, embedded.kept
        generation_config = self._lengths_in_new_tokens(generation_config, options, input_ids.shape[1])
        # What reads the ids finds each row's own: all padding comes first, and none is penalised.
        order = mask.ne(0).to(torch.uint8).argsort(dim=1, stable=True).to(input_ids.device)
        options["input_ids"] = input_ids.gather(1, order)
        penalty = self._setting("repetition_penalty", generation_config, options)
        if penalty is not None and penalty != 1:
            processors = [PaddedRepetitionPenalty(penalty, mask.eq(0).sum(dim=1))]
            processors += options.get("logits_processor") or []
            options |= {"logits_processor": LogitsProcessorList(processors), "repetition_penalty": 1.0}
        parts = {"inputs_embeds": embedded.embeddings}
        if self.config.visual_experts:
            parts["visual_token_mask"] = options["visual_token_mask"]
        if embedded.settings is not None and embedded.settings.selection.positions == "original":
            places = mask.long().cumsum(dim=1) - 1  # of each token in its row alone
            parts["position_ids"] = places.to(embedded.embeddings.device)
        tensors = tuple(parts.values())
        if embedded.cached is None:
            packed, options["attention_mask"] = pack(tensors, kept)
        else:  # what is in the cache comes first in all rows
            rows = list(zip(kept, embedded.cached))
            first, first_mask = pack(tensors, [own[:count] for own, count in rows])
            rest, rest_mask = pack(tensors, [own[count:] for own, count in rows])
            packed = [torch.cat(pair, dim=1) for pair in zip(first, rest)]
            options["attention_mask"] = torch.cat([first_mask, rest_mask], dim=1)
        options |= zip(parts, packed)
        return generation_config

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

    def _guard_against_loops(self, stop_repetition: bool | dict[str, int], options: dict[str, Any]) -> None:
        """Put what ends rows that repeat themselves among the stopping criteria of `options`, unless it is turned off."""
        prompt, tokenizer = options.get("input_ids"), options.get("tokenizer")
        length = 0 if prompt is None else prompt.shape[1]
        guard = read_guard(stop_repetition, length, getattr(tokenizer, "decode", None))
        if guard is not None:
            criteria = [*(options.get("stopping_criteria") or []), guard]
            options["stopping_criteria"] = StoppingCriteriaList(criteria)

    def _setting(self, name: str, generation_config: GenerationConfig | None, options: dict[str, Any]):
        """Return a setting from the options of a generation, its configuration or the model's own, in this order."""
        sources = (options, vars(generation_config or GenerationConfig()), vars(self.generation_config))
        return next((source[name] for source in sources if source.get(name) is not None), None)

    def _lengths_in_new_tokens(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], prompt_length: int
    ) -> GenerationConfig | None:
        """Turn limits that count the prompt into limits of new tokens: what is embedded is shorter than the prompt's ids.

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


def _with_prompt(output, prompt_ids: torch.Tensor):
    """Return what `generate` returned, its sequences beginning with the prompt as it was given, padding in its place."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = prompt_ids.repeat_interleave(len(sequences) // len(prompt_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, prompts.shape[1] :]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
