"""What happens to a document before a model sees it: a crooked photograph, uneven light, blur, noise, JPEG."""

import random

import numpy as np
from PIL import Image

from minimonkey.scripts.synthetic.canvas import Canvas, Document, Question
from minimonkey.scripts.synthetic.text_images import CharacterBox, degrade


def finish(
    canvas: Canvas,
    questions: list[Question],
    rng: random.Random,
    difficulty: float,
    text_size: int,
    is_flat: bool = False,
) -> Document:
    """Return the document on `canvas`, damaged as far as `difficulty` allows and text of `text_size` pixels survives.

    Args:
        is_flat: Leave every character where it is.
    """
    image, characters = canvas.image, canvas.characters
    if rng.random() < 0.4 * difficulty and not is_flat:
        image, characters = photograph(image, characters, rng, 0.03 + 0.04 * difficulty)
    if rng.random() < 0.4 * difficulty:
        image = light(image, rng)
    image = degrade(image, rng, difficulty, most_blur=min(1.2, text_size / 20))
    once = {question.text: question for question in questions}
    return Document(image, tuple(once.values()), tuple(characters))


def photograph(
    image: Image.Image, characters: list[CharacterBox], rng: random.Random, slant: float
) -> tuple[Image.Image, list[CharacterBox]]:
    """Show the image as a whole sheet seen at an angle: each corner moves inwards by up to `slant` of width and height."""
    width, height = image.size
    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    moved = [(abs(x - rng.uniform(0, slant) * width), abs(y - rng.uniform(0, slant) * height)) for x, y in corners]
    table = tuple(rng.randint(20, 120) for _ in range(3))
    return warp(image, characters, moved, (width, height), table)


def warp(
    image: Image.Image,
    characters: list[CharacterBox],
    corners: list[tuple[float, float]],
    size: tuple[int, int],
    fill: tuple[int, ...],
) -> tuple[Image.Image, list[CharacterBox]]:
    """Place the image with its corners (clockwise from the upper left) at `corners` of a canvas of `size`."""
    width, height = image.size
    forward = homography([(0, 0), (width, 0), (width, height), (0, height)], corners)
    inverse = np.linalg.inv(forward)
    coefficients = (inverse / inverse[2, 2]).ravel()[:8].tolist()
    seen = image.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC, fillcolor=fill)
    return seen, [CharacterBox(item.character, _moved_box(item.box, forward)) for item in characters]


def homography(source: list[tuple[float, float]], target: list[tuple[float, float]]) -> np.ndarray:
    """Return the projective map (3, 3) that takes four points to four points."""
    rows = []
    for (x, y), (u, v) in zip(source, target):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    solution = np.linalg.solve(np.array(rows, dtype=float), np.array(target, dtype=float).ravel())
    return np.append(solution, 1.0).reshape(3, 3)


def _moved_box(box: tuple[float, float, float, float], forward: np.ndarray) -> tuple[float, float, float, float]:
    """Return the upright box around a moved one."""
    x0, y0, x1, y1 = box
    x, y, scale = forward @ np.array([[x0, x1, x1, x0], [y0, y0, y1, y1], [1, 1, 1, 1]], dtype=float)
    x, y = x / scale, y / scale
    return tuple(map(float, (x.min(), y.min(), x.max(), y.max())))


def light(image: Image.Image, rng: random.Random) -> Image.Image:
    """Cast a shadow that grows in one direction."""
    direction = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-0.5 : 0.5 : image.height * 1j, -0.5 : 0.5 : image.width * 1j]
    along = x * np.cos(direction) + y * np.sin(direction)
    gain = 1 - rng.uniform(0.1, 0.4) * (along - along.min()) / (along.max() - along.min())
    return Image.fromarray((np.asarray(image) * gain[..., None]).astype(np.uint8))
