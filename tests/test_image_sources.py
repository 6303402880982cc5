"""What the image processors accept as a picture, how they read it, and what they refuse."""

import base64
import functools
import http.server
import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from conftest import synthetic_picture
from image_helpers import ONE_TILE, PUBLISHED, RAW, SIDE, colour, colours, data_uri, reopened, saved, square
from PIL import Image


ORIENTATION = 0x0112


@pytest.fixture
def picture():
    return synthetic_picture(SIDE, SIDE, 1)


# --- accepted pictures -----------------------------------------------------------------------------------------------


@pytest.fixture
def png(tmp_path, picture):
    path = tmp_path / "picture.png"
    picture.save(path)
    return path


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """The address of a server of `tmp_path`; the suite is offline otherwise."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


FORMS = {
    "pil": lambda picture, path: picture,
    "hwc": lambda picture, path: np.asarray(picture),
    "chw": lambda picture, path: np.asarray(picture).transpose(2, 0, 1),
    "int64": lambda picture, path: np.asarray(picture).astype(np.int64),
    "float 0 to 1": lambda picture, path: np.asarray(picture) / 255,
    "float32 0 to 255": lambda picture, path: np.asarray(picture).astype(np.float32),
    "16 bits": lambda picture, path: np.asarray(picture).astype(np.uint16) * 257,
    "torch chw": lambda picture, path: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
    "torch hwc": lambda picture, path: torch.from_numpy(np.array(picture)),
    "torch float": lambda picture, path: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255,
    "str": lambda picture, path: str(path),
    "Path": lambda picture, path: path,
    "data URI": lambda picture, path: data_uri(path.read_bytes()),
    "base64": lambda picture, path: base64.b64encode(path.read_bytes()).decode(),
    "list": lambda picture, path: [picture],
    "nested list": lambda picture, path: [[str(path)]],
    "batch": lambda picture, path: np.asarray(picture)[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_picture_is_accepted_in_every_form(either, picture, png, form):
    assert (colours(either, FORMS[form](picture, png)) == np.asarray(picture)).all()


def test_url_is_downloaded(either, picture, png, serve):
    assert (colours(either, f"{serve}/{png.name}") == np.asarray(picture)).all()


@pytest.mark.parametrize("shape", [(SIDE, SIDE, 1), (1, SIDE, SIDE)])
def test_array_of_one_channel_is_grey(either, shape):
    assert colour(either, np.full(shape, 77, np.uint8)) == (77, 77, 77)


def test_array_without_channels_is_grey(either):
    assert colour(either, np.full((SIDE, SIDE), 77, np.uint8)) == (77, 77, 77)


def test_array_of_four_channels_lies_on_white(either):
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., 3] = 51
    assert colour(either, pixels) == (204, 204, 204)


def test_layout_of_an_ambiguous_array_can_be_said(either):
    pixels = np.zeros((3, 9, 3), np.uint8)
    pixels[..., 0] = 250
    assert colour(either, pixels, input_data_format="channels_last") == (250, 0, 0)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_low_array_of_three_channels_is_read_as_channels_last(either, rows):
    pixels = np.zeros((rows, 200, 3), np.uint8)
    pixels[..., 0] = 250
    assert colour(either, pixels) == (250, 0, 0)


@pytest.mark.parametrize("nested", [[[0], [1, 2]], [[0, 1, 2]], [0, 1, 2]])
def test_nested_lists_are_read_in_order(either, nested):
    shades = [Image.new("RGB", (9, 9), (value, 0, 0)) for value in (10, 20, 30)]
    pictures = [[shades[i] for i in row] if isinstance(row, list) else shades[row] for row in nested]
    inputs = either(pictures, size=square(SIDE), return_tensors="np", **ONE_TILE, **RAW)
    assert inputs["pixel_values"][:, 0, 0, 0].tolist() == [10, 20, 30]
    assert inputs["tile_counts"].tolist() == [[0, 0, 1]] * 3


def test_callers_pictures_are_not_changed(either, picture):
    array = np.asarray(picture).copy()
    tensor = torch.from_numpy(array.copy())
    pictures = [array, tensor]
    either(pictures, size=square(SIDE), **PUBLISHED)
    assert pictures[0] is array
    assert (array == np.asarray(picture)).all()
    assert (tensor.numpy() == array).all()


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("from_file", [True, False])
def test_exif_orientation_is_applied(pil, tmp_path, picture, orientation, from_file):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    picture.save(path, exif=exif)
    source = path if from_file else Image.open(path)
    assert (colours(pil, source) == UPRIGHT[orientation](np.asarray(picture))).all()


def test_grids_are_those_of_the_upright_picture(either, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (400, 10)).save(path, exif=exif)
    assert tuple(either(path, size=square(SIDE), **PUBLISHED)["tile_grids"][0]) == (1, 12, 1, 7)


def test_transparency_of_a_palette_lies_on_white(either):
    picture = Image.new("P", (SIDE, SIDE), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    assert colour(either, reopened(picture, transparency=1)) == (255, 255, 255)
    assert colour(either, reopened(picture, transparency=0)) == (0, 0, 255)


def test_transparent_colour_of_an_rgb_picture_lies_on_white(either):
    picture = Image.new("RGB", (SIDE, SIDE), (9, 8, 7))
    assert colour(either, reopened(picture, transparency=(9, 8, 7))) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
        ("LA", (30, 255), (30, 30, 30)),
        ("L", 99, (99, 99, 99)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 0x8000, (128, 128, 128)),
        ("I", 0x4000, (64, 64, 64)),
        ("F", 200.0, (200, 200, 200)),
    ],
)
def test_every_mode_becomes_8_bit_rgb(either, mode, value, expected):
    assert colour(either, Image.new(mode, (SIDE, SIDE), value)) == expected


def test_cmyk_jpeg_is_read(either, tmp_path):
    path = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)).save(path, quality=100)
    red, green, blue = colour(either, path)
    assert red > 250
    assert max(green, blue) < 5


def test_16_bit_grey_png_keeps_the_upper_half(either, tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((SIDE, SIDE), 0xABCD, np.uint16)).save(path)
    assert colour(either, path) == (0xAB, 0xAB, 0xAB)


def test_dark_16_bit_grey_png_stays_dark(either, tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((SIDE, SIDE), 200, np.uint16)).save(path)
    assert colour(either, path) == (0, 0, 0)


@pytest.fixture
def animation():
    frames = [Image.new("RGB", (SIDE, SIDE), name) for name in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def test_first_frame_of_an_animation_is_taken(either, animation):
    assert colour(either, data_uri(animation)) == (255, 0, 0)
    assert colour(either, Image.open(io.BytesIO(animation))) == (255, 0, 0)


def test_first_frame_is_taken_where_the_animation_stands_at_another(either, animation):
    picture = Image.open(io.BytesIO(animation))
    picture.seek(1)
    assert colour(either, picture) == (255, 0, 0)
    assert picture.tell() == 1


# --- refused pictures ------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A small PNG that says that it is 30000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def overwritten(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\xff" * 40 + data[len(data) // 2 + 40 :]


BAD_FILES = {
    "zero bytes": (lambda picture: b"", "empty or not a picture"),
    "text": (lambda picture: b"Not a picture.\n" * 50, "empty or not a picture"),
    "truncated JPEG": (lambda picture: saved(picture, "JPEG")[:-200], "cannot be (read as a picture|decoded)"),
    "truncated PNG": (lambda picture: saved(picture, "PNG")[:-500], "cannot be (read as a picture|decoded)"),
    "PNG header alone": (lambda picture: saved(picture, "PNG")[:33], "empty or not a picture"),
    "corrupt PNG": (lambda picture: overwritten(saved(picture, "PNG")), "cannot be (read as a picture|decoded)"),
    "truncated GIF": (lambda picture: saved(picture, "GIF")[:-200], "cannot be (read as a picture|decoded)"),
    "bomb": (lambda picture: bomb(), "too many pixels .* raise PIL.Image.MAX_IMAGE_PIXELS"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_raises(either, tmp_path, picture, kind):
    make, message = BAD_FILES[kind]
    path = tmp_path / "bad.png"
    path.write_bytes(make(picture))
    for source in (path, str(path), data_uri(path.read_bytes())):
        with pytest.raises(ValueError, match=message):
            either(source, size=square(SIDE))


def test_message_names_the_bad_file(either, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="bad.png"):
        either(path)


def test_opened_picture_of_a_broken_file_raises(either, picture):
    broken = Image.open(io.BytesIO(saved(picture, "JPEG")[:-200]))
    with pytest.raises(ValueError, match="cannot be decoded"):
        either(broken, size=square(SIDE))


def test_missing_file_raises(either, tmp_path):
    with pytest.raises(ValueError, match="missing.png.*neither an existing file nor a URL nor base64"):
        either(str(tmp_path / "missing.png"))
    with pytest.raises(ValueError, match="missing.png cannot be read.*No such file"):
        either(tmp_path / "missing.png")


def test_folder_raises(either, tmp_path):
    for source in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match="picture"):
            either(source)


def test_missing_file_of_a_long_name_raises(either):
    with pytest.raises(ValueError, match="no picture"):
        either("a" * 300 + ".png")


def test_base64_without_a_slash_is_read(either):
    assert colour(either, base64.b64encode(saved(Image.new("RGB", (SIDE, SIDE)), "BMP")).decode()) == (0, 0, 0)


def test_url_that_is_not_there_raises(either, serve):
    with pytest.raises(ValueError, match="missing.png cannot be downloaded.*404"):
        either(f"{serve}/missing.png")


def test_url_of_a_text_raises(either, tmp_path, serve):
    (tmp_path / "page.html").write_text("<html></html>")
    with pytest.raises(ValueError, match="page.html is empty or not a picture"):
        either(f"{serve}/page.html")


def test_url_of_nobody_raises(either, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        either("http://127.0.0.1:1/picture.png")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.linspace(-2, 2, 3 * 9 * 9).reshape(3, 9, 9), "no colours.*normalised.*pixel_values"),
        (np.full((9, 9, 3), np.nan), "from nan to nan"),
        (np.full((9, 9, 3), np.inf), "no colours"),
        (np.full((9, 9, 3), 256.0), "no colours"),
        (np.full((9, 9, 3), -1), "no colours"),
        (np.full((9, 9, 3), 70000), "no colours"),
    ],
)
def test_values_that_are_no_colours_raise(either, values, message):
    with pytest.raises(ValueError, match=message):
        either(values)


@pytest.mark.parametrize("shape", [(0, 9, 3), (9, 0, 3), (9, 9, 2), (9, 9, 5)])
def test_shape_that_is_no_picture_raises(either, shape):
    with pytest.raises(ValueError):
        either(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("thing", [3, b"bytes", {"url": "x"}, ["page.png", 3]])
def test_thing_that_is_no_picture_raises(either, thing):
    with pytest.raises(ValueError, match="A picture is a PIL image, an array"):
        either(thing)


@pytest.mark.parametrize("thing", [[None], [[]], [[], "page.png"], np.zeros((0, 9, 9, 3), np.uint8)])
def test_list_that_holds_nothing_raises(either, thing):
    with pytest.raises(ValueError, match="which shows nothing"):
        either(thing)


@pytest.mark.parametrize("thing", [None, []])
def test_no_picture_at_all_raises(either, thing):
    with pytest.raises(ValueError, match="The list of pictures is empty"):
        either(thing)
