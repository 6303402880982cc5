"""Frames of videos: which ones, against the published choice, and from real clips whose frames tell their number."""

import http.server
import importlib.util
import struct
import sys
import threading
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from minimonkey.video_frames import DEFAULT_NUM_FRAMES, frame_indices, load_frames


av = pytest.importorskip("av")
from clips import write_clip as write_any_clip  # noqa: E402


module = sys.modules[load_frames.__module__]

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is missing"))
    for name, package in (("pyav", "av"), ("decord", "decord"), ("opencv", "cv2"))
]
STEP = 6  # levels of grey from a frame to the next
write_clip = partial(write_any_clip, step=STEP)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames) -> list[int]:
    """Which frames of a clip of `write_clip` these are."""
    return [round(float(np.mean(frame)) / STEP) for frame in frames]


def patch(path, box: bytes, offset: int, data: bytes):
    """Overwrite bytes of an MP4 file, `offset` behind the name of `box`."""
    content = bytearray(path.read_bytes())
    position = content.index(box) + len(box) + offset
    content[position : position + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4")


# --- which frames ----------------------------------------------------------------------------------------------------


def published_indices(bound, fps, max_frame, num_segments):
    """`get_index` of the published InternVL2 code."""
    start, end = bound or (-100000, 100000)
    start_idx = max(0, round(start * fps))
    end_idx = min(round(end * fps), max_frame)
    seg_size = float(end_idx - start_idx) / num_segments
    return [int(start_idx + (seg_size / 2) + np.round(seg_size * idx)) for idx in range(num_segments)]


@pytest.mark.parametrize("bound", [None, (0, 1), (0.35, 3.2), (1, 1000)])
@pytest.mark.parametrize("video_fps", [10.0, 25.0, 30000 / 1001])
def test_indices_are_the_published_ones_where_there_are_enough_frames(bound, video_fps):
    start, end = bound or (None, None)
    for total in (31, 60, 101, 500):
        available = len(frame_indices(total, video_fps, start=start, end=end))
        for num_frames in range(1, min(available, 40)):
            expected = published_indices(bound, video_fps, total - 1, num_frames)
            assert frame_indices(total, video_fps, num_frames, start=start, end=end) == expected
            assert expected == sorted(set(expected))


@pytest.mark.parametrize(
    ("total", "options", "indices"),
    [
        (100, {"num_frames": 4}, [12, 37, 62, 86]),
        (10, {"num_frames": 1}, [4]),
        (4, {}, [0, 1, 2, 3]),
        (1, {"num_frames": 1}, [0]),
        (40, {"start": 1.0, "end": 1.5}, [10, 11, 12, 13, 14, 15]),
        (40, {"start": 3.7}, [37, 38, 39]),
        (40, {"end": 0.2}, [0, 1, 2]),
        (40, {"start": -3, "end": 0.2}, [0, 1, 2]),
        (40, {"start": 1.0, "end": 1.01}, [10]),
        (40, {"start": 2.0, "end": 4.0, "num_frames": 2}, [24, 34]),  # segments of 9.5 frames; 9.5 is rounded to 10
        (40, {"fps": 1}, [4, 14, 24, 33]),  # 4 s in segments of 9.75 frames
        (40, {"fps": 1, "end": 1.9}, [4, 14]),
        (3, {"fps": 1}, [1]),  # at least one
        (5, {"fps": 1000}, [0, 1, 2, 3, 4]),
    ],
)
def test_indices_by_hand(total, options, indices):
    assert frame_indices(total, 10.0, **options) == indices


@pytest.mark.parametrize("num_frames", [8, 9, 100])
def test_more_frames_than_there_are_give_each_once(num_frames):
    assert frame_indices(8, None, num_frames) == list(range(8))


def test_number_of_frames_needs_no_frame_rate():
    assert frame_indices(100, None, 4) == [12, 37, 62, 86]
    assert frame_indices(3, None) == [0, 1, 2]


@pytest.mark.parametrize("video_fps", [None, 0.0, -1.0, float("nan")])
@pytest.mark.parametrize("options", [{"fps": 1}, {"start": 1}, {"end": 1}])
def test_seconds_need_a_frame_rate(video_fps, options):
    with pytest.raises(ValueError, match="frame rate of the video, which is unknown.*num_frames"):
        frame_indices(10, video_fps, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 2, "fps": 1}, "num_frames or fps, not both; got num_frames=2 and fps=1"),
        ({"num_frames": 0}, "at least 1, got 0"),
        ({"num_frames": 2.5}, "integer of at least 1, got 2.5"),
        ({"num_frames": True}, "integer"),
        ({"fps": 0}, "fps must be greater than 0"),
        ({"fps": -1}, "fps must be greater than 0"),
        ({"fps": float("nan")}, "fps must be greater than 0"),
        ({"start": 2, "end": 2}, "end must come after start, got start=2 s and end=2 s"),
        ({"start": 2, "end": 1}, "end must come after start"),
        ({"end": 0}, "end must come after start, got start=0 s"),
        ({"start": -2, "end": -1}, "end must come after start"),
        ({"start": float("inf")}, "start must be a number of seconds"),
        ({"end": float("nan")}, "end must be a number of seconds"),
        ({"start": 4.0}, r"40 frames at 10 per second are 4 s, start is 4 s"),
        ({"start": 60, "end": 70}, "ends before start"),
    ],
)
def test_bad_selections_raise(options, message):
    with pytest.raises(ValueError, match=message):
        frame_indices(40, 10.0, **options)


