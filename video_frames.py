"""Which frames of a video a model sees, and reading them.

    frames = load_frames("clip.mp4", num_frames=8)  # a list of (height, width, 3) arrays, to be passed as images
    frame_indices(100, video_fps=25.0, num_frames=4)  # [12, 37, 62, 86], without a file

Frames are the middles of equal segments, as InternVL2 takes them. Seconds are those at which frames are shown, also where
the frame rate varies, as on phones and screens. Files are decoded by transformers, with whichever of PyAV, decord,
torchcodec and OpenCV is installed.

Deals with frames and seconds, not with prompts or tiles.
"""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import is_av_available, is_cv2_available, is_decord_available, is_torchcodec_available

from .media_sources import VIDEO_DOWNLOAD, local_file, short_name
from .transformers_bridge import load_video


DEFAULT_NUM_FRAMES = 8  # of a file when nothing is asked for, as InternVL2's model card does
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]", b"v=0")  # how texts begin that name other files

CHANNELS = (1, 3)  # of a video's array
IMAGE_CHANNELS = (1, 3, 4)

Frame = np.ndarray | Image.Image


class _Backend(NamedTuple):
    package: str  # what pip installs
    is_available: Callable[[], bool]
    error: str | None  # "module.class" of its own exceptions, which no built-in one covers


BACKENDS: dict[str, _Backend] = {
    "pyav": _Backend("av", is_av_available, "av.FFmpegError"),
    "decord": _Backend("decord", is_decord_available, "decord.DECORDError"),
    "torchcodec": _Backend("torchcodec", is_torchcodec_available, None),
    "opencv": _Backend("opencv-python-headless", is_cv2_available, "cv2.error"),
}
"""What can decode a file, in the order in which it is looked for."""

# What the back ends raise for files they cannot read, besides their own: no stream (LookupError, ValueError), no frame
# rate (TypeError), an unknown codec (AttributeError), a broken container (the others).
READ_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError),
)


# --- which frames ----------------------------------------------------------------------------------------------------


def frame_indices(
    total_frames: int,
    video_fps: float | None,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    times: Sequence[float] | None = None,
) -> list[int]:
    """Choose which frames of a video to take, ascending and each once; the first frame is 0.

    Args:
        total_frames: How many frames the video has.
        video_fps: Its frames per second; None where that is unknown.
        num_frames: Take this many, at the middle of equal segments of the span. Where the span has no more than that,
            each of its frames once, so fewer may come back than were asked for; InternVL2 would repeat some.
        fps: Take this many per second of the span, rounded, at least one; in the same places.
        start, end: The span in seconds, both frames included; what lies before or after the video is left out.
            Default: the whole video.
        times: When each frame is shown, in seconds from the first, ascending. By default frames follow each other at
            `video_fps`; where they do not, `start`, `end` and `fps` go by these.

    Neither `num_frames` nor `fps` gives every frame of the span.

    Raises:
        ValueError: A video without frames, `num_frames` and `fps` together, values that select nothing, or seconds
            where the frame rate is unknown.

    Source: `get_index` in the published InternVL2 code.
    """
    _check_selection(num_frames, fps, start, end)
    if total_frames < 1:
        raise ValueError(f"The video has no frames to choose from: total_frames is {total_frames}.")
    first, last = 0, total_frames - 1
    if times is not None and not _is_regular(times, video_fps):
        return _indices_by_time(np.asarray(times, dtype=np.float64), num_frames, fps, start, end)
    if fps is not None or start is not None or end is not None:
        if video_fps is None or not 0 < video_fps < math.inf:
            raise ValueError(
                f"fps, start and end need the frame rate of the video, which is unknown (video_fps={video_fps}); "
                "choose by num_frames instead."
            )
        first = first if start is None else max(0, round(start * video_fps))
        last = last if end is None else min(round(end * video_fps), last)
        if first >= total_frames:
            raise ValueError(
                f"The video ends before start: {total_frames} frames at {video_fps:g} per second are "
                f"{total_frames / video_fps:g} s, start is {start:g} s."
            )
    if fps is not None:
        num_frames = max(1, round((last - first + 1) * fps / video_fps))
    return _middles(first, last, num_frames)


