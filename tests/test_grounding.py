"""Boxes in answers: reading, writing, pixels and drawing, with cases worked by hand."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from minimonkey.grounding import Grounding, denormalise, draw_boxes, format_box, normalise, parse_boxes


RED, BLUE = (214, 39, 40), (31, 119, 180)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<ref>the dog</ref><box>[[1, 2, 3, 4]]</box>", [("the dog", (1, 2, 3, 4))]),
        ("Here: <ref> dog </ref> <box> [ [1,2,3,4] ] </box>.", [("dog", (1, 2, 3, 4))]),
        ("<ref>dog</ref>\n<box>[[1, 2,\n 3, 4]]</box>", [("dog", (1, 2, 3, 4))]),
        ("<ref>cars</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", [("cars", (1, 2, 3, 4)), ("cars", (5, 6, 7, 8))]),
        ("<ref>cars</ref><box>[[1,2,3,4],[5,6,7,8],]</box>", [("cars", (1, 2, 3, 4)), ("cars", (5, 6, 7, 8))]),
        (
            "<ref>ship</ref><box>[[0, 0, 10, 10]]</box>\n<ref>plane</ref><box>[[20, 20, 1000, 1000]]</box>",
            [("ship", (0, 0, 10, 10)), ("plane", (20, 20, 1000, 1000))],
        ),
        ("<box>[[1, 2, 3, 4]]</box>", [(None, (1, 2, 3, 4))]),
        ("<ref>dog</ref><box>[1, 2, 3, 4]</box>", [("dog", (1, 2, 3, 4))]),
        ("<ref>dog</ref><box>[[1.5, .25, 3., 4.75]]</box>", [("dog", (1.5, 0.25, 3.0, 4.75))]),
        ("<ref>a</ref> and <ref>b</ref><box>[[1, 2, 3, 4]]</box>", [("b", (1, 2, 3, 4))]),
        ("<ref>a</ref> is at <box>[[1, 2, 3, 4]]</box>", [(None, (1, 2, 3, 4))]),
        ("<ref>狗</ref><box>[[1, 2, 3, 4]]</box>", [("狗", (1, 2, 3, 4))]),
        ("<ref><c1></ref><box>[[1, 2, 3, 4]]</box>", [("<c1>", (1, 2, 3, 4))]),
        ("<ref></ref><box>[[1, 2, 3, 4]]</box>", [("", (1, 2, 3, 4))]),
        ("<ref>line</ref><box>[[5, 2, 5, 2]]</box>", [("line", (5, 2, 5, 2))]),
        ("<ref>dog</ref><box>[[1, 2, 3, 4]]</box> of [[9, 9, 10, 10]]", [("dog", (1, 2, 3, 4))]),
        ("<ref>dog</ref>", []),
        ("No box.", []),
        ("", []),
    ],
)
def test_tagged_boxes(text, found):
    assert parse_boxes(text) == [Grounding(label, box) for label, box in found]


def test_many_spaces_are_read():
    spaces = " " * 200_000
    assert parse_boxes(f"<box>[[1, 2, 3, 4]{spaces},{spaces}]</box>") == [Grounding(None, (1, 2, 3, 4))]
    with pytest.raises(ValueError, match="is not a list of boxes"):
        parse_boxes(f"<box>[[1, 2, 3, 4]{spaces}x]</box>")


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("the dog[[1, 2, 3, 4]]", [(1, 2, 3, 4)]),
        ("It is at [1,2,3,4].", [(1, 2, 3, 4)]),
        ("cars[[1, 2, 3, 4], [5, 6, 7, 8]]\nship[[9, 9, 10, 10]]", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 10, 10)]),
        ("[0.5, 1e3, 2, 3] [1, 2, 3.5, 4]", [(1, 2, 3.5, 4)]),
        ("[1, 2, 3] [1, 2, 3, 4, 5] [[1, 2], [3, 4]]", []),
        ("[3, 2, 1, 4] [1, 4, 3, 2]", []),  # corners the wrong way round
        ("[-1, 2, 3, 4] [1, 2, 3, 1001]", []),  # outside the picture
        ("[a, 2, 3, 4] [, , , ]", []),
    ],
)
def test_without_tags_only_lists_that_can_be_boxes_are_read(text, boxes):
    assert parse_boxes(text) == [Grounding(None, box) for box in boxes]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("[[1, 2, 3]]", "is not a list of boxes"),
        ("[[1, 2, 3, 4, 5]]", "is not a list of boxes"),
        ("[[1, 2, 3, 4], [5, 6]]", "is not a list of boxes"),
        ("[[1, 2, 3, 4]", "is not a list of boxes"),
        ("1, 2, 3, 4", "is not a list of boxes"),
        ("[]", "is not a list of boxes"),
        ("", "is not a list of boxes"),
        ("[[1, 2, three, 4]]", "is not a list of boxes"),
        ("[[nan, 2, 3, 4]]", "is not a list of boxes"),
        ("[[3, 2, 1, 4]]", "second corner must not lie left of or above the first"),
        ("[[1, 4, 3, 2]]", "second corner"),
        ("[[1, 2, 3, 1001]]", "from 0 to 1000"),
        ("[[-1, 2, 3, 4]]", "from 0 to 1000"),
    ],
)
def test_box_that_cannot_be_read_raises_with_its_text(box, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_boxes(f"<ref>ok</ref><box>[[1, 2, 3, 4]]</box><ref>bad</ref><box>{box}</box>")
    assert f"<box>{box}</box>" in str(raised.value)


@pytest.mark.parametrize(
    "text", ["<ref>dog</ref><box>[[1, 2, 3", "<box>", "<box>[[1, 2, 3, 4]]", "<box>[[<box>1</box>"]
)
def test_box_without_end_raises(text):
    with pytest.raises(ValueError, match="has no </box>.*max_new_tokens"):
        parse_boxes(text)


@pytest.mark.parametrize("part", ["<ref>", "<ref>a</ref> ", "[[1,", "[" * 3, "1" * 3, "<box>[[1,2,3,4]]</box>", " "])
def test_long_answers_are_read_in_linear_time(part):
    start = time.perf_counter()
    parse_boxes(part * 20_000)
    assert time.perf_counter() - start < 5


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "boxes", "text"),
    [
        ("the dog", [(1, 2, 3, 4)], "<ref>the dog</ref><box>[[1, 2, 3, 4]]</box>"),
        ("cars", [[1, 2, 3, 4], (5, 6, 7, 8)], "<ref>cars</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>"),
        (None, [(0, 0, 1000, 1000)], "<box>[[0, 0, 1000, 1000]]</box>"),
        ("dog", [(1.0, 2.5, 3.0, 4.0)], "<ref>dog</ref><box>[[1, 2.5, 3, 4]]</box>"),
        ("dog", np.array([[1, 2, 3, 4]]), "<ref>dog</ref><box>[[1, 2, 3, 4]]</box>"),
    ],
)
def test_format_is_the_published_one_and_is_read_again(label, boxes, text):
    assert format_box(label, boxes) == text
    assert parse_boxes(text) == [Grounding(label, tuple(map(float, box))) for box in boxes]


@pytest.mark.parametrize(
    ("label", "boxes", "message"),
    [
        ("dog", [], "one or more"),
        ("dog", (1, 2, 3, 4), "must be a list of one or more"),
        ("dog", [(1, 2, 3)], "four numbers.*got 3"),
        ("dog", [(3, 2, 1, 4)], "second corner"),
        ("dog", [(1, 2, 3, 1001)], "from 0 to 1000"),
        ("dog", [(1, 2, 3, float("nan"))], "from 0 to 1000"),
        ("a</ref><box>", [(1, 2, 3, 4)], "holds </ref>"),
    ],
)
def test_what_cannot_be_written_raises(label, boxes, message):
    with pytest.raises(ValueError, match=message):
        format_box(label, boxes)


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_pixels_by_hand():
    assert denormalise((100, 250, 500, 1000), (640, 480)) == (64, 120, 320, 480)
    assert denormalise((0, 0, 1000, 1000), (7, 3)) == (0, 0, 7, 3)
    assert normalise((64, 120, 320, 480), (640, 480)) == (100, 250, 500, 1000)
    assert normalise((1, 1, 2, 2), (3, 7)) == (333, 143, 667, 286)


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (1000, 1000), (333, 4096)])
def test_coordinates_survive_the_way_to_pixels_and_back(size):
    rng = np.random.RandomState(0)
    for _ in range(200):
        (x1, x2), (y1, y2) = np.sort(rng.randint(0, 1001, (2, 2))).tolist()
        assert normalise(denormalise((x1, y1, x2, y2), size), size) == (x1, y1, x2, y2)


@pytest.mark.parametrize("size", [(640, 480), (1600, 900)])
def test_pixels_survive_the_way_to_coordinates_and_back_to_half_a_unit(size):
    rng = np.random.RandomState(1)
    for _ in range(200):
        left, right = np.sort(rng.uniform(0, size[0], 2)).tolist()
        top, bottom = np.sort(rng.uniform(0, size[1], 2)).tolist()
        back = denormalise(normalise((left, top, right, bottom), size), size)
        assert abs(back[0] - left) <= size[0] / 2000 + 1e-9 and abs(back[2] - right) <= size[0] / 2000 + 1e-9
        assert abs(back[1] - top) <= size[1] / 2000 + 1e-9 and abs(back[3] - bottom) <= size[1] / 2000 + 1e-9


@pytest.mark.parametrize(
    ("function", "box", "size", "message"),
    [
        (denormalise, (1, 2, 3, 1001), (10, 10), "from 0 to 1000"),
        (denormalise, (1, 2, 3), (10, 10), "four numbers"),
        (denormalise, (1, 2, 3, 4), (0, 10), "0 x 10"),
        (normalise, (0, 0, 11, 10), (10, 20), "10 x 20 picture.*x must be from 0 to 10 and its y from 0 to 20"),
        (normalise, (-1, 0, 1, 1), (10, 20), "picture"),
        (normalise, (5, 0, 1, 1), (10, 20), "second corner"),
        (normalise, (0, 0, 1, 1), (10, -1), "10 x -1"),
    ],
)
def test_boxes_outside_the_picture_raise(function, box, size, message):
    with pytest.raises(ValueError, match=message):
        function(box, size)


# --- drawing ---------------------------------------------------------------------------------------------------------


def outline(image, colour) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the pixels of this colour."""
    y, x = np.nonzero((np.asarray(image) == colour).all(-1))
    return x.min(), y.min(), x.max(), y.max()


