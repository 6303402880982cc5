"""See what multi-scale cropping and scale compression do to an image.

    python scripts/visualize.py assets/example.png "Read the text." --out seen.png
    python scripts/visualize.py page.png "What is the total?" --model MiniMonkey-2B --preset docvqa --keep-ratio 0.25

Writes a PNG: the seams of the detailed grid in blue, those of the adaptive grid in dashed orange, and of the detailed tokens
those that scale compression keeps lit, the others dark. Prints how many tokens the language model reads before and after.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw

from minimonkey.image_processing_minimonkey import load_image
from minimonkey.scripts.precision import add_dtype_argument, choose_dtype
from minimonkey.scripts.repository import (
    add_device_argument,
    add_model_arguments,
    add_tile_arguments,
    load_model,
    load_processor,
    prepared,
    reports_errors,
    tile_options,
)


DETAILED_COLOUR, ADAPTIVE_COLOUR = (40, 110, 255), (255, 140, 0)
DARKNESS = 0.3  # brightness of a token that is left out
SHORT_SIDE = 448  # smaller images are enlarged to this, so that seams are thin compared with letters

Grid = tuple[int, int]


def draw(picture: Image.Image, detailed: Grid, adaptive: Grid, lit: list[list[bool]]) -> Image.Image:
    """Draw the image with seams and tokens.

    Args:
        detailed, adaptive: (columns, rows) of the grids.
        lit: Which detailed tokens are kept, by rows over the whole image.
    """
    scale = max(1.0, SHORT_SIDE / min(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.convert("RGB").resize(size)
    brightness = Image.new("L", (len(lit[0]), len(lit)))
    brightness.putdata([255 if kept else round(255 * DARKNESS) for row in lit for kept in row])
    dark = Image.new("RGB", size)
    drawn = Image.composite(picture, dark, brightness.resize(size, Image.Resampling.NEAREST))
    pen, width = ImageDraw.Draw(drawn), max(2, min(size) // 200)
    for (columns, rows), colour, dashes in ((detailed, DETAILED_COLOUR, 1), (adaptive, ADAPTIVE_COLOUR, 20)):
        for column in range(1, columns):
            x = size[0] * column // columns
            for start, end in dash(size[1], dashes):
                pen.line([(x, start), (x, end)], colour, width)
        for row in range(1, rows):
            y = size[1] * row // rows
            for start, end in dash(size[0], dashes):
                pen.line([(start, y), (end, y)], colour, width)
    return drawn


def dash(length: int, dashes: int) -> list[tuple[int, int]]:
    """Return where the dashes of a line start and end; a seam that both grids have shows both colours."""
    ends = [length * end // (2 * dashes - 1) for end in range(2 * dashes)]
    return list(zip(ends[::2], ends[1::2]))


def lit_tokens(
    kept: torch.Tensor, first: int, detailed: Grid, tokens_per_tile: int, transposed: bool
) -> list[list[bool]]:
    """Return which detailed tokens of an image are kept, put in the places of the image that they stand for.

    Args:
        kept: Kept positions of the prompt.
        first: Position of the first detailed token.
        transposed: Whether tokens go down the columns of a tile (pixel shuffle v1).
    """
    columns, rows = detailed
    side = round(tokens_per_tile**0.5)
    is_kept = torch.zeros(columns * rows * tokens_per_tile, dtype=torch.bool)
    inside = kept[(kept >= first) & (kept < first + len(is_kept))]
    is_kept[inside - first] = True
    tiles = is_kept.view(rows, columns, side, side)
    tiles = tiles.transpose(2, 3) if transposed else tiles
    return tiles.transpose(1, 2).reshape(rows * side, columns * side).tolist()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="path or URL")
    parser.add_argument("question")
    parser.add_argument("--out", type=Path, default=Path("compressed.png"), help="PNG to write (compressed.png)")
    add_model_arguments(parser)
    add_device_argument(parser)
    add_dtype_argument(parser)
    add_tile_arguments(parser, preset="default")
    parser.add_argument("--keep-ratio", type=float, default=None, help="default: the model's")
    parser.add_argument("--layer", type=int, default=None, help="default: the model's")
    parser.add_argument("--queries", choices=("all", "visual"), default=None, help="default: the model's")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    if not args.out.parent.is_dir():
        raise ValueError(f"There is no folder {args.out.parent} to write {args.out.name} into.")
    processor = load_processor(args.model)
    picture = load_image(args.image)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": args.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images_kwargs": tile_options(args)},
    )
    columns, rows, *adaptive = inputs["tile_grids"][0].tolist()
    if columns * rows == 1:
        raise ValueError(
            "This picture gives no detailed tiles, so there is nothing to compress; raise --max-tiles or change --preset."
        )
    dtype = choose_dtype(args.dtype, args.device)
    model = prepared(load_model(args.model, subfolder=args.subfolder, dtype=dtype).to(args.device))
    inputs = inputs.to(args.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    (kept,) = model.kept_positions(
        **inputs, scm_keep_ratio=args.keep_ratio, scm_layer=args.layer, scm_queries=args.queries
    )
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    tokens_per_tile = model.tokens_per_tile(inputs["pixel_values"])
    transposed = model.config.pixel_shuffle_version == "v1"
    lit = lit_tokens(kept, first, (columns, rows), tokens_per_tile, transposed)
    draw(picture, (columns, rows), tuple(adaptive), lit).save(args.out, format="PNG")
    counts = inputs["tile_counts"][0].tolist()
    print(
        "tiles: {} detailed ({}x{}), {} adaptive ({}x{}), {} thumbnail".format(
            counts[0], columns, rows, counts[1], *adaptive, counts[2]
        )
    )
    before, detailed = inputs["input_ids"].shape[1], counts[0] * tokens_per_tile
    print(f"tokens of the prompt: {before} before, {len(kept)} after")
    print(f"tokens of the detailed tiles: {detailed} before, {sum(map(sum, lit))} after")
    print(f"written: {args.out}")


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run(parse_arguments(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
