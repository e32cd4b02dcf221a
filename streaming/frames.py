"""Frames between arrays and codecs: fit to a size, RGB to and from av.VideoFrame.

Knows no track and no model; an RGB frame is uint8 (height, width, 3).
"""

from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np

VIDEO_CLOCK_HZ = 90_000
Frame = np.ndarray[Any, np.dtype[np.uint8]]


def fit(frame_HWC: Frame, width: int, height: int) -> Frame:
    """Cut the middle out at the wanted aspect, then resize it."""
    rows, columns = frame_HWC.shape[:2]
    crop_width = min(columns, max(1, round(rows * width / height)))
    crop_height = min(rows, max(1, round(columns * height / width)))
    left, top = (columns - crop_width) // 2, (rows - crop_height) // 2
    crop_HWC = frame_HWC[top : top + crop_height, left : left + crop_width]
    if (crop_width, crop_height) == (width, height):
        return np.ascontiguousarray(crop_HWC)
    # Area averaging keeps a shrunk picture free of aliasing; it cannot enlarge smoothly.
    shrinks = crop_width >= width and crop_height >= height
    resized_HWC: Frame = cv2.resize(
        crop_HWC, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized_HWC


def to_video(frame_HWC: Frame, pts: int) -> Any:
    """An av.VideoFrame at `pts` on the 90 kHz clock. It stays RGB: the encoder's thread converts it."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
    frame.pts = pts
    frame.time_base = Fraction(1, VIDEO_CLOCK_HZ)
    return frame


def to_rgb(frame: Any) -> Frame:
    """The picture of an av.VideoFrame as RGB."""
    rgb_HWC: Frame = frame.to_ndarray(format="rgb24")
    return rgb_HWC
