"""The DALI graph: what is done to a batch, as one function of encoded images and of how each is to be shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.shards import Manifest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from nvidia.dali import Pipeline as Pipeline
    from nvidia.dali import fn, types

Device = Literal["cpu", "gpu"]
Inputs = Literal["mean_subtracted", "minus_one_to_one", "standardized"]
Feed = tuple[Sequence[NDArray[np.uint8] | None], NDArray[Any], NDArray[Any], NDArray[np.int32], NDArray[np.float32]]


def graph(
    source: Callable[[], Feed],
    *,
    batch: int,
    crop: int,
    resize: bool,
    std: Sequence[float],
    device: Device,
    device_id: int | None,
    threads: int,
    depth: int = 2,
) -> Pipeline:
    """decode -> resize of the region that the crop needs (or crop alone) -> mirror and normalise.

    `source` returns, for the n <= `batch` samples of a step: encoded images; where the region begins and where it ends
    as (y, x) in the original image, float32 [n, 2] (with `resize`), or the left top corner and the size as (x, y),
    int32 [n, 2] (without); mirror, int32 [n]; what to subtract from each channel, float32 [n, 3].

    Output: float32 NHWC. On the GPU the whole image is decoded: decoders of a region were seen to crash there
    (nvImageCodec issue 55).
    """
    pipeline = Pipeline(batch, threads, device_id, prefetch_queue_depth=depth)
    with pipeline:
        encoded, begin, end, mirror, mean = fn.external_source(source=source, num_outputs=5, batch=True)
        upright = {"output_type": types.RGB, "adjust_orientation": False}  # settled when the set was packed
        if not resize and device == "cpu":
            image = fn.decoders.image_slice(encoded, start=begin, shape=end, **upright)
        else:
            image = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", **upright)
            if resize:
                image = fn.resize(
                    image,
                    resize_x=crop,
                    resize_y=crop,
                    roi_start=begin,
                    roi_end=end,
                    interp_type=types.INTERP_LINEAR,
                    subpixel_scale=False,  # nearest to torchvision and Pillow
                )
            else:
                image = fn.slice(image, start=begin, shape=end, axis_names="WH")
        image = fn.crop_mirror_normalize(
            image, mirror=mirror, mean=mean, std=list(std), dtype=types.FLOAT, output_layout="HWC"
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
    """What is subtracted from each channel, and what it is then divided by, in levels: float32 [3] each."""
    if inputs == "minus_one_to_one":
        return np.full(3, 127.5, np.float32), np.full(3, 127.5, np.float32)
    mean, std = (255 * np.array(values, np.float32) for values in (statistics.mean, statistics.std))
    return mean, std if inputs == "standardized" else np.ones(3, np.float32)
