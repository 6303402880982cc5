"""Turn a published data set, as it is downloaded, into conversations to train on, or into a benchmark.

    python scripts/prepare.py drivelm downloads/drivelm data/drivelm
    python scripts/prepare.py drivelm downloads/drivelm data/drivelm --split eval           the questions that are scored
    python scripts/prepare.py remote-sensing downloads data/remote --general data/playground/meta.json --general-share 0.2
    python scripts/prepare.py playground playground data/playground                       what Mini-Monkey was trained on
    python scripts/prepare.py chartqa ChartQA_TEST.tsv data/chartqa                        one of the benchmarks
    python scripts/prepare.py meta train_meta/internvl_1_2_finetune_medical.json data/medical

Writes into OUT: NAME.jsonl, meta.json for `data` of a recipe (data sets prepared before stay in it), NAME.refused.jsonl with a
reason for everything that was not taken, and NAME.png, a sheet of records to look at. A test split becomes NAME-SPLIT.jsonl for
`evaluate --benchmark`, which `score` reads with the answers. What is missing of a download is said by name.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from minimonkey.grounding import draw_boxes, parse_boxes
from minimonkey.scripts.preparing.benchmarks import BENCHMARKS
from minimonkey.scripts.preparing.conversations import from_jsonl
from minimonkey.scripts.preparing.records import Record, Refusal, Writer
from minimonkey.scripts.preparing.sets import GROUPS, KNOWN, SETS, group_members, playground, published_meta
from minimonkey.scripts.repository import number_within, reports_errors, whole_number
from minimonkey.scripts.synthetic.sheet import sheet
from minimonkey.scripts.training.own_data import count_examples


SHEET_ITEMS, SHEET_COLUMNS, SHEET_WIDTH = 9, 3, 448
CAPTION_CHARACTERS = 400


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=KNOWN, metavar="NAME", help=", ".join(KNOWN))
    parser.add_argument("root", type=Path, help="folder of the download; of meta and of single files the file")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--split", default="train", help="train, val, test; of drivelm also eval (default: train)")
    parser.add_argument("--limit", type=whole_number(1), default=None, help="this many records, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=number_within(0.0001, 1000), default=1, help="repeat_time in the meta JSON")
    parser.add_argument("--draw-objects", action="store_true", help="of drivelm: draw the boxes of the key objects")
    parser.add_argument("--general", type=Path, default=None, help="meta JSON of general data to mix in")
    parser.add_argument(
        "--general-share",
        type=number_within(0, 100),
        default=0.25,
        help="examples of it for each of the domain's (0.25)",
    )
    args = parser.parse_args(arguments)
    if args.draw_objects and args.name != "drivelm":
        parser.error("--draw-objects belongs to drivelm")
    return args


def chosen(found: Iterable[Record | Refusal], limit: int | None, seed: int) -> Iterator[Record | Refusal]:
    """Yield all records, or `limit` of them drawn at random in their order; and all refusals."""
    if limit is None:
        yield from found
        return
    records = []
    for record in found:
        if isinstance(record, Refusal):
            yield record
        else:
            records.append(record)
    yield from (records[i] for i in sorted(random.Random(seed).sample(range(len(records)), min(limit, len(records)))))


def prepare(name: str, root: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Write one data set; return its entry of the meta JSON, or nothing for a benchmark."""
    data_set, split = SETS[name], args.split
    is_benchmark = data_set.is_benchmark or split in data_set.tests
    image_root = args.out if data_set.writes_images else root
    options = {"draw_objects": True} if args.draw_objects else {}
    label = name if split == "train" else f"{name}-{split}"
    writer = Writer(args.out, label, image_root, is_benchmark)
    found = iter(data_set.read(root, split, args.out, **options))
    first = [*itertools.islice(found, 1)]  # for which a reader looks for its files, before anything is written
    args.out.mkdir(parents=True, exist_ok=True)
    writer.write(chosen(itertools.chain(first, found), args.limit, args.seed))
    finish(writer)
    if is_benchmark:
        return {}
    entry = {"root": str(image_root.resolve()), "annotation": writer.path.name, "length": writer.written}
    return {label: entry | {"repeat_time": args.repeat} | data_set.meta}


