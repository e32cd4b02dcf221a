"""A picture that a page sends whole: its file in base64 -> an RGB frame of the wanted size.

What it is and how large is looked at before anything is decoded. Knows no message and no model.
"""

import binascii
from base64 import b64decode
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from streaming.errors import WireError
from streaming.frames import Frame, fit

PICTURE_BYTES = 512 * 1024
LONGEST_SIDE = 4096
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # others would start readers that nobody needs here


def read_picture(data: str, width: int, height: int) -> Frame:
    """The picture upright, its middle cut out at the wanted aspect; what it leaves open is black.

    Raises WireError: `picture_empty`, `picture_too_large`, `picture_too_wide`, `picture_unreadable`.
    """
    if not data:
        raise WireError("picture_empty", "The picture's file is empty.", "Choose another file.")
    try:
        file = b64decode(data, validate=True)
    except binascii.Error:
        raise _unreadable() from None
    if len(file) > PICTURE_BYTES:
        raise too_large()
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as picture:
            size = picture.size
            whole = None if max(size) > LONGEST_SIDE else ImageOps.exif_transpose(picture).convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_wide("far too many pixels") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError):  # Pillow's words for damage
        raise _unreadable() from None
    if whole is None:
        raise _too_wide(f"{size[0]} x {size[1]} pixels")
    ground = Image.new("RGBA", whole.size, "black")
    return fit(np.asarray(Image.alpha_composite(ground, whole).convert("RGB")), width, height)


def too_large() -> WireError:
    return WireError(
        "picture_too_large",
        f"The picture's file is larger than {PICTURE_BYTES // 1024} KiB.",
        "Save it smaller, or send it from the page, which does so.",
    )


def _too_wide(size: str) -> WireError:
    return WireError(
        "picture_too_wide",
        f"The picture has {size}; {LONGEST_SIDE} along a side are the most.",
        "Make it smaller first.",
    )


def _unreadable() -> WireError:
    return WireError(
        "picture_unreadable",
        "This file is no picture that can be read, or is damaged.",
        f"Choose a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file.",
    )
