"""The MiniMonkey model: InternViT vision tower, pixel shuffle and projector, any causal language model of transformers.

There is no attention code here: vision tower and language model are transformers' own, with all their attention back
ends, caches and parallel plans. This file adds what the Mini-Monkey family has beside them: `generate` that encodes an
image once, `chat` with history, and weights under their published names.

    model = AutoModel.from_pretrained("path/of/this/repository", trust_remote_code=True)
    answer = model.chat(processor, "receipt.png", "What is the total?")

Shapes: B rows, N tokens of a row, T tiles of all images of the batch, S tile size in pixels, I images, K tokens a tile,
D width of the language model.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, InternVLForConditionalGeneration
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.internvl.modeling_internvl import InternVLModel

from .chat_minimonkey import ChatMixin
from .checkpoint import weight_conversions
from .configuration_minimonkey import MiniMonkeyConfig


class MiniMonkeyModel(InternVLModel):
    """transformers' InternVL model with the older options of the published family."""

    config_class = MiniMonkeyConfig

    def __init__(self, config: MiniMonkeyConfig):
        super().__init__(config)
        for layer in self.vision_tower.encoder.layer:
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                if not isinstance(norm, nn.Identity):
                    norm.variance_epsilon = config.vision_config.layer_norm_eps

    def get_image_features(self, pixel_values: torch.Tensor, vision_feature_layer: int | None = None, **kwargs):
        """As in transformers, for every layer, the embeddings (0) among them."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
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
        features = self.get_image_features(pixel_values, return_dict=True).pooler_output  # (T, K, D)
        features = features.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_image.unsqueeze(-1).to(embeddings.device), features)

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
        **kwargs,
    ):
        """One pass over a batch; see `InternVLForConditionalGeneration.forward` for the arguments not named here.

        Args:
            input_ids: (B, N)
            pixel_values: (T, 3, S, S), the tiles of all images in the order of their image tokens.
            image_flags: (T,) or (T, 1), as published training passes them; tiles flagged 0 are padding.
            tile_counts, tile_grids: Accepted so that a processor's whole output can be passed; not used.

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
            inputs_embeds, input_ids = self.encode_images(input_ids, pixel_values, image_flags), None
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
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        use_scm: bool = False,
        **kwargs: Any,
    ):
        """Generate as any transformers model does; returns the prompt's ids and the new ones (B, N + new).

        Vision runs once, before the first step, whatever the number of beams or returned sequences.

        Args:
            inputs: The prompt's ids (B, N); `input_ids=` works too.
            generation_config: Settings, as for any transformers model.
            pixel_values: (T, 3, S, S) tiles of all images.
            tile_counts: (I, 3) detailed, adaptive and thumbnail tiles of each image.
            tile_grids: Accepted so that a processor's whole output can be passed; not used.
            use_scm: Scale compression; not in this version.
            **kwargs: Everything `GenerationMixin.generate` takes.

        Raises:
            ValueError: See `encode_images`; also for `use_scm=True`, and with images for `assistant_model`,
                `prompt_lookup_num_tokens` and `prefill_chunk_size`.
        """
        if use_scm:
            raise ValueError("Scale compression is not available in this version; call with use_scm=False.")
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("The prompt's ids were given twice, by position and as input_ids.")
            kwargs["input_ids"] = inputs
        input_ids = kwargs.get("input_ids")
        if pixel_values is not None:
            if kwargs.get("inputs_embeds") is not None or input_ids is None:
                raise ValueError("pixel_values need input_ids and no inputs_embeds.")
            _refuse_what_needs_whole_prompts(generation_config, kwargs)
            kwargs["inputs_embeds"] = self.encode_images(input_ids, pixel_values)
        elif kwargs.get("inputs_embeds") is None and kwargs.get("past_key_values") is None and input_ids is not None:
            tokens = int((input_ids == self.config.image_token_id).sum())
            if tokens:
                raise ValueError(f"The prompt has {tokens} image tokens, but no pixel_values were given.")
        return super().generate(generation_config=generation_config, **kwargs)


def _refuse_what_needs_whole_prompts(generation_config: GenerationConfig | None, options: dict[str, Any]) -> None:
    """Modes of transformers that read the prompt's ids again, and so lose the images; they give other answers."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if options.get(name) is not None or getattr(generation_config, name, None) is not None:
            raise ValueError(f"{name} does not work with images; leave it out.")


register_checkpoint_conversion_mapping(
    MiniMonkeyForConditionalGeneration.__name__, weight_conversions(), overwrite=True
)

__all__ = ["MiniMonkeyForConditionalGeneration"]
