"""DALI graph: turns encoded images and their views into inputs of the net."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import Augment, Inputs, Views, framed
from pipelines.dali_wheel import for_another, not_importable
from pipelines.errors import UserError
from pipelines.misc import cpus
from pipelines.reading import Encoded

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nvidia.dali import Pipeline, __cuda_version__, fn, types
        from nvidia.dali.data_node import DataNode
except ImportError as error:
    raise UserError(not_importable(error, torch.version.cuda)) from error

Device = Literal["cpu", "gpu"]
DEPTH = 2  # batches that DALI works on ahead of the one being collected


Feed = dict[str, Any]  # arrays for the n samples of a step by name, of which the graph takes those that it needs


def feed_of(encoded: Encoded, views: Views, crop: int, mean: NDArray[np.float32]) -> Feed:
    """Inputs of the graph: the fields of `Views` and of their `Frame`, but as the graph takes them

        encoded: file contents, n arrays.
        mirror: int32 [n].
        mean: value to subtract from each channel, float32 [n, 3]. Lighting adds the same value to all pixels of an
            image, so one subtraction covers both.

    Args:
        mean: of the training set, in levels, float32 [3].
    """
    given = {"encoded": encoded, "mirror": views.mirror.astype(np.int32), "mean": mean - views.shift}
    return {**vars(views), **framed(views, crop)._asdict(), **given}


@dataclass(frozen=True)
class Decode:
    """Decoding settings. Raises UserError if DALI shall use a GPU and is not the one for torch's CUDA.

    Attributes:
        device: where DALI decodes; "gpu" needs `device_id`.
        threads: DALI's decoding threads; 0: one per CPU of this process.
        inputs: mean_subtracted as in the paper, minus_one_to_one, or standardized (divided by the deviation, too).
        hw_decoder_load: on the GPU, the fraction of a batch for its JPEG decoder. CUDA decodes the rest and rounds
            differently. With 1 (all it can take) and with 0 an image's engine does not depend on its batch.
        wanted: device of the inputs; None: where they are decoded.
    """

    device: Device = "cpu"
    device_id: int | None = None
    threads: int = 0
    inputs: Inputs = "mean_subtracted"
    hw_decoder_load: float = 1.0
    wanted: torch.device | None = None

    def __post_init__(self) -> None:
        if self.device == "gpu" and (wrong := for_another(__cuda_version__, torch.version.cuda)):
            raise UserError(wrong)

    @property
    def place(self) -> torch.device:
        """Device of the inputs."""
        return self.wanted or torch.device("cpu" if self.device == "cpu" else f"cuda:{self.device_id}")

    @property
    def gives_bytes(self) -> bool:
        """True if pixels leave DALI as bytes, which quarters the copy from the CPU to a GPU."""
        return self.device == "cpu" and self.place.type != "cpu"


def graph(
    source: Callable[[], Feed],
    *,
    augment: Augment,
    batch: int,
    resize: bool,
    turn: bool = False,
    std: Sequence[float],
    decode: Decode,
    depth: int = DEPTH,
) -> Pipeline:
    """Pipeline: decode (only the crop, if nothing is resized) -> resize if needed -> mirror and normalise.

    `source` returns the inputs of a step of n <= `batch` samples. `resize`: whether any image of the set needs a
    resize; the others skip it, since it costs more than decoding an image of 256 pixels. `turn`: whether to apply the
    EXIF orientation; packed sets are stored upright. Output: float32 NHWC; with `decode.gives_bytes`, uint8 NHWC before
    normalisation, and the mean that is fed.
    """
    on_cpu = decode.device == "cpu"
    # No field that is not needed: each costs microseconds per sample.
    fields = ["encoded", "begin", "extent", "mirror", "mean"]
    fields += ["roi_begin", "roi_end", "scaled"] if resize else []
    pipeline = Pipeline(batch, decode.threads or cpus(), decode.device_id, prefetch_queue_depth=depth)
    with pipeline:
        ask = _asking(source, fields, held=depth + 2 if on_cpu else 0)
        inputs = fn.external_source(source=ask, num_outputs=len(fields), batch=True, no_copy=on_cpu)
        feed = dict(zip(fields, inputs, strict=True))
        image = _decoded(feed, turn, decode)
        if resize:
            image = _resized(image, feed, augment.crop)
        # On the CPU, flipping bytes first is far cheaper than flipping and normalising together.
        image = fn.flip(image, horizontal=feed["mirror"])
        if decode.gives_bytes:
            pipeline.set_outputs(image, feed["mean"])
        else:
            image = fn.crop_mirror_normalize(
                image, mean=feed["mean"], std=list(std), dtype=types.FLOAT, output_layout="HWC"
            )
            pipeline.set_outputs(image)
    return pipeline


def _decoded(feed: dict[str, DataNode], turn: bool, decode: Decode) -> DataNode:
    """Region of each image that `Frame` names. On the GPU the whole image is decoded: region decoders were seen to
    crash there (nvImageCodec issue 55)."""
    # Without "fancy", a GPU repeats chroma samples and the CPU interpolates them.
    how = {"output_type": types.RGB, "adjust_orientation": turn, "jpeg_fancy_upsampling": True}
    if decode.device == "cpu":
        return fn.decoders.image_slice(feed["encoded"], start=feed["begin"], shape=feed["extent"], **how)
    image = fn.decoders.image(feed["encoded"], device="mixed", hw_decoder_load=decode.hw_decoder_load, **how)
    return fn.slice(image, start=feed["begin"], shape=feed["extent"], axis_names="WH")


def _resized(image: DataNode, feed: dict[str, DataNode], crop: int) -> DataNode:
    """`if scaled: image = fn.resize(...)`, written with the operators of DALI's conditional execution. DALI's own
    way there rewrites the source of functions and imports the result from a temporary file at every build."""
    conditional = fn._conditional  # type: ignore[attr-defined]
    scaled = feed["scaled"]
    region, whole = conditional.split(image, predicate=scaled)
    begin, end = (conditional.split(feed[name], predicate=scaled)[0] for name in ("roi_begin", "roi_end"))
    region = fn.resize(
        region,
        resize_x=crop,
        resize_y=crop,
        roi_start=begin,
        roi_end=end,
        interp_type=types.INTERP_LINEAR,
        subpixel_scale=False,  # closest to torchvision and Pillow
    )
    return conditional.merge(region, whole, predicate=scaled)


def _asking(source: Callable[[], Feed], fields: Sequence[str], *, held: int) -> Callable[[], list[Any]]:
    """Wraps `source` to return these fields of its feeds. The last `held` feeds are kept alive: on the CPU, DALI reads
    them in place until their batch is out, since copying would cost the feeding thread a fifth of its time. For the
    GPU, DALI copies them at once."""
    last: deque[Feed] = deque(maxlen=held)

    def ask() -> list[Any]:
        feed = source()
        last.append(feed)
        return [feed[name] for name in fields]

    return ask


class DecodeError(RuntimeError):
    """Failure of a pipeline, most likely on a sample that it cannot decode. The pipeline cannot be run again."""


def collect(pipeline: Pipeline) -> list[Tensor]:
    """Runs a pipeline and returns its complete outputs, on a GPU in memory that DALI reuses. Raises DecodeError."""
    try:
        outputs = pipeline.run()
    except RuntimeError as error:
        raise DecodeError(str(error)) from error
    return [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]
