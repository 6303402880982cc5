"""DriveLM-nuScenes: six cameras as one stitched image, objects as tags with points in thousandths, behaviour as options.

Layout: v1_1_train_nus.json (or v1_1_val_nus_q_only.json), and nuScenes' samples/CAM_*. Every frame becomes one image of
2688 x 896 pixels, 6 x 2 whole tiles of 448, in OUT/stitch. `<c1,CAM_BACK,1088.3,497.5>` becomes `<c1,CAM_BACK,[cx, cy]>`.

Source: Mini-InternVL (arXiv 2410.16261), sections 3.3 and 4, and the published stitching and evaluation code; the questions
that are scored, and their tags, are chosen as DriveLM's challenge does.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from minimonkey.grounding import Grounding, draw_boxes
from minimonkey.multi_view import CAMERAS, StitchedViews, stitch_views
from minimonkey.scripts.preparing.layouts import read_json, require
from minimonkey.scripts.preparing.records import Record, Refusal, with_image


COLUMNS, VIEW_SIZE = 3, (896, 448)
SUBJECTS = ("perception", "prediction", "planning", "behavior")
TAG = re.compile(r"<(c\d+),(CAM_\w+),(-?\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?)>")
STITCHED_TAG = re.compile(r"<(c\d+),(CAM_\w+),\[(\d+), ?(\d+)\]>")
OPTIONS = "Please select the correct answer from the following options:"
MOVING = "What is the moving status of object"
ACTIONS = ("What actions could the ego vehicle take", "lead to a collision", "safe actions")
UNKNOWN = "unknown"  # the answer that only the challenge's server has
SCORED_AS = {0: "accuracy", 1: "gpt", 2: "language", 3: "match"}


def files(root: Path, split: str) -> dict[str, Path]:
    """Return where questions and images are; `split` "val" has questions without answers."""
    name = "v1_1_val_nus_q_only.json" if split == "val" else "v1_1_train_nus.json"
    return require(
        root,
        "DriveLM",
        {
            "questions": (name, f"QA_dataset_nus/{name}", f"data/QA_dataset_nus/{name}"),
            "images": ("nuscenes/samples", "samples", "data/nuscenes/samples", "val_data"),
        },
    )


def read(root: Path, split: str, out: Path, draw_objects: bool = False) -> Iterator[Record | Refusal]:
    """Yield DriveLM's questions; of the split "eval" only those that are scored, with their tag.

    Args:
        draw_objects: Also draw the boxes of the key objects into the stitched image.
    """
    found = files(root, split)
    scenes = read_json(found["questions"])
    choices = _choices(scenes)
    for scene, content in scenes.items():
        for frame, entry in content["key_frames"].items():
            name = f"{scene}_{frame}"
            try:
                views = _stitched(entry, found["images"], out / "stitch" / f"{name}.jpg", draw_objects)
            except (ValueError, OSError, KeyError) as error:
                yield Refusal(name, f"its cameras cannot be stitched: {error}")
                continue
            image = out / "stitch" / f"{name}.jpg"
            for number, (subject, asked, tag) in enumerate(_questions(entry, split)):
                if not asked.get("A") and split != "val":
                    yield Refusal(f"{name}_{number}", "it has no answer")
                else:
                    yield _record(f"{name}_{number}", image, subject, asked, tag, views, choices)


def _stitched(entry: dict, images: Path, target: Path, draw_objects: bool) -> StitchedViews:
    """Return the views of a frame, and write them as one image unless that is there."""
    paths = {camera: images / entry["image_paths"][camera].split("samples/")[-1] for camera in CAMERAS}
    if target.exists() and not draw_objects:
        sizes = tuple(Image.open(path).size for path in paths.values())
        return StitchedViews(Image.open(target), CAMERAS, sizes, COLUMNS, VIEW_SIZE)
    views = stitch_views({camera: Image.open(path) for camera, path in paths.items()}, COLUMNS, VIEW_SIZE)
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = views.image
    if draw_objects:
        shown = draw_boxes(shown, _objects(entry, views))
    shown.save(target, quality=95)
    return views


def _objects(entry: dict, views: StitchedViews) -> list[Grounding]:
    """Return the boxes of a frame's key objects in thousandths of the stitched image."""
    found = []
    for tag, info in entry.get("key_object_infos", {}).items():
        match = TAG.fullmatch(tag)
        if match is None or "2d_bbox" not in info:
            continue
        left, top, right, bottom = info["2d_bbox"]
        corners = [views.place(match[2], x, y) for x, y in ((left, top), (right, bottom))]
        found.append(Grounding(match[1], (*corners[0], *corners[1])))
    return found


