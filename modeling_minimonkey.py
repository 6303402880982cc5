"""The MiniMonkey model: InternViT vision tower, pixel shuffle and projector, any causal language model of transformers.

There is no attention code here: vision tower and language model are transformers' own, with all their attention back
ends, caches and parallel plans. This file adds what the Mini-Monkey family has beside them: `generate` that encodes an
image once and can compress its tokens (SCM), `chat` with history, and weights under their published names.

    model = AutoModel.from_pretrained("path/of/this/repository", trust_remote_code=True)
    answer = model.chat(processor, "receipt.png", "What is the total?")

Shapes: B rows, N tokens of a row, T tiles of all images of the batch, S tile size in pixels, I images, K tokens a tile,
D width of the language model.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, InternVLForConditionalGeneration
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.internvl.modeling_internvl import InternVLModel

from .attention_probe import attention_inputs
from .chat_minimonkey import ChatMixin
from .checkpoint import weight_conversions
from .compression import AttentionInputs, CompressionSettings, find_images, kept_positions, pack
from .configuration_minimonkey import MiniMonkeyConfig
from .visual_experts import add_visual_experts


# Tiles that go through the vision tower at a time: enough to keep a GPU busy, and memory does not grow with the images.
VISION_CHUNK_TILES = 16


class MiniMonkeyModel(InternVLModel):
    """transformers' InternVL model with the older options of the published family."""

    config_class = MiniMonkeyConfig

    def __init__(self, config: MiniMonkeyConfig):
        super().__init__(config)
        if config.visual_experts:
            add_visual_experts(self.language_model)
        for layer in self.vision_tower.encoder.layer:
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                if not isinstance(norm, nn.Identity):
                    norm.variance_epsilon = config.vision_config.layer_norm_eps

    def get_image_features(self, pixel_values: torch.Tensor, vision_feature_layer: int | None = None, **kwargs):
        """As in transformers, for every layer, the embeddings (0) among them."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        if not self.config.vision_config.num_hidden_layers:
            layer = -1  # without layers the only hidden state, the embeddings, is also the last
        if layer != -1:
            kwargs["output_hidden_states"] = True
        return super().get_image_features(pixel_values, vision_feature_layer=layer, **kwargs)

    def pixel_shuffle(self, vision_features: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """(T, rows, columns, width) -> (T, rows * f, columns * f, width / f^2) with f = `scale_factor`.

        Version 1 of the published code leaves out the last transposition of the grid.
        """
        shuffled = super().pixel_shuffle(vision_features, scale_factor)
        return shuffled.transpose(1, 2) if self.config.pixel_shuffle_version == "v1" else shuffled


class MiniMonkeyForConditionalGeneration(ChatMixin, InternVLForConditionalGeneration):
    """Mini-Monkey: answers questions about images. See the README for `chat`, `generate` and the pipeline."""

    config_class = MiniMonkeyConfig
    _no_split_modules = ["InternVLVisionLayer", "VisualExpertDecoderLayer"]

    def __init__(self, config: MiniMonkeyConfig):
        super(InternVLForConditionalGeneration, self).__init__(config)
        self.model = MiniMonkeyModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, use_flash_attn: bool | None = None, load_in_8bit: bool = False, **kwargs):
        """As in transformers; also takes two arguments of the published README.

        Args:
            use_flash_attn: True is `attn_implementation="flash_attention_2"`, False or None leave the choice open.
            load_in_8bit: False only; 8-bit loading is `quantization_config=BitsAndBytesConfig(load_in_8bit=True)`.

        Raises:
            ValueError: `load_in_8bit=True`.
        """
        if load_in_8bit:
            raise ValueError(
                "load_in_8bit=True is gone from transformers; pass "
                "quantization_config=BitsAndBytesConfig(load_in_8bit=True) instead."
            )
        if use_flash_attn:
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs) -> None:
        """As in transformers, always under transformers' own weight names, with the code that loads the model.

        Raises:
            ValueError: `save_original_format=True`; the published names are only read.
        """
        if save_original_format:
            raise ValueError(
                "MiniMonkey reads the published weight names but writes its own only; leave save_original_format=False."
            )
        super().save_pretrained(save_directory, save_original_format=False, **kwargs)
        if kwargs.get("is_main_process", True):
            custom_object_save(self, save_directory)

    def encode_images(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_flags: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of a prompt with the image features in the places of its image tokens.

        Args:
            input_ids: (B, N)
            pixel_values: (T, 3, S, S), normalised, in the order of the image tokens.
            image_flags: (T,) or (T, 1); tiles flagged 0 are padding and give no features.

        Returns:
            (B, N, D)

        Raises:
            ValueError: Shapes, types or devices that do not fit, or image tokens and features of different number.
        """
        self._check_pixel_values(pixel_values)
        if image_flags is not None:
            pixel_values = pixel_values[image_flags.flatten() == 1]
        embeddings = self.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_id
        tokens, features_per_tile = int(is_image.sum()), self.tokens_per_tile(pixel_values)
        if tokens != pixel_values.shape[0] * features_per_tile:
            raise ValueError(
                f"The prompt has {tokens} image tokens (id {self.config.image_token_id}), but {pixel_values.shape[0]} "
                f"tiles give {pixel_values.shape[0] * features_per_tile} features ({features_per_tile} each)."
            )
        if tokens == 0:
            return embeddings
        chunks = pixel_values.split(VISION_CHUNK_TILES)
        features = torch.cat([self.get_image_features(chunk, return_dict=True).pooler_output for chunk in chunks])
        features = features.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_image.unsqueeze(-1).to(embeddings.device), features)  # features (T, K, D)

    def tokens_per_tile(self, pixel_values: torch.Tensor) -> int:
        """Image tokens that each of these tiles gives."""
        patch_size, ratio = self.config.vision_config.patch_size[0], self.config.downsample_ratio
        return int(pixel_values.shape[-1] // patch_size * ratio) ** 2

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        channels, patch_size = self.config.vision_config.num_channels, self.config.vision_config.patch_size[0]
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3]:
            raise ValueError(f"pixel_values must be tiles of shape (tiles, {channels}, S, S), got {shape}.")
        if shape[2] % (patch_size * round(1 / self.config.downsample_ratio)):
            raise ValueError(f"Tiles of {shape[2]} px do not hold a whole number of {patch_size} px patch groups.")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be normalised floating-point tiles, got {pixel_values.dtype}; use the processor."
            )
        if not hasattr(self, "hf_device_map") and pixel_values.device != self.device:
            raise ValueError(
                f"pixel_values are on {pixel_values.device}, the model is on {self.device}; "
                "move the inputs with inputs.to(model.device)."
            )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        visual_token_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """One pass over a batch; see `InternVLForConditionalGeneration.forward` for the arguments not named here.

        Args:
            input_ids: (B, N)
            pixel_values: (T, 3, S, S), the tiles of all images in the order of their image tokens.
            image_flags: (T,) or (T, 1), as published training passes them; tiles flagged 0 are padding.
            tile_counts, tile_grids: Accepted so that a processor's whole output can be passed; not used.
            visual_token_mask: (B, N) which of these embeddings are image tokens; only for visual experts, and only with
                `inputs_embeds`. With `pixel_values` the ids say it.

        Returns:
            `InternVLCausalLMOutputWithPast` with loss (if `labels` are given) and logits (B, N, vocabulary).

        Raises:
            ValueError: See `encode_images`.
        """
        if pixel_values is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError(
                    "pixel_values need input_ids, whose image tokens say where the features belong, and no inputs_embeds."
                )
            visual_token_mask = input_ids == self.config.image_token_id
            inputs_embeds, input_ids = self.encode_images(input_ids, pixel_values, image_flags), None
        if self.config.visual_experts:
            kwargs["visual_token_mask"] = visual_token_mask
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

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
        if pixel_values is None:
            self._check_no_image_tokens(input_ids)
            return [row.nonzero().squeeze(1) for row in mask]
        return self._encode_and_compress(input_ids, mask, pixel_values, tile_counts, settings)[1]

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

    def _encode_and_compress(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        tile_counts: torch.Tensor | None,
        settings: CompressionSettings,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The prompt's embeddings (B, N, D), and the positions of each row that stay."""
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

        def probe(sequence: torch.Tensor, is_image: torch.Tensor) -> AttentionInputs:
            routing = {"visual_token_mask": is_image[None]} if self.config.visual_experts else {}
            return attention_inputs(self.model.language_model, sequence, settings.layer, **routing)

        return embeddings, kept_positions(embeddings, attention_mask, images, settings, probe)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        use_scm: bool = False,
        scm_keep_ratio: float | None = None,
        scm_layer: int | None = None,
        scm_queries: str | None = None,
        scm_query_ends: list[int] | None = None,
        tile_order: str = "detailed_first",
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
            tile_grids: Accepted so that a processor's whole output can be passed; not used.
            use_scm: Scale compression: of an image's detailed tokens the language model reads only those that the image's
                other tokens and the text attend to most. The ids returned begin with the whole prompt all the same.
            scm_keep_ratio: Share of the detailed tokens that stay, above 0 and at most 1.
            scm_layer: The layer whose attention decides.
            scm_queries: "all" as in the paper, or "visual" for scores that depend on nothing but the image.
            scm_query_ends: For each image the index into its padded row before which the text that scores it ends; the
                row's end by default. `chat` gives the end of the turn that brought the image.
            tile_order: Whether an image's detailed or its adaptive tiles come first; the processor's is "detailed_first".
            **kwargs: Everything `GenerationMixin.generate` takes.

        `scm_keep_ratio`, `scm_layer` and `scm_queries` are by default those of the configuration.

        Raises:
            ValueError: See `encode_images`; settings of SCM out of range or given without `use_scm=True`; with images also
                `assistant_model`, `prompt_lookup_num_tokens` and `prefill_chunk_size`.
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
        settings = self._compression_settings(**scm_options, tile_order=tile_order)
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("The prompt's ids were given twice, by position and as input_ids.")
            kwargs["input_ids"] = inputs
        input_ids = kwargs.get("input_ids")
        if use_scm and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "use_scm=True compresses images: pass pixel_values and input_ids instead of inputs_embeds."
            )
        if pixel_values is not None:
            if kwargs.get("inputs_embeds") is not None or input_ids is None:
                raise ValueError("pixel_values need input_ids and no inputs_embeds.")
            self._refuse_what_needs_whole_prompts(generation_config, kwargs, use_scm)
            mask = kwargs.get("attention_mask")
            if use_scm:
                mask = _whole_mask(mask, input_ids)
                embeddings, kept = self._encode_and_compress(input_ids, mask, pixel_values, tile_counts, settings)
            else:
                embeddings = self.encode_images(input_ids, pixel_values)
                kept = [row.nonzero().squeeze(1) for row in mask] if mask is not None and mask.ndim == 2 else None
            is_image = (input_ids == self.config.image_token_id).to(embeddings.device)
            if kept is not None and _needs_packing(mask, kept):
                generation_config = self._lengths_in_new_tokens(generation_config, kwargs, input_ids.shape[1])
                (embeddings, is_image), kwargs["attention_mask"] = pack((embeddings, is_image), kept)
            kwargs["inputs_embeds"] = embeddings
            if self.config.visual_experts:
                kwargs["visual_token_mask"] = is_image
        elif kwargs.get("inputs_embeds") is None and kwargs.get("past_key_values") is None and input_ids is not None:
            self._check_no_image_tokens(input_ids)
        return super().generate(generation_config=generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, visual_token_mask=None, **kwargs
    ):
        """As in transformers; image tokens are only in the prompt, so no later step is told where they are."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if visual_token_mask is not None and inputs.get("inputs_embeds") is not None:
            inputs["visual_token_mask"] = visual_token_mask
        return inputs

    def _check_no_image_tokens(self, input_ids: torch.Tensor) -> None:
        tokens = int((input_ids == self.config.image_token_id).sum())
        if tokens:
            raise ValueError(f"The prompt has {tokens} image tokens, but no pixel_values were given.")

    def _refuse_what_needs_whole_prompts(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], use_scm: bool
    ) -> None:
        """Modes of transformers that read the prompt's ids again, and so lose the images; they give other answers."""
        sources = (options, vars(generation_config or self.generation_config))
        for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
            if any(source.get(name) is not None for source in sources):
                raise ValueError(f"{name} does not work with images; leave it out.")
        for name in ("position_ids", "past_key_values"):
            if use_scm and options.get(name) is not None:
                raise ValueError(
                    f"{name} counts tokens that scale compression leaves out; leave it out or set use_scm=False."
                )

    def _lengths_in_new_tokens(
        self, generation_config: GenerationConfig | None, options: dict[str, Any], prompt_length: int
    ) -> GenerationConfig | None:
        """Say limits that count the prompt as limits of new tokens: what is embedded is shorter than the prompt's ids.

        Moves them in `options` and returns the configuration without them; that of the caller is not changed.
        """
        generation_config = copy.copy(generation_config)
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            sources = (options, vars(generation_config or GenerationConfig()), vars(self.generation_config))
            length = next((source[total] for source in sources if source.get(total) is not None), None)
            if length is None or any(source.get(new) is not None for source in sources):
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


def _needs_packing(attention_mask: torch.Tensor, kept: list[torch.Tensor]) -> bool:
    """Whether tokens were left out, or rows end with padding, where generation would go on."""
    return sum(map(len, kept)) < int(attention_mask.sum()) or not bool(attention_mask[:, -1].all())


register_checkpoint_conversion_mapping(
    MiniMonkeyForConditionalGeneration.__name__, weight_conversions(), overwrite=True
)

__all__ = ["MiniMonkeyForConditionalGeneration"]
