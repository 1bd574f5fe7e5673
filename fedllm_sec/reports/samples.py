"""A grid of images: what a generator makes."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import atomic_file

GAP = 2  # pixels between images
GROUND = 255  # white
SIDE = 56  # pixels; smaller images are enlarged by a whole number until a side has as many


def grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images in rows of equal length, about as many rows as columns, the first one top left.

    Args:
        images: (n, H, W) grey or (n, H, W, 3) in colour.

    Returns:
        (height, width) or (height, width, 3), with a gap around every image.

    Raises:
        InputError: if they are no such images, or none.
    """
    colours = images.shape[3:]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or colours not in ((), (3,)) or not images.size:
        raise InputError(
            f"images are drawn from uint8 of shape (n, H, W) or (n, H, W, 3), not {images.dtype} of {images.shape}"
        )
    count, height, width = images.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    down, right = height + GAP, width + GAP
    sheet = np.full((rows * down + GAP, columns * right + GAP, *colours), GROUND, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * down + GAP, place % columns * right + GAP
        sheet[top : top + height, left : left + width] = image
    return sheet


def draw_samples(images: NDArray[np.uint8], folder: Path, name: str = "samples") -> Path:
    """Write a grid of images as `<name>.png` into an existing folder; the same images, the same bytes.

    Args:
        images: (n, H, W) grey or (n, H, W, 3) in colour, uint8.
        folder: where to.
        name: of the file.

    Returns:
        The path.

    Raises:
        InputError: if they are no such images, or there is no such folder.
    """
    from PIL import Image

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it before images are drawn there")
    sheet = grid(images)
    times = math.ceil(SIDE / min(images.shape[1:3]))
    path = folder / f"{name}.png"
    with atomic_file(path) as partial:
        Image.fromarray(sheet.repeat(times, axis=0).repeat(times, axis=1)).save(partial, format="PNG")
    return path
