"""What a MiniMonkey is: vision tower, language model, how image tokens are made, and the defaults of SCM.

Reads three formats: its own, the published `config.json` of InternVL2 and Mini-Monkey (`llm_config`, `select_layer`,
`ps_version`, ...) as it is, and that of transformers' InternVL (`InternVL3-1B-hf` and the like). Imports transformers only.

    >>> MiniMonkeyConfig.from_pretrained("path/of/the/published/Mini-Monkey").text_config.model_type
    'llama'
"""

import copy
import re
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, InternVLConfig
from transformers.utils import logging

from .transformers_bridge import register_for_serving


NEWEST_TRIED_TRANSFORMERS = "5.24.0"

_MODEL = "modeling_minimonkey.MiniMonkeyForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_minimonkey.MiniMonkeyConfig",
    "AutoProcessor": "processing_minimonkey.MiniMonkeyProcessor",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
}

# The published code names its InternLM2 class in `llm_config.architectures`. InternLM2 is Llama with fused q, k, v.
PUBLISHED_LANGUAGE_MODELS = {
    "InternLM2ForCausalLM": "llama",
    "InternLM2VEForCausalLM": "llama",  # Mono-InternVL: with visual experts
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Phi3ForCausalLM": "phi3",
}
# An InternViT, and the patch embedding alone that Mono-InternVL has instead: its file tells layers that do not exist.
PUBLISHED_VISION_TOWERS = ("intern_vit_6b", "intern_vit_patch")
# The published tokenizers end with nine image tokens, of which <IMG_CONTEXT> is the third.
PUBLISHED_IMAGE_TOKEN_FROM_END = 7

_PUBLISHED_VISION_NAMES = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "hidden_dropout_prob",
    "initializer_factor": "layer_scale_init_value",
}
# What a published file leaves out has the value of the published class, which is that of InternViT-6B.
PUBLISHED_VISION_DEFAULTS = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
}
_VISION_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("attention_dropout", "initializer_range", "norm_type", "layer_norm_eps", "image_size", "patch_size"),
    *("num_channels", "dtype"),
)
# Settings of training, of the old code or of the old tokenizer; none changes what the model computes here.
_PUBLISHED_IGNORED = (
    *("architectures", "auto_map", "dynamic_image_size", "max_dynamic_patch", "min_dynamic_patch"),
    *("pad2square", "use_thumbnail", "use_backbone_lora", "use_llm_lora", "hidden_size"),
    *("vision_select_layer", "mlp_checkpoint", "transformers_version", "_commit_hash"),
)


def warn_beside_untried(installed: str) -> None:
    """Log one line, once, if this transformers is newer than the newest that all tests were run with."""
    numbers, tried = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (installed, NEWEST_TRIED_TRANSFORMERS))
    if numbers > tried:
        logging.get_logger("transformers.minimonkey").warning_once(
            f"MiniMonkey was tried with transformers up to {NEWEST_TRIED_TRANSFORMERS}, this is {installed}; if something "
            f"fails, try: pip install transformers=={NEWEST_TRIED_TRANSFORMERS}"
        )


warn_beside_untried(transformers.__version__)


def vision_config_from_published(published: dict[str, Any]) -> dict[str, Any]:
    """Return the `vision_config` of transformers' InternVL vision tower for a published one (InternViT).

    Raises:
        ValueError: The vision part is neither an InternViT nor the patch embedding of Mono-InternVL.
    """
    model_type = published.get("model_type")
    if model_type not in PUBLISHED_VISION_TOWERS:
        raise ValueError(
            f"Unknown published vision model_type {model_type!r}; known are {', '.join(PUBLISHED_VISION_TOWERS)}."
        )
    published = {"dtype": published.get("torch_dtype"), **PUBLISHED_VISION_DEFAULTS, **published}
    if model_type == "intern_vit_patch":
        published["num_hidden_layers"] = 0
    config = {name: published[name] for name in _VISION_FIELDS if name in published}
    config |= {ours: published[theirs] for theirs, ours in _PUBLISHED_VISION_NAMES.items() if theirs in published}
    return {"model_type": "internvl_vision", "projection_dropout": config.get("hidden_dropout_prob", 0.0), **config}


