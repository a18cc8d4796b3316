"""The DALI graph: from encoded images, and how each is to be shown, to the inputs of the net."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import Inputs
from pipelines.misc import cpus
from pipelines.shards import Manifest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from nvidia.dali import Pipeline, fn, types

Device = Literal["cpu", "gpu"]
DEPTH = 2  # batches that DALI works on ahead of the one that is collected


class Feed(NamedTuple):
    """The inputs of the graph for the n samples of a step.

    Attributes:
        encoded: the files' bytes, n arrays.
        begin: where the region to decode begins: (y, x) in the original image, float32 [n, 2], if the graph resizes;
            otherwise the left top corner as (x, y), int32 [n, 2].
        end: where it ends, float32 [n, 2], if the graph resizes; otherwise its size as (x, y), int32 [n, 2].
        mirror: horizontal reflection, int32 [n].
        mean: what to subtract from each channel, float32 [n, 3].
    """

    encoded: Sequence[NDArray[np.uint8] | None]
    begin: NDArray[Any]
    end: NDArray[Any]
    mirror: NDArray[np.int32]
    mean: NDArray[np.float32]


@dataclass(frozen=True)
class Decode:
    """Settings of the decoding.

    Attributes:
        device: where DALI decodes; "gpu" needs `device_id`.
        threads: DALI's decoding threads; 0: the CPUs of this process.
        inputs: mean_subtracted as the paper, minus_one_to_one, or standardized (divided by the standard deviation too).
    """

    device: Device = "cpu"
    device_id: int | None = None
    threads: int = 0
    inputs: Inputs = "mean_subtracted"

    @property
    def output(self) -> torch.device:
        """Holds the inputs."""
        return torch.device("cpu") if self.device == "cpu" else torch.device(f"cuda:{self.device_id}")


def graph(
    source: Callable[[], Feed],
    *,
    batch: int,
    crop: int,
    resize: bool,
    std: Sequence[float],
    decode: Decode,
    depth: int = DEPTH,
) -> Pipeline:
    """decode -> resize of the region that the crop needs (or crop alone) -> mirror and normalise.

    `source` returns the inputs of a step of n <= `batch` samples. Output: float32 NHWC. On the GPU the whole image is
    decoded: decoders of a region were seen to crash there (nvImageCodec issue 55).
    """
    pipeline = Pipeline(batch, decode.threads or cpus(), decode.device_id, prefetch_queue_depth=depth)
    with pipeline:
        feed = Feed(*fn.external_source(source=source, num_outputs=len(Feed._fields), batch=True))
        upright = {"output_type": types.RGB, "adjust_orientation": False}  # settled when the set was packed
        if not resize and decode.device == "cpu":
            image = fn.decoders.image_slice(feed.encoded, start=feed.begin, shape=feed.end, **upright)
        else:
            device = "mixed" if decode.device == "gpu" else "cpu"
            image = fn.decoders.image(feed.encoded, device=device, **upright)
            if resize:
                image = fn.resize(
                    image,
                    resize_x=crop,
                    resize_y=crop,
                    roi_start=feed.begin,
                    roi_end=feed.end,
                    interp_type=types.INTERP_LINEAR,
                    subpixel_scale=False,  # nearest to torchvision and Pillow
                )
            else:
                image = fn.slice(image, start=feed.begin, shape=feed.end, axis_names="WH")
        image = fn.crop_mirror_normalize(
            image, mirror=feed.mirror, mean=feed.mean, std=list(std), dtype=types.FLOAT, output_layout="HWC"
        )
        pipeline.set_outputs(image)
    return pipeline


def collect(pipeline: Pipeline) -> Tensor:
    """Run a pipeline: its output as a tensor of its own, float32 [n, 3, crop, crop], channels_last."""
    (output,) = pipeline.run()
    pixels: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    if pixels.is_cuda:  # DALI reuses its memory on its own stream; a copy of ours outlives that
        with torch.cuda.stream(torch.cuda.Stream(pixels.device)):  # type: ignore[no-untyped-call]
            pixels = pixels.clone()
            torch.cuda.current_stream().synchronize()
        pixels.record_stream(torch.cuda.default_stream(pixels.device))
    return pixels.permute(0, 3, 1, 2)


def scale(inputs: Inputs, statistics: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean to subtract from each channel, and deviation to divide it by then, in levels: float32 [3] each."""
    if inputs == "minus_one_to_one":
        return np.full(3, 127.5, np.float32), np.full(3, 127.5, np.float32)
    mean, std = (255 * np.array(values, np.float32) for values in (statistics.mean, statistics.std))
    return mean, std if inputs == "standardized" else np.ones(3, np.float32)
