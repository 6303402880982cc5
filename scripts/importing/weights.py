"""Convert published safetensors files, a shard at a time: checked as a whole first, resumable, with little memory."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minimonkey.scripts.importing.config import read_json, without_doubles


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
READABLE_TYPES = ("F64", "F32", "F16", "BF16")
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer in older releases; it is computed from the configuration


@dataclass(frozen=True)
class Shard:
    """One published file: its tensors' names, shapes and types."""

    path: Path
    shapes: dict[str, tuple[int, ...]]


def read_shards(folder: Path) -> list[Shard]:
    """Read the weight files of a checkpoint, from their headers alone.

    Raises:
        ValueError: No weights, a missing, damaged or truncated file, or an index that does not match the files.
    """
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_weight_map(folder / INDEX_NAME)
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        weight_map, names = None, [SINGLE_NAME]
    else:
        raise ValueError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; weights in other files (.bin, which can run code) are "
            "not read, save them as safetensors first."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names.")
    shards = [_read_header(folder / name) for name in names]
    if weight_map is not None:
        _check_index(weight_map, shards)
    return shards


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return the shard of each tensor.

    Raises:
        ValueError: It is not an index, or has a name that leads out of the folder.
    """
    weight_map = read_json(path, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path} must have a weight_map from tensors' names to files' names.")
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors") or any(character in name for character in "/\\\0"):
            raise ValueError(f"{path} names the file {name!r}; it must be a .safetensors file beside the index.")
    return weight_map


def missing_weights(folder: Path) -> list[str]:
    """Return the weight files that a finished folder should have and lacks."""
    if not (folder / INDEX_NAME).is_file():
        return [] if (folder / SINGLE_NAME).is_file() else [SINGLE_NAME]
    return [
        name for name in sorted(set(_read_weight_map(folder / INDEX_NAME).values())) if not (folder / name).is_file()
    ]


def _read_header(path: Path) -> Shard:
    shapes, unreadable = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                if part.get_dtype() not in READABLE_TYPES and not name.endswith(IGNORED_SUFFIXES):
                    unreadable[name] = part.get_dtype()
            _check_names(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}. Download it again.") from error
    empty = {name for name, shape in shapes.items() if not shape or 0 in shape}
    if empty:
        raise ValueError(f"{path} holds tensors without values: {_few(empty)}.")
    if unreadable:
        name, kind = next(iter(unreadable.items()))
        raise ValueError(
            f"{path}: {name} is of type {kind}, which is no plain weight ({len(unreadable)} such tensors). Weights must be "
            f"{', '.join(READABLE_TYPES)}; quantised checkpoints are not imported, take the original."
        )
    return Shard(path, shapes)


def _check_names(path: Path) -> None:
    """Raise `ValueError` if the header, found valid, names a tensor twice: safetensors takes the last."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=without_doubles)
    except ValueError as error:
        raise ValueError(f"The header of {path} is damaged: {error}.") from error


def _check_index(weight_map: dict[str, str], shards: list[Shard]) -> None:
    places = Counter(name for shard in shards for name in shard.shapes)
    twice = {name for name, count in places.items() if count > 1}
    if twice:
        raise ValueError(f"Several files hold the same tensors: {_few(twice)}.")
    for shard in shards:
        named = {key for key, name in weight_map.items() if name == shard.path.name}
        if named != shard.shapes.keys():
            raise ValueError(
                f"{shard.path.name} does not hold what the index says: missing "
                f"{_few(named - shard.shapes.keys())}, unexpected {_few(shard.shapes.keys() - named)}."
            )


def check_against_model(shards: list[Shard], expected: dict[str, tuple[int, ...]], convert, tied: bool) -> None:
    """Compare every name and shape with those of the model, before anything is read or written.

    Args:
        expected: Names and shapes of the model.
        convert: (name, tensor) -> {name: tensor}; called with tensors that have no data.
        tied: The output layer shares the input embeddings and may be missing.

    Raises:
        ValueError: Names the weights that are missing, unexpected, there twice or of another shape.
    """
    found: dict[str, tuple[int, ...]] = {}
    sources: dict[str, str] = {}
    problems = []
    for shard in shards:
        for source, shape in shard.shapes.items():
            if source.endswith(IGNORED_SUFFIXES):
                continue
            try:
                converted = convert(source, torch.empty(shape, device="meta"))
            except ValueError as error:
                problems.append(f"{source}: {error}")
                continue
            for name, tensor in converted.items():
                if name in found:
                    problems.append(f"twice: {name} comes from {sources[name]} and from {source}")
                found[name], sources[name] = tuple(tensor.shape), source
    missing = sorted(expected.keys() - found.keys() - ({"lm_head.weight"} if tied else set()))
    unexpected = sorted(sources[name] for name in found.keys() - expected.keys())
    problems += [f"missing: {name} {expected[name]}" for name in missing]
    problems += [f"unexpected: {name}" for name in dict.fromkeys(unexpected)]
    problems += [
        f"wrong shape: {sources[name]} gives {name} {found[name]}, the configuration wants {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"The checkpoint does not fit its configuration:\n  {shown}{more}")


def convert_shards(shards: list[Shard], out: Path, convert) -> None:
    """Write the converted shards and their index into `out`; shards that are there already are kept.

    A shard appears under its name only when it is complete.
    """
    weight_map, total = {}, 0
    count = sum(len(shard.shapes) for shard in shards)
    with tqdm(total=count, unit="tensor", desc="Converting", disable=None) as progress:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            if not (out / name).is_file():
                _convert_shard(shard, out / name, convert, progress)
            else:
                progress.update(len(shard.shapes))
            written = _read_header(out / name)
            weight_map |= dict.fromkeys(written.shapes, name)
            total += (out / name).stat().st_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _convert_shard(shard: Shard, target: Path, convert, progress) -> None:
    tensors = {}
    try:
        with safe_open(shard.path, framework="pt") as file:
            for source in shard.shapes:
                if not source.endswith(IGNORED_SUFFIXES):
                    tensors |= convert(source, check_finite(file.get_tensor(source), source))
                progress.update()
    except SafetensorError as error:
        raise ValueError(f"{shard.path} is damaged or truncated: {error}. Download it again.") from error
    temporary = target.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(target)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{target.name} could not be written: {error}. The shards before it are kept; run again."
        ) from error


def check_finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a weight if all its values are finite.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity); the checkpoint is damaged.")
    return tensor


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if shown else "nothing"
