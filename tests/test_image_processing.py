"""Pictures to tiles: the recorded pixels, the two back ends, settings, and how many tiles there are."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, synthetic_picture
from conftest import load_image_processor as load
from image_helpers import ONE_TILE, PUBLISHED, RANGE_NAMES, RAW, SIDE, colours, square
from PIL import Image
from transformers import AutoImageProcessor

from minimonkey.image_processing_minimonkey import (
    MiniMonkeyImageProcessor,
    MiniMonkeyImageProcessorPil,
    resize_image,
)


RECORDED = json.loads((FIXTURES / "preprocess" / "pixels.json").read_text())
IN_PARTS = {**PUBLISHED, "use_thumbnail": False}
BACKENDS = {"pil": "MiniMonkeyImageProcessorPil", "torchvision": "MiniMonkeyImageProcessor"}


@pytest.fixture
def picture():
    return synthetic_picture(SIDE, SIDE, 1)


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
    resized = resize_image(synthetic_picture(*old, 1), *new, Image.Resampling.BICUBIC)
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
    again = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True, backend=loaded_as)
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