def text_config_from_published(published: dict[str, Any]) -> dict[str, Any]:
    """Return the `text_config` of transformers' own language model for a published `llm_config`.

    Raises:
        ValueError: An architecture that the published family does not have.
    """
    architecture = (published.get("architectures") or [None])[0]
    if architecture not in PUBLISHED_LANGUAGE_MODELS:
        raise ValueError(
            f"Unknown language model {architecture!r} in llm_config.architectures; known are "
            f"{', '.join(PUBLISHED_LANGUAGE_MODELS)}. Pass any other model that transformers knows as "
            "`text_config` (with its `model_type`) instead of `llm_config`."
        )
    model_type = PUBLISHED_LANGUAGE_MODELS[architecture]
    # Published files may hold every default of an old release, generation settings among them.
    fields = {*CONFIG_MAPPING[model_type].__dataclass_fields__, "rope_theta", "rope_scaling", "torch_dtype"}
    config = {name: value for name, value in published.items() if name in fields - {"architectures"}}
    config["model_type"] = model_type
    if architecture.startswith("InternLM2"):
        config["attention_bias"] = published.get("bias", True)
    if (config.get("rope_scaling") or {}).get("type") == "su":  # the first name of longrope
        config["rope_scaling"] = {**config["rope_scaling"], "type": "longrope", "rope_type": "longrope"}
    config.setdefault("tie_word_embeddings", False)
    return config


VISION_SHARE_TRANSFORMS = ("none", "heads", "heads+conv")
PROJECTORS = ("mlp", "resampler")
SCM_QUERIES = ("all", "visual", "balanced", "question", "last")
KV_CACHE_DTYPES = (None, "int8")

# Fields of language models whose head does more than multiply by its weight.
_SOFTCAP = "final_logit_softcapping"
_HEAD_FACTORS = {"logit_scale": ("cohere",), "lm_head_multiplier": ("falcon_h1",), "logits_scaling": ("hyperclovax",)}
_HEAD_DIVISORS = {"logits_scaling": ("granite",)}
_UNKNOWN_HEAD_FIELDS = ("output_multiplier", "logits_soft_cap", "logits_mup_width_multiplier", "softcap")


def head_scaling(text_config) -> tuple[float, float | None]:
    """Return the factor of a language model's logits, and the bound that tanh keeps them within, None for none.

    Raises:
        ValueError: A head that does something else to its logits, so that its loss and its answers would be wrong.
    """
    model_type, factor = text_config.model_type, 1.0
    for name in {*_HEAD_FACTORS, *_HEAD_DIVISORS, *_UNKNOWN_HEAD_FIELDS}:
        value = getattr(text_config, name, None)
        if value is None or value == 1:
            continue
        if model_type.startswith(_HEAD_FACTORS.get(name, ())):
            factor *= value
        elif model_type.startswith(_HEAD_DIVISORS.get(name, ())):
            factor /= value
        else:
            raise ValueError(
                f"The head of a language model {model_type!r} with {name}={value!r} is not known here; without it the loss "
                f"and the probabilities would be wrong. Set {name} to None if the model does not use it."
            )
    return factor, getattr(text_config, _SOFTCAP, None)