def check_published(meta: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """Write the lines of published JSONL files that pass; return their meta with the number of lines that are left."""
    entries = {}
    for name, entry in meta.items():
        writer = Writer(args.out, name, Path(entry["root"]), is_benchmark=False)
        writer.write(chosen(from_jsonl(Path(entry["annotation"]), Path(entry["root"])), args.limit, args.seed))
        finish(writer)
        if "length" in entry and entry["length"] != writer.written:
            print(f"{name}: published with {entry['length']} lines, here are {writer.written}.")
        here = {"root": str(Path(entry["root"]).resolve()), "annotation": writer.path.name, "length": writer.written}
        entries[name] = entry | here
    return entries


def finish(writer: Writer) -> None:
    """Say what was written, and draw the sheet.

    Raises:
        ValueError: Not a single record was.
    """
    print(writer.report())
    if writer.name in BENCHMARKS:
        print(f"Ask it: minimonkey evaluate --benchmark {writer.path} --preset {BENCHMARKS[writer.name].preset}")
    if not writer.written:
        raise ValueError(f"{writer.name}: nothing could be taken; see {writer.refused_path}.")
    draw_sheet(writer)


def draw_sheet(writer: Writer) -> None:
    """Write an image of records evenly spread over the file, their boxes drawn, with what is asked and answered."""
    lines = writer.path.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // SHEET_ITEMS)
    root = writer.out if writer.is_benchmark else writer.root
    captioned = []
    for text in lines[::step][:SHEET_ITEMS]:
        line = json.loads(text)
        if writer.is_benchmark:
            texts = [line["question"], *line["answers"]]
        else:
            texts = [message["value"] for message in line["conversations"]]
        images = [line["image"]] if isinstance(line.get("image"), str) else line.get("image", [])
        image = Image.open(root / images[0]).convert("RGB") if images else Image.new("RGB", (SHEET_WIDTH, 20), "white")
        image.thumbnail((SHEET_WIDTH, SHEET_WIDTH))
        boxes = [box for answer in texts if "<box>" in answer for box in parse_boxes(answer)]
        captions = [" ".join(text.split())[:CAPTION_CHARACTERS] for text in texts[:4]]
        captioned.append((draw_boxes(image, boxes), [f"{line['id']}: {len(images)} image(s)", *captions]))
    sheet(captioned, SHEET_COLUMNS).save(writer.path.with_suffix(".png"))


def write_meta(entries: dict[str, dict], args: argparse.Namespace) -> Path:
    """Add data sets to OUT/meta.json, and general data in the wanted proportion to them."""
    path = args.out / "meta.json"
    meta = json.loads(path.read_text()) if path.exists() else {}
    meta |= entries
    if args.general is not None:
        domain = sum(entry["length"] * entry["repeat_time"] for entry in entries.values())
        repeat = args.general_share * domain / count_examples(str(args.general))
        general = json.loads(args.general.read_text())
        for name, entry in general.items():
            places = {
                key: str((args.general.parent / entry[key]).resolve()) for key in ("root", "annotation") if key in entry
            }
            # A part below one is taken once; from one on, data are repeated whole.
            meta[name] = entry | places | {"repeat_time": repeat if repeat < 1 else round(repeat)}
    path.write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prepare what the command line names."""
    args = parse_arguments(arguments)
    if args.name == "playground":
        meta = playground(args.root)
    elif args.name == "meta":
        meta = published_meta(args.root)
    else:
        members = group_members(args.name, args.root) if args.name in GROUPS else {args.name: args.root}
    if args.name in ("playground", "meta"):
        args.out.mkdir(parents=True, exist_ok=True)
        entries = check_published(meta, args)
    else:
        entries = {key: entry for name, root in members.items() for key, entry in prepare(name, root, args).items()}
    if entries:
        print(
            f"Wrote {write_meta(entries, args)}: train with `minimonkey train RECIPE --data {args.out / 'meta.json'}`."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