@pytest.mark.parametrize("total", [0, -5])
def test_video_without_frames_raises(total):
    with pytest.raises(ValueError, match=f"no frames.*{total}"):
        frame_indices(total, 10.0)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 4},
        {"num_frames": 1},
        {"fps": 2},
        {"start": 1, "end": 2, "num_frames": 3},
        {"start": 3.5},
        {"fps": 1, "end": 2},
        {"num_frames": 1000},
    ],
    ids=str,
)
def test_file_gives_the_chosen_frames(clip, backend, options):
    frames = load_frames(clip, **options, backend=backend)
    selection = options if {"num_frames", "fps"} & set(options) else {**options, "num_frames": DEFAULT_NUM_FRAMES}
    assert numbers(frames) == frame_indices(40, 10.0, **selection)
    assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in frames)


def test_file_gives_eight_frames_by_default(clip):
    assert DEFAULT_NUM_FRAMES == len(load_frames(str(clip))) == 8


def test_channels_of_a_file_are_red_green_blue(tmp_path):
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.full((48, 64, 3), (200, 20, 20), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = load_frames(path)
    assert np.abs(frame.mean((0, 1)) - (200, 20, 20)).max() < 8


@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.webm", "libvpx"), ("clip.mkv", "libx264"), ("clip.ts", "mpeg2video")],
)
def test_file_that_does_not_tell_its_number_of_frames(tmp_path, name, codec):
    path = write_clip(tmp_path / name, codec=codec, rate=25)
    assert numbers(load_frames(path, num_frames=5, backend="pyav")) == frame_indices(40, 25.0, 5)
    assert numbers(load_frames(path, start=1, end=1.2, num_frames=100, backend="pyav")) == [25, 26, 27, 28, 29, 30]


def test_trimmed_file_is_counted(tmp_path):
    path = write_clip(tmp_path / "trimmed.mp4", frames=20)
    patch(path, b"elst", 8, struct.pack(">I", 1000))  # an edit list that shows the first of two seconds
    assert numbers(load_frames(path, num_frames=100, backend="pyav")) == list(range(10))
    assert numbers(load_frames(path, num_frames=4, backend="pyav")) == frame_indices(10, 10.0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)], ids=["right", "left", "over"]
)
def test_pictures_are_upright_as_a_player_shows_them(tmp_path, backend, matrix, turns):
    path = tmp_path / "phone.mp4"
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[:48, :64] = 250  # a bright corner
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    a, b, c, d = (value << 16 for value in matrix)
    patch(path, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    (frame,) = load_frames(path, backend=backend)
    expected = np.rot90(pixels, turns)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 8


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    if kind == "text":
        path.write_text("This is no video.\n" * 50)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound":
        write_sound(path)
    elif kind == "without its end":
        path.write_bytes(write_clip(path).read_bytes()[:-900])
    elif kind == "without its last pictures":
        path.write_bytes(write_clip(path, size=(320, 240), faststart=True).read_bytes()[:-900])
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", ["text", "empty", "folder", "sound", "missing", "without its end", "without its last pictures"]
)
def test_unreadable_files_raise_with_their_name(tmp_path, backend, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=f"{kind}.mp4"):
        load_frames(path, num_frames=100, backend=backend)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "with pyav: .*Invalid data"),
        ("sound", "it has no video stream"),
        ("empty", "is empty"),
        ("folder", "is a folder"),
        ("missing", "There is no video file"),
    ],
)
def test_message_says_what_is_wrong_with_a_file(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        load_frames(damaged(tmp_path, kind), backend="pyav")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"start": 1}])
def test_unknown_codec_raises(tmp_path, backend, options):
    path = patch(write_clip(tmp_path / "clip.mp4"), b"stsd", 12, b"zzzz")
    with pytest.raises(ValueError, match="No frames could be taken from .*clip.mp4 with"):
        load_frames(path, **options, backend=backend)


