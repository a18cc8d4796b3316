"""This loader and common others: CPU time per image, also as a multiple of JPEG decoding alone.

All give the same: batches of float32 [n, 3, 227, 227] in levels minus the mean of the set, cropped at random from
shorter side 256 and reflected at random. In one run, in turn, each in a process of its own; the least of the rounds
(ROUNDS=N) counts. `python -m tests.benchmarks.loaders DIR` takes the photographs DIR/<class>/<image>.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, io
from torchvision.transforms import v2
from wds2idx import IndexCreator

from dist_train.process import keep_freed_memory
from pipelines.augment import Augment
from pipelines.loader import Loader
from pipelines.misc import cpus
from pipelines.pack import Options, pack
from pipelines.plan import TrainingPlan
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder

ROOT = Path(__file__).parents[2]
SIDE, CROP, BATCH = 256, 227, 64
WORKERS = 2  # of torch's DataLoader: with one for each of many CPUs they would do a small set before the clock starts
# Batches that are not counted: until the pace is steady, and the last ones. No candidate works further ahead than that
# (2 for each worker; what waits, and what DALI has begun), so that what is done before the clock starts is as much as
# what is done before it stops, for later.
WARM_UP, TAIL = 8, 8
AGREES = 10.0  # levels by which the mean of a few batches may differ: each candidate draws other ones


def mean_of(shards: ShardSet) -> list[float]:
    return [255 * value for value in shards.manifest.mean]


def alone(shards: ShardSet, scales: bool) -> Iterator[Any]:
    """The limit: bytes in memory, decoded as a whole, uint8."""
    encoded = [shards.read(sample) for sample in range(len(shards) // BATCH * BATCH)]
    batches = (encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH))
    pipeline = Pipeline(BATCH, cpus(), None, prefetch_queue_depth=2)
    with pipeline:
        (data,) = fn.external_source(lambda: [next(batches)], num_outputs=1, batch=True, no_copy=True)
        pipeline.set_outputs(fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False))
    pipeline.build()
    while True:
        yield pipeline.run()[0]


def this_loader(shards: ShardSet, scales: bool) -> Iterator[Tensor]:
    keep_freed_memory(torch.device("cpu"))  # as the process that trains
    plan = TrainingPlan(shards, Augment(SIDE, CROP, lighting=0), shards.manifest)
    for batch in Loader(plan, shards.manifest, batch=BATCH).epoch():
        yield batch.inputs


def dali(shards: ShardSet, scales: bool) -> Iterator[Tensor]:
    """DALI's plain graph behind its own reader."""
    tars = [str(shards.directory / name) for name in shards.names]
    indices = [f"{tar}.idx" for tar in tars]
    for tar, index in zip(tars, indices, strict=True):
        if not Path(index).exists():
            with IndexCreator(tar, index, verbose=False) as creator:
                creator.create_index()
    pipeline = Pipeline(BATCH, cpus(), None, prefetch_queue_depth=2, seed=0)
    with pipeline:
        files = {"paths": tars, "index_paths": indices, "ext": ["jpg;jpeg;png;webp", "cls"]}
        image, _ = fn.readers.webdataset(**files, random_shuffle=True, initial_fill=1000)
        image = fn.decoders.image(image, output_type=types.RGB, adjust_orientation=False)
        if scales:
            image = fn.resize(image, resize_shorter=SIDE)
        places = {f"crop_pos_{axis}": fn.random.uniform(range=[0.0, 1.0]) for axis in "xy"}
        normalize = {"mean": mean_of(shards), "std": [1.0] * 3, "dtype": types.FLOAT, "output_layout": "CHW"}
        mirror = fn.random.coin_flip()
        pipeline.set_outputs(fn.crop_mirror_normalize(image, crop=(CROP, CROP), mirror=mirror, **places, **normalize))
    pipeline.build()
    while True:
        yield torch.utils.dlpack.from_dlpack(pipeline.run()[0].as_tensor())


def transform(shards: ShardSet, scales: bool) -> v2.Transform:
    """Of torchvision, for images of Pillow and for tensors."""
    steps = [v2.Resize(SIDE)] if scales else []
    steps += [v2.RandomCrop(CROP), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32)]
    return v2.Compose([*steps, v2.Normalize(mean_of(shards), [1.0] * 3)])


def folder(shards: ShardSet, scales: bool) -> Iterator[Tensor]:
    """The images of the set as files, in torch's DataLoader, decoded by Pillow."""
    files = shards.directory / "files"
    if not files.exists():
        labels = shards.labels(np.arange(len(shards)))
        for sample, label in enumerate(labels.tolist()):
            place = files / f"{label:04d}" / f"{sample}{Path(shards.name(sample)).suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(shards.read(sample).tobytes())
    data = datasets.ImageFolder(str(files), transform(shards, scales))
    for images, _ in DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True):
        yield images


