"""Several cameras of one scene as one image, and points of it back in their cameras.

    stitched = stitch_views({"CAM_FRONT_LEFT": left, "CAM_FRONT": front, "CAM_FRONT_RIGHT": right})
    inputs = processor(stitched.image, "<image>\\nWhat is ahead?", preset="multi_view")
    stitched.locate(512, 480)  # ("CAM_FRONT", 857.6, 432.0): pixels of that camera's own image

Every camera fills two whole tiles of 448 pixels, so no tile shows two cameras: six in three columns are 6 x 2 tiles.
The preset cuts that grid alone; adaptive tiles would mix cameras.

Deals with images and points, not with questions or tags.

Source: DriveLM in Mini-InternVL (arXiv 2410.16261), the published stitching and evaluation code. The captions differ:
they are in Pillow's own font instead of DejaVu Sans Bold, which is not everywhere; size, colour and place are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .image_decoding import resize_image, to_rgb


SCALE = 1000
"""The right and lower edge of an image in the coordinates of questions and answers."""

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
"""Those of nuScenes, in the order in which DriveLM stitches them."""

CAPTION_COLOUR = (255, 0, 255)
CAPTION_SIZE = 50 / 448  # of the height of a view

Size = tuple[int, int]
"""(width, height) in pixels"""


@dataclass(frozen=True)
class StitchedViews:
    """One image of several cameras, row by row, and what it takes to find a point again.

    Attributes:
        image: The stitched image, RGB; cells without a camera are black.
        names: The cameras in order.
        sizes: The size of each camera's own upright image.
        columns: Cameras side by side.
        view_size: The size of each camera in `image`.
    """

    image: Image.Image
    names: tuple[str, ...]
    sizes: tuple[Size, ...]
    columns: int
    view_size: Size

    def locate(self, x: float, y: float, name: str | None = None) -> tuple[str, float, float]:
        """Find the camera at a point of the stitched image, and the point in that camera's own image.

        Args:
            x, y: 0 to 1000 of the stitched image.
            name: The camera, where it is known, as in DriveLM's tags: integers next to a seam may fall beyond it.

        Returns:
            The camera's name, and x and y in pixels of its own image, clamped to it and not rounded.

        Raises:
            ValueError: A point outside the image or in a cell without a camera, or an unknown camera.
        """
        if not (0 <= x <= SCALE and 0 <= y <= SCALE):
            raise ValueError(f"A point of the stitched picture has x and y from 0 to {SCALE}, got ({x}, {y}).")
        across, down = x / SCALE * self.columns, y / SCALE * self._rows  # in views
        index = self._index_at(across, down) if name is None else self._index(name)
        row, column = divmod(index, self.columns)
        width, height = self.sizes[index]
        x_px, y_px = (across - column) * width, (down - row) * height
        return self.names[index], float(min(max(x_px, 0), width)), float(min(max(y_px, 0), height))

    def place(self, name: str, x_px: float, y_px: float) -> tuple[int, int]:
        """Convert a point of a camera's own image, in pixels, to integers of 0 to 1000 of the stitched image.

        Raises:
            ValueError: An unknown camera, or a point outside its image.
        """
        index = self._index(name)
        row, column = divmod(index, self.columns)
        width, height = self.sizes[index]
        if not (0 <= x_px <= width and 0 <= y_px <= height):
            raise ValueError(f"({x_px}, {y_px}) lies outside the picture of {name}, {width} x {height} pixels.")
        return (
            round((column + x_px / width) / self.columns * SCALE),
            round((row + y_px / height) / self._rows * SCALE),
        )

    @property
    def _rows(self) -> int:
        return -(-len(self.names) // self.columns)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"There is no camera {name!r}; there are {', '.join(self.names)}.")
        return self.names.index(name)

    def _index_at(self, across: float, down: float) -> int:
        index = min(int(down), self._rows - 1) * self.columns + min(int(across), self.columns - 1)
        if index >= len(self.names):
            raise ValueError(
                f"There is no camera at column {int(across)}, row {int(down)} (from 0) of the stitched picture."
            )
        return index


def stitch_views(
    views: Mapping[str, Image.Image],
    columns: int = 3,
    view_size: Size = (896, 448),
    captions: bool = True,
) -> StitchedViews:
    """Put the images of several cameras side by side, each resized to the same size (its proportions may change).

    Args:
        views: Images by camera name, in the order in which they are put, row by row; they become upright RGB.
            nuScenes' order is `CAMERAS`.
        columns: Cameras side by side; no more than there are.
        view_size: (width, height) of each in pixels; whole tiles (448) keep cameras apart.
        captions: Write each camera's name in its upper left corner.

    Raises:
        ValueError: No views, something that is not a PIL image, or sizes below 1.
    """
    _check_views(views, columns, view_size)
    columns = min(columns, len(views))
    images = [to_rgb(view) for view in views.values()]
    width, height = view_size
    canvas = Image.new("RGB", (columns * width, -(-len(views) // columns) * height))
    font = ImageFont.load_default(size=max(1, round(CAPTION_SIZE * height))) if captions else None
    for i, (name, image) in enumerate(zip(views, images)):
        view = resize_image(image, width, height, Image.Resampling.BICUBIC)
        if captions:
            ImageDraw.Draw(view).text((0, 0), name, fill=CAPTION_COLOUR, font=font)
        canvas.paste(view, (i % columns * width, i // columns * height))
    sizes = tuple(image.size for image in images)
    return StitchedViews(canvas, tuple(views), sizes, columns, (width, height))


def _check_views(views: Mapping[str, Image.Image], columns: int, view_size: Size) -> None:
    if not isinstance(views, Mapping) or not views:
        raise ValueError(
            f"views must be pictures by camera name, {{'CAM_FRONT': image, ...}}, got {type(views).__name__} of "
            f"{len(views) if hasattr(views, '__len__') else 'unknown'} entries."
        )
    for name, view in views.items():
        if not isinstance(view, Image.Image):
            raise ValueError(f"The view {name!r} must be a PIL image, got {type(view).__name__}; open files first.")
    if columns < 1 or len(view_size) != 2 or min(view_size) < 1:
        raise ValueError(f"columns and view_size must be at least 1, got columns={columns} and view_size={view_size}.")


__all__ = ["StitchedViews", "stitch_views"]
