"""Drift: how far a model's logits move when its weights are stored in fewer bits, and the bytes of the weights.

Random weights, whose logits are no text: what a trained model still reads is measured by evaluate.py --quantize. The logits are
those of one tile and a few words in float32, the model's first layers alone with --depth.
"""

import argparse
import copy

import torch
from accelerate import init_empty_weights

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.quantized_cache import empty_cache
from minimonkey.quantized_weights import PRESETS, QuantizedWeightsConfig, QuantizedWeightsQuantizer, store_weights
from minimonkey.scripts.benchmarking.cpu import TEXT_TOKENS, shallow
from minimonkey.scripts.benchmarking.measure import megabytes, report
from minimonkey.scripts.benchmarking.models import SIZES, published_config, random_model, random_tiles
from minimonkey.scripts.quantize import INT8_CACHE
from minimonkey.scripts.repository import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano", "Mono"), help="dimensions")
    parser.add_argument("--depth", type=whole_number(1), default=100, help="layers of tower and language model")
    parser.add_argument("--vocabulary", type=whole_number(8), default=1024, help="logits that are compared")
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> None:
    report("drift", rows(args), torch.device("cpu"), args)


def weight_bytes(size: str, preset: str | None) -> int:
    """Return the bytes of all weights of a published size; what is not stored by the preset is in bfloat16."""
    config = published_config(size)
    with init_empty_weights():
        model = MiniMonkeyForConditionalGeneration(config).to(torch.bfloat16)
        if preset is not None:
            QuantizedWeightsQuantizer(QuantizedWeightsConfig(preset))._process_model_before_weight_loading(model)
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def rows(args: argparse.Namespace) -> list[dict]:
    args.decode_depth = args.depth
    config = shallow(published_config(args.size), args, args.vocabulary)
    model = random_model(config, torch.device("cpu"), torch.float32)
    tiles = random_tiles(1, model)
    ids = torch.randint(
        4, args.vocabulary, (1, config.image_seq_length + TEXT_TOKENS), generator=torch.Generator().manual_seed(3)
    )
    ids[0, 8 : 8 + config.image_seq_length] = config.image_token_id
    expected = model(input_ids=ids, pixel_values=tiles).logits[0]
    results = [
        {"preset": "none", "weights MB": megabytes(weight_bytes(args.size, None)), "drift": 0.0, "same first": 1.0}
    ]
    for preset in PRESETS:
        stored = copy.deepcopy(model)
        store_weights(stored, QuantizedWeightsConfig(preset))
        options = {}
        if preset in INT8_CACHE:
            stored.config.kv_cache_dtype = "int8"
            options = {"past_key_values": empty_cache(stored.config), "use_cache": True}
        logits = stored(input_ids=ids, pixel_values=tiles, **options).logits[0]
        drift = float((logits - expected).norm() / expected.norm())
        same = float((logits.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean())
        megabytes_stored = megabytes(weight_bytes(args.size, preset))
        results.append({"preset": preset, "weights MB": megabytes_stored, "drift": drift, "same first": same})
    return results
