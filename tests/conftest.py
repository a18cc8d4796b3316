"""Test images: smooth random photographs of three classes, as folders and as packed shard sets."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dist_train.monitor import wandb_process
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from tests.helpers.strange import MINE

pytest_plugins = ["tests.helpers.plugin"]

CLASSES = ("amber", "blue", "green")
TINTS = np.array([(190, 130, 60), (70, 100, 190), (80, 170, 90)], np.float64)
SIZES = ((96, 80), (75, 110), (72, 72), (150, 100))  # width, height
PER_CLASS = {"train": 80, "val": 21}


def photograph(rng: np.random.Generator, width: int, height: int, tint: NDArray[np.float64]) -> Image.Image:
    """A smooth image with some grain, as a camera's: what a resize makes of it is close to what another makes."""
    coarse = rng.normal(tint, 45, (5, 5, 3)).clip(0, 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((smooth + rng.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Receipts of submissions do not go into the home of whoever runs the tests; what `make` was called with, as
    ARGS, does not reach those that tests call."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    for name in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS", "MARK", "WORKERS", "RUN"):
        os.environ.pop(name, None)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, to which a stranger's links lead."""
    path = tmp_path / "home" / "victim"
    path.parent.mkdir()
    path.write_bytes(MINE)
    return path


@pytest.fixture
def wandb_alone() -> Iterator[None]:
    """Of wandb in the process of the tests nothing is left: neither its own process, nor the variable by which others
    would share that."""
    yield
    if "wandb" in sys.modules:
        wandb_process.kill()
        with suppress(Exception, SystemExit):
            wandb_process.teardown()
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds train/ and val/, each with a folder of JPEGs a class; a class is a tint. Shorter sides are 72 to 100."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for name, tint in zip(CLASSES, TINTS, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = photograph(rng, *SIZES[i % len(SIZES)], tint)
                image.save(root / split / name / f"{i:03d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def shard_sets(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds train/ (240 images) and val/ (63), packed at shorter side 72 into at least four shards each."""
    root = tmp_path_factory.mktemp("sets")
    for split in PER_CLASS:
        options = Options(shorter_side=72, shard_mb=0.2 if split == "train" else 0.06)
        pack(ImageFolder(image_folder / split), root / split, options, split=split, workers=2)
    return root


@pytest.fixture
def damaged(shard_sets: Path, tmp_path: Path) -> tuple[Path, list[int]]:
    """A copy of the sets in which three training images are garbage; sizes and headers are as indexed."""
    root = tmp_path / "damaged"
    shutil.copytree(shard_sets, root)
    bad = [3, 77, 200]
    for sample in bad:
        break_sample(root / "train", sample)
    return root, bad


def break_sample(directory: Path, sample: int) -> None:
    """Make an image of a set garbage."""
    shards = ShardSet(directory)
    row = shards.index[sample]
    with open(directory / shards.names[shards.shard_of(sample)], "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(b"\xff" * int(row["size"]))
