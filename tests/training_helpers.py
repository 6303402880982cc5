"""Small datasets, recipes and stand-ins for the tests of training."""

import json
import subprocess
import sys
import types
from pathlib import Path

import yaml
from conftest import ROOT
from PIL import Image, ImageDraw

from minimonkey.scripts.synthetic.canvas import Document, Question
from minimonkey.scripts.synthetic.text_images import CharacterBox


ONE_TILE = [[1, 1, 1, 1]]


def draw(path: Path, word: str, size: tuple[int, int] = (112, 112), **options) -> str:
    """Write a picture of a word; its file name."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((10, 40), word, fill="black")
    image.save(path, **options)
    return path.name


def line(question: str, answer: str, image=None, *more: str) -> dict:
    """A line of a JSONL file; `more` are further questions and answers."""
    values = (question, answer, *more)
    messages = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": messages} if image is None else {"image": image, "conversations": messages}


def write_lines(folder: Path, lines: list[dict], name: str = "lines.jsonl") -> str:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return name


def write_words(folder: Path, count: int = 6, size: tuple[int, int] = (112, 112)) -> dict:
    """Pictures of words with their lines; a meta JSON's content. Nano cuts no picture under 150 px into tiles."""
    words = [f"word{i}" * (1 + i % 3) for i in range(count)]
    lines = [line("<image>\nRead.", word, draw(folder / f"{i}.png", word, size)) for i, word in enumerate(words)]
    return {"words": {"root": str(folder), "annotation": str(folder / write_lines(folder, lines))}}


def write_recipe(folder: Path, **values) -> Path:
    """A recipe of a few quick steps on words, beside them."""
    defaults = {
        "model": str(ROOT),
        "output_dir": str(folder / "out"),
        "depth": 1,
        "tile_ranges": ONE_TILE,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "max_steps": 1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
    }
    recipe = folder / "recipe.yaml"
    values = {**defaults, **values}
    if "data" not in values:
        values["data"] = write_words(folder)
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def command(recipe: Path, *options) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "finetune.py"), str(recipe), *map(str, options)]


def finetune(recipe: Path, *options) -> subprocess.CompletedProcess:
    """The real command."""
    return subprocess.run(command(recipe, *options), cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def stand_in_documents(size: tuple[int, int] = (120, 100)) -> types.ModuleType:
    """A module like synthetic.documents, without fonts: answers tell the arguments; every third document is long."""

    def document(kind: str, index: int, seed: int, split: str = "training", difficulty: float = 1.0):
        if split not in ("training", "held_out"):
            raise ValueError(f"no split {split}")
        text = f"{kind} {index} {seed} {split} {difficulty:.2f}" + " long" * (100 if index % 3 == 2 else 0)
        characters = tuple(CharacterBox(c, (10 * i, 0, 10 * i + 10, 20)) for i, c in enumerate(text[:4]))
        return Document(Image.new("RGB", size), (Question("Read.", text),) * 2, characters)

    module = types.ModuleType("synthetic.documents")
    module.KINDS, module.document = {"word": None, "page": None}, document
    return module
