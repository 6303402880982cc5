"""BDD-X as DriveGPT4 wrote it: clips of a driving car, what it does and why, and its speed and course as answers.

Layout: BDD_X_training_label.json (and BDD_X_testing_label.json), lists of {"id", "image", "idx_list", "conversations"}, with
the frames in BDD_X_imgs_select/ or BDD_X_imgs/ as NAME_INDEX.png or .jpg; or the clips themselves in videos/, from which FRAMES
frames are taken. A clip becomes "Frame-1: <image>\\nFrame-2: <image> ..." with one tile a frame, as InternVL trains videos.

Source: DriveGPT4 (arXiv 2310.01412) and its data; Mini-InternVL (arXiv 2410.16261), section 3.3.
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from minimonkey.conversation import IMAGE_PLACEHOLDER
from minimonkey.scripts.preparing.layouts import find, read_json, require
from minimonkey.scripts.preparing.records import Record, Refusal
from minimonkey.video_frames import load_frames


FRAMES = 8
FOLDERS = ("BDD_X_imgs_select", "BDD_X_imgs")
SUFFIXES = (".png", ".jpg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv")
KINDS = (("control", ("speed", "control signal", "turning angle")), ("justification", ("why", "reason")))


def files(root: Path, split: str) -> dict[str, Path]:
    """Return where labels and frames are."""
    label = "BDD_X_testing_label.json" if split == "test" else "BDD_X_training_label.json"
    return require(root, "BDD-X", {"labels": label, "frames": (*FOLDERS, "videos")})


def read(root: Path, split: str, out: Path) -> Iterator[Record | Refusal]:
    """Yield a conversation for each clip, or of the split "test" an item for each question."""
    found = files(root, split)
    for number, entry in enumerate(read_json(found["labels"])):
        name = f"{number}-{entry.get('id', '')}"
        try:
            frames = _frames(entry, found["frames"], out)
            turns = _turns(entry, len(frames))
        except (ValueError, KeyError, TypeError) as error:
            yield Refusal(name, str(error))
            continue
        if split != "test":
            yield Record(name, tuple(frames), turns)
            continue
        for turn, (question, answer) in enumerate(turns):
            asked = question if turn == 0 else with_frames(question, len(frames))
            scoring = {"kind": kind_of(question), "metric": "exact_match"}
            yield Record(f"{name}-{turn}", tuple(frames), ((asked, answer),), scoring)


def _turns(entry: dict, frames: int) -> tuple[tuple[str, str], ...]:
    texts = [message["value"].replace("<video>", "").strip() for message in entry["conversations"]]
    if len(texts) < 2 or len(texts) % 2:
        raise ValueError(f"a conversation has questions and answers in turn, got {len(texts)} messages")
    texts[0] = with_frames(texts[0], frames)
    return tuple(zip(texts[0::2], texts[1::2]))


def with_frames(question: str, frames: int) -> str:
    """Return a question about a clip, with a numbered placeholder for each frame before it."""
    return "".join(f"Frame-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, frames + 1)) + question


def kind_of(question: str) -> str:
    """Return what a question asks for: control signals, a justification, or a description."""
    question = question.lower()
    return next((kind for kind, words in KINDS if any(word in question for word in words)), "description")


def _frames(entry: dict, folder: Path, out: Path) -> list[Path]:
    """Return the frames of a clip; those of a video are written once."""
    stem = Path(entry["image"] if "image" in entry else entry["video"]).stem
    if folder.name in FOLDERS:
        places = [[folder / f"{stem}_{index}{suffix}" for suffix in SUFFIXES] for index in entry["idx_list"]]
        return [next((path for path in paths if path.is_file()), paths[0]) for paths in places]
    video = find(folder, *(f"{stem}{suffix}" for suffix in VIDEO_SUFFIXES))
    if video is None:
        raise ValueError(f"there is no video {stem} in {folder}")
    targets = [out / "frames" / f"{stem}_{number}.jpg" for number in range(FRAMES)]
    if not all(path.is_file() for path in targets):
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        shown = load_frames(str(video), num_frames=FRAMES)
        targets = targets[: len(shown)]  # a very short clip has fewer
        for frame, path in zip(shown, targets):
            (frame if isinstance(frame, Image.Image) else Image.fromarray(frame)).save(path, quality=95)
    return targets
