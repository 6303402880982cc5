"""What visitors of the demo page bring, as images and videos that a message can hold: uploaded files and web addresses.

    media = read_file("/tmp/upload/invoice.pdf", pages="2-3")
    media = read_address("https://example.org/page.png")

Everything here comes from strangers. A file is one that the page has stored itself; an address must be public
(media_sources.py), so that neither this machine's files nor its network can be reached. What would take much memory or time is
refused before it is decoded: the limits stand below.

Deals with files, not with pages in the browser or models.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from minimonkey.media_sources import DownloadLimits, is_url, local_file, short_name
from minimonkey.scripts.reading.pages import Document, PdfFile, open_document, parse_ranges
from minimonkey.scripts.reading.pages import Settings as PageSettings
from minimonkey.video_frames import load_frames


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
SUFFIXES = (*IMAGE_SUFFIXES, ".pdf", *VIDEO_SUFFIXES)

MOST_BYTES = 32 * 2**20  # of a file
DOWNLOAD = DownloadLimits(MOST_BYTES, 30.0)
MOST_PIXELS = 40_000_000  # of an image, and of a frame of a video
MOST_PAGES = 8  # of a file at once
MOST_FRAME_PIXELS = 4096 * 2304
FRAMES = 8  # that are shown of a video
OPENING = PageSettings(dpi=150, max_pixels=2**62)  # how many pixels a page may have is looked at here

_pdfium = threading.Lock()  # PDFium works for one thread at a time


@dataclass(frozen=True)
class Medium:
    """An image or a video: what a message holds of it, and what a person is shown (its frames, or itself)."""

    name: str
    item: dict[str, Any]
    shown: list[Image.Image]

    @property
    def is_video(self) -> bool:
        return self.item["type"] == "video"


def read_file(path: str | Path, pages: str = "", name: str | None = None) -> list[Medium]:
    """Read the images of an uploaded file: itself, the pages of a PDF or TIFF, or the frames of a video.

    Args:
        pages: Which pages of several are wanted, from 1: "3", "2-5", "1,4-6"; empty: all.
        name: What to call it; by default the file's own name.

    Raises:
        ValueError: It cannot be read, is too large, or has more pages than `MOST_PAGES` of which none were chosen.
    """
    path, name = Path(path), short_name(name or Path(path).name)
    suffix = Path(name).suffix.lower()
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{name} has {path.stat().st_size / 2**20:.0f} MB, the limit is {MOST_BYTES / 2**20:.0f} MB.")
    try:
        if suffix in VIDEO_SUFFIXES:
            return [_read_video(path, name)]
        with _pdfium:
            return _read_pages(path, name, pages)
    except ValueError as error:  # which names where the file lies here, and what only the page's owner can do
        raise ValueError(str(error).replace(str(path), name).partition(" If you trust it")[0]) from error


def read_address(address: str, pages: str = "") -> list[Medium]:
    """Download and read what stands at a public http(s) address, see `read_file`.

    Raises:
        ValueError: It is no such address, cannot be downloaded, or cannot be read.
    """
    if not is_url(address):
        raise ValueError(f"{short_name(address)} is no address that begins with http:// or https://; upload a file.")
    name = Path(urlsplit(address).path).name or "download"
    try:
        with local_file(address, DOWNLOAD, untrusted=True) as path:
            return read_file(path, pages, name)
    except ValueError as error:
        raise ValueError(str(error).replace(", and with untrusted_sources=True others are refused", "")) from error


def choose_pages(pages: str, count: int, name: str) -> list[int]:
    """Return the page numbers, from 1, that a text like "1,4-6" chooses of `count`; all of them if it is empty.

    Raises:
        ValueError: It is no such text, names a page that there is not, or more than `MOST_PAGES` are chosen.
    """
    chosen = [(first, last or count) for first, last in parse_ranges(pages or "1-")]
    if wrong := [f"{first}-{last}" for first, last in chosen if not 1 <= first <= last <= count]:
        raise ValueError(f"{name} has pages 1 to {count}; {wrong[0]} is not among them.")
    numbers = sorted({number for first, last in chosen for number in range(first, last + 1)})
    if len(numbers) > MOST_PAGES:
        raise ValueError(
            f"{len(numbers)} pages of {name} are too many: at most {MOST_PAGES} at once. Choose them under Pages, for "
            f"example 1-{MOST_PAGES}."
        )
    return numbers


def _read_pages(path: Path, name: str, pages: str) -> list[Medium]:
    media = []
    with open_document(Document(str(path)), OPENING) as opened:
        for number in choose_pages(pages, opened.count, name):
            width, height = opened.size(number)
            if width * height > MOST_PIXELS:
                at = f" at {OPENING.dpi} dpi" if isinstance(opened, PdfFile) else ""
                raise ValueError(
                    f"Page {number} of {name} has {width} x {height} pixels{at}, the limit is {MOST_PIXELS // 10**6} million."
                )
            image = opened.image(number)
            medium = {"type": "image", "image": image}
            media.append(Medium(name if opened.count == 1 else f"{name}, page {number}", medium, [image]))
    return media


def _read_video(path: Path, name: str) -> Medium:
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{name} is a video, which needs PyAV here: pip install av") from error
    try:
        with av.open(str(path)) as container:
            sizes = [(stream.width, stream.height) for stream in container.streams.video]
    except av.FFmpegError as error:
        raise ValueError(f"{name} cannot be read as a video: it is damaged, or of an unknown kind.") from error
    if any(width * height > MOST_FRAME_PIXELS for width, height in sizes):
        raise ValueError(f"{name} has frames of more than {MOST_FRAME_PIXELS:,} pixels; make it smaller.")
    frames = load_frames(path, num_frames=FRAMES, backend="pyav")
    return Medium(name, {"type": "video", "video": frames}, [Image.fromarray(frame) for frame in frames])
