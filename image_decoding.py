"""Upright 8-bit RGB images from files, URLs, PIL images and arrays of any kind.

    image = load_image("page.png")
    pages = pages_of("scan.tiff")  # each of them for load_image

EXIF orientation is applied, transparency is put on white (the published code dropped it, which shows the hidden colours),
16-bit samples keep their upper half, of an animation the first frame is taken. The pages of a TIFF are images of their own.

Deals with images, not with tiles. Whatever is broken, or not an image at all, raises a ValueError.
"""

import base64
import binascii
import importlib
import importlib.util
import io
import os
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from .media_sources import is_url, path_of, read_source, refuse_path, short_name


BACKGROUND = (255, 255, 255)
HINT_LENGTH = 64  # bytes that tell a format
TOO_MANY_PIXELS = (
    "{name} has too many pixels to be opened safely ({error}). If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
)
LONGEST_SIDE = 1_000_000  # pixels; Pillow's resizing needs 32 bytes for each
MOST_PAGES = 1000

# What is decoded within this process. EPS would start Ghostscript and IPTC may hold one, WMF needs Windows, the others have
# no decoder in Pillow.
FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "HEIF"),
    *("ICNS", "ICO", "IM", "IMT", "JPEG", "JPEG2000", "MCIDAS", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
)

PAGED_FORMATS = ("TIFF", "DCX")
PAGED_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xb1\x68\xde\x3a")
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")

# What Pillow's decoders raise for files that are broken or not supported.
DECODER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an EXIF orientation upright."""


class Page(str):
    """The path, data URI or base64 text of a file of several pages, and which of them is meant, from 0.

    Text, so that it passes wherever a path does, also between two copies of this code in one program.
    """

    page: int

    def __new__(cls, source: str | os.PathLike, page: int) -> "Page":
        one = super().__new__(cls, os.fsdecode(source))
        one.page = page
        return one

    def __getnewargs__(self) -> tuple[str, int]:
        return str(self), self.page


# --- files -----------------------------------------------------------------------------------------------------------


def load_image(source: str | os.PathLike, untrusted: bool = False) -> Image.Image:
    """Read an image from a path, a URL, a data URI or a base64 string, as upright 8-bit RGB.

    Of a file of several pages the first is read, with a warning, unless `source` is one of `pages_of`.

    Args:
        untrusted: Refuse paths, and URLs of addresses that are not public.

    Raises:
        ValueError: It cannot be found, read or decoded, or has so many pixels that it may be an attack.
    """
    page = getattr(source, "page", None)
    name = short_name(source)
    with open_image(source, untrusted) as image:
        try:
            _check_pixels(image)
            if page is not None:
                image.seek(page)
            elif (pages := count_pages(image)) > 1:
                warnings.warn(several_pages(name, pages), stacklevel=2)
            return _decoded(image)
        except Image.DecompressionBombError as error:
            raise ValueError(TOO_MANY_PIXELS.format(name=name, error=error)) from error
        except DECODER_ERRORS as error:
            raise ValueError(f"{name} cannot be read as a picture: {_reason(error)}") from error


def several_pages(name: str, pages: int) -> str:
    """Return the warning for a file of pages where one image must be."""
    return (
        f"{name} has {pages} pages, but only one picture is wanted here, so that the first alone is read. In chat, leave out "
        f"<image> or write it {pages} times to show all; or pass pages that you choose, "
        "[page.copy() for page in PIL.ImageSequence.Iterator(PIL.Image.open(path))]."
    )


def pages_of(source, untrusted: bool = False) -> list:
    """List the pages of an image, each for `load_image`; `[source]` where it has one, or is not a file of pages.

    Only TIFF and DCX have pages. A URL is not downloaded for that, and a PIL image is the page at which it stands.

    Raises:
        ValueError: It has more than `MOST_PAGES`, is broken, or is a path where sources are untrusted.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [source]
    if untrusted:
        refuse_path(source)
    try:
        if not untrusted and os.path.isfile(source):
            with open(source, "rb") as file:
                start = file.read(4)
        else:
            start = _start(source, untrusted)
    except OSError:  # whoever reads the image says so
        return [source]
    if not start.startswith(PAGED_STARTS):
        return [source]
    with open_image(source, untrusted) as image:
        try:
            pages = count_pages(image)
        except DECODER_ERRORS as error:
            raise ValueError(f"{short_name(source)} cannot be read as a picture: {_reason(error)}") from error
    if pages > MOST_PAGES:
        raise ValueError(f"{short_name(source)} has {pages} pages, the limit is {MOST_PAGES}; pass a part of them.")
    return [source] if pages < 2 else [Page(source, page) for page in range(pages)]


