"""Cost of opening a shard set and of the first batch of an epoch, for sets of up to a billion samples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pipelines.augment import Augment
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.plan import TrainingPlan
from pipelines.rows import HEADER, SAMPLE, checksum
from pipelines.shards import INDEX, ShardSet

SIZES = {10**6: 1_000, 10**8: 10_000, 10**9: 100_000}  # samples: shards
BATCH = 128
ROOT = Path(__file__).parent.parent.parent
CALLS = ("stat", "lstat", "fstat", "pread", "access", "readlink")
AUDITED = ("open", "os.listdir", "os.scandir", "mmap.__new__")  # of any file, by whatever Python code
_hooks: list[list[str]] = []  # Python has no way to take one away again: there is one, which hears nothing mostly


def sparse(directory: Path, samples: int, shards: int) -> None:
    """A set without tars, all of whose shards have the same rows. Its index is a hole but for the shards that the first
    batch of epoch 0, and the one in its middle, come from."""
    directory.mkdir(parents=True, exist_ok=True)
    each = samples // shards
    rows = np.zeros(each, SAMPLE)
    rows["offset"], rows["size"] = HEADER + 1024 * np.arange(each), 400
    rows["width"], rows["height"], rows["label"] = 256, 320, np.arange(each) % 1000
    entry = {"samples": each, "bytes": 1024 * each + HEADER, "sha256": "0" * 64, "rows": checksum(rows)}
    manifest = Manifest(
        split="train",
        samples=samples,
        classes=[f"class {k}" for k in range(1000)],
        shards=[{"name": f"shard-{k:06d}.tar", **entry} for k in range(shards)],
        index_sha256="0" * 64,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        eigenvalues=[0.1, 0.01, 0.001],
        eigenvectors=np.eye(3).tolist(),
        sides=[256, 256],
    )
    manifest.write(directory)
    order = Order(np.full(shards, each), 0, 16)
    index = np.lib.format.open_memmap(directory / INDEX, "w+", SAMPLE, (samples,))
    for start in (0, samples // 2):
        for shard in np.unique(order.samples(0, start, start + BATCH) // each):
            index[shard * each : (shard + 1) * each] = rows


def open_plan(directory: Path) -> TrainingPlan:
    """What each rank opens."""
    shards = ShardSet(directory)
    return TrainingPlan(shards, Augment(), shards.manifest)


def batch(plan: TrainingPlan, start: int) -> None:
    """All of a batch but the images."""
    samples = plan.samples(0, start, start + BATCH)
    plan.views(0, samples, start)
    plan.shards.labels(samples)
    assert plan.shards.sides


@contextmanager
def counted() -> Iterator[list[str]]:
    """The file-system calls that Python code makes in the body, by name."""
    calls: list[str] = []

    def note(name: str, call: Any, *args: Any, **options: Any) -> Any:
        calls.append(name)
        return call(*args, **options)

    if not _hooks:
        sys.addaudithook(lambda name, args: _hooks[-1].append(name) if name in AUDITED else None)
    _hooks.append(calls)
    try:
        with patch.multiple(os, **{name: partial(note, name, getattr(os, name)) for name in CALLS}):
            yield calls
    finally:
        _hooks.append([])


def resident() -> float:
    """Memory of this process that is not the system's cache of files, in 10^6 bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024 / 1e6


def _measure(directory: Path, start: int) -> dict[str, float]:
    """In a process of its own: what one rank pays for opening and for the batch that begins at a position."""
    before = resident()
    with counted() as calls:
        began = time.perf_counter()
        plan = open_plan(directory)
        opened = time.perf_counter()
        batch(plan, start)
        first = time.perf_counter()
    times = {"opened": opened - began, "batch": first - began}
    return times | {"memory": resident() - before, "calls": len(calls)}


def table() -> None:
    """Print seconds, memory and calls of one rank for sets of 10^6, 10^8 and 10^9 samples."""
    print("\none rank opens a set and takes a batch of 128, but not its images")
    print("  samples   shards   at        opened   first batch   own memory   file-system calls")
    for samples, shards in SIZES.items():
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            needed = 600 * shards + 64 * samples // shards * SAMPLE.itemsize
            if (free := shutil.disk_usage(directory).free) < needed:
                print(f"  {samples:.0e}: skipped, the disk has {free / 1e6:.0f} MB and not {needed / 1e6:.0f}")
                continue
            try:
                sparse(directory, samples, shards)
            except OSError as error:  # a file system without holes, or with a limit on the size of files
                print(f"  {samples:.0e}: skipped, {error}")
                continue
            for name, start in (("start", 0), ("middle", samples // 2)):
                command = [sys.executable, "-m", "tests.benchmarks.sets", str(directory), str(start)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout)
                print(
                    f"  {samples:7.0e} {shards:8} {name:7} {found['opened']:7.2f} s {found['batch']:11.2f} s "
                    f"{found['memory']:9.0f} MB {found['calls']:19}"
                )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]))))
    else:
        table()
