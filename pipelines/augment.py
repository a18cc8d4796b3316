"""Augmentation: how the sample at a position is shown to the net.

Crop, reflection and lighting of a sample depend only on (seed, epoch, position), so the net sees the same pixels at any
world size, after any restart and with any number of threads. DALI receives them as tensors and holds no random state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.bounds import least
from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.misc import ceil_div
from pipelines.order import VIEWS, philox

Inputs = Literal["mean_subtracted", "minus_one_to_one", "standardized"]  # how pixels are scaled
LEAST_STD = 1 / 255  # one level, for pixels in [0, 1]: JPEG rounding alone adds as much to a constant channel
WORDS = 8  # per position in the stream VIEWS: x, y, reflection, four for two Box-Muller pairs, one spare
BLOCK = 4  # words that Philox4x64 makes at a time; `advance` counts blocks


@dataclass(frozen=True)
class Views:
    """Size, crop, reflection and lighting of each sample of a batch.

    Attributes:
        size: width and height after the resize, int32 [n, 2].
        corner: left and top edge of the crop in the resized image, int32 [n, 2].
        mirror: horizontal reflection, bool [n].
        shift: lighting added to each channel, in levels of 0..255, float32 [n, 3].
        original: width and height before the resize, int64 [n, 2].
    """

    size: NDArray[np.int32]
    corner: NDArray[np.int32]
    mirror: NDArray[np.bool_]
    shift: NDArray[np.float32]
    original: NDArray[np.int64]


class Frame(NamedTuple):
    """Region of each image to decode, and the part of it that becomes the crop. Images to resize are decoded whole.

    Attributes:
        begin: left and top edge of the region to decode, int32 [n, 2].
        extent: its width and height, int32 [n, 2].
        roi_begin: top and left edge of the crop in the stored image if it is resized, (y, x), float32 [n, 2].
        roi_end: bottom and right edge, likewise.
        scaled: whether the image is resized; if not, the region is the crop. Bool [n].
    """

    begin: NDArray[np.int32]
    extent: NDArray[np.int32]
    roi_begin: NDArray[np.float32]
    roi_end: NDArray[np.float32]
    scaled: NDArray[np.bool_]


def framed(views: Views, crop: int) -> Frame:
    """Frame of each view in the stored image.

    An image to be resized is decoded whole. A decoder notices a truncated file only below some line: if the region
    decided, one epoch would notice and another would not, and a restart would show other samples.
    """
    size = views.original
    scaled = (size != views.size).any(axis=1)
    ratio = size / views.size.astype(np.float64)
    begin, end = views.corner * ratio, (views.corner + crop) * ratio
    return Frame(
        begin=np.where(scaled[:, None], 0, views.corner).astype(np.int32),
        extent=np.where(scaled[:, None], size, crop).astype(np.int32),
        roi_begin=np.ascontiguousarray(begin[:, ::-1], np.float32),
        roi_end=np.ascontiguousarray(end[:, ::-1], np.float32),
        scaled=scaled,
    )


def resized(size: NDArray[np.int64], shorter_side: int) -> NDArray[np.int32]:
    """Width and height [n, 2] after "the shorter side was of length 256" (section 2); the longer side is
    truncated to an integer, as in torchvision."""
    now: NDArray[np.int64] = shorter_side * size // size.min(axis=1, keepdims=True)
    return now.astype(np.int32)


@dataclass(frozen=True)
class Augment:
    """Augmentation settings (section 4.1 of the paper). Lengths are in pixels."""

    resize: int = least(1, 256)
    """Shorter side of the image that crops are cut from."""
    crop: int = least(1, 227)
    """Side of the square input. The paper says 224; its layers' arithmetic needs 227."""
    center_square: bool = False
    """First cut the central resize x resize square, as in the paper."""
    mirror: bool = True
    """Reflect half of the training samples horizontally."""
    lighting: float = least(0, 0.1)
    """Standard deviation of the factors of PCA lighting; 0 disables it."""


def without_chance(augment: Augment) -> Augment:
    """The same scale and crop; whatever else there is to set is off, for views that are not random."""
    return Augment(augment.resize, augment.crop, augment.center_square, mirror=False, lighting=0.0)