def to_stitched(text: str, views: StitchedViews) -> str:
    """Rewrite the tags of a text: pixels of their camera become thousandths of the stitched image.

    Raises:
        ValueError: A camera or a point that there is not.
    """

    def rewrite(match: re.Match) -> str:
        x, y = views.place(match[2], float(match[3]), float(match[4]))
        return f"<{match[1]},{match[2]},[{x}, {y}]>"

    return TAG.sub(rewrite, text)


def to_cameras(text: str, camera_size: tuple[int, int] = (1600, 900)) -> str:
    """Rewrite the tags of an answer back to pixels of their camera, one decimal, as the challenge takes them."""
    views = StitchedViews(Image.new("RGB", (1, 1)), CAMERAS, (camera_size,) * len(CAMERAS), COLUMNS, VIEW_SIZE)

    def rewrite(match: re.Match) -> str:
        if match[2] not in CAMERAS or int(match[3]) > 1000 or int(match[4]) > 1000:
            return match[0]  # an answer may say anything
        _, x, y = views.locate(int(match[3]), int(match[4]), match[2])
        return f"<{match[1]},{match[2]},{round(x, 1)},{round(y, 1)}>"

    return STITCHED_TAG.sub(rewrite, text)


def _choices(scenes: dict) -> dict[str, list[str]]:
    """Return every answer that there is to questions with options, by the kind of question."""
    found: dict[str, set[str]] = {"behavior": set(), "moving": set()}
    for content in scenes.values():
        for entry in content["key_frames"].values():
            questions = entry["QA"]
            found["behavior"].update(qa["A"] for qa in questions.get("behavior", ()) if qa.get("A"))
            moving = (qa for qa in questions.get("perception", ()) if qa["Q"].startswith(MOVING))
            found["moving"].update(qa["A"] for qa in moving if qa.get("A"))
    return {kind: sorted(answers) for kind, answers in found.items()}


def with_options(question: str, answer: str, choices: list[str], seed: str) -> tuple[str, str]:
    """Return a question with up to four lettered options, one of them right, and the letter of that.

    Wrong options are answers to other questions of the kind; which and where is decided by `seed`.
    """
    rng = random.Random(seed)
    others = [choice for choice in choices if choice != answer]
    options = rng.sample(others, min(3, len(others))) + [answer]
    rng.shuffle(options)
    letters = "ABCD"[: len(options)]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(letters, options))
    return f"{question} {OPTIONS} {listed}", letters[options.index(answer)]


def _questions(entry: dict, split: str) -> Iterator[tuple[str, dict, int | None]]:
    """Yield the questions of a frame: all of them, or those that are scored, each with its tag."""
    for subject in SUBJECTS:
        seen: set[str] = set()
        for asked in entry["QA"].get(subject, ()):
            if split != "eval":
                yield subject, asked, None
                continue
            kind, tag = _kind_and_tag(subject, asked, entry)
            if kind is not None and kind not in seen:
                seen.add(kind)
                yield subject, asked, tag


def _kind_and_tag(subject: str, asked: dict, entry: dict) -> tuple[str | None, int | None]:
    """Return which of the scored kinds a question is, and how it is scored, see SCORED_AS; the first of a kind counts."""
    question, answer = asked["Q"], asked.get("A", "").lower()
    objects = entry.get("key_object_infos", {})
    if subject == "perception":
        names = [info["Visual_description"].split(".")[0].lower() for info in objects.values()]
        if all(name in answer for name in names):
            return "importance", 2
        return ("moving", 0) if question.startswith(MOVING) else (None, None)
    if subject == "prediction":
        if objects and all(tag.lower() in answer for tag in objects):
            return "graph", 3
        return ("yes or no", 0) if "yes" in answer or "no" in answer else (None, None)
    if subject == "planning":
        return next(((phrase, 1) for phrase in ACTIONS if phrase.lower() in question.lower()), (None, None))
    return f"behavior {question}", 0


def _record(
    name: str, image: Path, subject: str, asked: dict, tag: int | None, views: StitchedViews, choices: dict
) -> Record | Refusal:
    question, answer = asked["Q"], asked.get("A") or ""
    if answer and OPTIONS.lower() not in question.lower():
        kind = "moving" if question.startswith(MOVING) else subject
        if len(choices.get(kind, ())) > 1:
            question, answer = with_options(question, answer, choices[kind], name)
    try:
        question, answer = to_stitched(question, views), to_stitched(answer, views)
    except ValueError as error:
        return Refusal(name, f"a tag cannot be placed: {error}")
    scoring = {"subject": subject, "metric": "exact_match"}
    if tag is not None:
        scoring |= {"tag": tag, "frame": name.rpartition("_")[0], "original": [asked["Q"], asked.get("A") or ""]}
        scoring["camera_size"] = views.sizes[0]
    return Record(name, (image,), ((with_image(question), answer or UNKNOWN),), scoring)
