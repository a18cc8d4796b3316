"""Mean, deviation and principal components of a set's pixels: of all images, of a sample of them, or the usual ones."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from pipelines.cli import Parser
from pipelines.errors import first_line, of_the_system
from pipelines.files import regular
from pipelines.manifest import IMAGENET, LEAST, Estimate, Manifest, ShardError
from pipelines.order import Ints, philox
from pipelines.parallel import parallel, tick
from pipelines.pillow import STRIP, guarded, opened, upright_rgb
from pipelines.scanned import Scan, rows_of
from pipelines.tars import tar_samples

Reals = NDArray[np.float64]

ALL, SAMPLE_OF = "all", "sample:"
MANY, ENOUGH = 100_000, 20_000  # above so many images not all are decoded unless asked for, but so many
SUMS = 1 + 3 + 9  # of an image: pixels, levels of each channel, products of the levels of two channels
LEVELS = np.arange(256)
# The usual values of ImageNet. Mean and deviation: documentation of torchvision.models; what is known of their origin
# is in pytorch/vision#1965. Principal components: fb.resnet.torch, datasets/imagenet.lua; there as here, vectors are
# columns. Their signs are those of `_principal`.
USUAL_MEAN, USUAL_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
USUAL_EIGENVALUES = [0.2175, 0.0188, 0.0045]
USUAL_EIGENVECTORS = [[0.5675, 0.7192, -0.4009], [0.5808, -0.0045, 0.8140], [0.5836, -0.6948, -0.4203]]


class Statistics(NamedTuple):
    """The fields of a manifest that describe the pixels."""

    mean: list[float]
    std: list[float]
    eigenvalues: list[float]
    eigenvectors: list[list[float]]
    estimate: Estimate | None = None
    usual: str = ""


def statistics_option(parser: Parser) -> None:
    """Declares --statistics, a mode or None."""
    parser.add_argument(
        "--statistics",
        type=statistics_mode,
        metavar="all|sample:N|imagenet",
        help=f"which images are decoded for mean and deviation: all; N of them; none, with the usual values of "
        f"ImageNet. Default: all, or {SAMPLE_OF}{ENOUGH} if there are more than {MANY}",
    )


def statistics_mode(text: str) -> str:
    """An argument's type: all, sample:N or imagenet."""
    if text in (ALL, IMAGENET):
        return text
    number = text.removeprefix(SAMPLE_OF)
    if number == text or not (number.isascii() and number.isdigit() and 2 <= int(number[:20]) < 1 << 48):
        raise ArgumentTypeError(f"{text!r} is not all, sample:N (N images, 2 or more) or imagenet")
    return f"{SAMPLE_OF}{int(number)}"


def usual_mode(tars: Sequence[Path]) -> str:
    """The mode if none is asked for. Headers are read until it is known whether there are more than `MANY` samples;
    none are if the tars are too small for so many. Raises ShardError."""
    sizes = [tar.stat().st_size for tar in tars]
    found, left = 0, sum(sizes)
    for tar, size in zip(tars, sizes, strict=True):
        if found + left // (2 * LEAST) <= MANY:  # an image and its label have a header and data each
            return ALL
        for _ in tar_samples(tar):
            found += 1
            if found > MANY:
                return f"{SAMPLE_OF}{ENOUGH}"
        left -= size
    return ALL


