"""Pictures of one tile: the options that make them, their files, and the colours that an image processor sees."""

import base64
import io

import numpy as np
from PIL import Image


RANGE_NAMES = ("min_tiles", "max_tiles", "adaptive_min_tiles", "adaptive_max_tiles")
ONE_TILE = dict.fromkeys(RANGE_NAMES, 1)
PUBLISHED = dict(zip(RANGE_NAMES, (4, 12, 3, 7)))
RAW = {"do_rescale": False, "do_normalize": False}
SIDE = 28


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def colours(processor, picture, side=SIDE, **options) -> np.ndarray:
    """A picture of one tile as the (S, S, 3) colours that the processor sees."""
    inputs = processor(picture, size=square(side), return_tensors="np", **ONE_TILE, **RAW, **options)
    return inputs["pixel_values"][0].transpose(1, 2, 0)


def colour(processor, picture, **options) -> tuple[int, ...]:
    """The colour of a picture that has only one."""
    seen = colours(processor, picture, **options).reshape(-1, 3)
    assert (seen == seen[0]).all()
    return tuple(seen[0].tolist())


def saved(picture, format, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def reopened(picture, format="PNG", **options) -> Image.Image:
    return Image.open(io.BytesIO(saved(picture, format, **options)))


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
