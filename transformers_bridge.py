"""Everything that MiniMonkey takes from transformers beyond its documented interface, each with its reason.

A release of transformers that breaks something here breaks it in one place. CONTRIBUTING.md counts what is left.

Knows transformers, but nothing of MiniMonkey.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

# Fresh weights of our own modules leave alone what was loaded, as transformers' do.
from transformers import GenerationMixin, RepetitionPenaltyLogitsProcessor, initialization  # noqa: F401

# Published weights load under their names on the fly; there is no documented way to rename, split and merge them.
from transformers.conversion_mapping import register_checkpoint_conversion_mapping  # noqa: F401
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming  # noqa: F401

# Saving puts the code that loads a model next to it; transformers does so only for classes registered by hand.
from transformers.dynamic_module_utils import custom_object_save  # noqa: F401
from transformers.modeling_outputs import BaseModelOutputWithPooling

# `transformers serve` looks architectures up here, remote code or not.
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

# A vision tower may share its layers' weights, and a layer is otherwise transformers' own.
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer  # noqa: F401

# Visual experts are a second feed-forward block in a Llama layer, which is otherwise transformers' own.
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP  # noqa: F401

# What serving engines ask a processor for.
from transformers.processing_utils import MultiModalData  # noqa: F401

# Ways to store weights are registered here; the documented decorators refuse a name that a second copy of our code brings.
from transformers.quantizers import HfQuantizer  # noqa: F401
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import ModelOutput
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: F401

# Reads video files with whichever back end is installed; a video processor class would want all frames of all videos.
from transformers.video_utils import load_video  # noqa: F401


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


# transformers 5.24 renamed the argument and the output. Both names are taken and given, on every version.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = "cache" if "cache" in _parameters(GenerationMixin.prepare_inputs_for_generation) else "past_key_values"
OTHER_CACHE_NAME = CACHE_NAMES[1 - CACHE_NAMES.index(CACHE_NAME)]
# Outputs of releases before that have to be given the new name.
IS_CACHE_RENAMED = CACHE_NAME != "cache"


def with_one_cache_name(options: dict[str, Any]) -> dict[str, Any]:
    """Return `options` with a key/value cache under the name that this transformers uses.

    Raises:
        ValueError: Two caches, one under each name.
    """
    given = [name for name in CACHE_NAMES if options.get(name) is not None]
    if len(given) > 1:
        raise ValueError("The key/value cache was given twice, as past_key_values and as cache; pass one of them.")
    others = {name: value for name, value in options.items() if name not in CACHE_NAMES}
    return {**others, CACHE_NAME: options[given[0]]} if given else others


def with_both_cache_names(output):
    """Let the cache of an output be read as `cache` on a transformers that calls it `past_key_values`."""
    if IS_CACHE_RENAMED and isinstance(output, ModelOutput) and not torch.compiler.is_compiling():
        output.cache = getattr(output, CACHE_NAME, None)
    return output


def with_image_features(output, features: torch.Tensor):
    """Put the image features (T, K, D) into a model's output, where transformers keeps those that it computes itself."""
    if "image_outputs" in getattr(output, "__dataclass_fields__", {}):
        output.image_outputs = BaseModelOutputWithPooling(pooler_output=features)
    else:
        output.image_hidden_states = features
    return output


def register_for_serving(model_type: str, class_name: str) -> None:
    """Let `transformers serve` load a remote-code model, whose class it looks for among transformers' own otherwise."""
    for names in (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        names.setdefault(model_type, class_name)


def register_quantization(method: str, config_class: type, quantizer_class: type) -> None:
    """Let `from_pretrained` read models whose `quantization_config` names this method; the last to register counts."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config_class
    AUTO_QUANTIZER_MAPPING[method] = quantizer_class


def extends(parent: Callable) -> Callable[[Callable], Callable]:
    """Let an override name only the arguments that it uses and pass the rest on, whatever their names are.

    The signature that transformers, the Trainer and editors inspect is that of `parent`, with the arguments that the override
    adds. What the override takes by position stands first in `parent` too.

    Raises:
        TypeError: It does not with this release of transformers.
    """
    inherited = {name: p for name, p in _parameters(parent).items() if name != "self"}

    def decorate(function: Callable) -> Callable:
        own = {name: p for name, p in _parameters(function).items() if name != "self"}
        by_position = [name for name, p in own.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if by_position != list(inherited)[: len(by_position)]:
            raise TypeError(
                f"{parent.__qualname__} begins with {', '.join(inherited)}, not with {', '.join(by_position)}."
            )
        added = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.items()
            if name not in inherited and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        rest = [p for p in inherited.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        named = [p for p in inherited.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        function.__signature__ = inspect.Signature([myself, *named, *added, *rest])
        return function

    return decorate


class PaddedRepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' repetition penalty for ids that are padded on the left, whatever the attention mask's length.

    Its own class finds the padding in the mask from some release on, and counts it as part of the prompt before.

    Args:
        penalty: As in `RepetitionPenaltyLogitsProcessor`.
        padding: (B,) how many ids of padding each row begins with.
    """

    def __init__(self, penalty: float, padding: torch.Tensor):
        super().__init__(penalty)
        self.padding = padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalise as transformers does; a token that a row holds may be counted twice, padding is not."""
        padding = self.padding.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.padding))
        is_padding = torch.arange(input_ids.shape[1], device=input_ids.device) < padding[:, None]
        return super().__call__(torch.where(is_padding, input_ids[:, -1:], input_ids), scores)
