"""Write a model with its weights in 8, 4 or 16 bits, in a folder that AutoModel loads with nothing else installed.

    python scripts/quantize.py MiniMonkey-2B MiniMonkey-2B-int8 --preset int8
    python scripts/quantize.py MiniMonkey-2B MiniMonkey-2B-bluelm --preset bluelm
    python scripts/quantize.py . OUT --layer ".*language_model.*mlp.*=int4" --layer ".*=int8"

int8: all layers of vision tower, projector and language model. int4: the same, 32 numbers to a scale. bluelm: the language
model in 4 bits, vision tower and projector in 8, keys and values in 8 (BlueLM-V-3B). bfloat16: 16 bits, also where the model
computes in float32. --layer names layers by regular expressions instead; the first that matches a layer's name counts, and
layers that none matches stay as they are. Norms and embeddings always do, and the head but for bfloat16.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.quantized_weights import FORMATS, PRESETS, QuantizedWeightsConfig
from minimonkey.scripts.benchmarking.measure import free_bytes
from minimonkey.scripts.importing.config import read_json
from minimonkey.scripts.importing.folder import check_free, new_folder
from minimonkey.scripts.precision import choose_storage
from minimonkey.scripts.repository import load_model, load_processor, reports_errors


INT8_CACHE = ("bluelm",)  # presets with keys and values in 8 bits


def load_quantized(source: str, config: QuantizedWeightsConfig, **options):
    """Load a model and store its weights as `config` says; see `repository.load_model`, which takes the same options.

    Raises:
        ValueError: The model is quantised already, or a name of a layer fits none.
    """
    folder = Path(source, options.get("subfolder", ""))
    if folder.is_dir():
        settings = read_json(folder / "config.json")
    else:
        settings, _ = MiniMonkeyConfig.get_config_dict(source, subfolder=options.get("subfolder", ""))
    already = settings.get("quantization_config")
    if already is not None:
        how = already.get("preset") or already.get("quant_method")
        raise ValueError(f"{source} is quantised already ({how}); quantise the model that it was made from.")
    model = load_model(source, quantization_config=config, **options)
    if config.preset in INT8_CACHE:
        model.config.kv_cache_dtype = "int8"
    return model


def weights_config(texts: list[str]) -> QuantizedWeightsConfig:
    """Return what a preset's name, or layers as REGEX=FORMAT, say.

    Raises:
        ValueError: They say neither.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return QuantizedWeightsConfig(*texts)
    formats = {}
    for text in texts:
        pattern, _, kind = text.rpartition("=")
        if not pattern or kind not in FORMATS:
            raise ValueError(
                f"Weights are one of {', '.join(PRESETS)}, or REGEX=FORMAT for layers, with {', '.join(FORMATS)}, got {text!r}."
            )
        formats[pattern] = kind
    return QuantizedWeightsConfig(formats=formats)


def storage_that_fits(source: str, subfolder: str, dtype: torch.dtype) -> str | None:
    """Return the preset that a model's weights need to fit the memory that is free on this machine, and say so; or None."""
    config = MiniMonkeyConfig.from_pretrained(source, subfolder=subfolder)
    if getattr(config, "quantization_config", None) is not None:
        return None
    with init_empty_weights():
        numbers = sum(parameter.numel() for parameter in MiniMonkeyForConditionalGeneration(config).parameters())
    free = free_bytes(torch.device("cpu"))
    preset = choose_storage(numbers, dtype, free)
    if preset is not None:
        print(f"Storing weights as {preset}: {free / 2**30:.1f} GiB are free.", file=sys.stderr)
    return preset


def quantize(
    source: str, out: Path, config: QuantizedWeightsConfig, subfolder: str = "", dtype: str = "bfloat16"
) -> None:
    """Load a model, store its weights as `config` says, and write it with its processor to `out`.

    Args:
        source: A MiniMonkey folder or Hub id.
        subfolder: Where in it the weights are; the processor is that of `source`.
        dtype: Of what is not stored in a format: norms, embeddings, biases.

    Raises:
        ValueError: See `load_quantized`; or something is in the way of `out`.
    """
    check_free(out)
    model = load_quantized(source, config, subfolder=subfolder, dtype=getattr(torch, dtype))
    processor = load_processor(source)
    with new_folder(out, f"{source} {subfolder} {config.formats} {dtype}") as work:
        model.save_pretrained(work)
        processor.save_pretrained(work)


@reports_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="MiniMonkey folder or Hub id; published weights come through import")
    parser.add_argument("out", type=Path, help="folder to write")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--preset", choices=PRESETS)
    how.add_argument("--layer", action="append", default=[], metavar="REGEX=FORMAT", help="instead of a preset")
    parser.add_argument("--subfolder", default="", help="of the source, where its weights are")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of what stays as it is: norms, embeddings"
    )
    args = parser.parse_args(arguments)
    config = weights_config([args.preset] if args.preset else args.layer)
    quantize(args.source, args.out, config, args.subfolder, args.dtype)
    before = file_bytes(Path(args.source, args.subfolder))
    after = f"{file_bytes(args.out) / 1e6:.4g} MB of weights"
    print(f"Wrote {args.out}: {after}{f', {before / 1e6:.4g} MB before' if before else ''}.")


def file_bytes(folder: Path) -> int:
    """Count the bytes of the weights in a folder; 0 if there is none."""
    return sum(os.path.getsize(path) for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