def config_from_published(published: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `MiniMonkeyConfig` for a published `config.json`; raise `ValueError` for what it cannot express."""
    config = {
        name: value for name, value in published.items() if name not in _PUBLISHED_IGNORED and name != "llm_config"
    }
    config["text_config"] = text_config_from_published(published["llm_config"])
    config["visual_experts"] = published["llm_config"]["architectures"][0] == "InternLM2VEForCausalLM"
    config["vision_config"] = vision_config_from_published(published.get("vision_config") or {})
    config["pixel_shuffle_version"] = config.pop("ps_version", "v1")
    layer = config.pop("select_layer", -1)
    config["vision_feature_layer"] = (
        layer if config["vision_config"]["num_hidden_layers"] else -1
    )  # Mono-InternVL has none
    config["tile_size"] = config.pop("force_image_size", None)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"]
    return config


@strict
class MiniMonkeyConfig(InternVLConfig):
    r"""
    Configuration of a MiniMonkey model.

    Args:
        vision_config: An `InternVLVisionConfig` or a dict of its fields.
        text_config: The configuration of any causal language model that transformers knows, or a dict with `model_type`.
        image_token_id (int, *optional*): Id of `<IMG_CONTEXT>`, the token in whose place an image feature is put; by
            default that of the published tokenizers, the seventh from the end of the vocabulary.
        tile_size (int, *optional*): Side of a square tile in pixels; the vision tower's image size by default.
        downsample_ratio (float): Side of the pixel-shuffled grid over that of the patch grid.
        pixel_shuffle_version (str): "v2", or "v1" for the transposed grid of the first InternVL models.
        vision_feature_layer (int): Index into the vision tower's hidden states, of which the first is the embeddings.
        projector (str): "mlp", pixel shuffle and two layers, or "resampler", learned queries that give every tile or slice as
            many tokens, see `projectors.Resampler`.
        resampler_queries (int): Image tokens of a tile or slice, with a resampler.
        mining (bool): Whether an image's thumbnail is all that is written of it, with what it finds in the detailed tiles, see
            `projectors.PatchMining`.
        visual_experts (bool): Whether image tokens have feed-forward blocks of their own in the language model, as in
            Mono-InternVL.
        vision_share_layers (int): How many consecutive layers of the vision tower share their weights; 1 is the plain tower.
        vision_share_transform (str): What each of them has of its own besides norms: "none", "heads" or "heads+conv", see
            `shared_vision_layers.py`.
        template (str): Name of the chat template in `conversation.TEMPLATES`.
        system_message (str, *optional*): None is the template's, "" an empty one.
        scm_keep_ratio (float): Share of an image's detailed tokens that the scale compression mechanism keeps.
        scm_layer (int, *optional*): The language-model layer whose attention scores them; by default 1, the second.
        scm_queries (str): "all" scores with adaptive, thumbnail and text tokens, "visual" without text; the others are in
            `compression.CompressionSettings`.
        kv_cache_dtype (str, *optional*): "int8" keeps keys and values of earlier tokens in 8 bits.

    Raises:
        ValueError: Values that contradict each other or cannot work, with the values.
    """

    model_type = "minimonkey"

    image_token_id: int | None = None
    tile_size: int | None = None
    pixel_shuffle_version: str = "v2"
    projector: str = "mlp"
    resampler_queries: int = 64
    mining: bool = False
    visual_experts: bool = False
    vision_share_layers: int = 1
    vision_share_transform: str = "none"
    template: str = "internlm2-chat"
    system_message: str | None = None
    scm_keep_ratio: float = 0.5
    scm_layer: int | None = None
    scm_queries: str = "all"
    kv_cache_dtype: str | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a file as transformers does; a foreign one that we can read gets our `model_type` and what it leaves open."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if "llm_config" in config_dict:
            config_dict = {**config_dict, "model_type": cls.model_type}
        elif config_dict.get("model_type") == InternVLConfig.model_type:
            config_dict = {"template": "chatml", **config_dict, "model_type": cls.model_type}
            # transformers goes by the value of the whole model, even where that is left at its default.
            tied = config_dict.setdefault("tie_word_embeddings", InternVLConfig.tie_word_embeddings)
            config_dict["text_config"] = {**(config_dict.get("text_config") or {}), "tie_word_embeddings": tied}
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        # The caller's dicts stay as they are: the base class writes into them on some versions.
        self.vision_config, self.text_config = copy.deepcopy(self.vision_config), copy.deepcopy(self.text_config)
        if kwargs.get("llm_config") is not None:
            if not isinstance(self.vision_config, dict):
                raise ValueError("A published config has both `llm_config` and `vision_config`; the second is missing.")
            fields = config_from_published({**copy.deepcopy(kwargs), "vision_config": self.vision_config})
            for name in [name for name in fields if name in type(self).__dataclass_fields__]:
                setattr(self, name, fields.pop(name))
            kwargs, self.architectures = fields, None
        super().__post_init__(**kwargs)
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - PUBLISHED_IMAGE_TOKEN_FROM_END
        if self.tile_size is None:
            self.tile_size = self.vision_config.image_size[0]
        if self.scm_layer is None:
            self.scm_layer = min(1, self.text_config.num_hidden_layers - 1)
        self.image_seq_length = self._image_tokens_per_tile()
        self._check_values()

    @property
    def context_length(self) -> int | None:
        """Number of tokens the language model is made for, including those that its rope is stretched to."""
        length = getattr(self.text_config, "max_position_embeddings", None)
        factors = [rope.get("factor") or 1 for rope in self._ropes() if rope.get("rope_type") in ("dynamic", "linear")]
        return None if length is None else int(length * max(factors, default=1))

    @property
    def own_parts(self) -> list[str]:
        """Name what this model has and no other format of the family has a place for."""
        own = {
            f"projector {self.projector!r}": self.projector != "mlp",
            "mining": self.mining,
            "shared vision layers": self.shares_vision_layers,
        }
        return [name for name, is_there in own.items() if is_there]

    @property
    def shares_vision_layers(self) -> bool:
        """Whether the vision tower is another than transformers' own."""
        return self.vision_share_layers > 1 or self.vision_share_transform != "none"

    @property
    def cacheable_length(self) -> float:
        """Number of tokens up to which cached keys stay right; some kinds of rope rotate all keys anew beyond a length."""
        limits = [
            rope.get("original_max_position_embeddings") or self.text_config.max_position_embeddings
            for rope in self._ropes()
            if rope.get("rope_type") in ("dynamic", "longrope")
        ]
        return min(limits, default=float("inf"))

    def _ropes(self) -> list[dict[str, Any]]:
        """Return the rope settings of the language model, which may have one for each kind of layer."""
        parameters = getattr(self.text_config, "rope_parameters", None) or {}
        return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]

    def _image_tokens_per_tile(self) -> int:
        """Return the language-model tokens of one tile; raise `ValueError` if the grid cannot be shuffled."""
        patch_size = self.vision_config.patch_size
        if patch_size[0] != patch_size[1] or self.vision_config.image_size[0] != self.vision_config.image_size[1]:
            raise ValueError(
                f"Tiles and patches are square, got image_size {tuple(self.vision_config.image_size)} and patch_size "
                f"{tuple(patch_size)}."
            )
        if not 0 < self.downsample_ratio <= 1 or (1 / self.downsample_ratio) % 1:
            raise ValueError(f"downsample_ratio must be 1, 1/2, 1/3, ..., got {self.downsample_ratio}.")
        for size, name in ((self.tile_size, "tile_size"), (self.vision_config.image_size[0], "vision image_size")):
            if size < 1 or size % patch_size[0]:
                raise ValueError(f"{name} {size} is not a multiple of the patch size {patch_size[0]}.")
        patches, factor = self.tile_size // patch_size[0], round(1 / self.downsample_ratio)
        if self.projector == "resampler":
            return self.resampler_queries
        if patches % factor:
            raise ValueError(
                f"A tile of {self.tile_size} px has {patches} x {patches} patches of {patch_size[0]} px, which "
                f"downsample_ratio {self.downsample_ratio} cannot divide; {patches} must be a multiple of {factor}."
            )
        return (patches // factor) ** 2

    def view_tokens(self, width: int, height: int) -> int:
        """Count the image tokens of a view of this size in pixels.

        Raises:
            ValueError: Sides that are no multiples of a patch, or of the patches that become one token.
        """
        side = self.view_multiple
        if width % side or height % side or not width * height:
            raise ValueError(f"{width} x {height} px do not hold a whole number of {side} px patch groups.")
        return self.resampler_queries if self.projector == "resampler" else width // side * (height // side)

    @property
    def view_multiple(self) -> int:
        """What the sides of tiles and slices are multiples of, in pixels."""
        patch = self.vision_config.patch_size[0]
        return patch if self.projector == "resampler" else patch * round(1 / self.downsample_ratio)

    def _check_values(self) -> None:
        text, vision = self.text_config, self.vision_config
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector is one of {', '.join(PROJECTORS)}, got {self.projector!r}.")
        if self.resampler_queries < 1 or (self.projector == "resampler" and text.hidden_size % 4):
            raise ValueError(
                f"A resampler needs resampler_queries of at least 1, got {self.resampler_queries}, and a language model whose "
                f"width is a multiple of 4, got {text.hidden_size}."
            )
        if vision.hidden_size % vision.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {vision.hidden_size} is not a multiple of its {vision.num_attention_heads} heads."
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} is outside the vocabulary of {text.vocab_size}.")
        if self.pixel_shuffle_version not in ("v1", "v2"):
            raise ValueError(f"pixel_shuffle_version must be 'v1' or 'v2', got {self.pixel_shuffle_version!r}.")
        layer = self.vision_feature_layer
        if not isinstance(layer, int) or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer {layer} does not exist; a vision tower of {vision.num_hidden_layers} layers has "
                f"the hidden states 0 to {vision.num_hidden_layers} (or -1 to {-vision.num_hidden_layers - 1})."
            )
        if not 1 <= self.vision_share_layers <= max(1, vision.num_hidden_layers):
            raise ValueError(
                f"vision_share_layers must be 1 to {vision.num_hidden_layers}, the tower's layers, got "
                f"{self.vision_share_layers}."
            )
        if self.vision_share_transform not in VISION_SHARE_TRANSFORMS:
            raise ValueError(
                f"vision_share_transform must be one of {', '.join(VISION_SHARE_TRANSFORMS)}, got "
                f"{self.vision_share_transform!r}."
            )
        if not 0 < self.scm_keep_ratio <= 1:
            raise ValueError(f"scm_keep_ratio must be above 0 and at most 1, got {self.scm_keep_ratio}.")
        if not 0 <= self.scm_layer < text.num_hidden_layers:
            raise ValueError(f"scm_layer {self.scm_layer} does not exist in {text.num_hidden_layers} layers.")
        if self.scm_queries not in SCM_QUERIES:
            raise ValueError(f"scm_queries must be one of {', '.join(SCM_QUERIES)}, got {self.scm_queries!r}.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be None or 'int8', got {self.kv_cache_dtype!r}.")
        if getattr(text, "tie_word_embeddings", self.tie_word_embeddings) != self.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings is {self.tie_word_embeddings} here but {text.tie_word_embeddings} in text_config."
            )
        head_scaling(text)

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers returns, with `tie_word_embeddings` and the whole `AUTO_MAP` always written out."""
        return {**super().to_dict(), **self._always_written()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is saved, see `to_dict`."""
        return {**super().to_diff_dict(), **self._always_written()}

    def _always_written(self) -> dict[str, Any]:
        # The base class takes True for a missing tie_word_embeddings, and saving narrows auto_map to the class in use.
        return {"auto_map": dict(AUTO_MAP), "tie_word_embeddings": self.tie_word_embeddings}


register_for_serving(MiniMonkeyConfig.model_type, "MiniMonkeyForConditionalGeneration")

__all__ = ["MiniMonkeyConfig"]
