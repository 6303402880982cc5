"""What becomes of picture files: formats, pages, broken ones, and what tells remembered pictures apart."""

import base64
import copy
import io
import pickle
import struct
import sys
import threading
import types
import warnings
import weakref
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, load_image_processor, one_tile
from PIL import Image, ImageFile, PngImagePlugin
from transformers import AutoImageProcessor

from minimonkey.image_decoding import load_image, pages_of, to_rgb
from minimonkey.prompt_memory import image_key


ORIENTATION = 0x0112
SIDE = 8


@pytest.fixture(scope="module")
def image_processor():
    return one_tile(AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True))


def saved(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def plain(colour, mode="RGB") -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def colour(picture: Image.Image) -> tuple[int, int, int]:
    return picture.getpixel((0, 0))


def write(tmp_path, data: bytes, name="picture.png"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        struct.error("bad char"),
        NotImplementedError("pixel format"),
        RuntimeError("decoder"),
        MemoryError(),
        EOFError("sequence"),
        IndexError("index"),
        KeyError("key"),
        TypeError("type"),
        OverflowError("too large"),
        ZeroDivisionError("zero"),
        AttributeError("none"),
        zlib.error("stream"),
        OSError("truncated"),
        SyntaxError("no PNG"),
        Image.DecompressionBombError("bomb"),
        Image.DecompressionBombWarning("bomb"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_a_value_error(monkeypatch, tmp_path, image_processor, error):
    path = write(tmp_path, saved(plain("red"), "PNG"))
    lazy = Image.open(path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    for read in (load_image, image_processor):
        with pytest.raises(ValueError, match="picture.png (cannot be read as a picture|has too many pixels)"):
            read(path)
    for read in (to_rgb, image_processor, lambda picture: image_key(picture, None)):
        with pytest.raises(ValueError, match="The picture cannot be decoded"):
            read(lazy)
    monkeypatch.undo()
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "_open", fail)
    with pytest.raises(ValueError, match="picture.png"):
        load_image(path)


def test_unknown_kinds_of_dds_are_refused(tmp_path):
    header = struct.pack("<7I", 124, 0, SIDE, SIDE, 0, 0, 0) + bytes(44) + struct.pack("<4I", 32, 8, 0, 0) + bytes(40)
    with pytest.raises(ValueError, match="cannot be read as a picture: Unknown pixel format flags 8"):
        load_image(write(tmp_path, b"DDS " + header))


def test_truncated_picture_that_was_opened_has_no_key():
    with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
        image_key(opened(saved(Image.effect_noise((64, 64), 50), "JPEG")[:-200]), None)


@pytest.mark.parametrize("kind", [(9, struct.pack("<i", -5)), (12, None)], ids=["negative", "no integer"])
def test_strange_exif_beside_a_rotation_does_no_harm(tmp_path, kind):
    code, value = kind
    entries = [(ORIENTATION, 3, 1, struct.pack("<HH", 6, 0)), (0x0100, code, 1, value or struct.pack("<I", 38))]
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + table + bytes(4) + struct.pack("<d", 0.5)
    picture = plain("white")
    picture.paste("black", (0, 0, SIDE, SIDE // 2))  # upright this is the right half
    for source in (path := write(tmp_path, saved(picture, "JPEG", quality=95, exif=exif)), Image.open(path)):
        seen = np.asarray(load_image(source) if source is path else to_rgb(source))[..., 0]
        assert seen[:, :3].min() > 200
        assert seen[:, -3:].max() < 50


@pytest.mark.parametrize("make", [lambda n: np.zeros((1, n), np.uint8), lambda n: Image.new("L", (1, n))])
def test_side_that_is_too_long_to_be_resized_is_refused(image_processor, make):
    with pytest.raises(ValueError, match="a side has 1,000,000 at most"):
        image_processor(make(1_000_001))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF.*pypdfium2"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1" + bytes(40), "pip install pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ],
)
def test_what_pillow_does_not_read_is_named_with_what_does(monkeypatch, tmp_path, data, message):
    for source in (write(tmp_path, data), "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match=message):
            load_image(source)


def test_heic_is_read_where_its_package_is_installed(monkeypatch, tmp_path):
    registered = []
    fake = types.ModuleType("pillow_heif")
    fake.register_heif_opener = lambda: registered.append(1)
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    with pytest.raises(ValueError):
        load_image(write(tmp_path, b"\0\0\0\x18ftypheic" + bytes(40)))
    assert registered


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture.eps"])
def test_postscript_runs_nothing_whatever_its_name(monkeypatch, tmp_path, name):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("Ghostscript was started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="PostScript"):
        load_image(write(tmp_path, data, name))


# --- modes and lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_modes_lie_on_white(mode):
    grey = plain((100, 128), "LA") if mode == "La" else plain((100, 100, 100, 128), "RGBA")
    (value,) = {*colour(to_rgb(grey.convert(mode)))}
    assert abs(value - (100 * 128 + 255 * 127) / 255) <= 2


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_lists_within_lists_may_be_mixed(backend):
    processor = load_image_processor(backend)
    one, two, three = (plain(name) for name in ("red", "green", "blue"))
    batch = np.stack([np.asarray(two), np.asarray(three)])
    options = {"size": 28, "return_tensors": "np", "do_normalize": False}
    expected = processor([one, two, three], **options)["pixel_values"]
    for images in (
        [one, [two, three]],
        [[one, two], three],
        [[[one]], [two], three],
        (one, [np.asarray(two), [three]]),
    ):
        assert np.array_equal(processor(images, **options)["pixel_values"], expected)
    assert np.array_equal(processor([one, batch], **options)["pixel_values"], expected)
    assert np.array_equal(processor([[one], batch], **options)["pixel_values"], expected)


def test_only_a_few_pictures_are_in_memory_at_a_time(monkeypatch, tmp_path, image_processor):
    path = write(tmp_path, saved(plain("red"), "PNG"))
    module = image_processor.process_image.__globals__
    load, pictures, alive, lock = module["load_image"], [], [], threading.Lock()

    def count(*args):
        picture = load(*args)
        with lock:
            pictures.append(weakref.ref(picture))
            alive.append(sum(reference() is not None for reference in pictures))
        return picture

    monkeypatch.setitem(module, "load_image", count)
    image_processor([str(path)] * 40, size=28)
    assert len(alive) == 40
    assert max(alive) <= module["DECODED_AHEAD"] + 2


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(3, 4, 4, device="meta"),
        torch.zeros(3, 4, 4).to_sparse(),
        torch.zeros(3, 4, 4, dtype=torch.complex64),
        np.zeros((4, 4, 3), complex),
        np.full((4, 4, 3), "a"),
        np.full((4, 4, 3), None),
    ],
    ids=["meta", "sparse", "complex tensor", "complex array", "text", "objects"],
)
def test_values_of_other_kinds_are_no_pictures(image_processor, values):
    with pytest.raises(ValueError, match="is no picture"):
        image_processor(values)


# --- pages -----------------------------------------------------------------------------------------------------------


PAGES = ("red", "lime", "blue")
RGB = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def scan(tmp_path):
    first, *others = (plain(name) for name in PAGES)
    return write(tmp_path, saved(first, "TIFF", save_all=True, append_images=others), "scan.tiff")


def sources(path) -> list:
    text = base64.b64encode(path.read_bytes()).decode()
    return [path, str(path), path.as_uri(), "data:image/tiff;base64," + text, text]


def test_pages_of_a_tiff_are_pictures(scan):
    for source in sources(scan):
        pages = pages_of(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [colour(load_image(page)) for page in pages] == [RGB[name] for name in PAGES]
        assert len({image_key(page, None) for page in pages}) == 3


def test_pages_can_be_copied(scan):
    page = pages_of(scan)[2]
    for again in (copy.deepcopy(page), pickle.loads(pickle.dumps(page))):
        assert colour(load_image(again)) == RGB["blue"]


def test_one_picture_of_several_pages_is_the_first_with_a_warning(scan):
    for source in sources(scan):
        with pytest.warns(UserWarning, match=r"has 3 pages.*ImageSequence"):
            assert colour(load_image(source)) == RGB["red"]


def test_opened_file_of_pages_is_the_page_at_which_it_stands(scan):
    picture = Image.open(scan)
    picture.seek(2)
    assert colour(to_rgb(picture)) == RGB["blue"]
    assert pages_of(picture) == [picture]


def test_opened_file_at_its_first_page_warns_of_the_others(scan):
    with pytest.warns(UserWarning, match="has 3 pages"):
        assert colour(to_rgb(Image.open(scan))) == RGB["red"]


def test_other_pictures_have_one_page(tmp_path):
    gif = write(tmp_path, saved(plain("red"), "GIF", save_all=True, append_images=[plain("blue")]), "a.gif")
    one = write(tmp_path, saved(plain("red"), "TIFF"), "one.tiff")
    array, missing = np.zeros((3, 3, 3), np.uint8), tmp_path / "missing.tiff"
    for source in (gif, one, array, missing, "http://127.0.0.1:1/scan.tiff"):
        (page,) = pages_of(source)
        assert page is source
    with pytest.raises(ValueError, match="broken.tiff"):
        pages_of(write(tmp_path, b"II*\0", "broken.tiff"))


def test_too_many_pages_are_refused(monkeypatch, scan):
    monkeypatch.setitem(pages_of.__globals__, "MOST_PAGES", 2)
    with pytest.raises(ValueError, match="has 3 pages, the limit is 2"):
        pages_of(scan)


def layered_psd() -> bytes:
    """A red picture of two layers, whose frames Pillow counts from 1."""
    layer = struct.pack(">4i", 0, 0, 1, 1) + struct.pack(">H", 3)
    layer += b"".join(struct.pack(">hI", channel, 3) for channel in range(3))
    layer += b"8BIMnorm" + bytes([255, 0, 0, 0]) + struct.pack(">I", 0)
    info = struct.pack(">h", 2) + layer * 2 + (b"\0\0\x07" * 3) * 2
    masks = struct.pack(">I", len(info)) + info
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIDE, SIDE, 8, 3)
    planes = b"\xff" * SIDE**2 + bytes(2 * SIDE**2)
    return header + bytes(8) + struct.pack(">I", len(masks)) + masks + b"\0\0" + planes


def test_psd_with_layers_is_seen_as_a_whole(tmp_path):
    path = write(tmp_path, layered_psd(), "layers.psd")
    assert Image.open(path).n_frames == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colour(load_image(path)) == RGB["red"]
    assert image_key(Image.open(path), None) == image_key(plain("red"), None)


# --- in a conversation -----------------------------------------------------------------------------------------------


def asked(nano, processor, images, question, **options) -> str:
    history = nano.chat(processor, images, question, return_history=True, max_new_tokens=1, **options)[1]
    return history[-1][0]


def test_chat_shows_the_pages_as_numbered_pictures(nano, processor, sent, scan):
    question = asked(nano, processor, str(scan), "What is it?")
    assert question == "Image-1: <image>\nImage-2: <image>\nImage-3: <image>\nWhat is it?"
    assert asked(nano, processor, [scan, plain("red")], "What?").count("<image>") == 4


def test_chat_shows_the_first_page_where_one_picture_is_named(nano, processor, sent, scan):
    with pytest.warns(UserWarning, match="has 3 pages"):
        assert asked(nano, processor, scan, "<image>\nWhat is it?") == "<image>\nWhat is it?"


def test_pages_stay_the_same_pictures_in_the_next_turn(nano, processor, sent, scan):
    history = nano.chat(processor, scan, "One?", return_history=True)[1]
    assert nano.chat(processor, scan, "Two?", history, return_history=True)[1][-1][0] == "Two?"


def test_batch_shows_pages(nano, processor, sent, scan):
    histories = nano.batch_chat(processor, [scan, None], ["One?", "Two?"], return_history=True)[1]
    assert [history[0][0].count("<image>") for history in histories] == [3, 0]


def test_processor_takes_a_placeholder_for_each_page(processor, scan):
    alone = processor(text="<image>" * 3, images=str(scan))
    assert len(alone["tile_counts"]) == 3
    rows = processor(text=["<image>" * 3, "<image>"], images=[[scan], [plain("red")]])
    assert len(rows["tile_counts"]) == 4
    with pytest.warns(UserWarning, match="has 3 pages"):
        assert len(processor(text="<image>", images=[scan])["tile_counts"]) == 1


@pytest.mark.parametrize("options", [{"images_kwargs": {"untrusted_sources": True}}, {}], ids=["call", "setting"])
def test_untrusted_conversations_open_no_path(monkeypatch, nano, processor, sent, scan, options):
    if not options:
        monkeypatch.setattr(processor.image_processor, "untrusted_sources", True)
    for source in (str(scan), scan, scan.as_uri()):
        with pytest.raises(ValueError, match="is refused: with untrusted_sources=True"):
            nano.chat(processor, source, "What?", return_history=True, **options)
        with pytest.raises(ValueError, match="is refused: with untrusted_sources=True"):
            processor(text="<image>", images=[source], **options)
    videos = options and {"videos_kwargs": options["images_kwargs"]}
    with pytest.raises(ValueError, match="is refused: with untrusted_sources=True"):
        nano.chat(processor, None, "What?", videos="clip.mp4", **videos)
    with pytest.raises(ValueError, match="is refused: with untrusted_sources=True"):
        processor(text="<video>", videos="clip.mp4", **videos)


@pytest.mark.parametrize(
    "options", [5, [("max_tiles", 4)], {"max_tiles": "4"}, {"resample": 99}, {"tiles": 4}, {"size": 10**6}]
)
def test_bad_options_are_refused_before_a_picture_is_opened(nano, processor, options):
    for call in (
        lambda: nano.chat(processor, "missing.png", "What?", images_kwargs=options),
        lambda: nano.chat(processor, "missing.png", "What?", images_kwargs=options, tile_budget=4),
        lambda: nano.batch_chat(processor, ["missing.png"], ["What?"], images_kwargs=options),
        lambda: processor(text="<image>", images="missing.png", images_kwargs=options),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert type(raised.value) is ValueError
        assert "missing.png" not in str(raised.value)


# --- keys ------------------------------------------------------------------------------------------------------------


def palette_picture(alpha: bytes | int | None) -> Image.Image:
    picture = plain(1, "P")
    picture.putpalette([0, 0, 0, 200, 0, 0])
    if alpha is not None:
        picture.info["transparency"] = alpha
    return picture


def test_key_tells_the_alpha_of_a_palette_apart():
    opaque, half, clear = (palette_picture(alpha) for alpha in (None, bytes([255, 128]), 1))
    rgba = plain(1, "P")
    rgba.putpalette([0, 0, 0, 0, 200, 0, 0, 9], "RGBA")
    assert len({image_key(picture, None) for picture in (opaque, half, clear, rgba)}) == 4


def test_key_is_that_of_the_frame_that_is_shown():
    frames = [plain("red"), plain("blue")]
    animation = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    standing = opened(animation)
    standing.seek(1)
    assert image_key(standing, None) == image_key(opened(animation), None)
    assert standing.tell() == 1
    assert image_key(opened(saved(frames[1], "GIF")), None) != image_key(standing, None)


def test_key_tells_pages_and_turns_apart(scan):
    page = Image.open(scan)
    keys = []
    for position in range(3):
        page.seek(position)
        keys.append(image_key(page, None))
    assert len({*keys}) == 3
    picture = Image.effect_noise((SIDE, SIDE), 50)
    turned = picture.copy()
    turned.getexif()[ORIENTATION] = 6
    assert image_key(turned, None) != image_key(picture, None)


def test_key_of_what_cannot_be_read_raises(tmp_path):
    tensors = [torch.zeros(3, 4, 4, device="meta"), torch.zeros(3, 4, 4).to_sparse()]
    for source in (tmp_path, tmp_path / "missing.png", {"url": "x"}, None, *tensors):
        with pytest.raises(ValueError):
            image_key(source, None)
    assert image_key(torch.zeros(3, 2, 2), None) != image_key(torch.zeros(3, 4, 1), None)


def test_truncated_files_are_not_loaded_by_halves():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
