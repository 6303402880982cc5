"""Images to tiles: multi-scale adaptive cropping (MSAC) and normalisation.

    processor = AutoImageProcessor.from_pretrained("path/of/this/repository", trust_remote_code=True)
    inputs = processor("page.png", preset="docvqa", return_tensors="pt")

`backend="pil"` gives the pixels of the published code, bit for bit; `backend="torchvision"` (the default) is faster and
differs by at most one level of 255 before normalisation.

Deals with images, not with prompts; picture_decoding.py makes upright 8-bit RGB of whatever is given. Each image is cut as
soon as it is decoded, so that only a few are in memory at a time.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature, ImagesKwargs, PilBackend, TensorType, TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)

from .picture_decoding import (
    array_to_rgb,
    load_picture,
    resize_picture,
    resizing_steps,
    tensor_to_rgb,
    to_rgb,
)
from .tiling import (
    PRESETS,
    RANGE_NAMES,
    TileRanges,
    check_tile_range,
    largest_image,
    layer_grids,
    msac_grids,
    tile_counts,
)


CHECKED = ("size", "do_resize", "use_thumbnail", "resample", "image_mean", "image_std")
SOURCES = (str, os.PathLike)
KINDS = {
    "device": torch.device,
    "input_data_format": ChannelDimension,
    "data_format": ChannelDimension,
    "return_tensors": TensorType,
}
LEAST_REDUCTION = 1.5  # by which torch's 8-bit kernel stays within one level of Pillow's
RESIZED_BY_TORCH = (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC)  # others mean something else there
MOST_PIXELS = 2**29  # of all tiles of an image: 6 GB of float32
DECODED_AHEAD = 3  # images in memory at a time, besides the one that is cut


class MiniMonkeyImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    min_tiles (`int`, *optional*, defaults to `self.min_tiles`):
        Least number of tiles of the detailed grid.
    max_tiles (`int`, *optional*, defaults to `self.max_tiles`):
        Greatest number of tiles of the detailed grid.
    adaptive_min_tiles (`int`, *optional*, defaults to `self.adaptive_min_tiles`):
        Least number of tiles of the adaptive grid.
    adaptive_max_tiles (`int`, *optional*, defaults to `self.adaptive_max_tiles`):
        Greatest number of tiles of the adaptive grid.
    preset (`str`, *optional*):
        A name of `tiling.PRESETS`, the tile ranges of a published benchmark; sets those of the four that are not given.
    use_thumbnail (`bool`, *optional*, defaults to `self.use_thumbnail`):
        Whether the whole image follows its tiles as one more. Mini-Monkey always does that; without it an image is seen
        only in parts, which is useful for comparisons.
    untrusted_sources (`bool`, *optional*, defaults to `self.untrusted_sources`):
        For servers: whether paths are refused, and URLs of addresses that are not public.
    """

    min_tiles: int
    max_tiles: int
    adaptive_min_tiles: int
    adaptive_max_tiles: int
    preset: str | None
    use_thumbnail: bool
    untrusted_sources: bool


# --- MSAC ------------------------------------------------------------------------------------------------------------


