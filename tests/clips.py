"""Clips whose frames tell their number."""

import av
import numpy as np


def write_clip(path, step: int, frames=40, rate=10, codec="libx264", size=(64, 48), faststart=False):
    """A clip whose frame i is grey of level step * i."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), step * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
