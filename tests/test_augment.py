"""Augmentation: its distribution, as in section 4.1 of the paper, and its dependence on the position alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from pipelines import order
from pipelines.augment import Augment, fixed_views, framed, random_views, resized, uniform
from tests.helpers.reference import reference_crop

N = 40_000
COMPONENTS = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0] * np.array([0.22, 0.019, 0.0045])
SIZE = np.tile([[160, 144]], (N, 1))  # 80x72 once resized to 72
AUGMENT = Augment(resize=72, crop=67)
VIEWS = random_views(SIZE, AUGMENT, COMPONENTS, seed=5, epoch=3, start=0)


def chi_square(counts: NDArray[np.int64]) -> float:
    """Standard deviations by which Pearson's statistic of a table exceeds its mean under equally likely cells."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_crop_and_reflection_are_uniform_and_independent() -> None:
    assert VIEWS.size.tolist()[0] == [80, 72]
    x, y = VIEWS.corner.T
    counts = np.zeros((14, 6, 2), np.int64)  # 80 - 67 + 1 places by 72 - 67 + 1 places by reflected or not
    np.add.at(counts, (x, y, VIEWS.mirror.astype(int)), 1)
    assert chi_square(counts) < 5


def test_neighbours_and_epochs_are_independent() -> None:
    other = random_views(SIZE, AUGMENT, COMPONENTS, seed=5, epoch=4, start=0)
    seed = random_views(SIZE, AUGMENT, COMPONENTS, seed=6, epoch=3, start=0)
    x, alpha = VIEWS.corner[:, 0], VIEWS.shift[:, 0]
    pairs = [(x[:-1], x[1:]), (alpha[:-1], alpha[1:]), (x, alpha)]
    pairs += [(x, v.corner[:, 0]) for v in (other, seed)] + [(alpha, v.shift[:, 0]) for v in (other, seed)]
    for one, two in pairs:
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(N)


def test_lighting_is_the_papers_normal_distribution() -> None:
    shift = VIEWS.shift.astype(np.float64)
    covariance = (255 * 0.1) ** 2 * sum(np.outer(c, c) for c in COMPONENTS.T)
    deviation = np.sqrt(np.diag(covariance))
    assert (abs(shift.mean(0)) < 5 * deviation / np.sqrt(N)).all()
    error = np.sqrt((np.outer(deviation, deviation) ** 2 + covariance**2) / N)  # of a sample covariance of normals
    assert (abs(np.cov(shift.T) - covariance) < 5 * error).all()

    factors = np.linalg.solve(COMPONENTS, shift.T) / 255 / 0.1
    assert (abs(np.cov(factors) - np.eye(3)) < 5 * np.sqrt(2 / N)).all()
    for a in factors:  # the shape of a normal distribution, not only its moments
        for bound, share in ((0.5, 0.382925), (1, 0.682689), (2, 0.954500), (3, 0.997300)):
            assert abs((abs(a) < bound).mean() - share) < 5 * np.sqrt(share * (1 - share) / N)


def test_switches() -> None:
    plain = random_views(
        SIZE, Augment(resize=72, crop=67, mirror=False, lighting=0.0), COMPONENTS, seed=5, epoch=3, start=0
    )
    assert not plain.mirror.any()
    assert not plain.shift.any()
    assert np.array_equal(plain.corner, VIEWS.corner)
    double = random_views(SIZE, Augment(resize=72, crop=67, lighting=0.2), COMPONENTS, seed=5, epoch=3, start=0)
    np.testing.assert_allclose(double.shift, 2 * VIEWS.shift, rtol=1e-5)


def test_views_follow_from_the_position_alone() -> None:
    rng = np.random.default_rng(1)
    size = rng.integers(60, 400, (500, 2))
    whole = random_views(size, AUGMENT, COMPONENTS, seed=2, epoch=7, start=0)
    cuts = np.unique(np.concatenate([[0, 1, 500], rng.integers(0, 500, 12)]))
    for low, high in pairwise(cuts):
        piece = random_views(size[low:high], AUGMENT, COMPONENTS, seed=2, epoch=7, start=int(low))
        for name, values in vars(piece).items():
            assert values.tobytes() == getattr(whole, name)[low:high].tobytes(), name


@pytest.mark.parametrize("words", [1, 3, 4, 9])
def test_a_stream_follows_from_the_position_alone(words: int) -> None:
    """And shares no number with another, nor with that of crop, reflection and lighting."""
    given = {"seed": 2, "epoch": 7}
    whole = uniform("one", words, start=0, n=500, **given)
    assert whole.shape == (500, words)
    pieces = [uniform("one", words, start=low, n=high - low, **given) for low, high in pairwise((0, 1, 77, 500))]
    assert np.array_equal(np.concatenate(pieces), whole)
    others = [uniform(stream, words, start=0, n=500, **given) for stream in ("two", order.VIEWS)]
    assert len(np.unique([whole, *others])) == 3 * 500 * words
    assert whole.min() >= 0
    assert whole.max() < 1


