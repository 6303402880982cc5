"""Images to tiles: multi-scale adaptive cropping (MSAC) and normalisation.

    processor = AutoImageProcessor.from_pretrained("path/of/this/repository", trust_remote_code=True)
    inputs = processor("page.png", preset="docvqa", return_tensors="pt")

`backend="pil"` gives the pixels of the published code, bit for bit; `backend="torchvision"` (the default) is faster and
differs by at most one level of 255 before normalisation.

Deals with images, not with prompts; image_decoding.py makes upright 8-bit RGB of whatever is given. Each image is cut as
soon as it is decoded, so that only a few are in memory at a time.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
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

from .blank_tiles import shown_tiles
from .image_decoding import (
    array_to_rgb,
    load_image,
    pages_of,
    resize_image,
    resizing_steps,
    tensor_to_rgb,
    to_rgb,
)
from .tiling import (
    PRESET_TILINGS,
    PRESETS,
    RANGE_NAMES,
    SINGLE_TILE,
    SLICES,
    Grid,
    TileRanges,
    check_tiling,
    choose_grids,
    largest_image,
    slice_sizes,
    tile_counts,
)


TILING_OPTIONS = ("tiling", "relaxed_alpha", "max_scale")  # of `tiling.choose_grids`, in its order
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
# What was to be shown and got lost must not become an answer without it.
EMPTY = "{0} hold {1}, which shows nothing; pass {0}=None to ask without any."
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
        A name of `tiling.PRESETS`, the tile ranges of a published benchmark or system; sets those of the four that are not
        given, and the tiling.
    tiling (`str`, *optional*, defaults to `self.tiling`):
        How the grids are chosen, see `tiling.choose_grids`: "msac" as in Mini-Monkey; "internvl", "logscore" (MiniCPM-V) and
        "relaxed" (BlueLM-V-3B) have no adaptive grid, "msac-logscore" and "msac-relaxed" have one beside these. "slices" cuts
        the grid of "logscore" into slices of their own size, as MiniCPM-V does.
    slice_multiple (`int`, *optional*, defaults to `self.slice_multiple`):
        What the sides of slices are multiples of, in pixels: of the patches that become one token, or of a patch if the
        model has a resampler. A `MiniMonkeyProcessor` knows the first.
    relaxed_alpha (`float`, *optional*, defaults to `self.relaxed_alpha`):
        Share of useful pixels that "relaxed" gives up for less waste; 0 is the rule of LLaVA-NeXT.
    max_scale (`float`, *optional*, defaults to `self.max_scale`):
        How many times tiles may enlarge an image, at least 1, so that a small image has few tiles; one that is narrower than a
        tile is enlarged to that. None, as published: however much it takes to have `min_tiles`.
    use_thumbnail (`bool`, *optional*, defaults to `self.use_thumbnail`):
        Whether the whole image follows its tiles as one more. Mini-Monkey always does that; without it an image is seen
        only in parts, which is useful for comparisons.
    drop_blank (`bool`, *optional*, defaults to `self.drop_blank`):
        Whether detailed and adaptive tiles that show nothing but paper are left out, see blank_tiles.py; `tile_counts` then
        count the others. Photographs keep all their tiles, and so does an image that would have none left.
    untrusted_sources (`bool`, *optional*, defaults to `self.untrusted_sources`):
        For servers: whether paths are refused, and URLs of addresses that are not public.
    """

    min_tiles: int
    max_tiles: int
    adaptive_min_tiles: int
    adaptive_max_tiles: int
    preset: str | None
    tiling: str
    relaxed_alpha: float | int
    max_scale: float | int | None
    slice_multiple: int | None
    use_thumbnail: bool
    drop_blank: bool
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
    tiling = "msac"
    relaxed_alpha = 0.1
    max_scale = None
    slice_multiple = None
    use_thumbnail = True
    drop_blank = False
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
            and the adaptive grid. With tiling="slices" there are no pixel_values, but slice_values (P, 3), the pixels of all
            views row by row: overview and slices of the first image and so on; and slice_sizes (images, 4), width and
            height of the overview and of each slice; tile_counts are (slices, 0, 1).

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
                (*RANGE_NAMES, "preset", "tiling", "use_thumbnail", "size", "resample", "untrusted_sources")
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
        ranges = [options.get(name, getattr(self, name)) for name in RANGE_NAMES]
        size, do_resize, use_thumbnail, resample, image_mean, image_std = (
            options.get(name, getattr(self, name)) for name in CHECKED
        )
        side = _tile_side(size)
        rule = {name: options.get(name, getattr(self, name)) for name in TILING_OPTIONS}
        check_tiling(*ranges, **rule)
        most = ranges[1] + ranges[3] + 1
        if most * side**2 > MOST_PIXELS:
            raise ValueError(
                f"Up to {most} tiles of {side} x {side} pixels are {most * side**2:,} for a picture, the limit is "
                f"{MOST_PIXELS:,}; use a smaller size or fewer tiles."
            )
        if not isinstance(use_thumbnail, bool):
            raise ValueError(f"use_thumbnail is True or False, got {use_thumbnail!r}.")
        multiple = options.get("slice_multiple", self.slice_multiple)
        if multiple is not None and (isinstance(multiple, bool) or not 1 <= multiple <= side):
            raise ValueError(
                f"slice_multiple is a number of pixels from 1 to the tile's side {side}, got {multiple!r}."
            )
        if rule["tiling"] == SLICES:
            others = {"use_thumbnail": not use_thumbnail, "drop_blank": options.get("drop_blank", self.drop_blank)}
            if wrong := [name for name, is_set in others.items() if is_set]:
                raise ValueError(
                    f"tiling={SLICES!r} always has an overview and all slices; leave out {' and '.join(wrong)}."
                )
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
        list_images(image_url_or_urls)  # raises for what is not an image
        if isinstance(image_url_or_urls, SOURCES):
            return load_image(image_url_or_urls, self.untrusted_sources)
        return image_url_or_urls

    def with_pages(self, images: list, placeholders: int, **images_kwargs: Any) -> list:
        """Return `images`, with the pages of TIFF files as images of their own.

        Where a text has one placeholder for each file, its first page alone is shown, with a warning later on.

        Raises:
            ValueError: A path, where sources are untrusted.
        """
        untrusted = images_kwargs.get("untrusted_sources", self.untrusted_sources)
        pages = [page for image in images for page in pages_of(image, untrusted)]
        return images if placeholders == len(images) else pages

    def process_image(self, image, input_data_format=None, untrusted_sources=False, **kwargs) -> Image.Image:
        """Return one image of any accepted type as upright 8-bit RGB."""
        if isinstance(image, SOURCES):
            return load_image(image, untrusted_sources)
        if isinstance(image, Image.Image):
            return to_rgb(image)
        convert = tensor_to_rgb if isinstance(image, torch.Tensor) else array_to_rgb
        return convert(image, input_data_format)

    def _preprocess_image_like_inputs(
        self, images, *_, size: SizeDict, resample, use_thumbnail: bool, return_tensors=None, device=None, **settings
    ) -> BatchFeature:
        """Cut the images into tiles, each image as soon as it is decoded."""
        images, ranges = list_images(images), tuple(settings[name] for name in RANGE_NAMES)
        tiling = tuple(settings[name] for name in TILING_OPTIONS)
        if not images:
            raise ValueError("The list of pictures is empty.")
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        normalization = [settings[name] for name in names]
        if tiling[0] == SLICES:
            data = self._cut_slices(images, ranges, size.height, resample, normalization, settings, device)
            return BatchFeature(data=data, tensor_type=return_tensors)
        tiles, counts, grids = [], [], []
        for image in self._decoded(images, settings):
            detailed, adaptive = choose_grids(*image.size, ranges, size.height, *tiling)
            counts.append(tile_counts(detailed, adaptive, use_thumbnail))
            grids.append((*detailed, *adaptive))
            layers = [grid for grid, count in zip((detailed, adaptive, SINGLE_TILE), counts[-1]) if count]
            cut = self._cut(image, layers, size.height, resample, device)
            if settings["drop_blank"]:
                arrays = [part.cpu().numpy() if isinstance(part, torch.Tensor) else part for part in cut]
                shown = [shown_tiles(*pair) for pair in zip(arrays, layers)]
                if any(map(any, shown)):
                    remaining = iter(map(sum, shown))
                    counts[-1] = tuple(next(remaining) if count else 0 for count in counts[-1])
                    cut = [layer[numbers] for layer, numbers in zip(cut, shown)]
            tiles += cut
        joined = torch.cat(tiles).contiguous() if isinstance(tiles[0], torch.Tensor) else np.concatenate(tiles)
        pixel_values = self.rescale_and_normalize(joined, *normalization)
        data = {"pixel_values": pixel_values, "tile_counts": counts, "tile_grids": grids}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _cut_slices(
        self, images: list, ranges: TileRanges, side: int, resample, normalization: list, settings: dict, device
    ) -> dict[str, Any]:
        """Cut images into an overview and slices of their own size, see `preprocess`; both back ends resize with Pillow."""
        views, counts, grids, sizes = [], [], [], []
        for image in self._decoded(images, settings):
            (columns, rows), _ = grid, adaptive = choose_grids(*image.size, ranges, side, SLICES)
            overview, part = slice_sizes(*image.size, grid, side, self._multiple(settings["slice_multiple"]))
            views.append(np.asarray(resize_image(image, *overview, resample)))
            if grid != SINGLE_TILE:
                whole = np.asarray(resize_image(image, part[0] * columns, part[1] * rows, resample))
                views.append(whole.reshape(rows, part[1], columns, part[0], 3).swapaxes(1, 2))
            counts.append(tile_counts(grid, adaptive))
            grids.append((*grid, *adaptive))
            sizes.append((*overview, *part))
        pixels = np.concatenate([view.reshape(-1, 3) for view in views])
        pixels = torch.from_numpy(pixels).to(device) if isinstance(self, TorchvisionBackend) else pixels
        values = self.rescale_and_normalize(pixels.T[None, :, :, None], *normalization)[0, :, :, 0].T
        values = values.contiguous() if isinstance(values, torch.Tensor) else np.ascontiguousarray(values)
        return {"slice_values": values, "slice_sizes": sizes, "tile_counts": counts, "tile_grids": grids}

    def _multiple(self, given: int | None) -> int:
        """Return what the sides of slices are multiples of; raises `ValueError` where nothing says it."""
        multiple = self.slice_multiple if given is None else given
        if multiple is None:
            raise ValueError(
                f"tiling={SLICES!r} needs slice_multiple, the pixels that slices are multiples of: 28 for the published models "
                "(14 with a resampler). A whole MiniMonkeyProcessor sets it."
            )
        return multiple

    def _decoded(self, images: list, settings: dict[str, Any]) -> Iterator[Image.Image]:
        """Yield the images one by one as upright 8-bit RGB; files are read ahead, a few at a time."""
        options = {name: settings.get(name) for name in ("input_data_format", "untrusted_sources")}
        sources = iter([image for image in images if isinstance(image, SOURCES)])
        with ThreadPoolExecutor(DECODED_AHEAD) as threads:  # Pillow and the network let go of the interpreter meanwhile
            read = deque(
                threads.submit(self.process_image, source, **options) for source in islice(sources, DECODED_AHEAD)
            )
            for image in images:
                if not isinstance(image, SOURCES):  # it may be there twice, and must not be decoded by two threads
                    yield self.process_image(image, **options)
                    continue
                yield read.popleft().result()
                read.extend(threads.submit(self.process_image, source, **options) for source in islice(sources, 1))

    def tile_ranges(self, **images_kwargs: Any) -> TileRanges:
        """Return the four tile ranges that a call with these options uses; a tiling without adaptive grid has 1 to 1 there."""
        own = {name: getattr(self, name) for name in (*RANGE_NAMES, "tiling")}
        settings = {**own, **expand_preset(images_kwargs)}
        ranges = tuple(settings[name] for name in RANGE_NAMES)
        check_tiling(*ranges)
        return ranges if settings["tiling"].startswith("msac") else (*ranges[:2], 1, 1)

    def count_tiles(self, height: int, width: int, images_kwargs: dict | None = None) -> tuple[int, int, int]:
        """Count the detailed, adaptive and thumbnail tiles of an image of this size, without its pixels.

        With `drop_blank` these are the most it can have.
        """
        ranges, tile_size, tiling, use_thumbnail = self._grid_rule(images_kwargs)
        return tile_counts(*choose_grids(width, height, ranges, tile_size, *tiling), use_thumbnail)

    def choose_grids(self, height: int, width: int, images_kwargs: dict | None = None) -> tuple[Grid, Grid]:
        """Return the detailed and the adaptive grid of an image of this size, as (columns, rows) each, without its pixels."""
        ranges, tile_size, tiling, _ = self._grid_rule(images_kwargs)
        return choose_grids(width, height, ranges, tile_size, *tiling)

    def _grid_rule(self, images_kwargs: dict | None) -> tuple[TileRanges, int, tuple, bool]:
        """Return ranges, tile side and TILING_OPTIONS as `tiling.choose_grids` takes them, and whether there is a thumbnail."""
        own = {name: getattr(self, name) for name in (*RANGE_NAMES, *TILING_OPTIONS, "use_thumbnail")}
        settings = {**own, **expand_preset(images_kwargs or {})}
        tile_size = _tile_side(settings.get("size") or self.size)
        ranges = tuple(settings[name] for name in RANGE_NAMES)
        return ranges, tile_size, tuple(settings[name] for name in TILING_OPTIONS), settings["use_thumbnail"]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Count the tiles of an image of this size, all three kinds together, without its pixels; see `count_tiles`."""
        return sum(self.count_tiles(height, width, images_kwargs))

    def cuts_slices(self, images_kwargs: dict | None = None) -> bool:
        """Tell whether a call with these options cuts slices of their own size."""
        return expand_preset(images_kwargs or {}).get("tiling", self.tiling) == SLICES

    def slice_sizes(self, height: int, width: int, images_kwargs: dict | None = None) -> list[int]:
        """Return width and height of the overview and of the slices of an image of this size, without its pixels."""
        (ranges, tile_size, *_), options = self._grid_rule(images_kwargs), images_kwargs or {}
        grid, _ = choose_grids(width, height, ranges, tile_size, SLICES)
        multiple = self._multiple(options.get("slice_multiple"))
        return [side for size in slice_sizes(width, height, grid, tile_size, multiple) for side in size]

    def largest_image(self, **images_kwargs: Any) -> tuple[int, int]:
        """Return a (height, width) that gives the most tiles with these options, see `tiling.largest_image`."""
        ranges, tile_size, tiling, use_thumbnail = self._grid_rule(images_kwargs)
        width, height = largest_image(ranges, tile_size, use_thumbnail, *tiling)
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
    """Return `kwargs` with the four tile ranges and the tiling of its `preset`, where they are not given themselves.

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
    return {**dict(zip(RANGE_NAMES, PRESETS[preset])), "tiling": PRESET_TILINGS.get(preset, "msac"), **given}


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


