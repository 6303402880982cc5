"""Published data sets in their download layout, with two or three made-up records each."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image


CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
TAG = "<c1,CAM_BACK,800.0,450.0>"
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")


def image(path: Path, size: tuple[int, int] = (64, 48), colour: str = "white") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def dump(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def drivelm(root: Path) -> None:
    for camera, colour in zip(CAMERAS, COLOURS):
        image(root / "nuscenes" / "samples" / camera / "1.jpg", (160, 90), colour)
    tag = TAG.replace("800.0,450.0", "80.0,45.0")  # the cameras of this set have a tenth of nuScenes' pixels
    asked = {
        "perception": [
            {"Q": "What are the important objects?", "A": f"A brown SUV, {tag}, to the back."},
            {"Q": f"What is the moving status of object {tag}?", "A": "Going ahead."},
            {"Q": "What is the moving status of object <c9,CAM_BACK,900.0,45.0>?", "A": "Turn left."},
        ],
        "prediction": [
            {"Q": "What object should be noticed first?", "A": f"Firstly {tag}."},
            {"Q": f"Would {tag} be in the way?", "A": "Yes."},
        ],
        "planning": [{"Q": f"What actions could the ego vehicle take based on {tag}?", "A": "Keep going."}],
        "behavior": [{"Q": "Predict the behavior of the ego vehicle.", "A": "The ego vehicle is going straight."}],
    }
    paths = {camera: f"../nuscenes/samples/{camera}/1.jpg" for camera in CAMERAS}
    info = {tag: {"Visual_description": "Brown SUV.", "2d_bbox": [70.0, 40.0, 90.0, 50.0]}}
    other = json.loads(json.dumps(asked))
    other["behavior"][0]["A"] = "The ego vehicle is stopped."
    frames = {
        name: {"key_object_infos": info, "QA": questions, "image_paths": paths}
        for name, questions in (("frame1", asked), ("frame2", other))
    }
    dump(root / "v1_1_train_nus.json", {"scene": {"scene_description": "", "key_frames": frames}})


def bdd(root: Path) -> None:
    for index in range(3):
        for suffix in ("7", "8"):
            image(root / "BDD_X_imgs_select" / f"clip{suffix}_{index}.png", (90, 60), COLOURS[index])
    texts = ("<video>\nWhat is the car doing?", "The car stops.", "Why?", "The light is red.")
    control = ("Predict the speed and turning angle.", "Speed: 3.5, turning angle: 1.0")
    entries = [
        {"id": name, "image": f"{name}.mp4", "idx_list": indices, "conversations": talk(*texts, *control)}
        for name, indices in (("clip7", [0, 1, 2]), ("clip8", [0, 1]), ("clip9", [0]))
    ]
    for split in ("training", "testing"):
        dump(root / f"BDD_X_{split}_label.json", entries)


def rsvqa(root: Path, prefix: str, images: str) -> None:
    for number in (1, 2):
        image(root / images / f"{number}.tif")
    kinds = (
        ("presence", "Is there water?", "yes"),
        ("count", "How many roads are there?", "4"),
        ("comp", "More?", "no"),
    )
    questions = [
        {"id": i, "img_id": 1 + i % 2, "type": kind, "question": text, "answers_ids": [i + 10], "active": True}
        for i, (kind, text, _) in enumerate(kinds)
    ]
    questions += [{"id": 7, "active": False}, {**questions[0], "id": 8, "answers_ids": [99]}]
    answers = [{"id": i + 10, "answer": answer, "active": True} for i, (_, _, answer) in enumerate(kinds)]
    for split in ("train", "test"):
        dump(root / f"{prefix}_split_{split}_questions.json", {"questions": questions})
        dump(root / f"{prefix}_split_{split}_answers.json", {"answers": answers})


def dior_rsvg(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "Annotations").mkdir()
    for name in ("00001", "00002"):
        image(root / "JPEGImages" / f"{name}.jpg", (80, 80))
        objects = "".join(
            f"<object><name>ship</name><bndbox><xmin>{x}</xmin><ymin>8</ymin><xmax>{right}</xmax><ymax>40</ymax></bndbox>"
            f"<description>the ship {x}</description></object>"
            for x, right in ((0, 40), (16, 48), (90, 95))
        )
        size = "<size><width>80</width><height>80</height></size>"
        xml = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    for split in ("train", "test"):
        (root / f"{split}.txt").write_text("0\n2\n4\n6\n")


def geochat(root: Path) -> None:
    image(root / "images" / "final_images_llava" / "a.png")
    texts = (
        "<image>\n[grounding] Find the ship.",
        "<p>a ship</p> {<10><20><30><40>|<0>}<delim>{<10><20><30><40>|<90>}",
    )
    refer = ("[identify] What is {<0><0><50><100>|<0>}?", "water")
    entries = [{"id": "a", "image": "a.png", "conversations": talk(*texts)}]
    entries += [{"id": "b", "image": "a.png", "conversations": talk(*refer)}]
    entries += [{"id": "c", "image": "none.png", "conversations": talk(*refer)}]
    dump(root / "GeoChat_Instruct.json", entries)


def fit_rs(root: Path) -> None:
    image(root / "imgv2_split_512_100_vaild" / "a.png")
    entries = [{"id": 1, "image": "a.png", "conversations": talk("<image>\nWhich?", "bridge")}]
    dump(root / "fit_rs_vqa_100k.json", entries)


def scenes(root: Path) -> None:
    for label in ("Airport", "Beach"):
        for number in range(12):
            image(root / label / f"{label}_{number}.jpg")


def slake(root: Path) -> None:
    image(root / "imgs" / "xmlab1" / "source.jpg")
    entry = {"qid": 1, "img_name": "xmlab1/source.jpg", "question": "Is it a CT?", "answer": "Yes", "q_lang": "en"}
    entries = [{**entry, "answer_type": "CLOSED"}, {**entry, "qid": 2, "answer": "Left lung", "answer_type": "OPEN"}]
    entries += [{**entry, "qid": 3, "q_lang": "zh", "answer_type": "OPEN"}]
    for split in ("train", "test"):
        dump(root / f"{split}.json", entries)


def vqa_rad(root: Path) -> None:
    image(root / "VQA_RAD Image Folder" / "a.jpg")
    entry = {"qid": 1, "image_name": "a.jpg", "question": "Fracture?", "answer": "no", "answer_type": "CLOSED "}
    entries = [{**entry, "phrase_type": "freeform"}, {**entry, "qid": 2, "phrase_type": "test_freeform"}]
    dump(root / "VQA_RAD Dataset Public.json", entries)


def pmc_vqa(root: Path) -> None:
    image(root / "images" / "a.jpg")
    choices = {f"Choice {letter}": f" {letter}:choice {letter}" for letter in "ABCD"}
    row = {"Figure_path": "a.jpg", "Question": "Which?", "Answer": "choice B", **choices, "Answer_label": "B"}
    for split in ("train", "test"):
        table(root / f"{split}.csv", [row, {**row, "Answer_label": "E"}])


def pmc_oa(root: Path) -> None:
    image(root / "caption_T060_filtered_top4_sep_v0_subfigures" / "a.jpg")
    rows = [{"image": "a.jpg", "caption": "A scan."}, {"image": "a.jpg", "caption": ""}]
    (root / "pmc_oa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def quilt(root: Path) -> None:
    image(root / "images" / "a.jpg")
    table(root / "quilt_1M_lookup.csv", [{"caption": "Tissue.", "image_path": "a.jpg"}])


def llava(root: Path) -> None:
    for folder in ("gqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2", "coco/train2017"):
        image(root / folder / "1.jpg", (200, 100))
    image(root / "ocr_vqa" / "images" / "2.png")
    entries = [
        {
            "id": "a",
            "image": "coco/train2017/1.jpg",
            "conversations": talk("Where?\n<image>", "[0.25, 0.25, 0.5, 0.75]"),
        },
        {"id": "b", "image": "ocr_vqa/images/2.jpg", "conversations": talk("<image>\nWho?", "Me.", "And?", "You.")},
        {"id": "c", "conversations": talk("Hello", "Hi")},
        {"id": "d", "image": "coco/train2017/1.jpg", "conversations": talk("Where?", "[0.5, 0.01, 0.6, 0.1]")},
    ]
    dump(root / "llava_v1_5_mix665k.json", entries)


def playground(root: Path) -> None:
    from minimonkey.scripts.preparing.sets import PLAYGROUND

    for name, (images, annotation, _) in PLAYGROUND.items():
        image(root / images / "1.png")
        lines = [{"id": 0, "image": "1.png", "conversations": talk("<image>\nRead.", name)}]
        lines += [{"id": 1, "image": "gone.png", "conversations": talk("<image>\nRead.", name)}]
        (root / "opensource").mkdir(exist_ok=True)
        (root / "opensource" / annotation).write_text("".join(json.dumps(line) + "\n" for line in lines))


DOWNLOADS: dict[str, Callable[[Path], None]] = {
    "drivelm": drivelm,
    "bdd": bdd,
    "rsvqa-lr": lambda root: rsvqa(root, "LR", "Images_LR"),
    "rsvqa-hr": lambda root: rsvqa(root, "USGS", "Data"),
    "dior-rsvg": dior_rsvg,
    "geochat": geochat,
    "fit-rs": fit_rs,
    "scenes": scenes,
    "slake": slake,
    "vqa-rad": vqa_rad,
    "pmc-vqa": pmc_vqa,
    "pmc-oa": pmc_oa,
    "quilt": quilt,
    "llava-mix665k": llava,
    "playground": playground,
}