class _MsacMixin:
    """What both back ends share: settings, decoding to PIL, and the order of grids and tiles."""

    valid_kwargs = MiniMonkeyImageProcessorKwargs
    model_input_names = ["pixel_values", "tile_counts", "tile_grids"]
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles = PRESETS["default"]
    use_thumbnail = True
    untrusted_sources = False
    preset = None

    def __init__(self, **kwargs):
        super().__init__(**expand_preset(kwargs))
        self.check_options({})

    def preprocess(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        """Cut images into tiles.

        Args:
            images: One image or a (nested) list: PIL images, arrays, tensors, paths, URLs, data URIs.
            **kwargs: See `MiniMonkeyImageProcessorKwargs` and transformers' `ImagesKwargs`.

        Returns:
            pixel_values (T, 3, S, S), the tiles of all images: detailed, adaptive, thumbnail of the first and so on;
            tile_counts (images, 3), how many of each kind; tile_grids (images, 4), columns and rows of the detailed
            and the adaptive grid.

        Raises:
            ValueError: An image that cannot be read, or settings that cannot work.
        """
        self.check_options(kwargs)
        return super().preprocess(images, *args, **expand_preset(kwargs))

    __call__ = preprocess

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `ValueError` for options of a call that cannot work; no image is needed for that."""
        options = expand_preset(options)
        unknown = options.keys() - self.valid_kwargs.__annotations__.keys()
        if unknown:
            known = ", ".join(
                (*RANGE_NAMES, "preset", "use_thumbnail", "size", "resample", "do_normalize", "untrusted_sources")
            )
            raise ValueError(
                f"Unknown options of images: {', '.join(sorted(map(str, unknown)))}; known are {known}, ..."
            )
        try:
            validate_typed_dict(self.valid_kwargs, options)
        except StrictDataclassError as error:
            raise ValueError(f"An option of images cannot work. {error}") from error
        for name, kind in KINDS.items():
            try:
                _ = None if options.get(name) is None else kind(options[name])
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{name}={options[name]!r} is none: {error}") from error
        min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles = (
            options.get(name, getattr(self, name)) for name in RANGE_NAMES
        )
        size, do_resize, use_thumbnail, resample, image_mean, image_std = (
            options.get(name, getattr(self, name)) for name in CHECKED
        )
        check_tile_range(min_tiles, max_tiles, "detailed tile")
        check_tile_range(adaptive_min_tiles, adaptive_max_tiles, "adaptive tile")
        side = _tile_side(size)
        most = (max_tiles + adaptive_max_tiles + 1) * side**2
        if most > MOST_PIXELS:
            raise ValueError(
                f"Up to {max_tiles + adaptive_max_tiles + 1} tiles of {side} x {side} pixels are {most:,} for a picture, the "
                f"limit is {MOST_PIXELS:,}; use a smaller size or fewer tiles."
            )
        if not isinstance(use_thumbnail, bool):
            raise ValueError(f"use_thumbnail is True or False, got {use_thumbnail!r}.")
        if not do_resize:
            raise ValueError(
                "do_resize=False cannot work: a picture is cut in tiles after it is resized to their grid."
            )
        if isinstance(resample, (bool, float)) or resample not in list(PILImageResampling):
            known = ", ".join(f"{filter.value} ({filter.name})" for filter in PILImageResampling)
            raise ValueError(f"resample is one of Pillow's filters, {known}; got {resample!r}.")
        for name, values, least in (("image_mean", image_mean, -np.inf), ("image_std", image_std, 0)):
            numbers = np.atleast_1d(np.asarray(values, dtype=np.float64)) if values is not None else np.ones(1)
            if numbers.shape not in ((1,), (3,)) or not (np.isfinite(numbers).all() and (numbers > least).all()):
                raise ValueError(
                    f"{name} is a number for each of 3 channels, that of image_std above 0; got {values!r}."
                )

    def fetch_images(self, image_url_or_urls):
        """Read every path, URL and data URI in an image or a (nested) list of images; leave the rest as it is."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        _ = list(_flat(image_url_or_urls))  # which raises for what is not an image
        if isinstance(image_url_or_urls, SOURCES):
            return load_picture(image_url_or_urls, self.untrusted_sources)
        return image_url_or_urls

    def process_image(self, image, input_data_format=None, untrusted_sources=False, **kwargs) -> Image.Image:
        """Return one image of any accepted type as upright 8-bit RGB."""
        if isinstance(image, SOURCES):
            return load_picture(image, untrusted_sources)
        if isinstance(image, Image.Image):
            return to_rgb(image)
        convert = tensor_to_rgb if isinstance(image, torch.Tensor) else array_to_rgb
        return convert(image, input_data_format)

    def _prepare_image_like_inputs(self, images, *args, **kwargs) -> list:
        """Return the images in one list, as they were given; `_decoded` opens each when its turn comes."""
        pictures = list(_flat(images))
        if not pictures:
            raise ValueError("The list of pictures is empty.")
        return pictures

    def _decoded(self, pictures: list, settings: dict[str, Any]) -> Iterator[Image.Image]:
        """Yield the images one by one as upright 8-bit RGB; files are read ahead, a few at a time."""
        options = {name: settings.get(name) for name in ("input_data_format", "untrusted_sources")}
        sources = iter([picture for picture in pictures if isinstance(picture, SOURCES)])
        with ThreadPoolExecutor(DECODED_AHEAD) as threads:  # Pillow and the network let go of the interpreter meanwhile
            read = deque(
                threads.submit(self.process_image, source, **options) for source in islice(sources, DECODED_AHEAD)
            )
            for picture in pictures:
                if not isinstance(picture, SOURCES):  # it may be there twice, and must not be decoded by two threads
                    yield self.process_image(picture, **options)
                    continue
                yield read.popleft().result()
                read.extend(threads.submit(self.process_image, source, **options) for source in islice(sources, 1))

    def tile_ranges(self, **images_kwargs: Any) -> TileRanges:
        """Return the four tile ranges that a call with these options uses."""
        settings = {**{name: getattr(self, name) for name in RANGE_NAMES}, **expand_preset(images_kwargs)}
        ranges = tuple(settings[name] for name in RANGE_NAMES)
        check_tile_range(*ranges[:2], "detailed tile")
        check_tile_range(*ranges[2:], "adaptive tile")
        return ranges

    def count_tiles(self, height: int, width: int, images_kwargs: dict | None = None) -> tuple[int, int, int]:
        """Count the detailed, adaptive and thumbnail tiles of an image of this size, without its pixels."""
        own = {name: getattr(self, name) for name in (*RANGE_NAMES, "use_thumbnail")}
        settings = {**own, **expand_preset(images_kwargs or {})}
        tile_size = _tile_side(settings.get("size") or self.size)
        ranges = (settings[name] for name in RANGE_NAMES)
        return tile_counts(*msac_grids(width, height, *ranges, tile_size), settings["use_thumbnail"])

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Count the tiles of an image of this size, all three kinds together, without its pixels."""
        return sum(self.count_tiles(height, width, images_kwargs))

    def largest_image(self, **images_kwargs: Any) -> tuple[int, int]:
        """Return a (height, width) that gives the most tiles with these options, see `tiling.largest_image`."""
        settings = expand_preset(images_kwargs)
        tile_size = _tile_side(settings.get("size") or self.size)
        use_thumbnail = settings.get("use_thumbnail", self.use_thumbnail)
        width, height = largest_image(self.tile_ranges(**settings), tile_size, use_thumbnail)
        return height, width

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers returns, but keep both back ends in `auto_map`, which saving would narrow to one."""
        settings = super().to_dict()
        settings.pop("preset", None)
        settings["image_processor_type"] = "MiniMonkeyImageProcessor"
        module = "image_processing_minimonkey"
        settings["auto_map"] = {
            "AutoImageProcessor": {
                "torchvision": f"{module}.MiniMonkeyImageProcessor",
                "pil": f"{module}.MiniMonkeyImageProcessorPil",
            },
            "AutoProcessor": "processing_minimonkey.MiniMonkeyProcessor",
        }
        return settings


def expand_preset(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `kwargs` with the four tile ranges of its `preset`, where they are not given themselves.

    Raises:
        ValueError: No preset has that name.
    """
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"images_kwargs are a dict of options, {{'max_tiles': 12}} for example, got {kwargs!r}.")
    preset = kwargs.get("preset")
    if preset is None:
        return {name: value for name, value in kwargs.items() if name != "preset"}
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; known are {', '.join(PRESETS)}.")
    given = {name: value for name, value in kwargs.items() if name != "preset" and value is not None}
    return {**dict(zip(RANGE_NAMES, PRESETS[preset])), **given}


def _tile_side(size) -> int:
    """Return the side of a tile in pixels, from any of transformers' ways to write a size.

    Raises:
        ValueError: It is not a square.
    """
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(size, (Mapping, SizeDict)):
        sides = [size["height"], size["width"]] if {"height", "width"} <= {*dict(size)} else [None]
    is_pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not is_pair or sides[0] != sides[1] or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"Tiles are square: size must be {{'height': S, 'width': S}}, got {size}.")
    return sides[0]


def _flat(images) -> Iterator:
    """Flatten lists of images within lists, in order; an array of four dimensions is a batch."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
        return
    if not isinstance(images, (*SOURCES, Image.Image, np.ndarray, torch.Tensor)):
        raise ValueError(
            f"A picture is a PIL image, an array, a tensor, a path, a URL or a data URI, got {type(images).__name__}."
        )
    if getattr(images, "ndim", 3) == 4:
        yield from images
    else:
        yield images


def _batch(tiles, grids: list[tuple], use_thumbnail: bool, return_tensors) -> BatchFeature:
    data = {
        "pixel_values": tiles,
        "tile_counts": [tile_counts(*pair, use_thumbnail) for pair in grids],
        "tile_grids": [(*detailed, *adaptive) for detailed, adaptive in grids],
    }
    return BatchFeature(data=data, tensor_type=return_tensors)


class MiniMonkeyImageProcessorPil(_MsacMixin, PilBackend):
    """MSAC with PIL and NumPy: the pixels of the published code, bit for bit."""

    def _preprocess(
        self,
        images: list,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        use_thumbnail: bool,
        return_tensors=None,
        **settings,
    ) -> BatchFeature:
        tile_size, grids, layers = size.height, [], []
        ranges = [settings[name] for name in RANGE_NAMES]
        for image in self._decoded(images, settings):
            grids.append(msac_grids(*image.size, *ranges, tile_size))
            layers += [self._cut(image, grid, tile_size, resample) for grid in layer_grids(*grids[-1], use_thumbnail)]
        tiles = np.concatenate(layers)  # (T, 3, S, S) uint8
        if do_rescale and rescale_factor == 1 / 255:
            tiles = tiles.astype(np.float32) / np.float32(255)  # as ToTensor does; a factor would round differently
        elif do_rescale:
            tiles = tiles.astype(np.float32) * np.float32(rescale_factor)
        if do_normalize:
            mean, std = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in (image_mean, image_std))
            tiles = (tiles - mean) / std
        return _batch(tiles, grids, use_thumbnail, return_tensors)

    @staticmethod
    def _cut(image: Image.Image, grid: tuple[int, int], tile_size: int, resample) -> np.ndarray:
        """Cut into (columns * rows, 3, S, S) uint8, row by row."""
        columns, rows = grid
        resized = np.asarray(resize_picture(image, tile_size * columns, tile_size * rows, resample))
        tiles = resized.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3)
        return tiles.reshape(columns * rows, 3, tile_size, tile_size)


