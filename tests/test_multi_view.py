"""Several cameras as one picture: colours, tiles and points there and back."""

import numpy as np
import pytest
from PIL import Image

from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor, MiniMonkeyImageProcessorPil
from minimonkey.multi_view import stitch_views
from minimonkey.tiling import PRESETS, msac_grids


CAMERAS = ["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (90, 90, 90)]


def views(count=6, size=(1600, 900)):
    return {name: Image.new("RGB", size, colour) for name, colour in list(zip(CAMERAS, COLOURS))[:count]}


@pytest.fixture(scope="module")
def scene():
    return stitch_views(views())


# --- the picture -----------------------------------------------------------------------------------------------------


def test_six_cameras_are_three_by_two(scene):
    assert scene.image.size == (2688, 896) and scene.image.mode == "RGB"
    assert scene.names == tuple(CAMERAS)
    assert scene.sizes == ((1600, 900),) * 6
    assert (scene.columns, scene.view_size) == (3, (896, 448))
    pixels = np.asarray(scene.image).reshape(2, 448, 3, 896, 3)
    for i, colour in enumerate(COLOURS):
        assert (pixels[i // 3, 100:, i % 3] == colour).all()  # below the caption


def test_caption_names_the_camera_in_its_corner(scene):
    plain = stitch_views(views(), captions=False)
    changed = (np.asarray(scene.image) != np.asarray(plain.image)).any(-1)
    for i, name in enumerate(CAMERAS):
        y, x = np.nonzero(changed[i // 3 * 448 : (i // 3 + 1) * 448, i % 3 * 896 : (i % 3 + 1) * 896])
        assert 0 <= x.min() < 20 and 25 * len(name) < x.max() < 45 * len(name)
        assert 0 <= y.min() < 30 and 40 < y.max() < 70
    assert ((np.asarray(scene.image) == (255, 0, 255)).all(-1) & changed).sum() > 10_000


def test_views_are_resized_and_not_changed():
    given = {"wide": Image.new("L", (2000, 100), 50), "tall": Image.new("RGBA", (30, 600), (1, 2, 3, 255))}
    stitched = stitch_views(given, columns=2, view_size=(64, 32), captions=False)
    assert stitched.image.size == (128, 32)
    assert stitched.sizes == ((2000, 100), (30, 600))
    assert stitched.image.getpixel((63, 31)) == (50, 50, 50)
    assert stitched.image.getpixel((64, 0)) == (1, 2, 3)
    assert given["wide"].size == (2000, 100) and given["wide"].mode == "L"


def test_exif_orientation_is_applied():
    view = Image.new("RGB", (100, 50))
    view.getexif()[0x0112] = 6
    assert stitch_views({"phone": view}).sizes == ((50, 100),)


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, 3, (896, 448)), (2, 3, (1792, 448)), (3, 3, (2688, 448)), (5, 2, (1792, 1344))]
)
def test_other_numbers_of_cameras(count, columns, size):
    stitched = stitch_views(views(count), columns=columns)
    assert stitched.image.size == size
    assert stitched.columns == min(count, columns)


def test_cells_without_a_camera_are_black():
    stitched = stitch_views(views(5), columns=2)
    assert not np.asarray(stitched.image)[896:, 896:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "dict of 0 entries"),
        (([Image.new("RGB", (2, 2))],), "list of 1 entries"),
        (({"CAM_FRONT": "front.png"},), "'CAM_FRONT' must be a PIL image, got str; open files first"),
        ((views(), 0), "columns=0"),
        ((views(), 3, (0, 448)), r"view_size=\(0, 448\)"),
        ((views(), 3, (448,)), "view_size"),
    ],
)
def test_what_cannot_be_stitched_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        stitch_views(*arguments)


# --- its tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size", [448, 112])
def test_preset_gives_the_grid_of_whole_cameras_alone(tile_size):
    assert msac_grids(2688, 896, *PRESETS["multi_view"], tile_size) == ((6, 2), (1, 1))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_no_tile_shows_two_cameras(count):
    columns = 2 if count == 4 else 3
    stitched = stitch_views(views(count), columns=columns)
    grid, adaptive = msac_grids(*stitched.image.size, *PRESETS["multi_view"])
    assert adaptive == (1, 1)
    assert grid[0] % stitched.columns == 0 and grid[1] * stitched.columns % count == 0