def _middles(first: int, last: int, num_frames: int | None) -> list[int]:
    """Return the frames at the middle of equal segments; all of them where there are no more."""
    if num_frames is None or num_frames > last - first:
        return list(range(first, last + 1))
    segment = (last - first) / num_frames
    return [int(first + segment / 2 + np.round(segment * i)) for i in range(num_frames)]


def _is_regular(times: Sequence[float], video_fps: float | None) -> bool:
    """Tell whether frames follow each other at the frame rate, give or take half a frame."""
    if video_fps is None or not 0 < video_fps < math.inf:
        return False
    return bool(np.abs(np.asarray(times) * video_fps - np.arange(len(times))).max() < 0.5)


def _indices_by_time(
    times: np.ndarray, num_frames: int | None, fps: float | None, start: float | None, end: float | None
) -> list[int]:
    """Choose frames as `frame_indices` does, of those that are shown at `times`.

    `num_frames` counts frames of the span, as in a video of one rate; `fps` takes what is shown at equal distances of time.
    """
    total, duration = len(times), float(times[-1])
    if start is not None and start > duration + (duration / (total - 1) if total > 1 else 0):
        raise ValueError(
            f"The video ends before start: its last frame is shown at {duration:g} s, start is {start:g} s."
        )
    begin = 0.0 if start is None else min(max(start, 0.0), duration)
    stop = duration if end is None else min(max(end, begin), duration)
    if fps is None:
        return _middles(_nearest(times, begin), _nearest(times, stop), num_frames)
    count = max(1, round((stop - begin) * fps))
    return sorted({_shown_at(times, begin + (i + 0.5) * (stop - begin) / count) for i in range(count)})


def _nearest(times: np.ndarray, seconds: float) -> int:
    return int(np.abs(times - seconds).argmin())


def _shown_at(times: np.ndarray, seconds: float) -> int:
    """Return the frame that is on the screen at that time."""
    return max(0, int(np.searchsorted(times, seconds + 1e-6, side="right")) - 1)


def _check_selection(num_frames: int | None, fps: float | None, start: float | None, end: float | None) -> None:
    """Raise `ValueError` for what selects no frames of any video."""
    if num_frames is not None and fps is not None:
        raise ValueError(f"Give num_frames or fps, not both; got num_frames={num_frames} and fps={fps}.")
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, (int, np.integer)) or num_frames < 1
    ):
        raise ValueError(f"num_frames must be an integer of at least 1, got {num_frames!r}.")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be greater than 0 frames per second, got {fps}.")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be a number of seconds, got {value}; leave it out for no bound.")
    if end is not None and end <= max(start or 0, 0):
        raise ValueError(f"end must come after start, got start={start or 0:g} s and end={end:g} s.")


# --- loading ---------------------------------------------------------------------------------------------------------


def load_frames(
    video,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str | None = None,
    untrusted_sources: bool = False,
) -> list[Frame]:
    """Load the frames of a video that a model is to see.

    Args:
        video: A path, the URL of a video file (not of a page that shows it), or frames: an array or a tensor (frames,
            height, width, channels) or (frames, channels, height, width) of 1 or 3 channels, grey ones also (frames,
            height, width), or a list of PIL images, arrays or tensors.
        num_frames, fps, start, end: See `frame_indices`. Of a file 8 frames are taken when neither `num_frames` nor
            `fps` is given; of frames, all. Frames have no frame rate, so that they are chosen by `num_frames` alone.
        backend: "pyav", "decord", "torchcodec" or "opencv"; by default the first of them that is installed.
        untrusted_sources: Refuse paths, and URLs of addresses that are not public.

    Returns:
        Of a file, the frames as (height, width, 3) uint8 arrays, upright as a player shows them. Of frames, those
        given, arrays and tensors as arrays with channels last, 3 if they were grey.

    With PyAV a file that does not tell its number of frames (WebM, Matroska), or a wrong one (a trimmed MP4), is
    counted.

    Raises:
        ValueError: The file is missing, broken or without frames, it cannot be downloaded, or nothing is selected.
        ImportError: No back end is installed to decode it.
    """
    _check_selection(num_frames, fps, start, end)
    if not isinstance(video, (str, os.PathLike)):
        frames = _given_frames(video)
        return [frames[i] for i in frame_indices(len(frames), None, num_frames, fps, start, end)]
    if num_frames is None and fps is None:
        num_frames = DEFAULT_NUM_FRAMES
    backend = _choose_backend(backend)
    name = short_name(video)
    with local_file(video, VIDEO_DOWNLOAD, untrusted_sources) as path:
        try:
            _refuse_playlist(path)
            return _decode(path, backend, (num_frames, fps, start, end))
        except (*READ_ERRORS, *_errors_of(backend)) as error:
            reason = "it has no video stream." if isinstance(error, LookupError) else error
            raise ValueError(f"No frames could be taken from {name} with {backend}: {reason}") from error


