"""Where the time goes from an image file to the first token, with and without scale compression, as stacked bars."""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor, load_image
from minimonkey.scripts.benchmarking.compression import Prompt
from minimonkey.scripts.benchmarking.measure import median_seconds, report
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model
from minimonkey.scripts.benchmarking.preprocessing import photograph
from minimonkey.scripts.precision import add_dtype_argument
from minimonkey.scripts.repository import add_device_argument, whole_number


COLOURS = {
    "decode": (86, 180, 233),
    "tiles": (0, 158, 115),
    "vision": (230, 159, 0),
    "compression": (204, 121, 167),
    "prefill": (0, 114, 178),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano"), help="dimensions")
    parser.add_argument("--width", type=whole_number(1), default=4000)
    parser.add_argument("--height", type=whole_number(1), default=3000)
    parser.add_argument("--preset", default="default", help="tile ranges")
    add_dtype_argument(parser)
    parser.add_argument("--layers", type=whole_number(1), default=None, help="fewer layers of the language model")
    parser.add_argument("--prepare", action="store_true", help="call prepare_for_cpu()")
    parser.add_argument("--repeats", type=whole_number(1), default=1)
    parser.add_argument("--picture", type=Path, default=None, help="PNG to write the bars to")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    results = rows(args, device)
    if args.picture:
        draw(results).save(args.picture)
    report("stages", results, device, args)


@torch.no_grad()
def rows(args: argparse.Namespace, device: torch.device) -> list[dict]:
    model = random_model(random_config(args.size, args.layers), device, getattr(torch, args.dtype))
    if args.prepare:
        model.prepare_for_cpu()
    size = model.config.tile_size
    processor = MiniMonkeyImageProcessor(size={"height": size, "width": size})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        photograph(args.width, args.height).save(path, quality=90)
        decoded = load_image(path)
        inputs = processor(decoded, preset=args.preset, return_tensors="pt")
        prompt = Prompt(model, "+".join(map(str, inputs["tile_counts"][0].tolist())), 0.5)
        pixel_values = inputs["pixel_values"].to(device, model.dtype)
        short = prompt.compressed()

        def read(embeddings):
            return model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)

        caches = {"plain": read(prompt.embeddings).past_key_values, "SCM": read(short).past_key_values}

        def next_token(name):
            caches[name].crop(-1)
            return model(input_ids=prompt.input_ids[:, :1], past_key_values=caches[name], use_cache=True)

        seconds = median_seconds(
            {
                "decode": lambda: load_image(path),
                "tiles": lambda: processor(decoded, preset=args.preset, return_tensors="pt"),
                "vision": lambda: model.encode_images(prompt.input_ids, pixel_values),
                "compression": prompt.kept_positions,
                "plain prefill": lambda: read(prompt.embeddings),
                "SCM prefill": lambda: read(short),
                "plain next": lambda: next_token("plain"),
                "SCM next": lambda: next_token("SCM"),
            },
            device,
            args.repeats,
        )
    results = []
    for way in ("plain", "SCM"):
        row = {"way": way, "tokens": (prompt.embeddings if way == "plain" else short).shape[1]}
        row |= {name: seconds[name] for name in ("decode", "tiles", "vision")}
        row["compression"] = seconds["compression"] if way == "SCM" else 0.0
        row |= {"prefill": seconds[f"{way} prefill"], "next token": seconds[f"{way} next"]}
        first = sum(row[name] for name in COLOURS)
        results.append({**row, "first token": first})
    return [{**row, "ratio": row["first token"] / results[0]["first token"]} for row in results]


def draw(results: list[dict], width: int = 900) -> Image.Image:
    """Draw stacked bars, one for each row, all on one scale."""
    font, bar, margin, left = ImageFont.load_default(18), 46, 26, 90
    picture = Image.new("RGB", (width, margin * 2 + (bar + margin) * len(results) + 40), "white")
    pen = ImageDraw.Draw(picture)
    scale = (width - left - 110) / max(row["first token"] for row in results)
    for number, row in enumerate(results):
        top, x = margin + number * (bar + margin), float(left)
        pen.text((margin, top + 12), row["way"], "black", font)
        for name, colour in COLOURS.items():
            pen.rectangle([x, top, x + row[name] * scale, top + bar], colour)
            x += row[name] * scale
        pen.text((x + 8, top + 12), f"{row['first token']:.3g} s", "black", font)
    x, y = left, picture.height - 44
    for name, colour in COLOURS.items():
        pen.rectangle([x, y, x + 16, y + 16], colour)
        pen.text((x + 22, y - 3), name, "black", font)
        x += 40 + int(font.getlength(name))
    return picture
