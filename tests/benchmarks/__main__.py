"""`make bench`: what things cost on this machine, as ratios within one run. Never asserted.

Data: `data/fashion-mnist`, which `make demo` packs, and random photographs packed at shorter side 256.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from PIL import Image
from torch.nn import functional as F

from dist_train import models
from dist_train.config import ModelConfig
from dist_train.models.dropout import Dropout, mask_keys
from dist_train.models.lrn import local_response_norm
from pipelines.augment import Augment
from pipelines.bench import measure
from pipelines.dali import Feed
from pipelines.loader import Loader
from pipelines.misc import cpus
from pipelines.pack import Options, pack
from pipelines.plan import TrainingPlan
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from tests.benchmarks import towers, waiting


def photographs(root: Path, count: int = 1200) -> Path:
    """Random photographs of 400 x 300 pixels, packed at shorter side 256."""
    rng = np.random.default_rng(0)
    (root / "folder" / "all").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(
            (400, 300), Image.Resampling.BICUBIC
        )
        coarse.save(root / "folder" / "all" / f"{i}.jpg", quality=92)
    pack(ImageFolder(root / "folder"), root / "set", Options(), split="train", workers=2)
    return root / "set"


def clock(work: Callable[[], object], repeat: int = 5) -> float:
    """CPU milliseconds of one call, the least of a few."""
    work()
    times = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        times.append(1000 * (time.process_time() - began))
    return min(times)


def step(model: torch.nn.Module, images: torch.Tensor, keys: torch.Tensor) -> None:
    """Forward and backward."""
    model(images, keys).logsumexp(1).sum().backward()


def rows(title: str, entries: dict[str, float], unit: str) -> None:
    """A small table; ratios are to the first row."""
    first = next(iter(entries.values()))
    print(f"\n{title}")
    for name, value in entries.items():
        print(f"  {name:<58} {value:9.1f} {unit}  {value / first:6.2f} x")


def loader_output(directory: Path) -> None:
    """Normalised floats from DALI against uint8 from DALI and the normalisation in torch, end to end."""
    shards = ShardSet(directory)
    loader = Loader(TrainingPlan(shards, Augment(), shards.manifest), shards.manifest, batch=64)

    def epoch(output: str) -> Callable[[], None]:
        def work() -> None:
            feeds = loader.feeds(0, range(loader.steps))
            pipeline = Pipeline(64, cpus(), None, prefetch_queue_depth=2)
            with pipeline:
                feed = Feed(*fn.external_source(lambda: next(feeds), num_outputs=len(Feed._fields), batch=True))
                image = fn.decoders.image_slice(
                    feed.encoded, start=feed.begin, shape=feed.end, adjust_orientation=False
                )
                if output == "float":
                    image = fn.crop_mirror_normalize(
                        image, mirror=feed.mirror, mean=feed.mean, std=[1.0] * 3, output_layout="HWC"
                    )
                else:
                    image = fn.flip(image, horizontal=feed.mirror)
                pipeline.set_outputs(image, feed.mean)
            pipeline.build()
            for _ in range(loader.steps):
                pixels, shift = (torch.utils.dlpack.from_dlpack(o.as_tensor()) for o in pipeline.run())
                if output == "uint8":
                    pixels = pixels.float().sub_(shift[:, None, None])
                pixels.sum()

        return work

    images = loader.steps * 64
    rows(
        "loader output, whole epoch, CPU per image",
        {output: 1000 * clock(epoch(output), 3) / images for output in ("float", "uint8")},
        "us",
    )


def net() -> None:
    """LRN, dropout and a whole training step."""
    x = (torch.randn(32, 96, 55, 55) * 60).to(memory_format=torch.channels_last).requires_grad_()

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: function(x).sum().backward()

    compiled = torch.compile(lambda t: local_response_norm(t, 2))
    rows(
        "LRN of conv 1's output, forward and backward, batch 32",
        {
            "F.local_response_norm (one window over both towers)": clock(
                run(lambda t: F.local_response_norm(t, 5, 5e-4, 0.75, 2))
            ),
            "ours, eager": clock(run(lambda t: local_response_norm(t, 2))),
            "ours, compiled": clock(run(compiled)),
        },
        "ms",
    )
    units = torch.randn(128, 4096, requires_grad=True)
    layer, keys = Dropout(0.5, 7), mask_keys(0, 0, np.arange(128))
    hashed = torch.compile(lambda t: layer(t, keys))
    rows(
        "dropout of 4096 units, batch 128",
        {
            "F.dropout": clock(lambda: F.dropout(units, 0.5).sum().backward()),
            "hashed, eager": clock(lambda: layer(units, keys).sum().backward()),
            "hashed, compiled": clock(lambda: hashed(units).sum().backward()),
        },
        "ms",
    )
    for crop, hidden, batch in ((67, 512, 128), (227, 4096, 32)):
        images = (torch.randn(batch, 3, crop, crop) * 60).to(memory_format=torch.channels_last)
        keys = mask_keys(0, 0, np.arange(batch))
        entries = {}
        for mode in ("eager", "compiled"):
            model = models.build(ModelConfig(hidden=hidden), classes=10, crop=crop)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if mode == "compiled":
                model.compile(dynamic=False)
            entries[mode] = clock(partial(step, model, images, keys), 3) / batch
        rows(f"forward and backward, crop {crop}, hidden {hidden}, CPU per image", entries, "ms")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        packed = photographs(Path(scratch))
        sets = {
            "photographs packed at 256, crop 227": (packed, 256, 227),
            "the same, resized to 240": (packed, 240, 227),
        }
        if Path("data/fashion-mnist/train").exists():
            sets["Fashion-MNIST, 28 -> 72, crop 67"] = (Path("data/fashion-mnist/train"), 72, 67)
        for name, (directory, resize, crop) in sets.items():
            print(f"\nloader, {name}")
            for read_ms in (0.0, 5.0):
                print("  " + measure(directory, resize=resize, crop=crop, batch=64, read_ms=read_ms))
        loader_output(packed)
        waiting.table(packed)
    net()
    towers.table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
