"""What is written to be looked at can be read again."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pipeline.training.sheet import write_film, write_sheet


def test_a_sheet_holds_its_pictures_in_rows(tmp_path: Path) -> None:
    red, blue = (np.full((4, 6, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 0, 250)))
    write_sheet(tmp_path / "new" / "sheet.png", [[red, blue], [blue, blue]])
    sheet = cv2.cvtColor(cv2.imread(str(tmp_path / "new" / "sheet.png")), cv2.COLOR_BGR2RGB)
    assert sheet.shape == (8, 12, 3)
    assert (sheet[:4, :6] == red).all() and (sheet[:4, 6:] == blue).all() and (sheet[4:, :6] == blue).all()


def test_a_film_plays_its_clips_above_each_other_at_its_rate(tmp_path: Path) -> None:
    clips = [np.stack([np.full((8, 8, 3), 20 * k + shade, np.uint8) for k in range(5)]) for shade in (0, 100)]
    write_film(tmp_path / "film.webp", clips, fps=16)
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames == 5
        film.seek(3)
        picture = np.asarray(film.convert("RGB")).astype(int)
    assert picture.shape == (16, 8, 3)
    assert abs(picture[:8].mean() - 60) < 6
    assert abs(picture[8:].mean() - 160) < 6