def test_box_is_drawn_at_its_pixels_in_a_new_picture():
    image = Image.new("RGB", (200, 100))
    drawn = draw_boxes(image, [Grounding(None, (250, 200, 750, 900))])
    assert outline(drawn, RED) == (50, 20, 150, 90)
    assert drawn.size == image.size
    assert image.getextrema() == ((0, 0),) * 3
    assert drawn.getpixel((100, 50)) == (0, 0, 0)


def test_box_of_the_whole_picture_is_seen_on_all_sides():
    drawn = draw_boxes(Image.new("RGB", (200, 100)), [Grounding(None, (0, 0, 1000, 1000))])
    assert outline(drawn, RED) == (0, 0, 199, 99)


@pytest.mark.parametrize("box", [(1000, 1000, 1000, 1000), (0, 0, 0, 0), (500, 0, 500, 1000)])
def test_box_without_extent_is_drawn(box):
    assert outline(draw_boxes(Image.new("RGB", (20, 10)), [Grounding(None, box)]), RED)


@pytest.mark.parametrize("size", [(120, 80), (640, 480), (4000, 3000)])
@pytest.mark.parametrize("box", [(0, 0, 300, 300), (900, 0, 1000, 50), (400, 400, 600, 600), (990, 990, 1000, 1000)])
def test_caption_lies_in_the_picture_and_can_be_read(size, box):
    plain = draw_boxes(Image.new("RGB", size), [Grounding(None, box)])
    drawn = draw_boxes(Image.new("RGB", size), [Grounding("dog", box)])
    y, x = np.nonzero((np.asarray(drawn) != np.asarray(plain)).any(-1))
    left, top, right, bottom = x.min(), y.min(), x.max(), y.max()
    assert bottom - top >= 10 and right - left >= 15  # pixels
    assert bottom - top >= min(size) / 40
    white = (np.asarray(drawn) > 150).all(-1)
    assert white[top : bottom + 1, left : right + 1].mean() > 0.08  # letters


