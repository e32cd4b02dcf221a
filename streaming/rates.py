"""Bit rates and the frame rate of aiortc's video encoders, which it keeps as module globals.

Its defaults suit a video call: 0.5 to 1 Mbit/s shared over 30 frames a second. x264 divides its budget by the
frame rate it was told, so at 16 frames a second half of it would go unused. Knows no connection.
"""

from dataclasses import dataclass

from aiortc.codecs import h264, vpx

PIXELS_320x192 = 320 * 192


@dataclass(frozen=True)
class Rates:
    """Bits per second: where a stream starts, and the bounds that the viewer's estimate may move it between."""

    start_bps: int
    lowest_bps: int
    highest_bps: int


def rates_for(fps: float, width: int, height: int) -> Rates:
    """Picture quality first: 1.2 Mbit/s at 320x192 and 16 fps (43 dB or more), growing slower than the pixel rate."""
    # Neighbouring pixels of a larger picture resemble each other more, so bits per pixel may fall.
    scale = (width * height * fps / (PIXELS_320x192 * 16)) ** 0.75
    start_bps = max(1_200_000, round(1_200_000 * scale))
    return Rates(start_bps, start_bps // 2, start_bps * 2)


def tune_encoders(fps: float, width: int, height: int) -> Rates:
    """Set aiortc's encoders for this process; call it once at start-up, before a peer answers."""
    rates = rates_for(fps, width, height)
    for codec in (h264, vpx):
        codec.DEFAULT_BITRATE = rates.start_bps
        codec.MIN_BITRATE = rates.lowest_bps
        codec.MAX_BITRATE = rates.highest_bps
        codec.MAX_FRAME_RATE = round(fps)
    return rates
