"""The data sets that `minimonkey prepare` knows, and what a meta JSON says of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minimonkey.scripts.preparing import bdd, benchmarks, conversations, drivelm, medical, remote_sensing
from minimonkey.scripts.preparing.layouts import read_json, require
from minimonkey.scripts.preparing.records import Record, Refusal


Reader = Callable[..., Iterator[Record | Refusal]]
MULTI_VIEW = [[1, 12, 1, 1]]  # the preset multi_view of tiling.py: no adaptive tiles, which would mix cameras
ONE_TILE = [[1, 1, 1, 1]]
PUBLISHED_TILES = 12  # max_dynamic_patch of the published adaptation


@dataclass(frozen=True)
class DataSet:
    """How a data set is read.

    Args:
        read: Called with the folder of the download, the split and the folder to write to.
        tests: Splits that become a benchmark; the others are for training.
        meta: What its entry of the meta JSON says besides where it is.
        writes_images: Whether it writes images of its own, which the paths then start from.
        is_benchmark: Whether all of it is for evaluation; its download is one file.
    """

    read: Reader
    tests: tuple[str, ...] = ("test",)
    meta: dict = field(default_factory=dict, hash=False)
    writes_images: bool = False
    is_benchmark: bool = False


TILES = {"max_dynamic_patch": PUBLISHED_TILES}
SETS: dict[str, DataSet] = {
    "drivelm": DataSet(drivelm.read, ("eval", "val"), {"tile_ranges": MULTI_VIEW}, writes_images=True),
    "bdd": DataSet(bdd.read, ("test",), {"tile_ranges": ONE_TILE}),
    "geochat": DataSet(remote_sensing.geochat, (), TILES),
    "rsvqa-lr": DataSet(remote_sensing.rsvqa_lr, ("test",), TILES),
    "rsvqa-hr": DataSet(remote_sensing.rsvqa_hr, ("test", "test_phili"), TILES),
    "fit-rs": DataSet(remote_sensing.fit_rs, (), TILES),
    "dior-rsvg": DataSet(remote_sensing.dior_rsvg, ("test",), TILES),
    "scenes": DataSet(remote_sensing.scenes, ("test",), TILES),
    "pmc-oa": DataSet(medical.pmc_oa, (), TILES),
    "quilt": DataSet(medical.quilt, (), TILES),
    "slake": DataSet(medical.slake, ("test",), TILES),
    "vqa-rad": DataSet(medical.vqa_rad, ("test",), TILES),
    "pmc-vqa": DataSet(medical.pmc_vqa, ("test",), TILES),
    "llava-mix665k": DataSet(conversations.llava, (), {"max_dynamic_patch": 6}),
}


def _benchmark(name: str) -> DataSet:
    return DataSet(lambda path, split, out: benchmarks.read(name, path, out), writes_images=True, is_benchmark=True)


SETS |= {name: _benchmark(name) for name in benchmarks.BENCHMARKS}
# Several of them in one folder, each in a folder of one of these names, as published.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "remote-sensing": {
        "geochat": ("GeoChat",),
        "rsvqa-hr": ("RSVQA-H", "RSVQA-HR"),
        "fit-rs": ("FIT-RS",),
        "dior-rsvg": ("DIOR-RSVG",),
    },
    "medical": {
        "pmc-oa": ("PMC-OA", "pmc_oa"),
        "quilt": ("Quilt-1M", "quilt_1m"),
        "slake": ("Slake1.0", "SLAKE"),
        "vqa-rad": ("VQA-RAD", "VQA_RAD"),
        "pmc-vqa": ("PMC-VQA",),
    },
}
# The seven sets that Mini-Monkey was trained on, by the published meta file: folder of the images, annotation, lines.
PLAYGROUND = {
    "llava_instruct_150k_zh": ("data/coco", "llava_instruct_150k_zh.jsonl", 157712),
    "dvqa_train_200k": ("data/dvqa", "dvqa_train_200k.jsonl", 200000),
    "chartqa_train_18k": ("data/chartqa", "chartqa_train_18k.jsonl", 18317),
    "ai2d_train_12k": ("data/ai2d", "ai2d_train_12k.jsonl", 12413),
    "docvqa_train_10k": ("data/docvqa", "docvqa_train_10k.jsonl", 10211),
    "geoqa+": ("data/geoqa+", "geoqa+.jsonl", 72318),
    "synthdog_en": ("data/synthdog-en", "synthdog_en.jsonl", 29765),
}


def playground(root: Path) -> dict[str, dict]:
    """Return the meta of Mini-Monkey's own training, after looking for all its files.

    Raises:
        ValueError: Files or folders are missing, with the name of each.
    """
    needed = {name: f"opensource/{annotation}" for name, (_, annotation, _) in PLAYGROUND.items()}
    found = require(
        root, "The playground", needed | {f"images of {name}": at for name, (at, _, _) in PLAYGROUND.items()}
    )
    return {
        name: {"root": str(root / images), "annotation": str(found[name]), "length": length, "repeat_time": 1}
        for name, (images, _, length) in PLAYGROUND.items()
    }


def published_meta(path: Path) -> dict[str, dict]:
    """Return the datasets of a published meta JSON, with paths that start from the working folder, as published.

    Raises:
        ValueError: It is none, or annotations or image folders are missing, with the name of each.
    """
    meta = read_json(path)
    if not isinstance(meta, dict) or not all(
        isinstance(entry, dict) and "annotation" in entry for entry in meta.values()
    ):
        raise ValueError(f'{path} is no meta JSON: {{"name": {{"root": ..., "annotation": ...}}, ...}}.')
    missing = [entry[key] for entry in meta.values() for key in ("annotation", "root") if not Path(entry[key]).exists()]
    if missing:
        raise ValueError(f"{path} names what is not here: {', '.join(missing)}. Run where its paths start.")
    return meta


def group_members(group: str, root: Path) -> dict[str, Path]:
    """Return the folder of each data set of a group.

    Raises:
        ValueError: Some are missing, with their names.
    """
    return require(root, f"The data for {group}", dict(GROUPS[group]))


KNOWN = (*SETS, *GROUPS, "playground", "meta")
