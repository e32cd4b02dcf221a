"""What a video encoder makes of pictures: bytes at a fixed quality, so that held pixels can be seen to cost nothing.

H.264 by x264, set as live streams are (no pictures are kept back), but at a constant quantizer: a live encoder has a
rate to keep instead. Knows nothing of regions.
"""

import av
import numpy as np

QUANTIZER = 28
OPTIONS = {"qp": str(QUANTIZER), "preset": "veryfast", "tune": "zerolatency", "profile": "baseline"}


class Encoder:
    """One stream of pictures of one size. Only its first is a key picture."""

    def __init__(self, width: int, height: int, fps: int) -> None:
        self._context = av.CodecContext.create("libx264", "w")
        self._context.width, self._context.height = width, height
        self._context.pix_fmt, self._context.framerate = "yuv420p", fps
        self._context.gop_size, self._context.thread_count = 1_000_000, 1
        self._context.options = OPTIONS

    def push(self, frames_THWC: np.ndarray) -> int:
        """Bytes that these pictures come to; uint8 RGB."""
        count = 0
        for frame_HWC in frames_THWC:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            count += sum(packet.size for packet in self._context.encode(picture))
        return count
