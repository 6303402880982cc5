"""Pictures to tiles: the recorded pixels, the two back ends, what is accepted as a picture and what is refused."""

import base64
import functools
import hashlib
import http.server
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, synthetic_picture
from PIL import Image
from transformers import AutoImageProcessor

from minimonkey.image_processing_minimonkey import (
    MiniMonkeyImageProcessor,
    MiniMonkeyImageProcessorPil,
    resize_picture,
)


RECORDED = json.loads((FIXTURES / "preprocess" / "pixels.json").read_text())
RANGE_NAMES = ("min_tiles", "max_tiles", "adaptive_min_tiles", "adaptive_max_tiles")
ONE_TILE = dict.fromkeys(RANGE_NAMES, 1)
PUBLISHED = dict(zip(RANGE_NAMES, (4, 12, 3, 7)))
IN_PARTS = {**PUBLISHED, "use_thumbnail": False}
RAW = {"do_rescale": False, "do_normalize": False}
SIDE = 28
BACKENDS = {"pil": "MiniMonkeyImageProcessorPil", "torchvision": "MiniMonkeyImageProcessor"}
ORIENTATION = 0x0112


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def load(backend: str, source=ROOT):
    return AutoImageProcessor.from_pretrained(source, trust_remote_code=True, backend=backend)


@pytest.fixture(scope="module")
def pil():
    return load("pil")


@pytest.fixture(scope="module")
def torchvision():
    return load("torchvision")


@pytest.fixture(scope="module", params=BACKENDS)
def either(request):
    return load(request.param)


@pytest.fixture
def picture():
    return synthetic_picture(SIDE, SIDE, 1)


def colours(processor, picture, side=SIDE, **options) -> np.ndarray:
    """A picture of one tile as the (S, S, 3) colours that the processor sees."""
    inputs = processor(picture, size=square(side), return_tensors="np", **ONE_TILE, **RAW, **options)
    return inputs["pixel_values"][0].transpose(1, 2, 0)


def colour(processor, picture, **options) -> tuple[int, ...]:
    """The colour of a picture that has only one."""
    seen = colours(processor, picture, **options).reshape(-1, 3)
    assert (seen == seen[0]).all()
    return tuple(seen[0].tolist())


