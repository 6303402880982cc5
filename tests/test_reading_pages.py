"""Which pages there are, how they are opened, and which are read together."""

import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from reading_helpers import Echo, draw, empty_pages, fingerprint, spoil, write_pages

from minimonkey.scripts.reading.batches import ahead, open_pages, plan
from minimonkey.scripts.reading.engines import Question
from minimonkey.scripts.reading.pages import (
    MOST_PIXELS_KEPT,
    Document,
    Settings,
    find_files,
    open_document,
    parse_ranges,
    pixel_limit,
    survey,
)
from minimonkey.scripts.reading.reader import Reader


NEEDS_PDF = "pypdfium2, which reads PDF, is not installed"


def pages_of(path, settings: Settings | None = None) -> list[Image.Image]:
    settings = settings or Settings()
    (document,) = survey([str(path)], settings)
    assert document.error is None, document.error
    with open_document(document, settings) as opened:
        return [opened.image(page) for page in document.pages]


# --- files -----------------------------------------------------------------------------------------------------------


def test_folders_and_globs_are_searched_and_no_file_comes_twice(tmp_path):
    for name in ("b.png", "a.tif", "notes.txt", "inner/c.JPG", "inner/scan.weird"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_files([str(tmp_path), f"{tmp_path}/*.png", str(tmp_path / "inner" / "scan.weird")])
    assert found == [str(tmp_path / name) for name in ("a.tif", "b.png", "inner/c.JPG", "inner/scan.weird")]
    assert find_files([f"{tmp_path}/**/*.JPG"]) == [str(tmp_path / "inner/c.JPG")]


def test_a_name_with_brackets_is_a_file_where_there_is_one(tmp_path):
    path = tmp_path / "page[1].png"
    path.write_bytes(b"x")
    assert find_files([str(path)]) == [str(path)]


@pytest.mark.parametrize(
    ("name", "message"), [("none.png", "no file or folder"), ("*.png", "No file matches"), ("", "holds no file")]
)
def test_an_input_without_files_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        find_files([str(tmp_path / name)])


def test_pdf_without_pypdfium2_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pypdfium2"):
        find_files([str(tmp_path)])


def test_page_ranges():
    assert parse_ranges("1-3, 7,10-") == ((1, 3), (7, 7), (10, None))


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1-2-3", "-4", "1,,2", "½"])
def test_page_ranges_that_cannot_be(text):
    with pytest.raises(ValueError, match="numbers and ranges"):
        parse_ranges(text)


# --- pages -----------------------------------------------------------------------------------------------------------


def test_the_pages_of_a_tiff_are_those_that_were_written(tmp_path):
    texts = ["one", "two", "three"]
    pages = pages_of(write_pages(tmp_path / "scan.tif", texts))
    assert [fingerprint(page) for page in pages] == [fingerprint(draw(text)) for text in texts]
    (chosen,) = pages_of(tmp_path / "scan.tif", Settings(ranges=((2, 2),)))
    assert fingerprint(chosen) == fingerprint(draw("two"))


def test_pages_that_are_not_there_are_the_file_s_own_error(tmp_path):
    path = str(write_pages(tmp_path / "scan.tif", ["one", "two"]))
    assert [one.pages for one in survey([path], Settings(ranges=((2, 9),)))] == [[2]]
    (document,) = survey([path], Settings(ranges=((7, None),)))
    assert "has 2 pages, none of which is among 7-" in document.error


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_turned_image_is_upright_and_its_size_is_that_of_its_pixels(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw("turned").save(tmp_path / f"turned{suffix}", exif=exif)
    (document,) = survey([str(tmp_path / f"turned{suffix}")], Settings())
    with open_document(document, Settings()) as opened:
        assert opened.size(1) == opened.image(1).size == (120, 240)


def test_the_pages_of_a_pdf_have_the_resolution_that_is_asked_for(tmp_path):
    pytest.importorskip("pypdfium2", reason=NEEDS_PDF)
    path = write_pages(tmp_path / "a.pdf", ["one", "two"])
    for dpi, size in ((72, (240, 120)), (144, (480, 240))):
        pages = pages_of(path, Settings(dpi=dpi))
        assert [page.size for page in pages] == [size] * 2 and len({*map(fingerprint, pages)}) == 2
    assert fingerprint(pages_of(path, Settings(((2, 2),), dpi=72))[0]) != fingerprint(
        pages_of(path, Settings(dpi=72))[0]
    )


def test_what_cannot_be_read_costs_its_own_line(tmp_path, processor):
    pytest.importorskip("pypdfium2", reason=NEEDS_PDF)
    messages = spoil(tmp_path)
    write_pages(tmp_path / "good.pdf", ["one", "two"])
    draw("three").save(tmp_path / "good.png")
    settings = Settings(dpi=72)
    reader = Reader(Echo(processor), Question("Read."))
    documents = survey(find_files([str(tmp_path)]), settings)
    batches = plan(documents, set(), settings, lambda width, height: 1, 10_000)
    lines = [line for batch in batches for line in reader.read(open_pages(batch, settings))]
    read = [(line["file"].split("/")[-1], line["page"]) for line in lines if "error" not in line]
    assert read == [("good.pdf", 1), ("good.pdf", 2), ("good.png", 1)]
    failed = {line["file"].split("/")[-1]: line["error"] for line in lines if "error" in line}
    assert failed.keys() == messages.keys()
    for name, message in messages.items():
        assert any(part in failed[name] for part in message.split("|")), failed[name]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_page_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    pytest.importorskip("pypdfium2", reason=NEEDS_PDF)
    write_pages(tmp_path / "a.pdf", ["one"])
    draw("one").save(tmp_path / "a.png")
    for name, hint in (("a.pdf", "lower --dpi"), ("a.png", "--max-pixels")):
        settings = Settings(dpi=72, max_pixels=20_000)
        with (
            pytest.raises(ValueError, match=f"240 x 120 pixels, the limit is 20,000.*{hint}"),
            pixel_limit(settings.max_pixels),
            open_document(Document(str(tmp_path / name)), settings) as opened,
        ):
            opened.image(1)


@pytest.mark.parametrize(("mode", "suffix"), [("1", "tif"), ("L", "jpg")])
def test_a_scan_of_200_megapixels_is_reduced_as_it_is_read(tmp_path, mode, suffix):
    path = tmp_path / f"scan.{suffix}"
    image = Image.new(mode, (16_000, 12_600), 255 if mode == "L" else 1)
    image.paste(0, (0, 0, 8_000, 6_300))
    image.save(path, **({"compression": "group4"} if mode == "1" else {"quality": 50}))
    with pixel_limit(Settings().max_pixels):
        (page,) = pages_of(path)
    assert page.size == (8_000, 6_300) and page.width * page.height <= MOST_PIXELS_KEPT
    assert max(page.getpixel((3_900, 3_000))) < 20 and min(page.getpixel((4_100, 3_300))) > 235


@pytest.mark.parametrize("mode", ["1", "P", "LA", "I;16", "RGBA", "CMYK"])
def test_large_images_of_every_mode_are_reduced(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("minimonkey.scripts.reading.pages.MOST_PIXELS_KEPT", 10_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "page.tif"
    white = Image.new("RGBA" if mode in ("LA", "P") else "L", (240, 120), "white")
    white.paste("black", (0, 0, 120, 120))
    image = Image.new(mode, (240, 120), 60_000) if mode == "I;16" else white.convert(mode)
    image.save(path, exif=exif, compression="tiff_lzw")  # Pillow 13 garbles turned TIFF files without compression
    (page,) = pages_of(path)
    assert page.size == (60, 120) and page.mode == "RGB"
    if mode != "I;16":
        assert max(page.getpixel((30, 20))) < 20 and min(page.getpixel((30, 100))) > 235


MEMORY = """
import resource, sys
from minimonkey.scripts.reading.batches import ahead, open_pages, plan
from minimonkey.scripts.reading.pages import Settings, survey
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
settings = Settings(dpi=72)
batches = plan(survey(sys.argv[1:], settings), set(), settings, lambda width, height: 1000, 4000)
before = peak()
pages = [page.page for batch in ahead(open_pages(batch, settings) for batch in batches) for page in batch]
assert pages == list(range(1, 301)), pages
print(peak() - before)
"""


def test_300_pages_take_the_memory_of_a_few(tmp_path):
    """450 MB if they were all kept."""
    pytest.importorskip("pypdfium2", reason=NEEDS_PDF)
    path = tmp_path / "book.pdf"
    path.write_bytes(empty_pages(300, (595, 842)))
    command = [sys.executable, "-c", MEMORY, str(path)]
    result = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 100


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def documents(tmp_path):
    path = write_pages(tmp_path / "scan.tif", [f"{number}" for number in range(7)])
    draw("wide", (400, 100)).save(tmp_path / "wide.png")
    return [*survey([str(path), str(tmp_path / "wide.png")], Settings())]


def sizes(documents, most, done=(), cost=lambda width, height: width) -> list[int]:
    return [len(batch) for batch in plan(documents, done, Settings(), cost, most)]


def test_a_batch_costs_its_rows_times_its_longest(documents):
    assert sizes(documents, 3 * 240) == [3, 3, 1, 1]
    assert sizes(documents, 4 * 240) == [4, 3, 1]
    assert sizes(documents, 8 * 400) == [8]
    assert sizes(documents, 8 * 400 - 1) == [7, 1]
    assert sizes(documents, 1) == [1] * 8  # a page that is too long for any batch is still read


def test_pages_that_are_done_are_not_planned(documents):
    path = documents[0].path
    batches = plan(documents, {(path, 1), (path, 3)}, Settings(), lambda width, height: 1, 100)
    assert [(page.file, page.page) for batch in batches for page in batch][:2] == [(path, 2), (path, 4)]


def test_a_batch_that_fails_is_read_in_parts_down_to_the_page_that_fails(documents, processor):
    bad = fingerprint(draw("5"))
    engine = Echo(processor, fails={bad: RuntimeError("no memory\nis left")})
    reader = Reader(engine, Question("Read."))
    (batch,) = plan(documents, (), Settings(), lambda width, height: 1, 100)
    lines = reader.read(open_pages(batch, Settings()))
    assert [line["page"] for line in lines] == [*range(1, 8), 1]
    assert [line.get("error") for line in lines] == [None] * 5 + ["no memory is left"] + [None] * 2
    assert lines[6]["answer"] == fingerprint(draw("6")) and lines[7]["answer"] == fingerprint(draw("wide", (400, 100)))


def test_an_error_in_our_own_code_is_not_hidden(documents, processor):
    engine = Echo(processor, fails={fingerprint(draw("5")): TypeError("a mistake")})
    (batch,) = plan(documents, (), Settings(), lambda width, height: 1, 100)
    with pytest.raises(TypeError, match="a mistake"):
        Reader(engine, Question("Read.")).read(open_pages(batch, Settings()))


def test_what_fails_while_it_is_made_ahead_is_raised():
    def numbers():
        yield 1
        raise ValueError("no second")

    coming = ahead(numbers())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="no second"):
        next(coming)