def _start(source: str | os.PathLike, untrusted: bool) -> bytes:
    """Return the first bytes of a file, data URI or base64 text; none if it is not there."""
    path = None if untrusted else path_of(source)
    if path is not None:
        return _first_bytes(path, 4) if os.path.isfile(path) else b""
    text = os.fsdecode(source)
    text = text[:2000].partition(",")[2] if text[:5].lower() == "data:" else text
    try:
        return base64.b64decode("".join(text[:200].split())[:8])
    except (binascii.Error, ValueError):
        return b""


def open_image(source: str | os.PathLike, untrusted: bool = False) -> Image.Image:
    """Open an image file without decoding it, as `load_image` does: in-process formats alone.

    Raises:
        ValueError: It cannot be found, downloaded or opened, with what would read it where that is known.
    """
    name, data, start = short_name(source), read_source(source, untrusted), b""
    try:
        start = data[:HINT_LENGTH] if isinstance(data, bytes) else _first_bytes(data, HINT_LENGTH)
        return _open(io.BytesIO(data) if isinstance(data, bytes) else data, start)
    except Image.DecompressionBombError as error:
        raise ValueError(TOO_MANY_PIXELS.format(name=name, error=error)) from error
    except UnidentifiedImageError as error:
        if hint := _hint(start):
            raise ValueError(f"{name} {hint}") from error
        if isinstance(data, bytes) and not name[:5].lower() == "data:" and not is_url(name):
            raise ValueError(f"{name!r} is neither an existing file nor a URL nor a picture in base64.") from error
        raise ValueError(f"{name} is empty or not a picture that Pillow can read.") from error
    except DECODER_ERRORS as error:
        raise ValueError(f"{name} cannot be read as a picture: {_reason(error)}") from error


def _first_bytes(path: str, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _open(file: str | io.BytesIO, start: bytes) -> Image.Image:
    Image.init()
    if _is_heif(start) and "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def _hint(start: bytes) -> str:
    """Return what is wrong with a file that is not an image, where its first bytes tell."""
    if start.startswith(b"%PDF"):
        return (
            "is a PDF, not a picture. pypdfium2 makes pictures of its pages: "
            "[page.render(scale=2).to_pil() for page in pypdfium2.PdfDocument(path)]."
        )
    if _is_heif(start) and "HEIF" not in Image.OPEN:
        return "is a HEIC picture, which is read once pillow-heif is installed: pip install pillow-heif"
    if start.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "is PostScript (EPS), which is not opened since another program would run it; save it as PNG."
    if start.lstrip().startswith((b"<svg", b"<?xml")):
        return "is text (SVG?), not a picture of pixels; save it as PNG."
    return ""


def count_pages(image: Image.Image) -> int:
    """Count the pages of an opened TIFF or DCX; 1 of any other image."""
    return getattr(image, "n_frames", 1) if image.format in PAGED_FORMATS else 1


def _check_pixels(image: Image.Image) -> None:
    """Refuse an image at whose size Pillow only warns."""
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"{pixels} pixels, the limit is {limit}")


def _reason(error: BaseException) -> str:
    return "there is not enough memory for it." if isinstance(error, MemoryError) else str(error)


