"""Speed of `python -m pipelines index`: all images decoded, a sample of them, or none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import webdataset

from pipelines.indexing import index
from pipelines.manifest import MANIFEST
from pipelines.sources import ImageFolder
from tests.benchmarks.data import originals_of
from tests.benchmarks.loaders import cpu_seconds
from tests.benchmarks.sets import ROOT

IMAGES, SHARDS = 3000, 8
# 47 of 3,000 is the share that 20,000 is of ImageNet's 1,281,167.
MODES = {"every image (`all`)": "all", "a sample (`sample:47`)": "sample:47", "none (`imagenet`)": "imagenet"}
ROUNDS = 2
# Not as a module, which each worker would import.
MEASURE = "import sys; from tests.benchmarks.indexing import measure; measure(*sys.argv[1:])"


def _tars(source: ImageFolder, directory: Path) -> None:
    """The photographs as another tool's shards, again and again until there are IMAGES."""
    directory.mkdir()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(directory / f"{shard:03d}.tar")) as tar:
            for number in range(shard, IMAGES, SHARDS):
                item = source.items[number % len(source.items)]
                tar.write({"__key__": f"{number:06d}", "jpg": source.load(item.reference), "cls": str(item.label)})


def measure(place: str, mode: str, processes: str) -> None:
    """In a process of its own, whose workers have imported all they need."""
    directory, workers = Path(place), int(processes)
    first = directory.parent / "first"
    first.mkdir()
    shutil.copy(directory / "000.tar", first)
    index(first, classes=None, split="first", workers=workers, statistics="sample:2")
    shutil.rmtree(first)
    (directory / MANIFEST).unlink(missing_ok=True)
    cpu, began = cpu_seconds(), time.perf_counter()
    index(directory, classes=None, split="set", workers=workers, statistics=mode)
    wall = time.perf_counter() - began
    print(json.dumps({"images_per_s": IMAGES / wall, "cpu_us": (cpu_seconds() - cpu) / IMAGES * 1e6}))


def table(scratch: Path) -> None:
    """Print images per second and CPU us per image of `index`, with one and with two processes."""
    print(f"\nindex of {IMAGES} photographs in {SHARDS} tars, in the page cache")
    print("  decoded                          processes   images/s   CPU us per image")
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        directory = Path(own) / "set"
        _tars(ImageFolder(originals_of(Path(own))), directory)
        for name, mode in MODES.items():
            for workers in (1, 2):
                command = [sys.executable, "-c", MEASURE, str(directory), mode, str(workers)]
                runs = list[dict[str, float]]()
                for _ in range(ROUNDS):
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                    runs.append(json.loads(done.stdout))
                rate, cpu = max(run["images_per_s"] for run in runs), min(run["cpu_us"] for run in runs)
                print(f"  {name:32} {workers:9} {rate:10.0f} {cpu:18.0f}")