class MiniMonkeyImageProcessor(_MsacMixin, TorchvisionBackend):
    """MSAC with torchvision: faster than PIL, at most one level of 255 away from it."""

    def _preprocess(
        self,
        images: list,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        use_thumbnail: bool,
        return_tensors=None,
        device=None,
        **settings,
    ) -> BatchFeature:
        tile_size, grids, layers = size.height, [], []
        ranges = [settings[name] for name in RANGE_NAMES]
        for image in self._decoded(images, settings):
            grids.append(msac_grids(*image.size, *ranges, tile_size))
            pixels = _to_tensor(image, device)  # once for all its grids; this copy takes longer than a resize
            layers += [
                self._cut(image, pixels, grid, tile_size, resample) for grid in layer_grids(*grids[-1], use_thumbnail)
            ]
        tiles = self.rescale_and_normalize(
            torch.cat(layers), do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
        return _batch(tiles.contiguous(), grids, use_thumbnail, return_tensors)

    def _cut(
        self, image: Image.Image, pixels: torch.Tensor, grid: tuple[int, int], tile_size: int, resample
    ) -> torch.Tensor:
        """Cut into (columns * rows, 3, S, S) uint8, row by row."""
        columns, rows = grid
        resized = self._resize_as_pil(image, pixels, tile_size * columns, tile_size * rows, resample)
        tiles = resized.unflatten(1, (rows, tile_size)).unflatten(3, (columns, tile_size))
        return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def _resize_as_pil(
        self, image: Image.Image, pixels: torch.Tensor, width: int, height: int, resample
    ) -> torch.Tensor:
        """Resize to (3, height, width) uint8, at most one level away from `resize_picture`; `pixels` are those of `image`.

        Pillow resizes one direction after the other with 8-bit samples in between. The two kernels differ by a rounding
        in each pass. Reducing averages that out; enlarging does not, nor does reducing by a little, and there Pillow
        itself is used.
        """
        reduces = all(old == new or old >= LEAST_REDUCTION * new for old, new in zip(image.size, (width, height)))
        if not reduces or resample not in RESIZED_BY_TORCH:
            return _to_tensor(resize_picture(image, width, height, resample), pixels.device)
        for columns, rows in resizing_steps(*image.size, width, height):
            pixels = self.resize(pixels, SizeDict(height=rows, width=columns), resample)
        return pixels


def _to_tensor(image: Image.Image, device) -> torch.Tensor:
    """Return (3, H, W) uint8 with the channels last in memory, which torch resizes fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)


__all__ = ["MiniMonkeyImageProcessor", "MiniMonkeyImageProcessorPil"]