def tensors(shards: ShardSet, scales: bool) -> Iterator[Tensor]:
    """The tars through webdataset, decoded and changed as tensors."""
    change = transform(shards, scales)
    tars = [str(shards.directory / name) for name in shards.names]
    data = webdataset.WebDataset(tars, shardshuffle=100, seed=0).shuffle(1000).to_tuple("jpg;jpeg;png;webp", "cls")

    def decoded(file: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        return change(io.decode_image(encoded, io.ImageReadMode.RGB))  # type: ignore[no-any-return]

    batches = data.map_tuple(decoded, int).batched(BATCH, partial=False)
    for images, _ in DataLoader(batches, batch_size=None, num_workers=min(WORKERS, len(tars))):
        yield images


CANDIDATES: dict[str, Callable[[ShardSet, bool], Iterator[Any]]] = {
    "decoding, and nothing else (the limit)": alone,
    "this loader": this_loader,
    "DALI's plain graph and reader": dali,
    "webdataset, decode_image, v2 tensors, DataLoader": tensors,
    "ImageFolder, Pillow, v2, DataLoader": folder,
}


def cpu_seconds() -> float:
    """That this process, its threads and its descendants have used so far."""
    return time.process_time() + sum(map(_cpu_seconds, _children(os.getpid())))


def _cpu_seconds(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(_cpu_seconds, _children(pid)))
    except FileNotFoundError:  # it ended a moment ago
        return 0.0


def _children(pid: int) -> list[int]:
    tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(child) for task in tasks for child in task.read_text().split()]


def python_seconds() -> float:
    """That the threads of Python in this process have used so far: not those of DALI."""
    tasks = [Path(f"/proc/self/task/{thread.native_id}/schedstat") for thread in threading.enumerate()]
    return sum(int(task.read_text().split()[0]) for task in tasks if task.exists()) / 1e9


def measure(name: str, directory: Path, scales: bool) -> dict[str, Any]:
    """CPU microseconds per image of a candidate, all its processes together, and what its batches are."""
    shards = ShardSet(directory)
    measured = len(shards) // BATCH - WARM_UP - TAIL
    if measured < TAIL:
        raise RuntimeError(f"{directory} has {len(shards)} images: give {(WARM_UP + 2 * TAIL) * BATCH} at least")
    batches = CANDIDATES[name](shards, scales)
    found, means = dict[str, Any](), list[float]()
    for batch in islice(batches, WARM_UP):  # none is kept: the memory of the next ones would be new, and counted
        if isinstance(batch, Tensor):
            found = {"shape": list(batch.shape), "dtype": str(batch.dtype)}
            means.append(float(batch.mean()))
    cpu, python = cpu_seconds(), python_seconds()
    images = sum(len(batch) for batch in islice(batches, measured))
    found |= {
        "cpu_us": (cpu_seconds() - cpu) / images * 1e6,
        "python_us": (python_seconds() - python) / images * 1e6,
    }
    return found | ({"mean": float(np.mean(means))} if means else {})


def agree(found: dict[str, dict[str, Any]]) -> None:
    """All candidates give the same kind of batches, at the same level. Raises RuntimeError."""
    ours = found["this loader"]
    for name, other in found.items():
        if "shape" not in other:
            continue
        same = all(other[key] == ours[key] for key in ("shape", "dtype"))
        if not same or abs(other["mean"] - ours["mean"]) > AGREES:
            raise RuntimeError(f"{name} gives other batches: {other}, this loader {ours}")


def started(name: str, directory: Path, scales: bool) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.benchmarks.loaders", name, str(directory), str(int(scales))]
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sets(photographs: Path, root: Path) -> dict[str, tuple[Path, bool]]:
    """The shard sets to measure on, and whether plain programs have to resize their images."""
    source = ImageFolder(photographs)
    random = np.random.default_rng(0)
    for i, item in enumerate(source.items):
        place = root / "photographs" / source.classes[item.label] / f"{i}{Path(item.name).suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        original = source.root / item.reference
        if i % 10:
            place.symlink_to(original.resolve())
        else:
            image = Image.open(original).convert("RGB")
            image.thumbnail((side := int(random.integers(120, SIDE)), side))
            image.save(place.with_suffix(".jpg"), quality=90)
    pack(source, root / "256", Options(SIDE), split="train", workers=cpus())
    pack(
        ImageFolder(root / "photographs"), root / "mixed", Options(SIDE, keep_small=True), split="train", workers=cpus()
    )
    pack(source, root / "originals", Options(0), split="train", workers=cpus())
    return {
        "photographs packed at 256": (root / "256", False),
        "the same, every tenth smaller": (root / "mixed", True),
        "originals": (root / "originals", True),
    }


def table(photographs: Path, rounds: int = int(os.environ.get("ROUNDS", 2))) -> None:
    """Print what each candidate costs on the photographs DIR/<class>/<image>."""
    with tempfile.TemporaryDirectory() as scratch:
        for title, (directory, scales) in sets(photographs, Path(scratch)).items():
            best: dict[str, dict[str, Any]] = {}
            for _ in range(rounds):
                for name in CANDIDATES:
                    found = started(name, directory, scales)
                    if name not in best or found["cpu_us"] < best[name]["cpu_us"]:
                        best[name] = found
                agree(best)
            show(title, best)


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    limit, ours = (found[name]["cpu_us"] for name in list(CANDIDATES)[:2])
    print(f"\nloaders, {title}: CPU us per image, as a multiple of the limit, and this loader's part of it")
    for name, row in found.items():
        used = row["cpu_us"]
        print(f"  {name:<50} {used:7.0f} us  {used / limit:6.2f} x  {ours / used:6.2f}")
    print(f"  {'of this loader in threads of Python':<50} {found['this loader']['python_us']:7.0f} us")


def main(words: Iterable[str]) -> None:
    name, *rest = words
    if not rest:
        table(Path(name))
        return
    print(json.dumps(measure(name, Path(rest[0]), bool(int(rest[1])))), flush=True)
    os._exit(0)  # DALI does not like to be left in the middle of an epoch


if __name__ == "__main__":
    main(sys.argv[1:])
