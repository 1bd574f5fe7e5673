"""The grid of images: every pixel is where it belongs, and bytes are those of the images."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedllm_sec import InputError
from fedllm_sec.reports.samples import draw_samples, grid


def images(count, height, width, colour=False, seed=0):
    shape = (count, height, width, 3) if colour else (count, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_image_is_found_again_and_the_rest_is_white(count, height, width, colour):
    made = images(count, height, width, colour)
    sheet = grid(made).astype(int)
    columns = math.ceil(math.sqrt(count))
    for place, image in enumerate(made):
        row, column = divmod(place, columns)
        top, left = 2 + row * (height + 2), 2 + column * (width + 2)
        np.testing.assert_array_equal(sheet[top : top + height, left : left + width], image)
    assert sheet.size - made.size == (sheet == 255).sum() - (made == 255).sum()
    assert sheet.shape[1] == 2 + columns * (width + 2)


@pytest.mark.parametrize("colour", [False, True])
def test_the_picture_is_the_grid_enlarged_and_the_same_images_are_the_same_bytes(tmp_path, colour):
    made = images(10, 28, 32, colour)
    path = draw_samples(made, tmp_path)
    first = path.read_bytes()
    assert path == tmp_path / "samples.png"
    with Image.open(path) as picture:
        assert picture.mode == ("RGB" if colour else "L")
        shown = np.asarray(picture)
    np.testing.assert_array_equal(shown[::2, ::2], grid(made))
    np.testing.assert_array_equal(shown[1::2, 1::2], grid(made))
    assert draw_samples(made.copy(), tmp_path, "again").read_bytes() == first
    assert draw_samples(255 - made, tmp_path).read_bytes() != first


@pytest.mark.parametrize(
    "wrong", [images(0, 4, 4), images(4, 4, 4)[0], images(2, 4, 4) / 255, np.zeros((2, 4, 4, 2), np.uint8)], ids=str
)
def test_what_is_no_image_is_told(tmp_path, wrong):
    with pytest.raises(InputError, match="images are drawn from uint8 of shape"):
        draw_samples(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        draw_samples(images(1, 2, 2), tmp_path / "none")
