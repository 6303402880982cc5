"""Evaluation clients written for the published Mini-Monkey: their sequences of calls on a copy of this repository.

Both cut tiles of 448 px themselves. *lmms-eval* puts the adaptive tiles first and passes everything by position, with a
history to return; *VLMEvalKit* puts the detailed tiles first and passes everything by keyword, with one number of tiles
for each picture. The model is Nano with patches of 32 px instead of 8, each averaged to 8 first, so that it reads their
tiles.

With lmms-eval (0.7.3) in an environment of its own, its command line runs too:

    MINIMONKEY_LMMS_EVAL=path/to/its/python pytest -m slow tests/test_clients.py
"""

import csv
import json
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import normalize, to_tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from minimonkey.tiling import msac_grids


MODEL_FILES = ("*.py", "*.json", "*.jinja", "*.safetensors")
PATCHES = "model.vision_tower.embeddings.patch_embeddings.projection.weight"
TILE, WIDER = 448, 4
SQUARE = {"height": TILE, "width": TILE}
LMMS_EVAL_RANGES = (4, 12, 3, 7)
VLMEVALKIT_RANGES = {"default": (4, 12, 3, 7), "OCRBench": (9, 24, 5, 8), "MME": (5, 11, 2, 6)}
VLMEVALKIT_SETTINGS = {"do_sample": False, "max_new_tokens": 16, "top_p": None, "num_beams": 1}
QUESTION = "Read the text."
# Capitals of these words differ from their small letters in more than height.
SIZES = {"monkey": (112, 112), "garden": (896, 448), "market": (640, 480)}

TASK = """
task: words
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {pictures}
test_split: train
output_type: generate_until
doc_to_visual: !function words.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
process_results: !function words.process_results
metric_list: [{{metric: read, aggregation: mean, higher_is_better: true}}]
"""

TASK_FUNCTIONS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    return {"read": float(doc["answer"] == results[0])}
"""


def put(path: Path, **settings) -> None:
    """Change settings of a JSON file; those in a dict are changed one by one."""
    content = json.loads(path.read_text())
    for name, value in settings.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clean copy of the repository's model files; its model sees a tile as Nano sees it in a quarter of the size."""
    copy = tmp_path_factory.mktemp("clients") / "nano"
    copy.mkdir()
    for path in (path for pattern in MODEL_FILES for path in ROOT.glob(pattern)):
        shutil.copy(path, copy)
    weights = load_file(copy / "model.safetensors")
    wide = weights[PATCHES].repeat_interleave(WIDER, 2).repeat_interleave(WIDER, 3) / WIDER**2
    save_file({**weights, PATCHES: wide}, copy / "model.safetensors", metadata={"format": "pt"})
    patch = [8 * WIDER] * 2
    put(copy / "config.json", tile_size=TILE, vision_config={"image_size": [TILE, TILE], "patch_size": patch})
    # One tile unless a client asks for more, and no bound on enlarging: clients cut as was published.
    cutting = range_options((1, 1, 1, 1)) | {"max_scale": None}
    put(copy / "processor_config.json", image_processor={"size": SQUARE, **cutting})
    return copy


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Words on pictures of several sizes."""
    paths = {word: tmp_path_factory.mktemp("pictures") / f"{word}.png" for word in SIZES}
    for word, (width, height) in SIZES.items():
        image = Image.new("RGB", (width, height), "white")
        font = ImageFont.load_default(size=max(20, width * 24 // 112))
        ImageDraw.Draw(image).text((width * 0.1, height * 0.4), word, font=font, fill="black")
        image.save(paths[word])
    return paths


@pytest.fixture(scope="module")
def model(folder):
    """As VLMEvalKit loads it."""
    return AutoModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, trust_remote_code=True, load_in_8bit=False, device_map="cpu"
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    """As VLMEvalKit loads it."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)


@pytest.fixture(scope="module")
def processor(folder):
    """Our own way to the same tiles, bit by bit."""
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")


@pytest.fixture
def sent(model, monkeypatch):
    """The arguments of the last `generate`, which still runs."""
    last, generate = {}, model.generate

    def record(**options):
        last.clear()
        last.update(options)
        return generate(**options)

    monkeypatch.setattr(model, "generate", record)
    return last


def grid_tiles(image: Image.Image, columns: int, rows: int) -> list[torch.Tensor]:
    """The tiles (3, 448, 448) of one grid, row by row, normalised as for ImageNet."""
    resized = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    corners = [(column * TILE, row * TILE) for row in range(rows) for column in range(columns)]
    tiles = [to_tensor(resized.crop((x, y, x + TILE, y + TILE))) for x, y in corners]
    return [normalize(tile, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) for tile in tiles]


