"""Preprocessing: from an image file to normalised tiles, compared with the published code.

The baseline does what the published demo does: it opens the file for each grid, resizes with PIL to each grid and to a
thumbnail each time, and converts every tile to a tensor by itself.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor, MiniMonkeyImageProcessorPil
from minimonkey.scripts.benchmarking.measure import median_seconds, report
from minimonkey.scripts.repository import whole_number
from minimonkey.tiling import PRESETS, msac_grids


FORMATS = ("jpeg", "png", "webp")
TILE_SIZE = 448
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=whole_number(1), default=4000)
    parser.add_argument("--height", type=whole_number(1), default=3000)
    parser.add_argument("--formats", nargs="+", default=["jpeg"], choices=FORMATS)
    parser.add_argument("--preset", default="default", help="tile ranges")
    parser.add_argument("--batch", type=whole_number(1), default=1, help="pictures at a time")
    parser.add_argument("--repeats", type=whole_number(1), default=9)


def run(args: argparse.Namespace) -> None:
    report("preprocessing", rows(args), torch.device("cpu"), args)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw an image about as hard to decode as a photograph: smooth shapes, edges and a little noise."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    noise = np.random.RandomState(seed).randint(-6, 7, (height, width, 1))
    waves = [127 + 90 * np.sin(x / (90 + 30 * c)) * np.cos(y / (70 + 25 * c)) for c in range(3)]
    edges = 40 * ((x // 53 + y // 71) % 2)
    return Image.fromarray(np.clip(np.stack(waves, -1) + edges[..., None] + noise, 0, 255).astype(np.uint8))


def published_tiles(source, grids) -> torch.Tensor:
    """Return the tiles (T, 3, S, S), float32, of a file or of a decoded image, made the published way."""
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    parts = []
    for columns, rows in grids:
        image = source if isinstance(source, Image.Image) else Image.open(source).convert("RGB")
        resized = image.resize((TILE_SIZE * columns, TILE_SIZE * rows))
        tiles = [
            resized.crop((TILE_SIZE * x, TILE_SIZE * y, TILE_SIZE * (x + 1), TILE_SIZE * (y + 1)))
            for y in range(rows)
            for x in range(columns)
        ]
        parts.append([to_tensor(tile) for tile in [*tiles, image.resize((TILE_SIZE, TILE_SIZE))]])
    *detailed, thumbnail = parts[0]
    return torch.stack([*detailed, *parts[1][:-1], thumbnail])


def levels_apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two normalised images in levels of 255."""
    return float(((first - second).abs() * torch.tensor(STD).view(3, 1, 1) * 255).max())


def rows(args: argparse.Namespace) -> list[dict]:
    picture = photograph(args.width, args.height)
    processors = {
        "torchvision": MiniMonkeyImageProcessor(size={"height": TILE_SIZE, "width": TILE_SIZE}),
        "pil": MiniMonkeyImageProcessorPil(size={"height": TILE_SIZE, "width": TILE_SIZE}),
    }
    if args.preset not in PRESETS:
        raise ValueError(f"There is no preset {args.preset!r}; known are {', '.join(PRESETS)}.")
    grids = msac_grids(*picture.size, *PRESETS[args.preset], TILE_SIZE)
    results = []
    for name, source in sources(picture, args.formats):

        def ours(processor, source=source):
            return processor([source] * args.batch, preset=args.preset, return_tensors="pt")

        def baseline(source=source):
            return [published_tiles(source, grids) for _ in range(args.batch)]

        functions = {"published": baseline} | {key: partial(ours, value) for key, value in processors.items()}
        seconds = median_seconds(functions, torch.device("cpu"), args.repeats)
        expected = torch.cat(baseline())
        row = {"source": name, "tiles": len(expected) // args.batch}
        row |= {f"{way} ms": 1000 * value for way, value in seconds.items()}
        row |= {f"{way} speedup": seconds["published"] / seconds[way] for way in processors}
        for way, processor in processors.items():
            row[f"{way} levels"] = round(levels_apart(ours(processor)["pixel_values"], expected), 2)
        results.append(row)
    return results


def sources(picture: Image.Image, formats: list[str]) -> Iterator[tuple[str, Path | Image.Image]]:
    """Yield the image as a file of each format, and decoded."""
    with tempfile.TemporaryDirectory() as folder:
        for name in formats:
            path = Path(folder) / f"picture.{name}"
            picture.save(path, **({} if name == "png" else {"quality": 90}))
            yield name, path
    yield "decoded", picture