def pixel_sums(image: Image.Image) -> Ints:
    """Sums over the pixels of an RGB image, int64 [13]: their number, their levels [3], products of levels [3, 3].

    They are exact, from histograms of the levels and of the differences of two channels: 2 x y = x^2 + y^2 - (x - y)^2.
    """
    levels, apart = np.zeros((3, 256), np.int64), np.zeros((3, 256), np.int64)
    height = max(1, STRIP // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        red, green, blue = strip.split()
        levels += np.reshape(strip.histogram(), (3, 256))
        apart += np.reshape(ImageChops.difference(strip, Image.merge("RGB", (green, blue, red))).histogram(), (3, 256))
    squares = levels @ LEVELS**2
    products = np.diag(squares)
    for x, y in ((0, 1), (1, 2), (2, 0)):
        products[x, y] = products[y, x] = (squares[x] + squares[y] - apart[x] @ LEVELS**2) // 2
    return np.concatenate([[image.width * image.height], levels @ LEVELS, products.ravel()])


def of_all(_: Sequence[Path], scans: Sequence[Scan]) -> Statistics:
    """Statistics of all pixels, from the sums in the scans."""
    total: Any = sum(np.array([s.pixels, *s.total, *(v for row in s.products for v in row)], object) for s in scans)
    return Statistics(*_as_text(*_moments(total)))


def of_imagenet(_: Sequence[Path], __: Sequence[Scan]) -> Statistics:
    """The usual statistics, which are not those of these images."""
    return Statistics(USUAL_MEAN, USUAL_STD, USUAL_EIGENVALUES, USUAL_EIGENVECTORS, usual=IMAGENET)


class OfSample:
    """Statistics of images that are drawn without replacement, and decoded. Which ones depends on nothing but the
    number of images in the set.

    Attributes:
        broken: the samples drawn that cannot be decoded, with reasons; known when this was called.
    """

    def __init__(self, images: int, *, workers: int, label: str) -> None:
        self.images, self.workers, self.label = images, workers, label
        self.broken = dict[int, str]()

    def __call__(self, tars: Sequence[Path], scans: Sequence[Scan]) -> Statistics:
        ends = np.cumsum([scan.shard["samples"] for scan in scans])
        drawn = draw(int(ends[-1]), self.images)
        edges = np.searchsorted(drawn, [0, *ends])
        tasks, first = list[_Drawn](), 0
        for i, (tar, scan) in enumerate(zip(tars, scans, strict=True)):
            if len(samples := drawn[edges[i] : edges[i + 1]]):
                rows = rows_of(tar, scan)[samples - first]
                tasks.append(_Drawn(tar, samples.tolist(), rows["offset"].tolist(), rows["size"].tolist()))
            first = int(ends[i])
        found = parallel(_decode_drawn, tasks, workers=self.workers, images=len(drawn), label=self.label)
        sums = np.concatenate([some for some, _ in found])
        self.broken = {sample: reason for _, broken in found for sample, reason in broken.items()}
        if len(sums) < min(2, int(ends[-1])):
            some = next(iter(self.broken.values()))
            raise ShardError(
                f"{tars[0].parent}: {len(sums)} of {len(drawn)} images drawn can be decoded ({some}), too few for "
                f"statistics: draw more with --statistics {SAMPLE_OF}N, or look at the images"
            )
        return estimated(sums, int(ends[-1]))


Measure = Callable[[Sequence[Path], Sequence[Scan]], Statistics]  # statistics of tars, given their scans


def measure_of(mode: str, *, workers: int, label: str) -> Measure:
    """What makes the statistics in this mode.

    Args:
        workers, label: processes that decode a sample, and what their progress bar says.
    """
    if mode.startswith(SAMPLE_OF):
        return OfSample(int(mode.removeprefix(SAMPLE_OF)), workers=workers, label=label)
    return of_all if mode == ALL else of_imagenet


class _Drawn(NamedTuple):
    """Samples of a tar, with the places of their images."""

    tar: Path
    samples: list[int]
    offsets: list[int]
    sizes: list[int]


def _decode_drawn(task: _Drawn) -> tuple[Ints, dict[int, str]]:
    """Sums of the images that can be decoded, int64 [n, 13], and why others cannot."""
    sums, broken = [np.zeros((0, SUMS), np.int64)], dict[int, str]()
    with open(task.tar, "rb", opener=regular) as file:
        for sample, offset, size in zip(task.samples, task.offsets, task.sizes, strict=True):
            file.seek(offset)
            try:
                with guarded():
                    sums.append(pixel_sums(upright_rgb(opened(file.read(size))))[None])
            except Exception as error:  # decoders raise anything on garbage
                if of_the_system(error):
                    raise
                broken[sample] = f"cannot be read: {first_line(error)}"
            tick()
    return np.concatenate(sums), broken


def draw(population: int, images: int) -> Ints:
    """Numbers below `population`, sorted, int64 [images] or all: a sample without replacement, determined by the two
    arguments. They are the first different ones in a long enough row of random numbers."""
    if images >= population:
        return np.arange(population)
    bits, found = philox(0, 0, "statistics"), np.zeros(0, np.int64)
    while len(found) < images:
        more = (bits.random_raw(images) % np.uint64(population)).astype(
            np.int64
        )  # 2^64 is far above: no number is rarer
        found = np.concatenate([found, more])
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    return np.sort(found[:images])


def estimated(sums: Ints, population: int) -> Statistics:
    """Statistics of a set from the sums of a simple random sample of its images, with their standard errors.

    An image is a cluster of pixels, and images have different numbers of them. So a mean is a ratio of two means over
    images, that of the sums t_i of a channel's levels and that of the numbers of pixels p_i. Its standard error is that
    of the mean of t_i - R p_i, with the finite population correction (Cochran, Sampling Techniques, 3rd ed., sections
    2.11 and 6.4). Deviations and eigenvalues are functions of such ratios: their residuals are linearised.

    Args:
        sums: of each image drawn, as `pixel_sums` returns them, int64 [n, 13], 2 or more unless the population has one.
        population: images of the set.
    """
    total = sums.astype(object).sum(0)
    mean, std, values, vectors = _moments(total)
    pixels, levels, products = sums[:, :1], sums[:, 1:4] / 255, sums[:, 4:].reshape(-1, 3, 3) / 255**2
    covariance = vectors @ np.diag(values) @ vectors.T
    # Of the mean: t_i - R p_i. Of the covariance: the image's squares and products about the mean, less p_i C.
    cross = levels[:, :, None] * mean
    about = products - cross - cross.transpose(0, 2, 1) + pixels[:, :, None] * np.outer(mean, mean)
    spread = about - pixels[:, :, None] * covariance
    variances = np.einsum("ncc->nc", spread)
    turned = np.einsum("cv,ncd,dv->nv", vectors, spread, vectors)  # first order: dl = v^T dC v
    roots = np.divide(variances, 2 * std, out=np.zeros_like(variances), where=std > 0)  # 0 for a channel of one level
    residuals = (levels - mean * pixels, roots, turned)
    errors = [_standard_error(of / pixels.mean(), population) for of in residuals]
    found = Statistics(*_as_text(mean, std, values, vectors))
    return found._replace(estimate=Estimate(len(sums), *(_digits(error) for error in errors)))


def _standard_error(residuals: Reals, population: int) -> Reals:
    """Of the mean of residuals [n, 3], which is 0, for each column."""
    n = len(residuals)
    fraction = n / population
    squares = (residuals**2).sum(0) / max(1, n - 1)
    error: Reals = np.sqrt((1 - fraction) / n * squares)
    return error


def _moments(sums: NDArray[np.object_]) -> tuple[Reals, Reals, Reals, Reals]:
    """Mean, standard deviation, eigenvalues and eigenvectors (columns) of the RGB covariance, for pixels in [0, 1].

    Args:
        sums: over all pixels, as `pixel_sums` returns them. For a large set they need Python's integers.
    """
    pixels, total, products = sums[0], sums[1:4], sums[4:].reshape(3, 3)
    mean = np.array(total / pixels, np.float64) / 255
    # Exact up to the division: the variance of a constant channel is exactly 0.
    covariance = np.array((products * pixels - np.outer(total, total)) / (255 * pixels) ** 2, np.float64)
    return mean, np.sqrt(np.diag(covariance).clip(0)), *_principal(covariance)


def _principal(covariance: Reals) -> tuple[Reals, Reals]:
    """Eigenvalues, largest first, and eigenvectors (columns), whose free sign is always chosen in the same way."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    return values.clip(0, 1), vectors


def _as_text(mean: Reals, std: Reals, values: Reals, vectors: Reals) -> tuple[Any, ...]:
    """Rounded to the digits of a manifest."""
    return _digits(mean), _digits(std), _digits(values), [_digits(row) for row in vectors]


def _digits(values: Reals) -> list[float]:
    return [float(f"{v:.9g}") for v in values]


def told(manifest: Manifest) -> str:
    """How a set's statistics came about, as a sentence for its user."""
    estimate = manifest.estimate
    of = f"of {estimate.images} of {manifest.samples} images" if estimate else f"of all {manifest.samples} images"
    if manifest.usual:
        of = "are the usual ones of ImageNet, not of these images"
    mean = _with_errors(manifest.mean, estimate.mean if estimate else None)
    std = _with_errors(manifest.std, estimate.std if estimate else None)
    return f"statistics {of}: mean ({mean}), standard deviation ({std})"


def _with_errors(values: Sequence[float], errors: Sequence[float] | None) -> str:
    if errors is None:
        return ", ".join(f"{value:.3f}" for value in values)
    return ", ".join(f"{value:.4f} +- {error:.4f}" for value, error in zip(values, errors, strict=True))
