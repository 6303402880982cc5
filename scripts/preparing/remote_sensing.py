"""Remote sensing: RSVQA (low and high resolution), DIOR-RSVG, GeoChat, FIT-RS, and folders of scenes by class.

    RSVQA-LR    LR_split_{train,val,test}_{questions,answers}.json, Images_LR/
    RSVQA-HR    USGS_split_{train,val,test,test_phili}_{questions,answers}.json, Data/
    DIOR-RSVG   Annotations/*.xml, JPEGImages/, {train,val,test}.txt
    GeoChat     GeoChat_Instruct.json, images/final_images_llava/
    FIT-RS      fit_rs_vqa*.json, imgv2_split_512_100_vaild/
    scenes      CLASS/*.jpg, as AID, UCMerced and WHU-RS19 come

Source: the data sets' own pages, Mini-InternVL (arXiv 2410.16261), and its published evaluation.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from minimonkey.grounding import format_box, normalise
from minimonkey.scripts.preparing.conversations import as_is, from_llava, from_turned
from minimonkey.scripts.preparing.layouts import read_json, require
from minimonkey.scripts.preparing.records import Record, Refusal, with_image


ONE_WORD = "Answer the question using a single word or phrase."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
HELD_OUT_SHARE = 5  # one scene in five is the test split, by a digest of its name


def rsvqa_lr(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the questions of RSVQA-LR."""
    return _rsvqa(root, "RSVQA-LR", f"LR_split_{split}", "Images_LR")


def rsvqa_hr(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the questions of RSVQA-HR; its second test split is "test_phili"."""
    return _rsvqa(root, "RSVQA-HR", f"USGS_split_{split}", "Data")


def _rsvqa(root: Path, what: str, prefix: str, images: str) -> Iterator[Record | Refusal]:
    names = {part: f"{prefix}_{part}.json" for part in ("questions", "answers")}
    found = require(root, what, names | {"images": images})
    answers = {entry["id"]: entry for entry in read_json(found["answers"])["answers"] if entry.get("active", True)}
    for entry in read_json(found["questions"])["questions"]:
        if not entry.get("active", True):
            continue  # a row of the file for a question of another split
        lacking = [name for name in ("question", "answers_ids", "img_id") if name not in entry]
        if lacking:
            yield Refusal(str(entry["id"]), f"it lacks {', '.join(lacking)}")
            continue
        right = [answers[number]["answer"] for number in entry["answers_ids"] if number in answers]
        if not right:
            yield Refusal(str(entry["id"]), "it has no answer")
            continue
        image = found["images"] / f"{entry['img_id']}.tif"
        turn = (with_image(f"{entry['question']}\n{ONE_WORD}"), right[0])
        yield Record(str(entry["id"]), (image,), (turn,), {"kind": entry["type"], "metric": "same_text"})


def dior_rsvg(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the referred objects of DIOR-RSVG; the split's file counts objects over all annotations in order of their names."""
    found = require(root, "DIOR-RSVG", {"annotations": "Annotations", "images": "JPEGImages", "split": f"{split}.txt"})
    wanted = {int(number) for number in found["split"].read_text().split()}
    count = 0
    for path in sorted(found["annotations"].glob("*.xml")):
        tree = ElementTree.parse(path).getroot()
        for member in tree.findall("object"):
            number, count = count, count + 1
            if number in wanted:
                yield _referred(number, tree, member, found["images"])
    for number in sorted(wanted - set(range(count))):
        yield Refusal(str(number), f"the annotations hold {count} objects")


def _referred(number: int, tree: ElementTree.Element, member: ElementTree.Element, images: Path) -> Record | Refusal:
    phrase = member.findtext("description") or ""
    corners = [float(member.findtext(f"bndbox/{name}", "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
    size = (int(tree.findtext("size/width", "0")), int(tree.findtext("size/height", "0")))
    try:
        answer = format_box(phrase, [normalise(corners, size)])
    except ValueError as error:
        return Refusal(str(number), str(error))
    scoring = {"box": corners, "size": size, "metric": "exact_match"}
    image = images / (tree.findtext("filename") or "")
    return Record(str(number), (image,), ((with_image(f"Detect <ref>{phrase}</ref>"), answer),), scoring)


def geochat(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield GeoChat's conversations, with upright boxes in thousandths."""
    folder = "final_images_llava"
    places = (f"images/{folder}", folder, f"share/softwares/kartik/GeoChat_finetuning/{folder}")
    found = require(root, "GeoChat", {"annotation": "GeoChat_Instruct.json", "images": places})
    return from_llava(found["annotation"], found["images"], from_turned)


def fit_rs(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield the questions of FIT-RS."""
    needed = {"annotation": "fit_rs_vqa*.json", "images": "imgv2_split_512_100_vaild"}
    found = require(root, "FIT-RS", needed)
    return from_llava(found["annotation"], found["images"], as_is)


def scenes(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield a question that lists all classes for each image of a folder of classes; no split is published, see HELD_OUT_SHARE.

    Raises:
        ValueError: Fewer than two folders with images.
    """
    if not root.is_dir():
        raise ValueError(f"There is no folder {root} with a folder for each class.")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    images = {
        folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) for folder in folders
    }
    images = {name: paths for name, paths in images.items() if paths}
    if len(images) < 2:
        raise ValueError(
            f"{root} must hold two or more folders of images, one for each class; found {', '.join(images)}."
        )
    return _classified(images, split)


def _classified(images: dict[str, list[Path]], split: str) -> Iterator[Record]:
    question = f"Classify the image within one of the given classes: {', '.join(images)}. Answer with one word or short phrase."
    for label, paths in images.items():
        for path in paths:
            name = f"{label}/{path.name}"
            is_test = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0
            if is_test == (split == "test"):
                yield Record(name, (path,), ((with_image(question), label),), {"metric": "same_text"})
