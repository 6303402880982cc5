"""What the tests of reading share: documents of every kind, and an engine that needs no model."""

import hashlib
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minimonkey.chat_answer import ChatAnswer, ChatHistory


def draw(text: str, size: tuple[int, int] = (240, 120)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((12, size[1] // 3), text, font=ImageFont.load_default(size=40), fill="black")
    return image


def write_pages(path: Path, texts: list[str], size: tuple[int, int] = (240, 120)) -> Path:
    """Write a PDF or TIFF with a text on each page."""
    first, *others = [draw(text, size) for text in texts]
    first.save(path, save_all=True, append_images=others)
    return path


def empty_pages(count: int, size: tuple[int, int] = (100, 100), is_encrypted: bool = False) -> bytes:
    """A PDF of empty pages, which are rendered at once; or one that opens with a password only."""
    kids = b" ".join(b"%d 0 R" % number for number in range(4, count + 4))
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %d %d] >>" % size
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, count),
        b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"ab" * 32, b"cd" * 32),
        *[page] * count,
    ]
    data, starts = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        starts.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    total = len(objects) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n" % total + b"".join(b"%010d 00000 n \n" % start for start in starts)
    secret = b"/Encrypt 3 0 R /ID [<00> <00>] " if is_encrypted else b""
    trailer = b"trailer\n<< /Size %d /Root 1 0 R %s>>\nstartxref\n%d\n%%%%EOF\n" % (total, secret, len(data))
    return data + table + trailer


def spoil(folder: Path) -> dict[str, str]:
    """Put files into a folder that cannot be read; return what is said of each."""
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing of the kind")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "encrypted.pdf").write_bytes(empty_pages(1, is_encrypted=True))
    (folder / "noise.png").write_bytes(bytes(range(256)) * 8)
    draw("cut").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:500])
    return {
        "broken.pdf": "is no PDF that can be read",
        "empty.pdf": "is empty",
        "encrypted.pdf": "is encrypted and opens with a password only",
        "noise.png": "not a picture that Pillow can read",
        "cut.jpg": "cannot be read|cannot be decoded",
    }


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:8]


class Echo:
    """An engine whose answer is the fingerprint of the image.

    Args:
        tokens: What every prompt has.
        fails: Fails with batches in which one of these fingerprints is.
    """

    def __init__(self, processor, tokens: int = 100, fails: dict[str, Exception] | None = None):
        self.tokenizer, self.tokens, self.fails, self.batches = processor.tokenizer, tokens, fails or {}, []

    def count_tokens(self, width, height, question) -> int:
        return self.tokens

    def answer(self, images, question) -> list[ChatAnswer]:
        self.batches.append(len(images))
        for image in images:
            if fingerprint(image) in self.fails:
                raise self.fails[fingerprint(image)]
        return [ChatAnswer(fingerprint(image), ChatHistory(), [5], [-0.1], "stop") for image in images]


class Looping:
    """An engine to which large images loop, until they are shown as another preset says."""

    def __init__(self, weights, questions):
        self.tokenizer = None

    def count_tokens(self, width, height, question) -> int:
        return 100

    def answer(self, images, question) -> list[ChatAnswer]:
        preset = question.images_kwargs.get("preset", "")
        loops = [image.width < 300 and not preset for image in images]
        return [ChatAnswer(preset, ChatHistory(), [5], None, "repetition" if one else "stop") for one in loops]