def _given_frames(video) -> list[Frame]:
    """Return the frames of an array, a tensor or a list of images; tensors become arrays, channels come last."""
    if isinstance(video, (np.ndarray, torch.Tensor)):
        return _frames_of_array(video)
    if not isinstance(video, (list, tuple)):
        raise ValueError(
            f"A video is a path, a URL, an array, a tensor or a list of frames, got {type(video).__name__}."
        )
    if len(video) == 1 and getattr(video[0], "ndim", 0) == 3 and video[0].shape[-1] not in IMAGE_CHANNELS:
        return _frames_of_array(video[0])  # a grey video in a list of videos, not one frame
    for frame in video:
        is_array = isinstance(frame, (np.ndarray, torch.Tensor)) and _is_image(frame)
        if not (is_array or isinstance(frame, Image.Image)):
            shape = f" of {tuple(frame.shape)}" if isinstance(frame, (np.ndarray, torch.Tensor)) else ""
            raise ValueError(
                "A list is the frames of one video, PIL images or arrays (height, width, 3); it holds "
                f"{type(frame).__name__}{shape}. Pass videos one by one, and open picture files first."
            )
    return [frame if isinstance(frame, Image.Image) else _channels_last(frame) for frame in video]


def _is_image(frame: np.ndarray | torch.Tensor) -> bool:
    return frame.ndim == 2 or (
        frame.ndim == 3 and (frame.shape[0] in IMAGE_CHANNELS or frame.shape[-1] in IMAGE_CHANNELS)
    )


def _frames_of_array(video: np.ndarray | torch.Tensor) -> list[np.ndarray]:
    """Return the frames of (frames, height, width, channels), (frames, channels, height, width) or grey (frames,
    height, width).

    Raises:
        ValueError: Another shape, or one that could be an image as well.
    """
    shape = tuple(video.shape)
    if len(shape) == 4 and (shape[1] in CHANNELS or shape[3] in CHANNELS):
        return [_channels_last(frame) for frame in video]
    if len(shape) == 3 and not {shape[0], shape[-1]} & {3, 4}:
        return [_channels_last(frame) for frame in video]
    hint = ""
    if len(shape) == 3:
        hint = " That could be one picture too: a grey video is video[..., None], and one frame is [frame], its channels last."
    raise ValueError(
        "A video is an array (frames, height, width, 3) or (frames, 3, height, width), or grey (frames, height, width), got "
        f"one of {shape}.{hint}"
    )