def test_center_square_keeps_crops_in_the_central_square() -> None:
    square = Augment(resize=72, crop=67, center_square=True)
    for size, axis in (((144, 72), 0), ((72, 144), 1)):
        views = random_views(np.tile([size], (2000, 1)), square, COMPONENTS, seed=0, epoch=0, start=0)
        assert set(views.corner[:, axis]) == set(range(36, 42))  # the square covers 36 .. 108
        assert set(views.corner[:, 1 - axis]) == set(range(6))
        centre = fixed_views(np.array([size]), square)
        assert centre.corner[0, axis] == 38


def test_crops_lie_inside_the_image_and_reach_its_edges() -> None:
    size = np.random.default_rng(2).integers(30, 300, (5000, 2))
    views = random_views(size, AUGMENT, COMPONENTS, seed=0, epoch=0, start=0)
    room = views.size - views.corner - 67
    assert (views.corner >= 0).all()
    assert (room >= 0).all()
    assert (views.corner == 0).any(0).all()
    assert (room == 0).any(0).all()


def test_resized_sizes_are_torchvisions() -> None:
    size = np.random.default_rng(3).integers(20, 500, (300, 2))
    for shorter in (37, 256):
        for (width, height), now in zip(size.tolist(), resized(size, shorter).tolist(), strict=True):
            assert now == list(F.resize(Image.new("1", (width, height)), [shorter]).size)


def patches(image: Image.Image, augment: Augment, views: range) -> list[bytes]:
    """Patches that `fixed_views` cuts from an image of the resized size."""
    size = np.array([image.size])
    return [reference_crop(image, fixed_views(size, augment, v), 0, augment.crop).tobytes() for v in views]


@pytest.mark.parametrize("center_square", [False, True])
@pytest.mark.parametrize("crop", [60, 65, 67, 70, 72])
@pytest.mark.parametrize(("width", "height"), [(72, 72), (75, 72), (72, 77), (80, 72), (72, 91), (97, 72)])
def test_fixed_views_are_torchvisions_ten_crop(width: int, height: int, crop: int, center_square: bool) -> None:
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    augment = Augment(resize=72, crop=crop, center_square=center_square)
    square = F.center_crop(image, [72]) if center_square else image
    upper_left, upper_right, lower_left, lower_right, centre = (p.tobytes() for p in F.five_crop(square, [crop]))
    assert patches(image, augment, range(5)) == [centre, upper_left, upper_right, lower_left, lower_right]
    assert sorted(patches(image, augment, range(10))) == sorted(p.tobytes() for p in F.ten_crop(square, [crop]))
    for view in range(10):
        views = fixed_views(np.array([image.size]), augment, view)
        assert views.mirror[0] == (view >= 5)
        assert not views.shift.any()


@pytest.mark.parametrize(("width", "height"), [(80, 72), (72, 90), (75, 72), (72, 77)])
def test_the_first_fixed_view_is_torchvisions_centre_crop(width: int, height: int) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (height, width, 3), np.uint8)
    views = fixed_views(np.array([[width, height]]), Augment(resize=72, crop=68))
    expected = np.asarray(F.center_crop(Image.fromarray(pixels), [68]))
    assert np.array_equal(reference_crop(Image.fromarray(pixels), views, 0, 68), expected)


def test_reference_crop_is_torchvisions() -> None:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (144, 160, 3), np.uint8)
    for i in range(20):
        left, top = VIEWS.corner[i].tolist()
        expected = F.resized_crop(F.resize(Image.fromarray(pixels), [72]), top, left, 67, 67, [67, 67])
        expected = F.hflip(expected) if VIEWS.mirror[i] else expected
        assert np.array_equal(reference_crop(Image.fromarray(pixels), VIEWS, i, 67), np.asarray(expected))


@pytest.mark.parametrize("size", [(72, 100), (300, 72), (144, 200), (31, 60), (1000, 733)])
@pytest.mark.parametrize("view", range(10))
def test_what_is_decoded(size: tuple[int, int], view: int) -> None:
    """The crop, or the whole image if it is resized."""
    augment = Augment(resize=72, crop=67)
    views = fixed_views(np.array([size]), augment, view)
    frame = framed(views, augment.crop)
    assert frame.scaled[0] == (min(size) != 72)
    if frame.scaled[0]:
        assert (frame.begin[0].tolist(), frame.extent[0].tolist()) == ([0, 0], list(size))
        scale = (np.array(size) / views.size[0])[::-1]
        np.testing.assert_allclose(frame.roi_begin[0], views.corner[0][::-1] * scale, rtol=1e-6)
        np.testing.assert_allclose(frame.roi_end - frame.roi_begin, [67 * scale], rtol=1e-5)
    else:
        assert (frame.begin == views.corner).all()
        assert (frame.extent == 67).all()
