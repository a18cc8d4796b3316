"""The settings of the data, which are a part of the configuration; each with its bounds beside it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.augment import Augment, Inputs
from pipelines.bounds import least, within
from pipelines.limits import USUAL


@dataclass(frozen=True)
class DataConfig(Augment):
    """Where the images come from, and how they become inputs of the net."""

    train: str = "data/imagenet/train"
    """Shard set to train on: a directory, or the URL of one (docs/data.md)."""
    val: str = "data/imagenet/val"
    """Shard set for the validation error; likewise."""
    cache: str = ""
    """Folder of each node through which both are read; $VARIABLES are replaced on the node. A URL needs one."""
    cache_gb: float = least(0, 0.0)
    """Gigabytes (10^9 bytes) that it may hold; 0: what its disk has."""
    source: str = ""
    """Packed first if the sets do not exist: imagefolder, a torchvision data set, or module:name (docs/data.md)."""
    raw: str = ""
    """Folder that data.source reads, or puts its files in; default: raw beside the sets."""
    inputs: Inputs = "mean_subtracted"
    """Scale of the inputs. The paper only subtracts the mean (section 2), and its weights N(0, 0.01) need inputs of
    that scale; [-1, 1] is common elsewhere; standardized also divides by the standard deviation."""
    shuffle_shards: int = least(1, 16)
    """Shards per block; samples are shuffled within a block."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device on which DALI decodes; auto: the model's."""
    threads: int = least(0, 0)
    """DALI's decoding threads per rank; 0: the rank's share of the CPUs of its node."""
    hw_decoder_load: float = within(0, 1, 0.65, closed=True)
    """On a GPU, fraction of a batch for its JPEG decoder (0.65 is DALI's default); the rest is decoded by CUDA, which
    rounds differently. train.deterministic sets it to 1, so that an image has the same decoder in any batch."""
    readers: int = least(1, 32)
    """Read-ahead threads per rank."""
    ahead: int = least(1, 4)
    """Batches to read ahead."""
    max_bad: int = least(0, 100)
    """Samples that may fail to decode, and are replaced, before the run stops."""
    max_pixels: int = least(1, USUAL.pixels)
    """Pixels that an image may have: a decoder takes gigabytes for more."""
