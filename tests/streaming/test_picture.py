"""Pictures that a page sends: what is read, how it fits, and what each bad file says."""

import zlib
from base64 import b64encode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streaming.errors import WireError
from streaming.picture import FORMATS, PICTURE_BYTES, read_picture


def file_of(picture: Image.Image, kind: str = "PNG", **words: Any) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **words)
    return file.getvalue()


def read(file: bytes, width: int = 64, height: int = 32) -> np.ndarray:
    return read_picture(b64encode(file).decode(), width, height)


def refused(data: str) -> str:
    with pytest.raises(WireError) as caught:
        read_picture(data, 64, 32)
    assert caught.value.message.count(".") == 1 and caught.value.remedy
    return caught.value.code


@pytest.mark.parametrize("kind", FORMATS)
def test_each_kind_is_read_and_its_middle_is_cut_out_at_the_wanted_size(kind: str) -> None:
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (50, 0, 250, 100))
    frame_HWC = read(file_of(picture, kind))
    assert frame_HWC.shape == (32, 64, 3)
    assert frame_HWC.dtype == np.uint8
    assert np.abs(frame_HWC.astype(int) - (0, 0, 255)).mean() < 8


def test_a_picture_is_upright_and_black_where_it_is_open() -> None:
    sideways = Image.new("RGB", (32, 64), "white")
    sideways.paste("black", (0, 0, 16, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # as a camera that was turned says it
    assert read(file_of(sideways, "JPEG", exif=exif))[:12].mean() < 20
    assert read(file_of(Image.new("RGBA", (64, 32), (255, 255, 255, 0)))).max() == 0


def test_grey_and_palettes_become_colours() -> None:
    assert read(file_of(Image.new("L", (64, 32), 90)))[0, 0].tolist() == [90, 90, 90]
    assert read(file_of(Image.new("RGB", (64, 32), "red").convert("P"), "GIF"))[0, 0].tolist() == [255, 0, 0]


def test_each_file_that_cannot_be_used_says_so_in_one_sentence() -> None:
    whole = file_of(Image.new("RGB", (64, 32), "red"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8))
    assert refused("") == "picture_empty"
    cut = file_of(noise, "JPEG")[:9000]
    for file in (b"nothing", whole[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", cut):
        assert refused(b64encode(file).decode()) == "picture_unreadable"
    assert refused("no base64!") == "picture_unreadable"
    assert len(file_of(noise)) > PICTURE_BYTES
    assert refused(b64encode(file_of(noise)).decode()) == "picture_too_large"
    assert refused(b64encode(file_of(Image.new("1", (5000, 10)))).decode()) == "picture_too_wide"


def test_a_small_file_that_unpacks_to_a_huge_picture_is_refused_before_it_is_unpacked() -> None:
    head = bytearray(file_of(Image.new("1", (8, 8))))
    head[16:24] = (60_000).to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    assert refused(b64encode(bytes(head)).decode()) == "picture_too_wide"