# Offsets as fractions of the width and height left over by a crop.
PLACES = np.array([(0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])


def fixed_views(size: NDArray[np.int64], augment: Augment, view: int = 0) -> Views:
    """Views of one of the ten patches that predictions are averaged over (section 4.1), without lighting.

    "At test time, the network makes a prediction by extracting five 224x224 patches (the four corner patches and the
    center patch) as well as their horizontal reflections (hence ten patches in all)". With `center_square` they are
    cut from the central square, otherwise from the whole resized image. The pixels are those of torchvision's
    CenterCrop(resize) and TenCrop(crop). It reflects before it cuts, so if the margin of the centre patch is odd, the
    centre patch of the reflected image starts one pixel further to the right.

    Args:
        size: original width and height, [n, 2].
        view: 0: centre; 1 to 4: the corners, upper left and right, lower left and right; 5 to 9: the same patches,
            reflected.
    """
    assert 0 <= view < 2 * len(PLACES)
    now, mirrored = resized(size, augment.resize), view >= len(PLACES)
    square, room = _room(now, augment)
    places = room * PLACES[view % len(PLACES)]
    inside = np.rint(places)  # half to even, as torchvision's round
    if mirrored:
        inside[:, 0] = room[:, 0] - np.rint(room[:, 0] - places[:, 0])
    corner = (square + inside).astype(np.int32)
    n = len(size)
    return Views(now, corner, np.full(n, mirrored), np.zeros((n, 3), np.float32), size)


def _room(now: NDArray[np.int32], augment: Augment) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Top left corner of the region that crops are cut from, and how far a crop can move in it, int32 [n, 2] each."""
    side = np.full_like(now, augment.resize) if augment.center_square else now
    return np.rint((now - side) / 2).astype(np.int32), side - augment.crop


def uniform(stream: int | str, words: int, *, seed: int, epoch: int, start: int, n: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) for positions start .. start + n of an epoch, float64 [n, words].

    Each augmentation draws from a stream of its own, named after its setting, and so leaves the others as they are.
    """
    blocks = ceil_div(words, BLOCK)
    bits = philox(seed, epoch, stream)
    bits.advance(blocks * start)
    raw: NDArray[np.uint64] = bits.random_raw(BLOCK * blocks * n).reshape(n, BLOCK * blocks)[:, :words]
    return (raw >> np.uint64(11)) * np.float64(2**-53)


def random_views(
    size: NDArray[np.int64],
    augment: Augment,
    components: NDArray[np.float64],
    *,
    seed: int,
    epoch: int,
    start: int,
) -> Views:
    """Random views of positions start .. start + n of an epoch (section 4.1 of the paper).

    Crop: uniform over all places. Reflection: with probability 1/2. Lighting: the paper adds
    "[p1, p2, p3][a1 l1, a2 l2, a3 l3]^T" with a ~ N(0, 0.1), where p and l are the eigenvectors and eigenvalues of the
    covariance of RGB values; with these scaled to [0, 1], the shift in levels is 255 times that product.

    Args:
        size: original width and height, [n, 2].
        components: the products l_i p_i as columns, [3, 3].
    """
    draw = partial(uniform, seed=seed, epoch=epoch, start=start, n=len(size))
    words = draw(VIEWS, WORDS)
    now = resized(size, augment.resize)
    square, room = _room(now, augment)
    corner = square + np.floor(words[:, :2] * (room + 1)).astype(np.int32)
    radius = np.sqrt(-2 * np.log1p(-words[:, 3:5]))
    angle = 2 * np.pi * words[:, 5:7]
    normal = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)
    shift = 255 * augment.lighting * normal @ components.T
    flipped = (words[:, 2] < 0.5) & augment.mirror
    return Views(now, corner, flipped, shift.astype(np.float32), size)


def scale(inputs: Inputs, statistics: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean to subtract from each channel and standard deviation to divide by, in levels, float32 [3] each. Raises
    UserError rather than divide by next to zero."""
    if inputs == "minus_one_to_one":
        return np.full(3, 127.5, np.float32), np.full(3, 127.5, np.float32)
    if inputs == "standardized" and min(statistics.std) < LEAST_STD:
        channels = [name for name, std in zip(("red", "green", "blue"), statistics.std, strict=True) if std < LEAST_STD]
        raise UserError(
            f"data.inputs standardized divides each channel by its deviation, which is less than one level of 255 for "
            f"{' and '.join(channels)} in the training set: set data.inputs to mean_subtracted"
        )
    mean, std = (255 * np.array(values, np.float32) for values in (statistics.mean, statistics.std))
    return mean, std if inputs == "standardized" else np.ones(3, np.float32)