def list_images(images) -> list:
    """List the images of a (nested) list without opening any; an array of four dimensions is a batch.

    Raises:
        ValueError: Something that is not an image, or that shows nothing: None or an empty list in a list, an empty array.
    """
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        for item in images:
            if item is None or (isinstance(item, (list, tuple)) and not item):
                raise ValueError(EMPTY.format("images", repr(item)))
        return [image for item in images for image in list_images(item)]
    if not isinstance(images, (*SOURCES, Image.Image, np.ndarray, torch.Tensor)):
        raise ValueError(
            f"A picture is a PIL image, an array, a tensor, a path, a URL or a data URI, got {type(images).__name__}."
        )
    if 0 in getattr(images, "shape", ()):
        raise ValueError(EMPTY.format("images", f"an array of shape {tuple(images.shape)}"))
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]


def cut_images(image_processor, images: list[tuple[Any, dict[str, Any]]], **options: Any) -> dict[str, Any]:
    """Cut images that have options of their own, beside `options` for all, with the image processor, in order."""
    parts = [
        image_processor([image for image, _ in group], **{**own, **options})
        for own, group in groupby(images, key=lambda image: image[1])
    ]
    return dict(parts[0]) if len(parts) == 1 else {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(parts: list):
    """Join tensors, arrays or lists into one."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return [item for part in parts for item in part] if isinstance(parts[0], list) else np.concatenate(parts)


class MiniMonkeyImageProcessorPil(_MsacMixin, PilBackend):
    """MSAC with PIL and NumPy: the pixels of the published code, bit for bit."""

    def _cut(self, image: Image.Image, grids: list[Grid], tile_size: int, resample, device) -> list[np.ndarray]:
        """Cut an image in each grid: (columns * rows, 3, S, S) uint8, row by row."""
        layers = []
        for columns, rows in grids:
            resized = np.asarray(resize_image(image, tile_size * columns, tile_size * rows, resample))
            tiles = resized.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3)
            layers.append(tiles.reshape(columns * rows, 3, tile_size, tile_size))
        return layers

    def rescale_and_normalize(
        self, images: np.ndarray, do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean, image_std
    ) -> np.ndarray:
        """Rescale and normalise tiles (T, 3, S, S) as the torchvision back end does, with the published rounding."""
        if do_rescale and rescale_factor == 1 / 255:
            images = images.astype(np.float32) / np.float32(255)  # as ToTensor does; a factor would round differently
        elif do_rescale:
            images = images.astype(np.float32) * np.float32(rescale_factor)
        if do_normalize:
            mean, std = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in (image_mean, image_std))
            images = (images - mean) / std
        return images


class MiniMonkeyImageProcessor(_MsacMixin, TorchvisionBackend):
    """MSAC with torchvision: faster than PIL, at most one level of 255 away from it."""

    def _cut(self, image: Image.Image, grids: list[Grid], tile_size: int, resample, device) -> list[torch.Tensor]:
        """Cut an image in each grid: (columns * rows, 3, S, S) uint8, row by row, at most one level away from PIL's.

        Pillow resizes one direction after the other with 8-bit samples in between. The two kernels differ by a rounding
        in each pass. Reducing averages that out; enlarging does not, nor does reducing by a little, and there Pillow
        itself is used.
        """
        layers = []
        # Channels last in memory, which torch resizes fastest; once for all grids, since this copy takes longer than a resize.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)
        for columns, rows in grids:
            size = (tile_size * columns, tile_size * rows)
            reduces = all(old == new or old >= LEAST_REDUCTION * new for old, new in zip(image.size, size))
            if reduces and resample in RESIZED_BY_TORCH:
                resized = pixels
                for step in resizing_steps(*image.size, *size):
                    resized = self.resize(resized, SizeDict(height=step[1], width=step[0]), resample)
            else:
                resized = np.array(resize_image(image, *size, resample))
                resized = torch.from_numpy(resized).permute(2, 0, 1).to(device)
            tiles = resized.unflatten(1, (rows, tile_size)).unflatten(3, (columns, tile_size))
            layers.append(tiles.permute(1, 3, 0, 2, 4).flatten(0, 1))
        return layers


__all__ = ["MiniMonkeyImageProcessor", "MiniMonkeyImageProcessorPil"]