def saved(picture, format, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def reopened(picture, format="PNG", **options) -> Image.Image:
    return Image.open(io.BytesIO(saved(picture, format, **options)))


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


# --- recorded pixels -------------------------------------------------------------------------------------------------


def recorded_options(record) -> dict:
    return {**dict(zip(RANGE_NAMES, record["ranges"])), "size": square(record["tile_size"])}


def record_name(record) -> str:
    return "x".join(map(str, record["size"]))


def sha256(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("record", RECORDED, ids=record_name)
def test_pil_tiles_equal_the_recorded_ones_bit_by_bit(pil, record):
    picture = synthetic_picture(*record["size"], record["seed"])
    assert sha256(np.asarray(picture)) == record["source_sha256"]
    tiles = pil(picture, return_tensors="np", **recorded_options(record))["pixel_values"]
    assert tiles.dtype == np.float32
    assert sha256(tiles) == record["sha256_float32"]


@pytest.mark.parametrize("record", RECORDED, ids=record_name)
def test_tiles_stand_in_the_recorded_order(pil, record):
    picture = synthetic_picture(*record["size"], record["seed"])
    tiles = pil(picture, return_tensors="np", **RAW, **recorded_options(record))["pixel_values"]
    assert [sha256(tile)[:16] for tile in tiles] == record["tiles_uint8"]


@pytest.mark.parametrize("record", RECORDED, ids=record_name)
def test_counts_and_grids_equal_the_recorded_ones(either, record):
    inputs = either(synthetic_picture(*record["size"], record["seed"]), **recorded_options(record))
    detailed, adaptive = record["detailed"], record["adaptive"]
    assert [list(grids) for grids in inputs["tile_grids"]] == [[*detailed, *adaptive]]
    counts = [0 if grid == [1, 1] else grid[0] * grid[1] for grid in (detailed, adaptive)]
    assert [list(row) for row in inputs["tile_counts"]] == [[*counts, 1]]
    assert len(inputs["pixel_values"]) == sum(counts) + 1 == len(record["tiles_uint8"])


# What `Image.resize` of Pillow 13.0.0 makes of `synthetic_picture(*old, 1)`, bicubic: (old size, new size, sha256).
RESIZED = [
    ((60, 50), (90, 80), "3afead2c3348cb85"),
    ((60, 200), (40, 50), "c28c4ab90855bc3e"),
    ((200, 60), (50, 40), "fa24c3b1d76798ac"),
    ((40, 90), (120, 30), "92eb7506e081c6ac"),
    ((90, 40), (30, 120), "0a43f5cd7dcf0ed9"),
    ((60, 50), (60, 20), "9820915be3e2f6eb"),
    ((50, 60), (20, 60), "aca6aeb0299f8b2b"),
    ((60, 90), (45, 60), "51db92652a9df7b7"),
    ((60, 81), (50, 60), "49f8791175ab6440"),
    ((40, 60), (90, 59), "6aacc3cda2cf23d8"),
]


@pytest.mark.parametrize(("old", "new", "digest"), RESIZED)
def test_resized_pixels_do_not_depend_on_the_pillow_version(old, new, digest):
    resized = resize_picture(synthetic_picture(*old, 1), *new, Image.Resampling.BICUBIC)
    assert resized.size == new
    assert sha256(np.asarray(resized))[:16] == digest


# --- the two back ends -----------------------------------------------------------------------------------------------


def stripes(width: int, height: int) -> Image.Image:
    """Hard edges, where a resize overshoots most."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[::3] = 0
    pixels[:, ::5] = (200, 0, 0)
    return Image.fromarray(pixels)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(7).randint(0, 256, (height, width, 3)).astype(np.uint8))


def largest_difference(pil, torchvision, picture, **options) -> int:
    tiles = [backend(picture, return_tensors="np", **RAW, **options)["pixel_values"] for backend in (pil, torchvision)]
    assert tiles[0].dtype == tiles[1].dtype == np.uint8
    return int(np.abs(tiles[0].astype(int) - tiles[1]).max())


@pytest.mark.parametrize("record", RECORDED, ids=record_name)
def test_torchvision_is_within_one_level_of_pil_on_the_recorded_pictures(pil, torchvision, record):
    picture = synthetic_picture(*record["size"], record["seed"])
    assert largest_difference(pil, torchvision, picture, **recorded_options(record)) <= 1


@pytest.mark.parametrize("draw", [stripes, noise])
@pytest.mark.parametrize("size", [(500, 333), (333, 500), (1000, 1400), (90, 900), (600, 20), (3, 3), (1, 200)])
def test_torchvision_is_within_one_level_of_pil(pil, torchvision, draw, size):
    assert largest_difference(pil, torchvision, draw(*size), size=square(SIDE), **PUBLISHED) <= 1


def test_torchvision_is_within_one_level_of_pil_where_a_side_hardly_shrinks(pil, torchvision):
    options = {"min_tiles": 7, "max_tiles": 7, "adaptive_min_tiles": 1, "adaptive_max_tiles": 1, "size": square(112)}
    assert largest_difference(pil, torchvision, stripes(113, 1200), **options) <= 1


def test_normalised_tiles_of_the_back_ends_differ_by_one_level_at_most(pil, torchvision):
    picture = synthetic_picture(640, 480, 3)
    tiles = [backend(picture, size=square(SIDE), return_tensors="pt", **PUBLISHED) for backend in (pil, torchvision)]
    left, right = (inputs["pixel_values"] for inputs in tiles)
    assert left.dtype == right.dtype == torch.float32
    deviation = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    assert ((left - right).abs() * deviation).max() * 255 < 1.001


def test_pixels_are_normalised_as_imagenet(either):
    inputs = either(Image.new("RGB", (9, 9), (255, 0, 51)), size=square(SIDE), return_tensors="pt", **ONE_TILE)
    expected = torch.tensor([(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    assert torch.allclose(inputs["pixel_values"][0].flatten(1).mean(1), expected, atol=1e-5)


def test_auto_class_gives_the_back_end_asked_for():
    assert type(load("pil")).__name__ == "MiniMonkeyImageProcessorPil"
    assert type(load("torchvision")).__name__ == "MiniMonkeyImageProcessor"


def test_auto_class_gives_torchvision_by_default():
    processor = AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True)
    assert type(processor).__name__ == "MiniMonkeyImageProcessor"


@pytest.mark.parametrize("saved_as", BACKENDS)
@pytest.mark.parametrize("loaded_as", BACKENDS)
def test_saved_processor_loads_as_either_back_end(tmp_path, picture, saved_as, loaded_as):
    processor = load(saved_as)
    processor.max_tiles = 6
    processor.save_pretrained(tmp_path)
    again = load(loaded_as, tmp_path)
    assert type(again).__name__ == BACKENDS[loaded_as]
    assert again.to_dict() == processor.to_dict()
    assert (colours(again, picture) == colours(processor, picture)).all()


def test_saved_settings_name_both_back_ends(tmp_path, either):
    either.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["auto_map"]["AutoImageProcessor"] == {
        name: f"image_processing_minimonkey.{cls}" for name, cls in BACKENDS.items()
    }
    assert settings["image_processor_type"] == "MiniMonkeyImageProcessor"


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[MiniMonkeyImageProcessor, MiniMonkeyImageProcessorPil])
def processor_class(request):
    return request.param


def ranges_of(processor) -> tuple[int, ...]:
    return tuple(getattr(processor, name) for name in RANGE_NAMES)


def test_defaults_are_those_of_the_published_demo(processor_class):
    processor = processor_class()
    assert ranges_of(processor) == (4, 12, 3, 7)
    assert (processor.size["height"], processor.size["width"]) == (448, 448)


def test_preset_at_init_sets_the_ranges(processor_class):
    assert ranges_of(processor_class(preset="docvqa")) == (1, 24, 1, 8)


def test_range_at_init_wins_over_the_preset(processor_class):
    assert ranges_of(processor_class(preset="docvqa", max_tiles=6)) == (1, 6, 1, 8)


def test_preset_of_a_call_is_that_of_its_ranges(either, picture):
    by_name = either(picture, preset="ccbench", size=square(SIDE), return_tensors="pt")
    by_ranges = either(picture, size=square(SIDE), return_tensors="pt", **dict(zip(RANGE_NAMES, (3, 8, 1, 4))))
    assert by_name["tile_grids"].tolist() == by_ranges["tile_grids"].tolist()
    assert torch.equal(by_name["pixel_values"], by_ranges["pixel_values"])


def test_range_of_a_call_wins_over_its_preset(either, picture):
    inputs = either(picture, preset="ccbench", min_tiles=6, max_tiles=6, size=square(SIDE))
    assert tuple(inputs["tile_counts"][0])[0] == 6


def test_settings_of_a_call_do_not_stay(either, picture):
    before = either.to_dict()
    either(picture, preset="ccbench", size=square(SIDE))
    assert either.to_dict() == before


def test_preset_is_saved_as_its_ranges(tmp_path, processor_class):
    processor_class(preset="mme").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert tuple(settings[name] for name in RANGE_NAMES) == (3, 9, 1, 4)
    assert "preset" not in settings


BAD_SETTINGS = [
    ({"size": {"height": 28, "width": 56}}, "Tiles are square"),
    ({"size": {"shortest_edge": 28}}, "Tiles are square"),
    ({"size": {"height": 0, "width": 0}}, "Tiles are square"),
    ({"min_tiles": 7, "max_tiles": 6}, "detailed tile range 7 to 6"),
    ({"min_tiles": 0}, "detailed tile range 0"),
    ({"adaptive_min_tiles": 7, "adaptive_max_tiles": 6}, "adaptive tile range 7 to 6"),
    ({"preset": "nonsense"}, "Unknown preset 'nonsense'; known are default, chartqa"),
    ({"do_resize": False}, "do_resize=False cannot work"),
    ({"max_tiles": "4"}, "max_tiles|range must be two integers"),
    ({"max_tiles": 10**6}, "at most 1000 tiles"),
    ({"adaptive_max_tiles": 10**7}, "at most 1000 tiles"),
    ({"size": square(10**6)}, "are [0-9,]* for a picture, the limit is"),
    ({"size": square(4096), "max_tiles": 500}, "50[28] tiles of 4096 x 4096 pixels"),
    ({"resample": 99}, r"one of Pillow's filters, .*BICUBIC.*; got 99"),
    ({"resample": 2.0}, "resample"),
    ({"image_std": (0.0, 1.0, 1.0)}, "image_std.* above 0"),
    ({"image_mean": (0.5, 0.5)}, "image_mean is a number for each of 3 channels"),
    ({"image_mean": (0.5, float("nan"), 0.5)}, "image_mean"),
    ({"preset": ["docvqa"]}, "Unknown preset"),
]
BAD_OPTIONS = [
    ({"tiles": 4}, "Unknown options of images: tiles; known are min_tiles"),
    ({"max_tiles": True}, "max_tiles"),
    ({"max_tiles": 4.0}, "max_tiles"),
    ({"max_tiles": None}, "max_tiles"),
    ({"size": "28"}, "size"),
    ({"size": [28]}, "Tiles are square"),
    ({"size": {"height": "28", "width": "28"}}, "size"),
    ({"resample": "bicubic"}, "resample"),
    ({"do_rescale": "yes"}, "do_rescale"),
    ({"use_thumbnail": 1}, "use_thumbnail"),
    ({"device": "nonsense"}, "device"),
    ({"input_data_format": "hwc"}, "input_data_format"),
    ({"return_tensors": "list"}, "list"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_raise_at_init(processor_class, settings, message):
    with pytest.raises(ValueError, match=message):
        processor_class(**settings)


@pytest.mark.parametrize(("settings", "message"), [*BAD_SETTINGS, *BAD_OPTIONS])
def test_bad_settings_raise_in_a_call_before_a_picture_is_opened(either, settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        either("missing.png", **settings)
    assert "missing.png" not in str(raised.value)


@pytest.mark.parametrize("options", [5, "docvqa", [("max_tiles", 4)]])
def test_options_that_are_no_dict_raise(either, options):
    for ask in (either.check_options, lambda options: either.count_tiles(9, 9, options)):
        with pytest.raises(ValueError, match="a dict of options"):
            ask(options)


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_every_filter_gives_the_same_in_both_back_ends(pil, torchvision, resample):
    picture = noise(300, 200)
    assert largest_difference(pil, torchvision, picture, size=square(SIDE), resample=resample, **ONE_TILE) <= 1


# --- tile counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (480, 640), (20, 800), (800, 20), (61, 59)])
@pytest.mark.parametrize(
    "options", [PUBLISHED, ONE_TILE, {"preset": "docvqa"}, {"preset": "infovqa", "max_tiles": 9}, IN_PARTS]
)
def test_number_of_patches_is_what_comes_out(either, size, options):
    options = {**options, "size": square(SIDE)}
    tiles = either(Image.new("RGB", size), **options)["pixel_values"]
    assert either.get_number_of_image_patches(size[1], size[0], options) == len(tiles)


def test_without_thumbnail_the_other_tiles_are_the_same(either, processor_class):
    image = Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).convert("RGB")
    whole, parts = either(image, **PUBLISHED), either(image, **IN_PARTS)
    assert tuple(parts["tile_counts"][0]) == (*whole["tile_counts"][0][:2], 0)
    np.testing.assert_array_equal(parts["pixel_values"], whole["pixel_values"][:-1])
    assert processor_class(use_thumbnail=False).to_dict()["use_thumbnail"] is False


def test_number_of_patches_uses_the_processors_own_settings(either):
    tiles = either(Image.new("RGB", (300, 200)))["pixel_values"]
    assert either.get_number_of_image_patches(200, 300) == len(tiles)


def test_tiles_of_several_pictures_follow_each_other(either):
    pictures = [synthetic_picture(50, 40, 1), synthetic_picture(40, 90, 2)]
    options = {**PUBLISHED, "size": square(SIDE), "return_tensors": "pt"}
    together = either(pictures, **options)
    alone = [either(picture, **options) for picture in pictures]
    for name in ("pixel_values", "tile_counts", "tile_grids"):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone])), name


def test_last_tile_is_the_whole_picture(pil):
    picture = synthetic_picture(90, 60, 4)
    tiles = pil(picture, size=square(SIDE), return_tensors="np", **PUBLISHED, **RAW)["pixel_values"]
    assert (tiles[-1].transpose(1, 2, 0) == np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).all()


@pytest.mark.parametrize(("size", "grids"), [((200, 1), (12, 1, 7, 1)), ((1, 200), (1, 12, 1, 7))])
def test_very_long_pictures_become_a_strip(either, size, grids):
    inputs = either(Image.new("RGB", size), size=square(SIDE), **PUBLISHED)
    assert tuple(inputs["tile_grids"][0]) == grids
    assert tuple(inputs["tile_counts"][0]) == (12, 7, 1)


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


@pytest.mark.parametrize("thing", [None, 3, b"bytes", {"url": "x"}, [None]])
def test_thing_that_is_no_picture_raises(either, thing):
    with pytest.raises(ValueError, match="A picture is a PIL image, an array"):
        either(thing)


def test_no_picture_at_all_raises(either):
    with pytest.raises(ValueError, match="(?i)picture|image"):
        either([])