# --- PIL images and arrays -------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to upright 8-bit RGB, transparency on white, the first frame of an animation.

    Of a file of several pages it is the page at which it stands; at the first a warning tells of the others.

    Raises:
        ValueError: Its file is broken, or a side is too long.
    """
    try:
        if (pages := count_pages(image)) > 1 and image.tell() == 0:
            warnings.warn(several_pages("The picture", pages), stacklevel=2)
        return _decoded(image)
    except DECODER_ERRORS as error:
        raise ValueError(f"The picture cannot be decoded: {_reason(error)}") from error


def _decoded(image: Image.Image) -> Image.Image:
    """Do what `to_rgb` does, with the decoder's own errors."""
    _check_sides(image.width, image.height)
    image = upright(standing_frame(image))
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return array_to_rgb(np.asarray(image)) if image.mode in ("I", "F") else _on_background(image)


def _check_sides(width: int, height: int) -> None:
    if max(width, height) > LONGEST_SIDE:
        raise ValueError(
            f"The picture has {width} x {height} pixels; a side has {LONGEST_SIDE:,} at most. Cut it in parts."
        )


def standing_frame(image: Image.Image) -> Image.Image:
    """Return what is seen of a file of several images: the page at which it stands, of an animation the first frame.

    The caller's image stays at its own.
    """
    is_animation = image.format not in (*PAGED_FORMATS, "PSD") and getattr(image, "is_animated", False)
    position = image.tell() if is_animation else 0
    if position == 0:
        return image
    image.seek(0)
    first = image.copy()
    image.seek(position)
    return first


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says."""
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _on_background(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow knows no way to RGBA from there
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def array_to_rgb(array: np.ndarray, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """Convert an array of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels to 8-bit RGB.

    Integers are taken as 0 to 255, or as 0 to 65535 if one exceeds 255; floats as 0 to 1, or as 0 to 255 if one exceeds 1.

    Raises:
        ValueError: Another shape, or values that are not colours (a normalised tensor, say).
    """
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"A picture has shape (H, W), (H, W, C) or (C, H, W), got an array of {array.shape}.")
    if array.ndim == 3:
        # An image of three rows has channels at both ends, as it were; arrays have theirs last by custom.
        layout = input_data_format or (ChannelDimension.LAST if array.shape[-1] in (3, 4) else None)
        layout = layout or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        array = np.moveaxis(array, 0, -1) if ChannelDimension(layout) == ChannelDimension.FIRST else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    _check_sides(array.shape[1], array.shape[0])
    array = _to_uint8(array)
    if array.ndim == 3 and array.shape[-1] == 4:
        return to_rgb(Image.fromarray(array))
    return Image.fromarray(array).convert("RGB")


def tensor_to_rgb(tensor: torch.Tensor, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """Convert a tensor as `array_to_rgb` does an array; where both ends could be channels, the first is by custom."""
    if input_data_format is None and tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4):
        input_data_format = ChannelDimension.FIRST
    try:
        tensor = tensor.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, on the meta device, ...
        raise ValueError(f"A tensor of {tensor.layout} on {tensor.device} is no picture: {error}") from error
    return array_to_rgb(array, input_data_format)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"An array of {array.dtype} is no picture; its values are integers or floats.")
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


# --- resizing --------------------------------------------------------------------------------------------------------


def resizing_steps(old_width: int, old_height: int, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the two (width, height) through which an image is resized, one direction after the other.

    The samples in between are rounded to 8 bits, so that the order decides the pixels: the height goes first where it shrinks
    by more than twice what the width does, which Pillow does by itself from version 13 on and not before.
    """
    shrinks_by = old_height - height
    vertical_first = shrinks_by > 0 and shrinks_by > 2 * (old_width - width)
    return (old_width, height) if vertical_first else (width, old_height), (width, height)


def resize_image(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """Resize as `image.resize((width, height), resample)` of Pillow 13, with the same pixels under every Pillow."""
    for step in resizing_steps(*image.size, width, height):
        image = image.resize(step, resample)
    return image


__all__ = ["Page", "count_pages", "load_image", "open_image", "pages_of", "resize_image", "to_rgb"]
