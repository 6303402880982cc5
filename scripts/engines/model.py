"""A MiniMonkey whose language model is run by another program: images, prompts, MSAC, SCM, `chat` and `generate` are ours.

The program reads embeddings, one sequence at a time, and gives logits. Of the language model torch has only the token
embeddings and, for scale compression, the first layers.
"""

import copy
import weakref
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.transformers_bridge import CACHE_NAME, CACHE_NAMES, extends


class LanguageEngine(Protocol):
    """A language model that goes on from what it read; see `libllama.LibLlama` for what its methods do."""

    length: int
    context_length: int
    width: int
    vocab_size: int
    needs_consecutive_positions: bool

    def read(self, embeddings: np.ndarray, every: bool = False) -> np.ndarray: ...

    def read_ids(self, ids: list[int], every: bool = False) -> np.ndarray: ...

    def cut(self, length: int) -> None: ...


class EngineModel(MiniMonkeyForConditionalGeneration):
    """A MiniMonkey that gives its language model's work to `engine`: one row, no beams, no gradients.

    An engine holds one conversation. Another one that begins takes its place; the first, if it goes on, is read anew.

    Args:
        scored_layers: How many layers torch has, for scale compression; 0 for none.
    """

    # Weights that only the engine needs are in the checkpoint all the same.
    _keys_to_ignore_on_load_unexpected = (r"lm_head\.", r"language_model\.layers\.")
    _tied_weights_keys = None

    def __init__(self, config, scored_layers: int = 0):
        config = copy.deepcopy(config)
        config.kv_cache_dtype = None  # keys and values are the engine's; the cache here only counts tokens
        super().__init__(config)
        language_model = self.model.language_model
        language_model.layers = language_model.layers[:scored_layers]
        self.lm_head = nn.Identity()
        self.engine: LanguageEngine | None = None
        self._holder: weakref.ref[Cache] | None = None  # whose tokens the engine holds

    def use(self, engine: LanguageEngine) -> "EngineModel":
        """Let `engine` be the language model; return this model.

        Raises:
            ValueError: It is another model's, by its sizes.
        """
        text = self.config.text_config
        sizes, expected = (engine.width, engine.vocab_size), (text.hidden_size, text.vocab_size)
        if sizes != expected:
            raise ValueError(
                f"The engine's model has embeddings of {sizes[0]} dimensions and {sizes[1]} tokens, this one {expected[0]} and "
                f"{expected[1]}; export it from the same checkpoint."
            )
        self.engine = engine
        return self

    @extends(MiniMonkeyForConditionalGeneration.generate)
    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs: Any):
        """Generate as any MiniMonkey does, one answer to one prompt.

        Raises:
            ValueError: Several rows, beams or sequences; ways of compression that need layers which the engine has.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        for name in ("num_beams", "num_return_sequences"):
            count = self._setting(name, generation_config, kwargs) or 1
            if count != 1:
                raise ValueError(
                    f"An engine follows one answer, got {name}={count}; leave it out or take --engine torch."
                )
        if ids is not None and len(ids) != 1:
            raise ValueError(f"An engine reads one prompt at a time, got {len(ids)}; ask one after the other.")
        if kwargs.get("use_scm"):
            self._check_what_engine_scores(kwargs)
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def _check_what_engine_scores(self, options: dict[str, Any]) -> None:
        layer = self.config.scm_layer if options.get("scm_layer") is None else options["scm_layer"]
        layers = self.scored_layers()
        if layer >= layers:
            raise ValueError(
                f"Scale compression scores by layer {layer}, but torch has {layers} layers beside this engine; load the model "
                f"with at least {layer + 1} (use_scm=True)."
            )
        settings = self._compression_settings(scm_layer=layer, scm_select=options.get("scm_select"))
        if settings.selection.stage == "layer":
            raise ValueError("scm_select with stage='layer' goes on inside the language model, which an engine has.")
        if settings.selection.positions == "original" and self.engine.needs_consecutive_positions:
            raise ValueError(
                "This engine reads tokens whose positions follow each other; leave out positions='original'."
            )

    def scored_layers(self) -> int:
        """Return how many of the first layers can score tokens for scale compression."""
        return len(self.model.language_model.layers)

    @torch.no_grad()
    def forward(self, input_ids=None, *, inputs_embeds=None, position_ids=None, logits_to_keep=0, **kwargs):
        """Read tokens behind those that the cache holds.

        Args:
            input_ids: (1, n), or `inputs_embeds` (1, n, D).
            logits_to_keep: 0: logits of all tokens, else of the last alone.

        Returns:
            Logits (1, n, vocabulary) and the cache.

        Raises:
            ValueError: Labels, pixels or several rows; a cache that had to give way to another conversation.
        """
        refused = [name for name in ("labels", "pixel_values") if kwargs.get(name) is not None]
        rows = len(input_ids if inputs_embeds is None else inputs_embeds)
        if self.engine is None or refused or rows != 1:
            raise ValueError(
                "An engine reads one row of ids or embeddings, for `generate` and `chat`: "
                + ("there is none, call use(engine)." if self.engine is None else f"got {rows} rows, {refused}.")
            )
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        past = 0 if cache is None else cache.get_seq_length()
        self._take_place(cache, past)
        self.engine.cut(past)
        every = not isinstance(logits_to_keep, int) or logits_to_keep == 0
        if inputs_embeds is None:
            count, logits = input_ids.shape[1], self.engine.read_ids(input_ids[0].tolist(), every)
        else:
            count, logits = inputs_embeds.shape[1], self.engine.read(inputs_embeds[0].float().cpu().numpy(), every)
        if cache is not None:
            places = torch.arange(past, past + count, dtype=torch.int32).view(1, 1, -1, 1)
            for layer in range(self.config.text_config.num_hidden_layers):
                cache.update(places, places, layer)
        return ModelOutput({"logits": torch.from_numpy(logits)[None], CACHE_NAME: cache})

    def _take_place(self, cache: Cache | None, past: int) -> None:
        """Let the engine hold what belongs to `cache`, which counts tokens, from now on."""
        holder = None if self._holder is None else self._holder()
        if cache is not None and holder is cache and past <= self.engine.length:
            return
        if past or getattr(cache, "gave_way", False):
            raise ValueError(
                "The engine holds another conversation by now; two cannot be generated at once. Start this one again."
            )
        if holder is not None:
            holder.gave_way = True
            holder.reset()  # so that its conversation, should it go on, is read from the start
        self._holder = None if cache is None else weakref.ref(cache)
