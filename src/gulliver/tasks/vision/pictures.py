"""A picture, as a file or as numbers, into the pixels that a network reads. Files and numbers come from strangers."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from gulliver.core.errors import DataError
from gulliver.core.foreign import foreign

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
"""Larger pictures are refused from their header, before anything is decoded."""
TOO_LARGE = f"the picture has more than {MAX_PIXELS:,} pixels; make it smaller"


def decoded(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels float32 [channels, height, width] in [0, 1] of a picture file's bytes, turned as its EXIF tag says, in

    grey or RGB as the network's `shape` has 1 or 3 channels, resized to it. DataError for what cannot be read.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    known = f"; give a {', '.join(FORMATS)} file"
    with foreign("the picture cannot be read", DataError, known), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise DataError(TOO_LARGE) from None
        if picture.width * picture.height > MAX_PIXELS:
            raise DataError(TOO_LARGE)
        ImageOps.exif_transpose(picture, in_place=True)
        mode = "L" if channels == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32) / 255
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def from_numbers(values: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """The same from numbers in [0, 1], flat or nested. DataError when they are too many, too few or out of range."""
    try:
        pixels = np.asarray(values, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"'image' must be numbers from 0 to 1: {error}") from None
    if pixels.size != int(np.prod(shape)):
        raise DataError(f"'image' has {pixels.size} numbers; the network takes {' x '.join(map(str, shape))}")
    if not np.isfinite(pixels).all() or pixels.min() < 0.0 or pixels.max() > 1.0:
        raise DataError("'image' must be numbers from 0 to 1; scale the pixels")
    return pixels.reshape(shape)