@lru_cache
def cut(path: Path, ranges: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Detailed tiles, adaptive tiles, the thumbnail and the detailed grid, cut as the clients do."""
    image = Image.open(path).convert("RGB")
    detailed, adaptive = msac_grids(*image.size, *ranges)
    layers = [torch.stack(grid_tiles(image, *grid)).bfloat16() for grid in (detailed, adaptive, (1, 1))]
    return *layers, detailed


def detailed_first(path: Path, ranges: tuple[int, ...]) -> torch.Tensor:
    return torch.cat(cut(path, ranges)[:3])


def range_options(ranges: tuple[int, ...]) -> dict:
    names = ("min_tiles", "max_tiles", "adaptive_min_tiles", "adaptive_max_tiles")
    return dict(zip(names, ranges))


def last_turn(sent, tokenizer) -> str:
    """What follows the system message in the prompt that was sent, image tokens shortened."""
    text = tokenizer.decode(sent["input_ids"][0]).replace("<IMG_CONTEXT>", "")
    return text.partition("<|im_end|>")[2]


def turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"


def tokens_of_pictures(sent, tokenizer) -> list[int]:
    """How many image tokens stand between each `<img>` and `</img>`."""
    first, last = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    ids = sent["input_ids"][0].tolist()
    starts, ends = ([i for i, token in enumerate(ids) if token == wanted] for wanted in (first, last))
    return [end - start - 1 for start, end in zip(starts, ends)]


def test_model_loads_as_the_clients_load_it(model, folder):
    assert model.dtype == torch.bfloat16
    assert model.config.vision_config.image_size in (TILE, [TILE, TILE], (TILE, TILE))
    lmms_eval = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16, device_map="cpu")
    lmms_eval.eval()
    lmms_eval.tie_weights()
    assert all(torch.equal(tensor, lmms_eval.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_tokenizers_of_both_clients_agree(tokenizer, folder):
    plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = plain.encode(QUESTION, add_special_tokens=False)
    assert ids == tokenizer.encode(QUESTION, add_special_tokens=False)
    assert plain.decode(ids) == QUESTION
    assert plain.decode(plain.eos_token_id) == plain.eos_token


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("monkey", {"max_new_tokens": 16, "do_sample": False, "temperature": 0, "top_p": 1.0}),
        ("garden", {"max_new_tokens": 1024, "temperature": 0, "top_p": None}),
        ("market", {"max_new_tokens": 16, "do_sample": True, "temperature": 0.2, "top_p": 0.9}),
    ],
)
def test_lmms_eval(model, tokenizer, pictures, sent, word, settings):
    """Adaptive tiles, detailed tiles, thumbnail; the settings of a task, and its own where a task has none."""
    detailed, adaptive, thumbnail, grid = cut(pictures[word], LMMS_EVAL_RANGES)
    tiles = torch.cat([adaptive, detailed, thumbnail]).to("cpu").to(torch.bfloat16)
    settings = {**settings, "num_beams": 1}
    before = dict(settings)
    answer, history = model.chat(tokenizer, tiles, grid, QUESTION, settings, history=None, return_history=True)
    assert answer == word
    assert history == [(f"<image>\n{QUESTION}", word)]
    assert settings == before
    assert torch.equal(sent["pixel_values"], tiles)
    assert last_turn(sent, tokenizer) == turn(f"<img></img>\n{QUESTION}")
    assert tokens_of_pictures(sent, tokenizer) == [49 * len(tiles)]


def ask_as_vlmevalkit(model, tokenizer, tiles: list[torch.Tensor], question: str, settings: dict) -> str:
    """Its call of `chat`; `tiles` are those of each picture."""
    return model.chat(
        tokenizer,
        pixel_values=torch.cat(tiles) if tiles else None,
        target_aspect_ratio=(1, 1),
        num_patches_list=[part.size(0) for part in tiles],
        question=question,
        generation_config=settings,
        verbose=False,
    )


@pytest.mark.parametrize("dataset", VLMEVALKIT_RANGES)
def test_vlmevalkit_one_picture(model, tokenizer, processor, pictures, sent, dataset):
    """The tiles and the answer are those of our own processor."""
    ranges, path, settings = VLMEVALKIT_RANGES[dataset], pictures["garden"], dict(VLMEVALKIT_SETTINGS)
    tiles = detailed_first(path, ranges)
    with torch.no_grad():
        answer = ask_as_vlmevalkit(model, tokenizer, [tiles], f"<image>\n{QUESTION}", settings)
    assert answer.lower() == "garden"
    assert settings == VLMEVALKIT_SETTINGS
    assert torch.equal(sent["pixel_values"], tiles)
    ids = sent["input_ids"]
    ours = model.chat(processor, path, QUESTION, images_kwargs=range_options(ranges), **VLMEVALKIT_SETTINGS)
    assert ours == answer
    assert torch.equal(sent["input_ids"], ids)
    assert torch.equal(sent["pixel_values"], tiles)


@pytest.mark.parametrize(
    "prompt",
    ["<image-1>: <image> <image-2>: <image>\n<image-1><image-2>Which?", "Frame1: <image> Frame2: <image>\nWhich?"],
)
def test_vlmevalkit_several_pictures(model, tokenizer, processor, pictures, sent, prompt):
    """An interleaved message, and the frames of a video."""
    ranges, paths = VLMEVALKIT_RANGES["default"], [pictures["monkey"], pictures["garden"]]
    tiles = [detailed_first(path, ranges) for path in paths]
    answer = ask_as_vlmevalkit(model, tokenizer, tiles, prompt, dict(VLMEVALKIT_SETTINGS))
    assert last_turn(sent, tokenizer) == turn(prompt.replace("<image>", "<img></img>"))
    assert tokens_of_pictures(sent, tokenizer) == [49 * len(part) for part in tiles]
    options = {"images_kwargs": range_options(ranges), **VLMEVALKIT_SETTINGS}
    assert answer == model.chat(processor, paths, prompt, **options)


def test_vlmevalkit_without_a_picture(model, tokenizer, sent):
    answer = ask_as_vlmevalkit(model, tokenizer, [], "\nHello", dict(VLMEVALKIT_SETTINGS))
    assert isinstance(answer, str)
    assert last_turn(sent, tokenizer) == turn("\nHello")


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "num_beams": 2}])
def test_vlmevalkit_with_settings_of_the_caller(model, tokenizer, pictures, settings):
    """Keyword arguments of its class become the settings; without any, an answer still ends by itself."""
    tiles = detailed_first(pictures["monkey"], VLMEVALKIT_RANGES["default"])
    answer = ask_as_vlmevalkit(model, tokenizer, [tiles], f"<image>\n{QUESTION}", settings)
    assert answer.lower() == "monkey"


@pytest.mark.parametrize(
    ("words", "question", "history"),
    [
        (["monkey"], "<image>\nRead Image-1.", None),
        (["monkey", "garden"], "<image>\nAnd this?", [("<image>\nRead.", "monkey")]),
        (["monkey", "garden"], "And Image-2?", [("<image>\n<image>\nRead Image-1.", "monkey")]),
        (["monkey", "garden"], "And?", [("<image>\nRead.", "monkey"), ("Sure?", "Yes"), ("<image>\nThis?", "garden")]),
    ],
)
def test_vlmevalkit_conversation(model, tokenizer, processor, pictures, sent, words, question, history):
    """All pictures of the conversation, the grid of the last, its history returned longer and not changed in place."""
    ranges, paths = VLMEVALKIT_RANGES["default"], [pictures[word] for word in words]
    tiles = [detailed_first(path, ranges) for path in paths]
    before = None if history is None else list(history)
    answer, longer = model.chat(
        tokenizer,
        pixel_values=torch.cat(tiles),
        target_aspect_ratio=cut(paths[-1], ranges)[3],
        num_patches_list=[part.size(0) for part in tiles],
        question=question,
        generation_config=dict(VLMEVALKIT_SETTINGS),
        history=history,
        return_history=True,
    )
    assert history == before
    assert longer == [*(before or []), (question, answer)]
    said = "".join(f"{turn(asked)}{replied}<|im_end|>" for asked, replied in before or []) + turn(question)
    assert last_turn(sent, tokenizer) == said.replace("<image>", "<img></img>")
    assert tokens_of_pictures(sent, tokenizer) == [49 * len(part) for part in tiles]
    options = {"images_kwargs": range_options(ranges), **VLMEVALKIT_SETTINGS}
    assert answer == model.chat(processor, paths, question, history=history, **options)


def lmms_eval_python() -> str:
    """The Python that has lmms-eval; the test is skipped where there is none."""
    python = os.environ.get("MINIMONKEY_LMMS_EVAL")
    if not python:
        pytest.skip("MINIMONKEY_LMMS_EVAL names no Python with lmms-eval")
    found = subprocess.run([python, "-c", "import lmms_eval.models.simple.minimonkey"], capture_output=True, text=True)
    return python if found.returncode == 0 else pytest.skip(f"{python} cannot import lmms-eval: {found.stderr[-200:]}")


@pytest.mark.slow
def test_lmms_eval_itself(folder, pictures, tmp_path):
    """Its own command line, not changed, on three local pictures; it logs an error in a call and goes on."""
    python = lmms_eval_python()
    data, tasks, out = (tmp_path / name for name in ("data", "tasks", "out"))
    data.mkdir()
    tasks.mkdir()
    for path in pictures.values():
        shutil.copy(path, data)
    with (data / "metadata.csv").open("w", newline="") as file:
        rows = [(path.name, QUESTION, word) for word, path in pictures.items()]
        csv.writer(file).writerows([("file_name", "question", "answer"), *rows])
    (tasks / "words.yaml").write_text(TASK.format(pictures=json.dumps(str(data))))
    (tasks / "words.py").write_text(TASK_FUNCTIONS)
    arguments = ["--model", "minimonkey", "--model_args", f"pretrained={folder},device=cpu", "--tasks", "words"]
    outputs = ["--include_path", tasks, "--batch_size", "1", "--log_samples", "--output_path", out]
    done = subprocess.run(
        [python, "-m", "lmms_eval", *arguments, *map(str, outputs)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0 and "in generating" not in log, log
    (samples,) = out.rglob("*samples_words.jsonl")
    answers = {
        sample["target"]: sample["filtered_resps"] for sample in map(json.loads, samples.read_text().splitlines())
    }
    assert answers == {word: word for word in pictures}