def _channels_last(frame: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return a frame as (height, width, 3 or 4).

    Where both ends could be channels, by custom tensors have them first and arrays last.
    """
    is_tensor = isinstance(frame, torch.Tensor)
    is_first = frame.ndim == 3 and (
        (frame.shape[0] == 3 and (is_tensor or frame.shape[2] != 3))
        or (frame.shape[0] == 1 and frame.shape[2] not in IMAGE_CHANNELS)
    )
    if is_tensor:
        frame = frame.detach().cpu()
        frame = (frame.float() if frame.is_floating_point() else frame).numpy()
    frame = frame[..., None] if frame.ndim == 2 else frame
    frame = np.moveaxis(frame, 0, -1) if is_first else frame
    return np.repeat(frame, 3, axis=-1) if frame.shape[-1] == 1 else frame


# --- files -----------------------------------------------------------------------------------------------------------


def _choose_backend(backend: str | None) -> str:
    """Return `backend` if it is installed; for None the first that is."""
    if backend is None:
        for name, candidate in BACKENDS.items():
            if candidate.is_available():
                return name
        raise ImportError("No package is installed that decodes video files: pip install av")
    if backend not in BACKENDS:
        raise ValueError(f"Unknown video backend {backend!r}; known are {', '.join(BACKENDS)}.")
    if not BACKENDS[backend].is_available():
        raise ImportError(f"The video backend {backend!r} is not installed: pip install {BACKENDS[backend].package}")
    return backend


def _errors_of(backend: str) -> tuple[type[Exception], ...]:
    """Return the exceptions that only `backend` has, and PyAV's, which tells the times of frames for all of them.

    Not imported at the top: the packages are optional.
    """
    names = [BACKENDS[backend].error, BACKENDS["pyav"].error if is_av_available() else None]
    split = [name.rpartition(".") for name in names if name is not None]
    return tuple(getattr(importlib.import_module(module), name) for module, _, name in split)


def _refuse_playlist(path: str) -> None:
    """Raise `ValueError` for a text that names other files and URLs, which decoders would open."""
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(PLAYLISTS):
        raise ValueError("it is a list of other files, not a video file.")


def _decode(path: str, backend: str, selection: tuple) -> list[np.ndarray]:
    """Decode the selected frames of a file; `selection` is (num_frames, fps, start, end)."""
    asks_for_seconds = any(value is not None for value in selection[1:])
    times = _times_of(path, backend) if asks_for_seconds else None
    frames, missing = _read(path, backend, selection, times)
    if missing and backend == "pyav":
        frames, missing = _read(path, backend, selection, _frame_times(path, decode=True))
    if missing:
        raise ValueError(f"the file ends early, {missing} of the frames cannot be decoded.")
    if backend == "pyav":  # the others turn the frames themselves
        turns = _quarter_turns(path)
        frames = [np.rot90(frame, turns) for frame in frames] if turns else frames
    return frames


def _read(path: str, backend: str, selection: tuple, times: list[float | None] | None) -> tuple[list[np.ndarray], int]:
    """Read the selected frames of a file, and return them with how many are missing.

    `times` are those of its frames; by default it has as many as it says, at its frame rate.
    """
    chosen: list[int] = []

    def choose(metadata: Any, **_) -> list[int]:
        known = times
        if known is None and metadata.total_num_frames < 1 and backend == "pyav":
            known = _frame_times(path, decode=False)
        frames = metadata.total_num_frames if known is None else len(known)
        is_timed = bool(known) and None not in known
        chosen[:] = frame_indices(frames, metadata.fps, *selection, times=known if is_timed else None)
        return chosen

    frames, _ = load_video(path, backend=backend, sample_indices_fn=choose)
    return [_channels_last(frame) for frame in frames], len(chosen) - len(frames)


def _times_of(path: str, backend: str) -> list[float | None] | None:
    """Return when each frame of a file is shown, from whichever package tells; None where none does (torchcodec alone)."""
    if is_av_available():
        return _frame_times(path, decode=False)
    if backend == "decord":
        reader = importlib.import_module("decord").VideoReader(path)
        return reader.get_frame_timestamp(list(range(len(reader))))[:, 0].tolist()
    if backend == "opencv":
        cv2 = importlib.import_module("cv2")
        capture, times = cv2.VideoCapture(path), []
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        capture.release()
        return times or None
    return None


def _frame_times(path: str, decode: bool) -> list[float | None]:
    """Return when PyAV shows each frame of a file, in seconds from the first, None where that is unknown.

    The times are those of its packets, which is quick and may be too many, or what decoding really gives.
    """
    with importlib.import_module("av").open(path) as container:
        if decode:
            container.streams.video[0].thread_type = "AUTO"
            parts = ((frame.pts, frame.time_base) for frame in container.decode(video=0))
        else:
            packets = (packet for packet in container.demux(video=0) if packet.size and not packet.is_discard)
            parts = ((packet.pts, packet.time_base) for packet in packets)
        times = [None if pts is None else float(pts * base) for pts, base in parts]
    if None in times:
        return [None] * len(times)
    return [time - min(times) for time in sorted(times)]


def _quarter_turns(path: str) -> int:
    """Count the counter-clockwise quarter turns that make the frames upright; phones film sideways and say so."""
    with importlib.import_module("av").open(path) as container:
        return round(getattr(next(container.decode(video=0), None), "rotation", 0) / 90) % 4


__all__ = ["DEFAULT_NUM_FRAMES", "frame_indices", "load_frames"]
