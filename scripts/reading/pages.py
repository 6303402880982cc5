"""Pages of files, folders and globs: counted without their pixels, opened one at a time.

    documents = survey(find_files(["scans/", "invoice.pdf", "archive/*.tif"]), Settings(dpi=200))
    with open_document(documents[0], settings) as pages:
        image = pages.image(1)

A page is an image file, a page of a TIFF, or a page of a PDF, which pypdfium2 renders (extra `pdf`). A file that cannot be read
is a `Document` with an error: it costs its own line of a result, never the others. What is in memory is one page at a time,
of at most `max_pixels`.

Knows nothing of models.
"""

import glob
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from minimonkey.image_decoding import DECODER_ERRORS, TURNS, count_pages, open_image, to_rgb
from minimonkey.media_sources import check_file, short_name


PDF_START, PDF_HEADER_WITHIN = b"%PDF-", 1024  # bytes; readers accept what precedes the header
POINTS_PER_INCH = 72
PASSWORD_ERROR = 4  # FPDF_ERR_PASSWORD
# What a folder is searched for; a file that is named itself may have any suffix.
SUFFIXES = frozenset(
    (".pdf", ".png", ".jpg", ".jpeg", ".jp2", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm")
    + (".heic", ".heif", ".avif", ".dcx")
)
# More pixels than these are halved until they fit before anything else is done with them; tiles show far fewer.
MOST_PIXELS_KEPT = 89_478_485
DEFAULT_MAX_PIXELS = 2**28
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112
IRREDUCIBLE = {"1": "L", "P": "RGBA", "PA": "RGBA", "La": "RGBA", "RGBa": "RGBA"}  # modes that Pillow cannot reduce


@dataclass(frozen=True)
class Settings:
    """Which pages are read and how they become images.

    Args:
        ranges: (first, last) page numbers from 1, `last` None for the end; None: all pages.
        dpi: Resolution at which pages of PDF files are rendered.
        max_pixels: The most that one page may have, width times height.
    """

    ranges: tuple[tuple[int, int | None], ...] | None = None
    dpi: float = 200.0
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class Document:
    """A file and the numbers of its pages that are to be read, from 1; or why it cannot be read."""

    path: str
    pages: list[int] = field(default_factory=list)
    error: str | None = None


# --- which files and pages -------------------------------------------------------------------------------------------


def parse_ranges(text: str) -> tuple[tuple[int, int | None], ...]:
    """Parse page numbers like "1-3,7,10-".

    Raises:
        ValueError: It is not of that form, or a range that ends before it begins.
    """
    ranges = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        is_number = first.isdecimal() and (last.isdecimal() or not last)
        if not is_number or int(first) < 1 or (last and int(last) < int(first)):
            raise ValueError(f"Pages are numbers and ranges like 1-3,7,10- counted from 1, got {text!r}.")
        ranges.append((int(first), (int(last) if last else None) if dash else int(first)))
    return tuple(ranges)


def find_files(inputs: list[str]) -> list[str]:
    """List the files that are meant by paths of files, of folders (with all below them) and by globs, each once, in order.

    Raises:
        ValueError: One of the inputs means no file, or PDF files are among them and pypdfium2 is not installed.
    """
    found: dict[str, str] = {}
    for text in inputs:
        if os.path.isdir(text):
            files = _files_below(text)
            known = ", ".join(sorted(SUFFIXES))
            missing = f"The folder {text} holds no file with one of the endings {known}."
        elif os.path.exists(text) or not glob.has_magic(text):
            files, missing = [text], f"There is no file or folder {text}."
            files = files if os.path.exists(text) else []
        else:
            files = sorted(path for path in glob.glob(text, recursive=True) if not os.path.isdir(path))
            missing = f"No file matches {text}."
        if not files:
            raise ValueError(missing)
        for path in files:
            found.setdefault(os.path.realpath(path), path)
    paths = list(found.values())
    if importlib.util.find_spec("pypdfium2") is None and (pdf := [path for path in paths if _suffix(path) == ".pdf"]):
        raise ValueError(
            f"{len(pdf)} files are PDF, {short_name(pdf[0])} for one, which pypdfium2 reads: pip install pypdfium2"
        )
    return paths


def _files_below(folder: str) -> list[str]:
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return sorted(path for path in paths if _suffix(path) in SUFFIXES)


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def survey(paths: list[str], settings: Settings) -> Iterator[Document]:
    """Yield for each file which of its pages are to be read, or why it cannot be; headers alone are read."""
    for path in paths:
        try:
            with _open_file(path, settings) as opened:
                yield Document(path, _chosen(opened.count, settings.ranges, path))
        except ValueError as error:
            yield Document(path, error=str(error))


def _chosen(count: int, ranges: tuple[tuple[int, int | None], ...] | None, path: str) -> list[int]:
    if ranges is None:
        return list(range(1, count + 1))
    chosen = {page for first, last in ranges for page in range(first, min(last or count, count) + 1)}
    if not chosen:
        asked = ",".join(f"{first}-{last or ''}" if first != last else f"{first}" for first, last in ranges)
        raise ValueError(f"{short_name(path)} has {count} pages, none of which is among {asked}.")
    return sorted(chosen)


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_document(document: Document, settings: Settings) -> Iterator["ImageFile | PdfFile"]:
    """Open a document whose pages can then be asked for their size (width, height) and their image.

    Raises:
        ValueError: It cannot be read; so do `size` and `image` for a page that is broken or has too many pixels.
    """
    with _open_file(document.path, settings) as opened:
        yield opened


@contextmanager
def _open_file(path: str, settings: Settings) -> Iterator["ImageFile | PdfFile"]:
    check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(PDF_HEADER_WITHIN)
    except OSError as error:
        raise ValueError(f"{short_name(path)} cannot be read: {error.strerror}.") from error
    if not start:
        raise ValueError(f"{short_name(path)} is empty.")
    opened = PdfFile(path, settings) if PDF_START in start else ImageFile(path, settings)
    try:
        yield opened
    finally:
        opened.close()


class ImageFile:
    """An image file of one page, or a TIFF of several."""

    def __init__(self, path: str, settings: Settings):
        self.path, self.name, self.settings = path, short_name(path), settings
        self.file: Image.Image | None = open_image(path)
        with self._reading() as file:
            self.count = count_pages(file)

    def size(self, page: int) -> tuple[int, int]:
        with self._reading() as file:
            file.seek(page - 1)
            width, height = file.size
            is_turned_by_pillow = file.format == "TIFF"
            is_sideways = not is_turned_by_pillow and file.getexif().get(ORIENTATION) in SIDEWAYS
        _check_pixels(self.name, page, width, height, self.settings.max_pixels)
        return (height, width) if is_sideways else (width, height)

    def image(self, page: int) -> Image.Image:
        self.size(page)
        with self._reading() as file:
            if self.count == 1:
                self.file = None  # it may be the very image that is returned, so that it is not closed here
            if file.width * file.height > MOST_PIXELS_KEPT:
                return to_rgb(_reduced(file))
            return to_rgb(file if self.count == 1 else file.copy())

    @contextmanager
    def _reading(self) -> Iterator[Image.Image]:
        if self.file is None:
            self.file = open_image(self.path)
        try:
            yield self.file
        except DECODER_ERRORS as error:
            reason = "there is not enough memory for it" if isinstance(error, MemoryError) else error
            raise ValueError(f"{self.name} cannot be read: {reason}") from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class PdfFile:
    """A PDF file; its pages are rendered with what was filled into its forms.

    pdfium is not made for threads: one thread alone may use any of these.
    """

    def __init__(self, path: str, settings: Settings):
        if importlib.util.find_spec("pypdfium2") is None:
            raise ValueError(f"{short_name(path)} is a PDF, which pypdfium2 reads: pip install pypdfium2")
        import pypdfium2

        self.name, self.settings, self.error = short_name(path), settings, pypdfium2.PdfiumError
        try:
            self.file = pypdfium2.PdfDocument(path)
        except pypdfium2.PdfiumError as error:
            if error.err_code == PASSWORD_ERROR:
                raise ValueError(
                    f"{self.name} is encrypted and opens with a password only; save it without one."
                ) from error
            raise ValueError(f"{self.name} is no PDF that can be read: {error}") from error
        self.count = len(self.file)
        if self.count == 0:
            self.close()
            raise ValueError(f"{self.name} has no pages.")
        if self.file.get_formtype() != 0:
            self.file.init_forms()

    def size(self, page: int) -> tuple[int, int]:
        scale = self.settings.dpi / POINTS_PER_INCH
        try:
            width, height = (math.ceil(side * scale) for side in self.file.get_page_size(page - 1))
        except self.error as error:
            raise ValueError(f"Page {page} of {self.name} cannot be read: {error}") from error
        _check_pixels(self.name, page, width, height, self.settings.max_pixels, " Choose a lower --dpi.")
        return width, height

    def image(self, page: int) -> Image.Image:
        self.size(page)
        try:
            opened = self.file[page - 1]
            try:
                bitmap = opened.render(scale=self.settings.dpi / POINTS_PER_INCH)
                image = bitmap.to_pil().convert("RGB")  # a copy, which outlives the bitmap
                bitmap.close()
            finally:
                opened.close()
        except (self.error, MemoryError) as error:
            raise ValueError(f"Page {page} of {self.name} cannot be rendered: {error}") from error
        return image

    def close(self) -> None:
        self.file.close()


def _check_pixels(name: str, page: int, width: int, height: int, limit: int, hint: str = "") -> None:
    if width < 1 or height < 1 or width * height > limit:
        raise ValueError(
            f"Page {page} of {name} has {width} x {height} pixels, the limit is {limit:,} (--max-pixels).{hint}"
        )


def _reduced(image: Image.Image) -> Image.Image:
    """Return an upright image with at most MOST_PIXELS_KEPT, each the mean of a square of k x k; JPEG is decoded that small."""
    factor = 1
    while image.width * image.height > MOST_PIXELS_KEPT * factor**2:
        factor *= 2
    if image.format == "JPEG":
        image.draft(image.mode, (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        return image
    image.load()
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in IRREDUCIBLE:
        image = image.convert(IRREDUCIBLE[image.mode])
    image = image.reduce(factor)  # before it is turned, which takes as much memory again
    image.info.clear()  # or it would be turned twice
    return image if turn is None else image.transpose(turn)


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Let Pillow open images of up to `max_pixels` meanwhile, in the whole process."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
