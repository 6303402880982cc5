"""Data that are conversations already: LLaVA's JSON files, and InternVL's own JSONL, whose images and boxes are checked.

LLaVA writes boxes as shares of the image padded to a square ([0.25, 0.12, 0.5, 0.9]); they become thousandths of the image
itself. GeoChat's are percentages with an angle ({<25><12><50><90>|<30>}); they become the upright box around the turned one.

Source: LLaVA-1.5's training data and its maintainers' answers on boxes; GeoChat (arXiv 2311.15826), section 3.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from minimonkey.conversation import IMAGE_PLACEHOLDER
from minimonkey.scripts.preparing.layouts import read_json, require
from minimonkey.scripts.preparing.records import Record, Refusal
from minimonkey.scripts.training.data import parse_line, picture_size


LLAVA_FOLDERS = {
    "coco/": "coco/train2017",
    "gqa/": "gqa/images",
    "ocr_vqa/": "ocr_vqa/images",
    "textvqa/": "textvqa/train_images",
    "vg/VG_100K/": "vg/VG_100K",
    "vg/VG_100K_2/": "vg/VG_100K_2",
}
OTHER_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg")  # downloads of one image differ in these
SHARE = r"(?:0(?:\.\d+)?|1(?:\.0+)?)"
SHARES = re.compile(rf"\[({SHARE}), ?({SHARE}), ?({SHARE}), ?({SHARE})\]")
TURNED = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>\|<(-?\d+)>\}")
TURNED_PHRASE = re.compile(rf"<p>(.*?)</p>\s*((?:{TURNED.pattern}(?:<delim>|,|\s)*)+)")

Size = tuple[int, int]


def llava(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the conversations of llava_v1_5_mix665k.json."""
    needed = {"annotation": "llava_v1_5_mix665k.json", **LLAVA_FOLDERS}
    found = require(root, "LLaVA's mix665k", needed)
    yield from from_llava(found["annotation"], root, from_shares)


def from_llava(annotation: Path, root: Path, boxes: Callable[[str, Size], str]) -> Iterator[Record | Refusal]:
    """Yield the conversations of a LLaVA JSON file.

    Args:
        annotation: A list of {"id", "image", "conversations"}.
        root: Where the paths of images start.
        boxes: Rewrites the boxes of a text, given the (height, width) of its image.
    """
    for number, entry in enumerate(read_json(annotation)):
        name = f"{number}-{entry.get('id', '')}"
        try:
            yield _converted(name, entry, root, boxes)
        except (ValueError, KeyError, TypeError) as error:
            yield Refusal(name, str(error).removeprefix(f"{name}: "))


def _converted(name: str, entry: dict, root: Path, boxes: Callable[[str, Size], str]) -> Record:
    images = entry.get("image") or []
    paths = [_existing(root / image) for image in ([images] if isinstance(images, str) else images)]
    texts = [message["value"] for message in entry["conversations"]]
    if paths:
        size = picture_size(paths[0], name)
        texts = [boxes(text, size) for text in texts]
        # LLaVA puts the image anywhere in the first question, and sometimes nowhere.
        bare = texts[0].replace(IMAGE_PLACEHOLDER, "").strip()
        texts[0] = f"{IMAGE_PLACEHOLDER}\n" * len(paths) + bare
    speakers = [message["from"] for message in entry["conversations"]]
    if speakers != ["human", "gpt"] * (len(speakers) // 2) or not speakers:
        raise ValueError(f"human and gpt must alternate, got {speakers[:4]}")
    return Record(name, tuple(paths), tuple(zip(texts[0::2], texts[1::2])))


def _existing(path: Path) -> Path:
    """Return the file of an image, under another suffix if need be."""
    candidates = (path, *(path.with_suffix(suffix) for suffix in OTHER_SUFFIXES))
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def as_is(text: str, size: Size) -> str:
    """Return a text whose boxes are not touched."""
    return text


def from_shares(text: str, size: Size) -> str:
    """Rewrite LLaVA's boxes, shares of the padded square, as `<box>[[x1, y1, x2, y2]]</box>` in thousandths of the image.

    Args:
        size: (height, width) of the image.

    Raises:
        ValueError: A box lies in the padding or has its corners in the wrong order.
    """
    height, width = size
    side = max(size)

    def rewrite(match: re.Match) -> str:
        x1, y1, x2, y2 = map(float, match.groups())
        left, right = (_thousandths(x * side - (side - width) / 2, width) for x in (x1, x2))
        top, bottom = (_thousandths(y * side - (side - height) / 2, height) for y in (y1, y2))
        if x1 > x2 or y1 > y2 or left is None or right is None or top is None or bottom is None:
            raise ValueError(f"the box {match[0]} is none of an image of {width} x {height} pixels")
        return f"<box>[[{left}, {top}, {right}, {bottom}]]</box>"

    return SHARES.sub(rewrite, text)


def _thousandths(pixels: float, length: int) -> int | None:
    """Return pixels as thousandths of a length; None more than 1% outside it (shares are rounded to two digits or three)."""
    value = pixels / length * 1000
    return min(1000, max(0, round(value))) if -10 <= value <= 1010 else None


def from_turned(text: str, size: Size) -> str:
    """Rewrite GeoChat's boxes as upright ones in thousandths, with their phrase in <ref>; drop its task tags."""
    text = TURNED_PHRASE.sub(
        lambda match: f"<ref>{match[1]}</ref><box>[{', '.join(map(str, _upright_boxes(match[2])))}]</box>", text
    )
    text = TURNED.sub(lambda match: f"<box>{_upright_boxes(match[0])}</box>", text)
    return re.sub(r"\[(?:grounding|refer|identify)\]\s*", "", text)


def _upright_boxes(text: str) -> list[list[int]]:
    return [upright_box(*map(int, match.groups())) for match in TURNED.finditer(text)]


def upright_box(x1: int, y1: int, x2: int, y2: int, angle: int) -> list[int]:
    """Return the upright box in thousandths around a box in percent that is turned about its centre by `angle` degrees."""
    centre_x, centre_y, half_x, half_y = (x1 + x2) / 2, (y1 + y2) / 2, abs(x2 - x1) / 2, abs(y2 - y1) / 2
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    reach_x, reach_y = half_x * cos + half_y * sin, half_x * sin + half_y * cos
    corners = (centre_x - reach_x, centre_y - reach_y, centre_x + reach_x, centre_y + reach_y)
    return [min(1000, max(0, round(10 * value))) for value in corners]


def from_jsonl(annotation: Path, root: Path) -> Iterator[Record | Refusal]:
    """Yield the conversations of a JSONL file in InternVL's form."""
    with annotation.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                parsed = parse_line(text, f"line {number}")
            except ValueError as error:
                yield Refusal(f"line {number}", str(error))
                continue
            if parsed["system"] is not None:
                yield Refusal(f"line {number}", "it has a system message, which would be lost")
                continue
            images = tuple(root / image for image in parsed["images"])
            yield Record(str(number), images, tuple(zip(parsed["questions"], parsed["answers"])))