def test_same_label_has_the_same_colour():
    groundings = parse_boxes(
        "<ref>a</ref><box>[[0,0,100,100],[800,800,900,900]]</box><ref>b</ref><box>[[0,500,9,900]]</box>"
    )
    drawn = draw_boxes(Image.new("RGB", (500, 500)), groundings)
    assert drawn.getpixel((25, 50)) == drawn.getpixel((425, 450)) == RED
    assert drawn.getpixel((0, 400)) == BLUE


def test_picture_is_drawn_on_as_the_model_sees_it():
    image = Image.new("L", (200, 100))
    image.getexif()[0x0112] = 6  # turned by a quarter
    drawn = draw_boxes(image, [Grounding(None, (0, 0, 1000, 1000))])
    assert drawn.size == (100, 200) and drawn.mode == "RGB"
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("image", ["page.png", Path("page.png"), b"bytes", None, [[0]]], ids=repr)
def test_boxes_are_drawn_in_a_pil_image_alone(image):
    with pytest.raises(ValueError, match="Boxes are drawn in a PIL image, got .*Image.open"):
        draw_boxes(image, [])


def test_colours_and_font_can_be_chosen():
    font = ImageFont.load_default(size=40)
    drawn = draw_boxes(Image.new("RGB", (300, 300)), [Grounding("dog", (100, 500, 900, 900))], [(1, 2, 3)], font)
    left, top, right, bottom = outline(drawn, (1, 2, 3))
    assert (left, right, bottom) == (30, 270, 270) and 90 < top < 130
    with pytest.raises(ValueError, match="colour"):
        draw_boxes(Image.new("RGB", (300, 300)), [], [])


def test_no_boxes_give_a_copy():
    image = Image.new("RGB", (30, 30), "green")
    drawn = draw_boxes(image, [])
    assert drawn is not image and drawn.tobytes() == image.tobytes()
