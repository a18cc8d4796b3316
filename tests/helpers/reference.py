"""The loader's pixels, computed independently."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.augment import Views


def reference_crop(image: Image.Image, views: Views, i: int, crop: int) -> NDArray[np.uint8]:
    """Sample `i` as DALI must show it: uint8 [crop, crop, 3], by Pillow's bilinear resize of the whole image."""
    width, height = (int(v) for v in views.size[i])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (int(v) for v in views.corner[i])
    pixels = np.asarray(image)[top : top + crop, left : left + crop]
    return pixels[:, ::-1] if views.mirror[i] else pixels
