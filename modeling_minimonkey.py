"""The MiniMonkey model: InternViT vision tower, pixel shuffle and projector, any causal language model of transformers.

There is no attention code here: vision tower and language model are transformers' own, with all their attention back
ends, caches and parallel plans. This file adds the older options of the published family and weights under their published
names; `generate` with scale compression and `chat` with history come from the files next to it.

    model = AutoModel.from_pretrained("path/of/this/repository", trust_remote_code=True)
    answer = model.chat(processor, "receipt.png", "What is the total?")

Shapes: B rows, N tokens of a row, T tiles of all images of the batch, S tile size in pixels, I images, K tokens a tile,
D width of the language model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import GenerationMixin, InternVLForConditionalGeneration, InternVLModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import can_return_tuple, torch_compilable_check

from .chat_minimonkey import ChatMixin
from .checkpoint import weight_conversions
from .configuration_minimonkey import MiniMonkeyConfig, head_scaling
from .cpu_attention import CPU_ATTENTION
from .generation_minimonkey import GenerateMixin
from .image_inputs import ImageInputs, image_layouts
from .packed_weights import check_stays, is_packed, pack_weights
from .projectors import PatchMining, Resampler, ZeroLinear
from .published_names import PublishedNamesMixin
from .quantized_weights import METHOD, QuantizedWeightsConfig, QuantizedWeightsQuantizer, pack_stored
from .shared_vision_layers import SharedVisionModel
from .transformers_bridge import (
    IS_CACHE_RENAMED,
    OTHER_CACHE_NAME,
    custom_object_save,
    extends,
    register_checkpoint_conversion_mapping,
    register_quantization,
    with_both_cache_names,
    with_image_features,
    with_one_cache_name,
)
from .vision_offload import OffloadedModules
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
        if config.shares_vision_layers:
            self.vision_tower = SharedVisionModel(
                config.vision_config, config.vision_share_layers, config.vision_share_transform
            )
        for name, norm in self.vision_tower.named_modules():
            if name.endswith((".q_norm", ".k_norm")) and not isinstance(norm, nn.Identity):
                norm.variance_epsilon = config.vision_config.layer_norm_eps
        if config.projector == "resampler":
            widths = (config.vision_config.hidden_size, config.text_config.hidden_size)
            self.multi_modal_projector = Resampler(*widths, config.resampler_queries)
        if config.mining:
            self.mining = PatchMining(config.vision_config.hidden_size)

    @extends(InternVLModel.get_image_features)
    def get_image_features(self, pixel_values, vision_feature_layer: int | None = None, **kwargs):
        """Return image features as transformers does, for every layer, the embeddings (0) among them."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        if not self.config.vision_config.num_hidden_layers:
            layer = -1  # without layers the only hidden state, the embeddings, is also the last
        if layer != -1:
            kwargs["output_hidden_states"] = True
        if self.config.projector == "resampler" or pixel_values.shape[2] != pixel_values.shape[3]:
            outputs = self._see(pixel_values, layer)
            outputs.pooler_output = self.project(self._patches(outputs, layer, pixel_values))
            return outputs
        return super().get_image_features(pixel_values, vision_feature_layer=layer, **kwargs)

    def _see(self, pixel_values: torch.Tensor, layer: int):
        options = {} if layer == -1 else {"output_hidden_states": True}
        return self.vision_tower(pixel_values=pixel_values.to(self.dtype), return_dict=True, **options)

    def _patches(self, outputs, layer: int, pixel_values: torch.Tensor) -> torch.Tensor:
        states = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        height, width = (side // self.config.vision_config.patch_size[0] for side in pixel_values.shape[2:])
        return states[:, 1:].unflatten(1, (height, width))  # without the class token

    def patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the vision tower's features of the patches (T, h, w, C) of tiles or equal slices (T, 3, H, W)."""
        layer = self.config.vision_feature_layer if self.config.vision_config.num_hidden_layers else -1
        return self._patches(self._see(pixel_values, layer), layer, pixel_values)

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Return what the language model sees of patches (T, h, w, C): (T, K, D)."""
        if self.config.projector == "mlp":
            patches = self.pixel_shuffle(patches, self.config.downsample_ratio).flatten(1, 2)
        return self.multi_modal_projector(patches)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Resampler, ZeroLinear)):
            module.reset_parameters()

    @extends(InternVLModel.forward)
    def forward(self, input_ids=None, pixel_values=None, *, inputs_embeds=None, visual_token_mask=None, **kwargs):
        """Run as in transformers; `visual_token_mask` (B, N) tells visual experts which of `inputs_embeds` are image tokens.

        Raises:
            ValueError: Visual experts are given embeddings without a mask.
        """
        if self.config.visual_experts:
            if visual_token_mask is None and inputs_embeds is not None:
                raise ValueError(
                    "A model with visual experts needs to know which of inputs_embeds are image tokens: pass "
                    "visual_token_mask (rows, tokens), all False for text."
                )
            if visual_token_mask is None and pixel_values is not None:
                visual_token_mask = input_ids == self.config.image_token_id
            kwargs["visual_token_mask"] = visual_token_mask
        if OTHER_CACHE_NAME in kwargs:
            kwargs = with_one_cache_name(kwargs)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)

    def pixel_shuffle(self, vision_features: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """Shuffle (T, rows, columns, width) to (T, rows * f, columns * f, width / f^2) with f = `scale_factor`.

        Version 1 of the published code leaves out the last transposition of the grid.
        """
        shuffled = super().pixel_shuffle(vision_features, scale_factor)
        return shuffled.transpose(1, 2) if self.config.pixel_shuffle_version == "v1" else shuffled


class ScaledHead(nn.Linear):
    """The head of a language model that scales its logits and keeps them within a bound, see `head_scaling`."""

    def __init__(self, in_features: int, out_features: int, factor: float, softcap: float | None):
        super().__init__(in_features, out_features, bias=False)
        self.factor, self.softcap = factor, softcap

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., vocabulary) of hidden states (..., D)."""
        logits = super().forward(hidden_states) * self.factor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _language_model_head(text_config) -> nn.Linear:
    factor, softcap = head_scaling(text_config)
    size = (text_config.hidden_size, text_config.vocab_size)
    return nn.Linear(*size, bias=False) if (factor, softcap) == (1, None) else ScaledHead(*size, factor, softcap)


# GenerationMixin by name: without it transformers wraps a class that has a `generate` of its own in another of the same
# name, whose objects cannot be pickled.
class MiniMonkeyForConditionalGeneration(
    PublishedNamesMixin, ChatMixin, GenerateMixin, InternVLForConditionalGeneration, GenerationMixin
):
    """Mini-Monkey: answers questions about images. See the README for `chat`, `generate` and the pipeline."""

    config_class = MiniMonkeyConfig
    vision_chunk_tiles = VISION_CHUNK_TILES
    _offloaded_vision: OffloadedModules | None = None
    _vision_present: Callable[[], AbstractContextManager] = nullcontext

    def __init__(self, config: MiniMonkeyConfig):
        super(InternVLForConditionalGeneration, self).__init__(config)
        if config.visual_experts:
            self._no_split_modules = ["VisualExpertDecoderLayer"]  # the layers' own class; post_init adds the others
        self.model = MiniMonkeyModel(config)
        self.lm_head = _language_model_head(config.text_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, use_flash_attn: bool | None = None, load_in_8bit: bool = False, **kwargs):
        """Load a model as transformers does; also take two arguments of the published README.

        Args:
            use_flash_attn: True means `attn_implementation="flash_attention_2"`; False and None leave the choice open.
            load_in_8bit: Only False; 8-bit loading is `quantization_config=BitsAndBytesConfig(load_in_8bit=True)`.

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

    @classmethod
    def _from_config(cls, config: MiniMonkeyConfig, **kwargs):
        """Make a model as transformers does; vLLM, which has a head of its own, gets one without a head.

        Raises:
            ValueError: vLLM asks for visual experts, whose mask of image tokens it does not hand on.
        """
        if getattr(config.get_text_config(), "_attn_implementation", None) != "vllm":
            return super()._from_config(config, **kwargs)
        if config.visual_experts:
            raise ValueError(
                "vLLM cannot run a model with visual experts (Mono-InternVL): it does not tell the layers which tokens are "
                "an image's. Use transformers, for example `transformers serve`."
            )
        if config.mining:
            raise ValueError(
                "vLLM cannot run a model with patch mining: it does not tell which tiles are of one image. Use transformers."
            )
        return MiniMonkeyModel._from_config(config, **kwargs)

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs) -> None:
        """Save as transformers does, always under its own weight names, with the code that loads the model.

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
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        **image_inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the embeddings of a prompt with the image features in the places of its image tokens.

        Args:
            input_ids: (B, N)
            pixel_values: (T, 3, S, S) in the order of the image tokens: normalised, or uint8, which are normalised here (with
                ImageNet's mean and deviation, on the model's device; a quarter of the bytes to move there).
            image_flags: (T,) or (T, 1); tiles flagged 0 are padding and give no features.
            **image_inputs: tile_counts and tile_grids, for patch mining; slice_values and slice_sizes, for slices; see
                `image_inputs.ImageInputs`.

        Returns:
            (B, N, D)

        Raises:
            ValueError: Shapes, types or devices that do not fit, or the numbers of image tokens and features differ.
        """
        pixel_values = pixel_values if image_flags is None else pixel_values[image_flags.flatten() == 1]
        images = ImageInputs(pixel_values, **image_inputs)
        return self.place_features(input_ids, self.image_features(images, input_ids))

    def image_features(self, images: ImageInputs, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the language model sees of images: (..., D) in the order of the prompt.

        Args:
            input_ids: (B, N), a prompt that must have as many image tokens; None: it is not looked at.

        Raises:
            ValueError: See `encode_images`.
        """
        is_plain = images.slice_values is None and images.slice_sizes is None and not self.config.mining
        if is_plain:
            self.tokens_per_tile(images.pixel_values, input_ids)
            return self.encode_tiles(images.pixel_values)
        self._check_parts(images, input_ids)
        with self._vision_present():
            return self._encode_slices(images.views()) if images.are_slices else self._mine(images)

    def encode_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what the language model sees of tiles (T, 3, S, S): (T, K, D); for `pixel_values` see `encode_images`."""
        per_tile = self.tokens_per_tile(pixel_values)
        if not len(pixel_values):
            return pixel_values.new_empty(0, per_tile, self.config.text_config.hidden_size)
        chunks = pixel_values.split(self.vision_chunk_tiles)
        chunks = map(self._normalized, chunks) if pixel_values.dtype == torch.uint8 else chunks
        with self._vision_present():
            return torch.cat([self.get_image_features(chunk, return_dict=True).pooler_output for chunk in chunks])

    def offload_vision(self) -> int:
        """Keep the weights of vision tower and projector out of the way but for the time that tiles are encoded.

        On a GPU they live in the CPU's memory, on a CPU in a temporary file (see vision_offload.py). For the life of the
        model, which stays on its device and is not trained.

        Returns:
            The bytes of these weights.

        Raises:
            ValueError: It was done already, or after `prepare_for_cpu`, or the model is spread over several devices.
        """
        if self._offloaded_vision is not None or hasattr(self, "hf_device_map"):
            raise ValueError("offload_vision is for a model on one device, and done once.")
        if is_packed(self):
            raise ValueError("Packed weights stay where they are: call offload_vision() before prepare_for_cpu().")
        self._offloaded_vision = OffloadedModules(list(self._vision_parts().values()), self.device)
        self._vision_present = self._offloaded_vision.present
        return self._offloaded_vision.nbytes()

    def _vision_parts(self) -> dict[str, nn.Module]:
        """Return all but the language model by their names: a resampler or patch mining too."""
        language = self.model.language_model
        return {f"model.{name}": part for name, part in self.model.named_children() if part is not language}

    def prepare_for_cpu(self, pack: bool = True) -> None:
        """Answer sooner on a CPU, for the life of the model: take an attention made for it and pack the weights.

        Attention is replaced where it is "sdpa" (see cpu_attention.py). Packed weights (see packed_weights.py) stay on the CPU
        in their type and are neither trained nor counted among the parameters, which want no gradients from then on. A vision
        tower that is out of the way (`offload_vision`) is not packed. Quantised weights of 4 bits are held a second time, for
        new tokens in bfloat16. A second call does nothing.

        Args:
            pack: Also pack weights; small models gain nothing by it.

        Raises:
            ValueError: The machine cannot pack weights of this type or device, or the model has adapters, which want to be
                merged first.
        """
        if pack:
            if any(name.endswith(".base_layer") for name, _ in self.named_modules()):  # of peft
                raise ValueError("Packed weights cannot be changed: merge the adapters first, or take pack=False.")
            away = () if self._offloaded_vision is None else tuple(f"{name}." for name in self._vision_parts())
            pack_weights(self, self.config.tie_word_embeddings, away)
            if is_packed(self):
                self.requires_grad_(False)
            if self.dtype == torch.bfloat16:
                pack_stored(self.model.language_model, self.lm_head)  # the vision tower never has few rows
        replaced = {}
        for name in self.config.sub_configs:
            part = getattr(self.config, name)
            # Some language models choose the keys of each query by themselves, and tell torch's back end by its name.
            if part._attn_implementation == "sdpa" and getattr(part, "index_topk", None) is None:
                replaced[name] = CPU_ATTENTION
        self.set_attn_implementation(replaced)

    def _apply(self, fn, recurse=True):
        if is_packed(self):
            check_stays(fn, self.dtype)  # before anything is moved
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on, wherever its vision tower is kept."""
        if self._offloaded_vision is not None:
            return self._offloaded_vision.device
        return next(parameter.device for parameter in self.parameters())  # torch.compile does not follow super() here

    def _encode_slices(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Return the features (tokens, D) of views (3, H, W); those of one size go through the vision tower together."""
        features: dict[int, torch.Tensor] = {}
        for shape in dict.fromkeys(view.shape for view in views):
            numbers = [number for number, view in enumerate(views) if view.shape == shape]
            for first in range(0, len(numbers), self.vision_chunk_tiles):
                chunk = numbers[first : first + self.vision_chunk_tiles]
                tiles = self._normalized(torch.stack([views[number] for number in chunk]))
                features |= zip(chunk, self.model.project(self.model.patch_features(tiles)))
        return torch.cat([features[number] for number in range(len(views))])

    def _mine(self, images: ImageInputs) -> torch.Tensor:
        """Return the features (I, K, D) of thumbnails that have mined their detailed tiles."""
        chunks = map(self._normalized, images.pixel_values.split(self.vision_chunk_tiles))
        patches = torch.cat([self.model.patch_features(chunk) for chunk in chunks])  # (T, h, w, C)
        counts, grids = (torch.as_tensor(given).tolist() for given in (images.tile_counts, images.tile_grids))
        mined = []
        for own, (columns, rows, *_) in zip(patches.split([sum(tiles) for tiles in counts]), grids):
            *tiles, thumbnail = own
            mined.append(
                self.model.mining(thumbnail, torch.stack(tiles).unflatten(0, (rows, columns))) if tiles else thumbnail
            )
        return self.model.project(torch.stack(mined))

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        return ((pixels / 255 - mean) / std).to(self.dtype)

    def image_layouts(self, images: ImageInputs) -> list:
        """Return how each image is written in a prompt, see `image_inputs.image_layouts`."""
        if images.slice_sizes is None and not self.config.mining:
            return torch.as_tensor(images.tile_counts).sum(dim=1).tolist()
        return image_layouts(
            images.tile_counts,
            images.tile_grids,
            images.slice_sizes,
            view_tokens=self.config.view_tokens,
            is_mined=self.config.mining,
        )

    def _check_parts(self, images: ImageInputs, input_ids: torch.Tensor | None) -> None:
        """Raise `ValueError` for slices, or tiles to be mined, that do not fit each other, the model or a prompt (B, N)."""
        images.check()
        if images.tile_counts is None:
            raise ValueError("Patch mining needs tile_counts and tile_grids, which the processor returns.")
        layouts = self.image_layouts(images)
        if images.are_slices:
            pixels, expected = images.slice_values, sum(layout.tokens for layout in layouts)
            what = f"slices of {len(layouts)} images"
        else:
            tiles, counted = len(images.pixel_values), int(torch.as_tensor(images.tile_counts).sum())
            if tiles != counted:
                raise ValueError(f"pixel_values hold {tiles} tiles, but tile_counts are of {counted}.")
            pixels, expected = images.pixel_values, self.tokens_per_tile(images.pixel_values) * len(layouts)
            what = f"{len(layouts)} mined thumbnails"
        self._check_fit(pixels, input_ids, expected, what)

    def _check_fit(
        self, pixels: torch.Tensor, input_ids: torch.Tensor | None, expected: int, what: str, each: str = ""
    ) -> None:
        """Raise `ValueError` for pixels that do not fit the model, or a prompt (B, N) that has not so many image tokens."""
        if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixel_values must be normalised floating-point tiles, or uint8, got {pixels.dtype}; use the processor."
            )
        if not hasattr(self, "hf_device_map") and pixels.device != self.device:
            raise ValueError(
                f"pixel_values are on {pixels.device}, the model is on {self.device}; "
                "move the inputs with inputs.to(model.device)."
            )
        if input_ids is None:
            return
        tokens = (input_ids == self.config.image_token_id).sum()
        torch_compilable_check(
            tokens == expected,
            lambda: (
                f"The prompt has {int(tokens)} image tokens (id {self.config.image_token_id}), but {what} give {expected} "
                f"features{each}."
            ),
        )

    def place_features(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, N, D) of a prompt (B, N) with `features` (..., D) in the places of its image tokens."""
        embeddings = self.model.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.config.image_token_id).unsqueeze(-1).to(embeddings.device)
        return embeddings.masked_scatter(is_image, features.to(embeddings.device, embeddings.dtype))

    def tokens_per_tile(self, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None) -> int:
        """Return how many image tokens each of these tiles (T, 3, S, S) gives.

        Args:
            input_ids: (B, N), a prompt that must have as many image tokens as all tiles together give.

        Raises:
            ValueError: Shapes, types or devices that do not fit, or the numbers of image tokens and features differ.
        """
        channels = self.config.vision_config.num_channels
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3]:
            raise ValueError(f"pixel_values must be tiles of shape (tiles, {channels}, S, S), got {shape}.")
        is_usual = shape[2] == self.config.tile_size
        per_tile = self.config.image_seq_length if is_usual else self.config.view_tokens(shape[3], shape[2])
        self._check_fit(pixel_values, input_ids, shape[0] * per_tile, f"{shape[0]} tiles", f" ({per_tile} each)")
        return per_tile

    @can_return_tuple
    @extends(InternVLForConditionalGeneration.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        tile_counts: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        slice_values: torch.Tensor | None = None,
        slice_sizes: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        visual_token_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """Run one pass over a batch; see `InternVLForConditionalGeneration.forward` for the arguments not named here.

        Args:
            input_ids: (B, N)
            pixel_values: (T, 3, S, S), the tiles of all images in the order of their image tokens.
            image_flags: (T,) or (T, 1), as published training passes them; tiles flagged 0 are padding.
            tile_counts, tile_grids: Of each image, see `image_inputs.ImageInputs`; used for slices and patch mining.
            slice_values, slice_sizes: Instead of pixel_values, for slices.
            mm_token_type_ids: Accepted so that a processor's whole output can be passed; not used.
            visual_token_mask: (B, N) which of these embeddings are image tokens; only for visual experts, and only with
                `inputs_embeds`. With `pixel_values` the ids say it.

        Returns:
            `InternVLCausalLMOutputWithPast` with loss (if `labels` are given), logits (B, N, vocabulary) and, with pixels,
            the image features (T, K, D).

        Raises:
            ValueError: See `encode_images`; image tokens without pixels.
        """
        features = None
        if pixel_values is not None and image_flags is not None:
            pixel_values = pixel_values[image_flags.flatten() == 1]
        if pixel_values is not None or slice_values is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError(
                    "pixel_values need input_ids, whose image tokens say where the features belong, and no inputs_embeds."
                )
            visual_token_mask = input_ids == self.config.image_token_id
            images = ImageInputs(pixel_values, tile_counts, tile_grids, slice_values, slice_sizes)
            features = self.image_features(images, input_ids)
            inputs_embeds, input_ids = self.place_features(input_ids, features), None
        elif input_ids is not None and input_ids.shape[-1] > 1 and not torch.compiler.is_compiling():
            self._check_no_image_tokens(input_ids)  # no later step of a generation waits for the device here
        if self.config.visual_experts:
            # A generation gives the mask of the whole prompt in every step; later steps read ids, none of them an image's.
            is_prompt = visual_token_mask is not None and inputs_embeds is not None
            kwargs["visual_token_mask"] = visual_token_mask[:, -inputs_embeds.shape[1] :] if is_prompt else None
        if OTHER_CACHE_NAME in kwargs:
            kwargs = with_one_cache_name(kwargs)
        kwargs |= {"attention_mask": attention_mask, "return_dict": True}
        output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if features is not None:
            output = with_image_features(output, features)
        return with_both_cache_names(output) if IS_CACHE_RENAMED else output


register_checkpoint_conversion_mapping(
    MiniMonkeyForConditionalGeneration.__name__, weight_conversions(), overwrite=True
)
register_quantization(METHOD, QuantizedWeightsConfig, QuantizedWeightsQuantizer)

__all__ = ["MiniMonkeyForConditionalGeneration"]
