"""The images of a call as the image processor hands them to a model: square tiles, or slices of their own size.

    images = ImageInputs(pixel_values, tile_counts, tile_grids)                              square tiles
    images = ImageInputs(None, tile_counts, tile_grids, slice_values, slice_sizes)           slices
    image_layouts(tile_counts, tile_grids)                                                   how they are written

Deals with tensors of pixels and counts, not with models.

Shapes: I images, T tiles of all of them, S tile size, P pixels of all views of all images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .conversation import ImageLayout, SlicedImage


@dataclass(frozen=True)
class ImageInputs:
    """Tiles (T, 3, S, S) of all images or, of slices, pixels (P, 3) of all views; and what is known of each image.

    tile_counts (I, 3), tile_grids (I, 4) and slice_sizes (I, 4) are those of the image processor. A remembered turn has
    these of all its images, and pixels of the new ones.
    """

    pixel_values: torch.Tensor | None = None
    tile_counts: torch.Tensor | None = None
    tile_grids: torch.Tensor | None = None
    slice_values: torch.Tensor | None = None
    slice_sizes: torch.Tensor | None = None

    @property
    def are_slices(self) -> bool:
        """Whether these are slices of their own size."""
        return self.slice_sizes is not None or self.slice_values is not None

    def check(self) -> None:
        """Raise `ValueError` for tensors that do not fit together."""
        if self.pixel_values is not None and self.are_slices:
            raise ValueError("Images are tiles (pixel_values) or slices (slice_values), not both in one call.")
        if not self.are_slices:
            return
        given = {"tile_counts": self.tile_counts, "tile_grids": self.tile_grids, "slice_sizes": self.slice_sizes}
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"slice_values need {', '.join(missing)}, which the image processor returns beside them.")
        shapes = {name: tuple(torch.as_tensor(value).shape) for name, value in given.items()}
        if len({shape[:1] for shape in shapes.values()}) > 1 or shapes["slice_sizes"][1:] != (4,):
            raise ValueError(f"tile_counts, tile_grids and slice_sizes describe the same images, got shapes {shapes}.")
        if self.slice_values is not None and (self.slice_values.ndim != 2 or self.slice_values.shape[1] != 3):
            raise ValueError(f"slice_values are pixels of shape (P, 3), got {tuple(self.slice_values.shape)}.")

    def of(self, numbers: list[int]) -> "ImageInputs":
        """Return these pixels with what is known of the images `numbers`, whose pixels they are."""
        known = {name: getattr(self, name) for name in ("tile_counts", "tile_grids", "slice_sizes")}
        return replace(
            self, **{name: None if value is None else torch.as_tensor(value)[numbers] for name, value in known.items()}
        )

    def views(self) -> list[torch.Tensor]:
        """Return the overview and the slices of each image in order, (3, H, W) each.

        Raises:
            ValueError: The number of pixels is not that of the sizes.
        """
        sizes: list[tuple[int, int]] = []
        for (slices, *_), (width, height, *part) in zip(
            torch.as_tensor(self.tile_counts).tolist(), torch.as_tensor(self.slice_sizes).tolist()
        ):
            sizes += [(height, width), *[(part[1], part[0])] * slices]
        pixels = [height * width for height, width in sizes]
        if sum(pixels) != len(self.slice_values):
            raise ValueError(
                f"slice_values hold {len(self.slice_values)} pixels, but views of {sizes} have {sum(pixels)}."
            )
        parts = self.slice_values.split(pixels)
        return [part.unflatten(0, size).permute(2, 0, 1) for part, size in zip(parts, sizes)]


def image_layouts(
    tile_counts, tile_grids=None, slice_sizes=None, *, view_tokens: Callable[[int, int], int], is_mined: bool = False
) -> list[ImageLayout]:
    """Return how each image is written in a prompt: its number of tiles, or its slices.

    Args:
        tile_counts, tile_grids, slice_sizes: See `ImageInputs`; lists and arrays will do.
        view_tokens: Tells the image tokens of a view by its width and height.
        is_mined: Whether the model mines patches: of all tiles the thumbnail alone is written.

    Raises:
        ValueError: For patch mining slices, an image without a thumbnail, with adaptive tiles, or with tiles left out.
    """
    counts = torch.as_tensor(tile_counts).tolist()
    if slice_sizes is not None:
        if is_mined:
            raise ValueError(
                "Patch mining looks into square tiles of a grid; slices of their own size do not lie in one."
            )
        grids, sizes = torch.as_tensor(tile_grids).tolist(), torch.as_tensor(slice_sizes).tolist()
        return [
            SlicedImage(columns, rows, view_tokens(width, height), view_tokens(*part) if part[0] else 0)
            for (columns, rows, *_), (width, height, *part) in zip(grids, sizes)
        ]
    if not is_mined:
        return [sum(tiles) for tiles in counts]
    if tile_grids is None:
        raise ValueError(
            "Patch mining needs to know how tiles lie: pass tile_grids (images, 4), which the processor returns."
        )
    for number, (tiles, (columns, rows, *_)) in enumerate(zip(counts, torch.as_tensor(tile_grids).tolist())):
        detailed = columns * rows if columns * rows > 1 else 0
        if tiles != [detailed, 0, 1]:
            raise ValueError(
                f"Patch mining reads all tiles of a detailed grid and one thumbnail; image {number} has {tiles} detailed, "
                f"adaptive and thumbnail tiles, and a grid of {columns} x {rows}. Cut with tiling='internvl' (or 'logscore', "
                "'relaxed'), with the thumbnail and without drop_blank; chat needs target_aspect_ratio for tiles that you cut."
            )
    return [1] * len(counts)
