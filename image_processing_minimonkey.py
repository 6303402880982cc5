"""Pictures to tiles: decoding, multi-scale adaptive cropping (MSAC) and normalisation.

    processor = AutoImageProcessor.from_pretrained("path/of/this/repository", trust_remote_code=True)
    inputs = processor("page.png", preset="docvqa", return_tensors="pt")

`backend="pil"` gives the pixels of the published code bit by bit; `backend="torchvision"` (the default) is faster and
differs by at most one level of 255 before normalisation.

Knows pictures, not prompts. Every picture becomes upright 8-bit RGB first, whatever it was: EXIF orientation is applied,
transparency is put on white (the published code dropped it, which shows the hidden colours), 16-bit samples keep their
upper half, of an animation the first frame is taken.
"""

import base64
import binascii
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs

from .tiling import PRESETS, RANGE_NAMES, TileRanges, check_tile_range, layer_grids, msac_grids, tile_counts


BACKGROUND = (255, 255, 255)
URL_TIMEOUT = 30.0  # seconds
CHECKED = (*RANGE_NAMES, "size", "do_resize", "use_thumbnail")
LEAST_REDUCTION = 1.5  # by which torch's 8-bit kernel stays within one level of Pillow's


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
        Whether the whole picture follows its tiles as one more. Mini-Monkey always does that; without it a picture is seen
        in parts alone, which is of use for comparisons.
    """

    min_tiles: int
    max_tiles: int
    adaptive_min_tiles: int
    adaptive_max_tiles: int
    preset: str | None
    use_thumbnail: bool


# --- decoding --------------------------------------------------------------------------------------------------------


def load_picture(source: str | Path) -> Image.Image:
    """Read a picture from a path, a URL, a data URI or a base64 string, as upright 8-bit RGB.

    Raises:
        ValueError: It cannot be found, read or decoded, or has so many pixels that it may be an attack.
    """
    text = str(source)
    name = text if len(text) < 200 else text[:60] + "..."
    is_bare_base64 = False
    if text.startswith(("http://", "https://")):
        data = _download(text)
    elif text.startswith("file://"):
        data = url2pathname(urlparse(text).path)
    elif isinstance(source, Path) or os.path.isfile(text):  # unlike Path.is_file, no error for over-long names
        data = source
    elif text.startswith("data:"):
        data = _decode_base64(text.partition(",")[2], name)
    else:
        data, is_bare_base64 = _decode_base64(text, name), True
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:  # where Pillow only warns
                raise Image.DecompressionBombError(f"{pixels} pixels, the limit is {limit}")
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has too many pixels to be opened safely ({error}). If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        if is_bare_base64:
            raise ValueError(f"{name!r} is neither an existing file nor a URL nor a picture in base64.") from error
        raise ValueError(f"{name} is empty or not a picture that Pillow can read.") from error
    except (OSError, SyntaxError) as error:  # Pillow reports some broken PNG files as SyntaxError
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def _download(url: str) -> bytes:
    try:
        response = get_session().get(url, timeout=URL_TIMEOUT, follow_redirects=True)
        response.raise_for_status()
    except Exception as error:  # the HTTP client is huggingface_hub's choice, and so are its exceptions
        raise ValueError(f"{url} cannot be downloaded: {error}") from error
    return response.content


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name!r} is no picture: neither an existing file nor a URL nor base64 data.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL picture of any mode as upright 8-bit RGB, transparency on white, the first frame of an animation.

    Raises:
        ValueError: Its file is broken.
    """
    try:
        image = _first_frame(image)
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # transposing copies, even where nothing turns
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"The picture cannot be decoded: {error}") from error
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return array_to_rgb(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _first_frame(image: Image.Image) -> Image.Image:
    """The first frame of an animation; the caller's picture stays at its own."""
    position = image.tell() if getattr(image, "is_animated", False) else 0
    if position == 0:
        return image
    image.seek(0)
    first = image.copy()
    image.seek(position)
    return first


def array_to_rgb(array: np.ndarray, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """An array of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels as 8-bit RGB.

    Integers are taken as 0 to 255, or as 0 to 65535 if one exceeds 255; floats as 0 to 1, or as 0 to 255 if one exceeds 1.

    Raises:
        ValueError: Another shape, or values that are no colours (a normalised tensor, say).
    """
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"A picture has shape (H, W), (H, W, C) or (C, H, W), got an array of {array.shape}.")
    if array.ndim == 3:
        # A picture of three rows has channels at both ends, as it were; arrays have theirs last by custom.
        layout = input_data_format or (ChannelDimension.LAST if array.shape[-1] in (3, 4) else None)
        layout = layout or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        array = np.moveaxis(array, 0, -1) if ChannelDimension(layout) == ChannelDimension.FIRST else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    array = _to_uint8(array)
    if array.ndim == 3 and array.shape[-1] == 4:
        return to_rgb(Image.fromarray(array, "RGBA"))
    return Image.fromarray(array).convert("RGB")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    low, high = float(array.min()), float(array.max())
    is_float = np.issubdtype(array.dtype, np.floating)
    if not (low >= 0 and high <= (255 if is_float else 65535)):  # also for NaN
        raise ValueError(
            f"Values from {low} to {high} ({array.dtype}) are no colours. Floats go from 0 to 1 or 0 to 255; tiles that "
            "are normalised already are passed to the model as `pixel_values`."
        )
    if is_float:
        return np.rint(array * 255 if high <= 1 else array).astype(np.uint8)
    return (array >> 8 if high > 255 else array).astype(np.uint8)


def resizing_steps(old_width: int, old_height: int, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two (width, height) through which a picture is resized, one direction after the other.

    The samples in between are rounded to 8 bits, so that the order decides the pixels: the height goes first where it shrinks
    by more than twice what the width does, which Pillow does by itself from version 13 on and not before.
    """
    shrinks_by = old_height - height
    vertical_first = shrinks_by > 0 and shrinks_by > 2 * (old_width - width)
    return (old_width, height) if vertical_first else (width, old_height), (width, height)


def resize_picture(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """`image.resize((width, height), resample)` of Pillow 13, with the same pixels under every Pillow."""
    for step in resizing_steps(*image.size, width, height):
        image = image.resize(step, resample)
    return image


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
    preset = None

    def __init__(self, **kwargs):
        super().__init__(**expand_preset(kwargs))
        self._check_settings(**{name: getattr(self, name) for name in CHECKED})

    def preprocess(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        """Cut pictures into tiles.

        Args:
            images: One picture or a (nested) list: PIL images, arrays, tensors, paths, URLs, data URIs.
            **kwargs: See `MiniMonkeyImageProcessorKwargs` and transformers' `ImagesKwargs`.

        Returns:
            pixel_values (T, 3, S, S), the tiles of all pictures: detailed, adaptive, thumbnail of the first and so on;
            tile_counts (images, 3), how many of each kind; tile_grids (images, 4), columns and rows of the detailed
            and the adaptive grid.

        Raises:
            ValueError: A picture that cannot be read, or settings that cannot work.
        """
        return super().preprocess(images, *args, **expand_preset(kwargs))

    __call__ = preprocess

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        self._check_settings(**{name: kwargs[name] for name in CHECKED})
        super()._validate_preprocess_kwargs(**kwargs)

    @staticmethod
    def _check_settings(
        min_tiles, max_tiles, adaptive_min_tiles, adaptive_max_tiles, size, do_resize, use_thumbnail
    ) -> None:
        check_tile_range(min_tiles, max_tiles, "detailed tile")
        check_tile_range(adaptive_min_tiles, adaptive_max_tiles, "adaptive tile")
        if size is None or size["height"] is None or size["height"] != size["width"] or size["height"] < 1:
            raise ValueError(f"Tiles are square: size must be {{'height': S, 'width': S}}, got {size}.")
        if not isinstance(use_thumbnail, bool):
            raise ValueError(f"use_thumbnail is True or False, got {use_thumbnail!r}.")
        if not do_resize:
            raise ValueError(
                "do_resize=False cannot work: a picture is cut in tiles after it is resized to their grid."
            )

    def fetch_images(self, image_url_or_urls):
        """Read every path, URL and data URI in a picture or a (nested) list of pictures; leave the rest as it is."""
        if isinstance(image_url_or_urls, (list, tuple)):
            if len(image_url_or_urls) < 2:
                return [self.fetch_images(image) for image in image_url_or_urls]
            with ThreadPoolExecutor() as decoders:  # Pillow and the network let go of the interpreter meanwhile
                return list(decoders.map(self.fetch_images, image_url_or_urls))
        if isinstance(image_url_or_urls, (str, Path)):
            return load_picture(image_url_or_urls)
        if isinstance(image_url_or_urls, (np.ndarray, torch.Tensor)) and image_url_or_urls.ndim == 2:
            return self.process_image(image_url_or_urls)
        if isinstance(image_url_or_urls, (Image.Image, np.ndarray, torch.Tensor)):
            return image_url_or_urls
        raise ValueError(
            "A picture is a PIL image, an array, a tensor, a path, a URL or a data URI, got "
            f"{type(image_url_or_urls).__name__}."
        )

    def process_image(self, image, input_data_format=None, **kwargs) -> Image.Image:
        """One picture of any accepted type as upright 8-bit RGB."""
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if isinstance(image, torch.Tensor):
            if input_data_format is None and image.ndim == 3 and image.shape[0] in (1, 3, 4):
                input_data_format = ChannelDimension.FIRST  # the custom of tensors
            image = image.detach().cpu()
            image = image.float().numpy() if image.is_floating_point() else image.numpy()
        return array_to_rgb(image, input_data_format)

    def _prepare_images_structure(self, images, *args, **kwargs):
        if isinstance(images, (list, tuple)) and len(images) == 0:
            raise ValueError("The list of pictures is empty.")
        return super()._prepare_images_structure(images, *args, **kwargs)

    def tile_ranges(self, **images_kwargs: Any) -> TileRanges:
        """The four tile ranges that a call with these options uses."""
        settings = {**{name: getattr(self, name) for name in RANGE_NAMES}, **expand_preset(images_kwargs)}
        return tuple(settings[name] for name in RANGE_NAMES)

    @staticmethod
    def _grids(size: tuple[int, int], settings: dict[str, Any], tile_size: int) -> tuple:
        return msac_grids(*size, *(settings[name] for name in RANGE_NAMES), tile_size)

    def count_tiles(self, height: int, width: int, images_kwargs: dict | None = None) -> tuple[int, int, int]:
        """How many detailed, adaptive and thumbnail tiles a picture of this size gives, without its pixels."""
        own = {name: getattr(self, name) for name in (*RANGE_NAMES, "use_thumbnail")}
        settings = {**own, **expand_preset(images_kwargs or {})}
        tile_size = get_size_dict(settings.get("size") or dict(self.size))["height"]
        return tile_counts(*self._grids((width, height), settings, tile_size), settings["use_thumbnail"])

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """How many tiles a picture of this size gives, all three kinds together, without its pixels."""
        return sum(self.count_tiles(height, width, images_kwargs))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; keeps both back ends in `auto_map`, which saving would narrow to one."""
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
    """`kwargs` with the four tile ranges of its `preset`, where they are not given themselves.

    Raises:
        ValueError: There is no preset of that name.
    """
    preset = kwargs.get("preset")
    if preset is None:
        return {name: value for name, value in kwargs.items() if name != "preset"}
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; known are {', '.join(PRESETS)}.")
    given = {name: value for name, value in kwargs.items() if name != "preset" and value is not None}
    return {**dict(zip(RANGE_NAMES, PRESETS[preset])), **given}


def _batch(tiles, grids: list[tuple], use_thumbnail: bool, return_tensors) -> BatchFeature:
    data = {
        "pixel_values": tiles,
        "tile_counts": [tile_counts(*pair, use_thumbnail) for pair in grids],
        "tile_grids": [(*detailed, *adaptive) for detailed, adaptive in grids],
    }
    return BatchFeature(data=data, tensor_type=return_tensors)


class MiniMonkeyImageProcessorPil(_MsacMixin, PilBackend):
    """MSAC with PIL and NumPy: the pixels of the published code, bit by bit."""

    def _preprocess(
        self,
        images: list[Image.Image],
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
        tile_size = size.height
        grids = [self._grids(image.size, settings, tile_size) for image in images]
        tiles = np.concatenate(
            [
                self._cut(image, grid, tile_size, resample)
                for image, pair in zip(images, grids)
                for grid in layer_grids(*pair, use_thumbnail)
            ]
        )  # (T, 3, S, S) uint8
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
        """(columns * rows, 3, S, S) uint8, row by row."""
        columns, rows = grid
        resized = np.asarray(resize_picture(image, tile_size * columns, tile_size * rows, resample))
        tiles = resized.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3)
        return tiles.reshape(columns * rows, 3, tile_size, tile_size)


class MiniMonkeyImageProcessor(_MsacMixin, TorchvisionBackend):
    """MSAC with torchvision: faster than PIL, at most one level of 255 away from it."""

    def _preprocess(
        self,
        images: list[Image.Image],
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
        tile_size = size.height
        grids = [self._grids(image.size, settings, tile_size) for image in images]
        layers = []
        for image, pair in zip(images, grids):
            pixels = _to_tensor(image, device)  # once for all its grids; this copy takes longer than a resize
            layers += [
                self._cut(image, pixels, grid, tile_size, resample) for grid in layer_grids(*pair, use_thumbnail)
            ]
        tiles = self.rescale_and_normalize(
            torch.cat(layers), do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
        return _batch(tiles.contiguous(), grids, use_thumbnail, return_tensors)

    def _cut(
        self, image: Image.Image, pixels: torch.Tensor, grid: tuple[int, int], tile_size: int, resample
    ) -> torch.Tensor:
        """(columns * rows, 3, S, S) uint8, row by row."""
        columns, rows = grid
        resized = self._resize_as_pil(image, pixels, tile_size * columns, tile_size * rows, resample)
        tiles = resized.unflatten(1, (rows, tile_size)).unflatten(3, (columns, tile_size))
        return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def _resize_as_pil(
        self, image: Image.Image, pixels: torch.Tensor, width: int, height: int, resample
    ) -> torch.Tensor:
        """(3, height, width) uint8, at most one level away from `resize_picture`; `pixels` are those of `image`.

        Pillow resizes one direction after the other with 8-bit samples in between. The two kernels differ by a rounding
        in each pass. Reducing averages that out; enlarging does not, nor does reducing by a little, and there Pillow
        itself is used.
        """
        if not all(old == new or old >= LEAST_REDUCTION * new for old, new in zip(image.size, (width, height))):
            return _to_tensor(resize_picture(image, width, height, resample), pixels.device)
        for columns, rows in resizing_steps(*image.size, width, height):
            pixels = self.resize(pixels, SizeDict(height=rows, width=columns), resample)
        return pixels


def _to_tensor(image: Image.Image, device) -> torch.Tensor:
    """(3, H, W) uint8 with the channels last in memory, which torch resizes fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)


__all__ = ["MiniMonkeyImageProcessor", "MiniMonkeyImageProcessorPil"]