@pytest.mark.parametrize("image_processor_class", [MiniMonkeyImageProcessor, MiniMonkeyImageProcessorPil])
def test_tiles_show_their_cameras(scene, image_processor_class):
    image_processor = image_processor_class()
    inputs = image_processor(scene.image, preset="multi_view", do_normalize=False, return_tensors="pt")
    assert inputs["tile_grids"].tolist() == [[6, 2, 1, 1]]
    assert inputs["tile_counts"].tolist() == [[12, 0, 1]]
    tiles = (inputs["pixel_values"] * 255).round()  # (13, 3, 448, 448)
    for i, tile in enumerate(tiles[:12]):
        row, column = divmod(i, 6)
        assert tile[:, 100:].flatten(1).unique(dim=1).T.tolist() == [list(COLOURS[row * 3 + column // 2])]


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "found"),
    [
        ((0, 0), ("CAM_FRONT_LEFT", 0, 0)),
        ((500, 250), ("CAM_FRONT", 800, 450)),
        ((1000, 1000), ("CAM_BACK_RIGHT", 1600, 900)),
        ((400, 600), ("CAM_BACK", 320, 180)),
        ((100, 499), ("CAM_FRONT_LEFT", 480, 898.2)),
        ((100, 500), ("CAM_BACK_LEFT", 480, 0)),
    ],
)
def test_points_by_hand(scene, point, found):
    name, x_px, y_px = scene.locate(*point)
    assert name == found[0]
    assert (x_px, y_px) == pytest.approx(found[1:])


def test_points_are_those_of_the_published_evaluation(scene):
    rng = np.random.RandomState(0)
    for x, y in rng.randint(0, 1001, (300, 2)).tolist():
        for i, name in enumerate(CAMERAS):
            row, column = divmod(i, 3)
            x_px = min(max((x / 1000 * 2688 - column * 896) * 1600 / 896, 0), 1600)
            y_px = min(max((y / 1000 * 896 - row * 448) * 900 / 448, 0), 900)
            found = scene.locate(x, y, name)
            assert found[0] == name
            assert found[1:] == pytest.approx((x_px, y_px))


def test_pixels_survive_the_way_there_and_back(scene):
    rng = np.random.RandomState(1)
    for name in CAMERAS:
        points = [*rng.uniform((0, 0), (1600, 900), (200, 2)).tolist(), (0, 0), (1600, 900), (0, 900), (1600, 0)]
        for x_px, y_px in points:
            x, y = scene.place(name, x_px, y_px)
            assert isinstance(x, int) and isinstance(y, int) and 0 <= x <= 1000 and 0 <= y <= 1000
            found = scene.locate(x, y, name)
            assert abs(found[1] - x_px) <= 2.4 + 1e-9  # 1600 * 3 / 2000
            assert abs(found[2] - y_px) <= 0.9 + 1e-9  # 900 * 2 / 2000
            if 3 < x_px < 1597 and 1 < y_px < 899:
                assert scene.locate(x, y) == found


def test_points_next_to_a_seam_need_the_camera(scene):
    x, y = scene.place("CAM_FRONT", 0, 450)
    assert (x, y) == (333, 250)  # the seam is at 333.3
    assert scene.locate(x, y)[0] == "CAM_FRONT_LEFT"
    assert scene.locate(x, y, "CAM_FRONT") == ("CAM_FRONT", 0, 450)


def test_cameras_of_different_sizes_keep_their_own_pixels():
    stitched = stitch_views({"a": Image.new("RGB", (100, 50)), "b": Image.new("RGB", (4000, 3000))})
    assert stitched.locate(250, 500) == ("a", 50, 25)
    assert stitched.locate(750, 500) == ("b", 2000, 1500)
    assert stitched.place("b", 2000, 1500) == (750, 500)


@pytest.mark.parametrize("point", [(-1, 5), (5, 1001), (float("nan"), 5)])
def test_points_outside_the_stitched_picture_raise(scene, point):
    with pytest.raises(ValueError, match="from 0 to 1000"):
        scene.locate(*point)


def test_points_without_a_camera_raise():
    stitched = stitch_views(views(5), columns=2)
    with pytest.raises(ValueError, match="no camera at column 1, row 2"):
        stitched.locate(900, 900)


def test_pixels_outside_a_camera_raise(scene):
    with pytest.raises(ValueError, match="outside the picture of CAM_BACK, 1600 x 900"):
        scene.place("CAM_BACK", 1601, 5)


@pytest.mark.parametrize("method", ["place", "locate"])
def test_unknown_camera_raises(scene, method):
    arguments = ("CAM_TOP", 1, 1) if method == "place" else (1, 1, "CAM_TOP")
    with pytest.raises(ValueError, match="no camera 'CAM_TOP'; there are CAM_FRONT_LEFT"):
        getattr(scene, method)(*arguments)
