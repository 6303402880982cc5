"""A MiniMonkey in vLLM, with scale compression (SCM) as an option of a request.

    vllm ... --mm-processor-kwargs '{"use_scm": true, "scm_keep_ratio": 0.5}'         for every request
    llm.chat(messages, mm_processor_kwargs={"use_scm": True})                         for one

Builds on vLLM's transformers backend, which runs MSAC by itself. An engine asks how many tokens an image has before it sees
the image, and shares what it computed for one prompt with others. Both allow for SCM where it scores with the image alone
(`scm_queries="visual"`): of n detailed tokens int(scm_keep_ratio * n) stay, whichever they are, and which they are depends on
the image and the options, which vLLM hashes together.

Imports vLLM; vllm_plugin.py tells vLLM of it.

Shapes: I images, T tiles of all images, K tokens a tile, n tokens of one image, D width of the language model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BatchFeature
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize

from minimonkey.attention_probe import attention_inputs
from minimonkey.compression import CompressionSettings, attention_received


SCM_OPTIONS = ("use_scm", "scm_keep_ratio")
KEPT = "scm_kept"  # how many detailed tokens of an image stay


def without_scm(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a processor without those of SCM, flat or among `images_kwargs`."""
    kept = {name: value for name, value in options.items() if name not in SCM_OPTIONS}
    if isinstance(kept.get("images_kwargs"), Mapping):
        kept["images_kwargs"] = without_scm(kept["images_kwargs"])
    return kept


class WithoutScm:
    """A processor of prompts and images that is not told the options of SCM, which are this file's."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name: str):
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **options: Any) -> BatchFeature:
        return self.processor(*args, **without_scm(options))


class ProcessingInfo(MultiModalProcessingInfo):
    """Answers vLLM's questions about images: the largest one, and the options that a request may set."""

    def get_hf_processor(self, **kwargs: object) -> WithoutScm:
        return WithoutScm(super().get_hf_processor(**without_scm(kwargs)))

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        supported = super().get_supported_mm_processor_kwargs()
        return {**supported, "images_kwargs": supported["images_kwargs"] | {*SCM_OPTIONS}}

    def images_kwargs(self, options: Mapping[str, object]) -> dict[str, Any]:
        """Return what a request with these options asks of images, the options of the server behind those of the request.

        Raises:
            ValueError: An option that neither images nor texts have; it would be ignored.
        """
        scopes = self._merge_and_resolve_mm_processor_kwargs(options)
        unknown = [name for name in scopes if not name.endswith("_kwargs")]
        if unknown:
            raise ValueError(f"Unknown mm_processor_kwargs: {', '.join(sorted(unknown))}.")
        return dict(scopes.get("images_kwargs") or {})

    def get_image_size_with_most_features(self) -> ImageSize:
        """Return the size that gives the most tokens, by which vLLM sizes its encoder cache; it is seldom a square."""
        image_processor = self.get_hf_processor().image_processor
        height, width = image_processor.largest_image(**without_scm(self.images_kwargs({})))
        return ImageSize(width=width, height=height)

    def keep_ratio(self, options: Mapping[str, object]) -> float:
        """Return the share of an image's detailed tokens that stay in a request with these options.

        Raises:
            ValueError: It is out of range, or given without `use_scm`.
        """
        use_scm, keep_ratio = map(self.images_kwargs(options).get, SCM_OPTIONS)
        if not use_scm:
            if keep_ratio is not None:
                raise ValueError("scm_keep_ratio works only with use_scm=True.")
            return 1.0
        config = self.get_hf_config()
        ratio = config.scm_keep_ratio if keep_ratio is None else keep_ratio
        return CompressionSettings(ratio, config.scm_layer, config.text_config.num_hidden_layers).keep_ratio


class Processor(MultiModalProcessor):
    """Makes prompts whose images have as many tokens as SCM leaves them."""

    info: ProcessingInfo

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        keep_ratio = self.info.keep_ratio(hf_processor_mm_kwargs)
        if "tile_counts" not in data:
            return data
        per_tile, image_token = (
            getattr(self.info.get_hf_processor(), name) for name in ("image_seq_length", "image_token_id")
        )
        counts = data["tile_counts"]
        if keep_ratio < 1 and bool(((counts[:, 0] > 0) & (counts[:, 1:].sum(dim=1) == 0)).any()):
            raise ValueError(
                "SCM scores an image with its adaptive tiles and its thumbnail, but use_thumbnail=False left neither; leave "
                "out use_scm or use_thumbnail."
            )
        detailed = counts[:, 0] * per_tile
        data[KEPT] = torch.tensor([int(tokens * keep_ratio) for tokens in detailed.tolist()], dtype=torch.long)
        replacements = data["image_replacement_ids"].split(data["image_replacement_sizes"].tolist())
        shorter = []
        for ids, dropped in zip(replacements, (detailed - data[KEPT]).tolist()):
            first = int((ids == image_token).nonzero()[0])
            shorter.append(torch.cat([ids[:first], ids[first + dropped :]]))
        data["image_replacement_ids"] = torch.cat(shorter)
        data["image_replacement_sizes"] = torch.tensor([len(ids) for ids in shorter])
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for name in ("tile_counts", "tile_grids", KEPT):
            fields[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder)
class MiniMonkeyInVLLM(TransformersMultiModalForCausalLM):
    """vLLM's transformers backend with SCM between the vision tower and the prompt."""

    def _process_image_input(self, **kwargs: Any) -> list[torch.Tensor] | None:
        """Return what the language model sees of each image (n, D), those tokens that SCM keeps."""
        kept, counts = kwargs.pop(KEPT, None), kwargs.pop("tile_counts", None)
        for name in ("tile_grids", "image_grid_thw"):
            kwargs.pop(name, None)
        features = super()._process_image_input(**kwargs)
        if kept is None or features is None:
            return features
        kept, counts = kept.flatten().tolist(), counts.reshape(-1, 3).tolist()
        return [self.compressed(*image) for image in zip(features, counts, kept)]

    def compressed(self, features: torch.Tensor, counts: list[int], kept: int) -> torch.Tensor:
        """Return the features (n, D) of an image without the detailed tokens that its other tokens attend to least.

        Args:
            counts: Its detailed, adaptive and thumbnail tiles.
            kept: How many detailed tokens stay.
        """
        detailed = len(features) * counts[0] // sum(counts)
        if kept == detailed:
            return features
        language_model, layer = self.model.language_model, self.config.scm_layer
        inputs = attention_inputs(language_model, features, layer, back_end="sdpa")
        scores = attention_received(inputs, slice(0, detailed), torch.arange(detailed, len(features)))
        if get_tensor_model_parallel_world_size() > 1:  # each process has scored with its own heads
            scores = tensor_model_parallel_all_reduce(scores)
        stays = torch.ones(len(features), dtype=torch.bool, device=features.device)
        stays[scores.argsort(descending=True, stable=True)[kept:]] = False
        return features[stays]