def test_error_keeps_its_cause(tmp_path):
    with pytest.raises(ValueError, match="text.mp4") as raised:
        load_frames(damaged(tmp_path, "text"), backend="pyav")
    assert isinstance(raised.value.__cause__, av.FFmpegError)


def test_what_a_file_cannot_give_is_said_with_its_name(clip):
    with pytest.raises(ValueError, match=r"clip.mp4.*are 4 s, start is 9 s"):
        load_frames(clip, start=9)


def test_bad_selection_raises_before_the_file_is_looked_for():
    with pytest.raises(ValueError, match="not both"):
        load_frames("missing.mp4", num_frames=1, fps=1)


# --- frame rates that vary -------------------------------------------------------------------------------------------


VARYING = [0.05 * i for i in range(20)] + [1.0 + i for i in range(20)]  # twenty a second, then one a second


def write_varying_clip(path, times=VARYING):
    """A clip whose frame i is grey of level STEP * i and shown at `times[i]`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), STEP * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start": 2, "end": 4, "num_frames": 100}, [21, 22, 23]),
        ({"start": 2, "end": 4}, [21, 22, 23]),
        ({"start": 0.5, "end": 1, "num_frames": 100}, list(range(10, 21))),
        ({"start": 9, "end": 15, "num_frames": 2}, [29, 32]),
        ({"start": 18, "num_frames": 100}, [37, 38, 39]),
        ({"fps": 1, "start": 2, "end": 5}, [21, 22, 23]),
        ({"fps": 0.2}, [21, 26, 31, 36]),
        ({"fps": 4, "end": 1}, [2, 7, 12, 17]),
    ],
    ids=str,
)
def test_seconds_are_those_at_which_frames_are_shown(tmp_path, backend, name, options, expected):
    assert numbers(load_frames(write_varying_clip(tmp_path / name), **options, backend=backend)) == expected


def test_number_of_frames_counts_them_whatever_their_seconds(tmp_path):
    assert numbers(load_frames(write_varying_clip(tmp_path / "clip.mp4"), num_frames=4)) == [4, 14, 24, 33]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_other_back_ends_tell_the_seconds_too(monkeypatch, tmp_path, backend):
    monkeypatch.setitem(load_frames.__globals__, "is_av_available", lambda: False)
    frames = load_frames(write_varying_clip(tmp_path / "clip.mp4"), start=2, end=4, num_frames=100, backend=backend)
    assert numbers(frames) == [21, 22, 23]


def test_seconds_behind_the_last_frame_of_a_varying_rate_raise(tmp_path):
    with pytest.raises(ValueError, match="its last frame is shown at 20 s, start is 30 s"):
        load_frames(write_varying_clip(tmp_path / "clip.mp4"), start=30)


@pytest.mark.parametrize("video_fps", [10.0, 30000 / 1001])
@pytest.mark.parametrize(
    "options", [{"fps": 2}, {"start": 0.35, "end": 3.2, "num_frames": 5}, {"start": 1}, {"end": 2}]
)
def test_times_of_one_frame_rate_change_nothing(video_fps, options):
    rng = np.random.RandomState(0)
    times = [max(0, i + rng.uniform(-0.1, 0.1)) / video_fps for i in range(100)]
    expected = frame_indices(100, video_fps, **options)
    assert frame_indices(100, video_fps, **options, times=times) == expected


# --- back ends -------------------------------------------------------------------------------------------------------


def test_unknown_backend_raises(clip):
    with pytest.raises(ValueError, match="'vlc'; known are pyav, decord, torchcodec, opencv"):
        load_frames(clip, backend="vlc")


def without(monkeypatch, *names):
    changed = {name: module.BACKENDS[name]._replace(is_available=lambda: False) for name in names}
    monkeypatch.setattr(module, "BACKENDS", {**module.BACKENDS, **changed})


def test_no_backend_says_what_to_install(clip, monkeypatch):
    without(monkeypatch, *module.BACKENDS)
    with pytest.raises(ImportError, match="pip install av"):
        load_frames(clip)


def test_missing_backend_says_what_to_install(clip, monkeypatch):
    without(monkeypatch, "opencv")
    with pytest.raises(ImportError, match="'opencv' is not installed: pip install opencv-python-headless"):
        load_frames(clip, backend="opencv")


def test_first_installed_backend_is_taken(monkeypatch):
    assert list(module.BACKENDS) == ["pyav", "decord", "torchcodec", "opencv"]
    assert module._choose_backend(None) == "pyav"
    changed = {"decord": module.BACKENDS["decord"]._replace(is_available=lambda: True)}
    monkeypatch.setattr(module, "BACKENDS", {**module.BACKENDS, **changed})
    without(monkeypatch, "pyav")
    assert module._choose_backend(None) == "decord"


def test_remote_code_loads_without_a_backend():
    from transformers.dynamic_module_utils import get_imports

    assert not {"av", "decord", "torchcodec", "cv2"} & set(get_imports(module.__file__))


# --- URLs ------------------------------------------------------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(clip):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(clip.parent))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_url_gives_the_chosen_frames(server):
    assert numbers(load_frames(f"{server}/clip.mp4", num_frames=4)) == frame_indices(40, None, 4)


def test_url_of_nothing_raises(server):
    with pytest.raises(ValueError, match=r"missing.mp4 cannot be downloaded: .*404"):
        load_frames(f"{server}/missing.mp4")


def test_url_of_a_page_raises(server):
    with pytest.raises(ValueError, match=f"No frames could be taken from {server}/ with"):
        load_frames(f"{server}/")


def test_malformed_url_raises():
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_frames("http://[broken/clip.mp4")


def test_file_url_gives_frames(clip):
    assert numbers(load_frames(clip.as_uri(), num_frames=4)) == frame_indices(40, None, 4)


# --- frames ----------------------------------------------------------------------------------------------------------


def grey_video(frames=10, height=4, width=6):
    return np.arange(frames, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.full((1, height, width, 3), STEP, np.uint8)


@pytest.mark.parametrize(
    "video",
    [
        grey_video(),
        np.moveaxis(grey_video(), -1, 1),
        torch.from_numpy(grey_video()),
        torch.from_numpy(grey_video()).permute(0, 3, 1, 2),
        torch.from_numpy(grey_video()).to(torch.bfloat16),
        list(grey_video()),
        tuple(torch.from_numpy(grey_video()).permute(0, 3, 1, 2)),
    ],
    ids=["array", "array, channels first", "tensor", "tensor, channels first", "bfloat16", "arrays", "tensors"],
)
def test_frames_are_taken_all_or_by_number(video):
    assert numbers(load_frames(video)) == list(range(10))
    some = load_frames(video, num_frames=3)
    assert numbers(some) == frame_indices(10, None, 3)
    assert all(isinstance(frame, np.ndarray) and frame.shape == (4, 6, 3) for frame in some)


@pytest.mark.parametrize("frames", [1, 2, 5, 10])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_grey_videos_are_read(frames, make):
    grey = grey_video(frames, 6, 8)[..., 0]
    for video in (make(grey), [make(grey)], make(grey[..., None]), make(grey[:, None]), list(make(grey))):
        seen = load_frames(video)
        assert numbers(seen) == list(range(frames))
        assert all(frame.shape == (6, 8, 3) for frame in seen)


@pytest.mark.parametrize("frames", [3, 4])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_grey_videos_that_could_be_one_picture_are_refused(frames, make):
    grey = grey_video(frames, 6, 8)[..., 0]
    for video in (make(grey), [make(grey)]):
        with pytest.raises(ValueError, match=r"could be one picture too: a grey video is video\[..., None\]"):
            load_frames(video)
    assert numbers(load_frames(make(grey[..., None]))) == list(range(frames))


def test_pictures_come_back_as_they_are():
    pictures = [Image.new("RGB", (8 + i, 8)) for i in range(4)]
    assert all(frame is picture for frame, picture in zip(load_frames(pictures), pictures, strict=True))
    assert [frame.width for frame in load_frames(pictures, num_frames=2)] == [8 + i for i in frame_indices(4, None, 2)]


def test_given_frames_are_not_changed():
    pictures = [Image.new("RGB", (8, 8)) for _ in range(4)]
    video = grey_video()
    load_frames(pictures, num_frames=2)
    load_frames(video, num_frames=2)
    assert len(pictures) == 4
    assert np.array_equal(video, grey_video())


@pytest.mark.parametrize("options", [{"fps": 1}, {"start": 1}, {"end": 1}])
def test_frames_have_no_seconds(options):
    with pytest.raises(ValueError, match="frame rate of the video, which is unknown"):
        load_frames(grey_video(), **options)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 6, 3)), r"got one of \(4, 6, 3\)"),
        (torch.zeros(2, 4, 6, 5), r"got one of \(2, 4, 6, 5\)"),
        (["a.png", "b.png"], "it holds str.*open picture files first"),
        ([grey_video(), grey_video()], r"ndarray of \(10, 4, 6, 3\). Pass videos one by one"),
        ([], "no frames"),
        (np.zeros((0, 4, 6, 3)), "no frames"),
        (7, "got int"),
        (b"ftyp", "got bytes"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_video_raises(video, message):
    with pytest.raises(ValueError, match=message):
        load_frames(video)
