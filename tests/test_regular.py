"""Pipes and devices in the place of files: one sentence, and nothing waits for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.files import read_file
from tests.helpers.launch import SMALL

PATIENCE = 60.0  # seconds; what waits for a pipe waits for ever


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked").symlink_to("/dev/zero")
    for name in ("pipe", "linked"):
        with pytest.raises(OSError, match="is no file but a pipe, a socket or a device: put the right one there"):
            read_file(tmp_path / name)
    with pytest.raises(OSError, match="is a folder: put the right file there"):
        read_file(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "to-it").symlink_to("file")
    assert read_file(tmp_path / "to-it") == b"x"


def said(*words: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=PATIENCE, env=os.environ
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


SETS = ("manifest.json", "index.npy", "quarantine.jsonl", "shard-000000.tar")


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_pipe_in_a_set(name: str, shard_sets: Path, tmp_path: Path) -> None:
    """For `index`, `verify`, and a run."""
    copy = tmp_path / "set"
    shutil.copytree(shard_sets / "val", copy)
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    run = [f"--data.train={copy}", f"--data.val={shard_sets}/val", f"--run.dir={tmp_path}/run", "--train.max_steps=1"]
    assert "is no file but" in said("dist_train", *SMALL, *run)
    if name != "quarantine.jsonl":  # which is removed by it if there is nothing bad
        assert "is no file but" in said("pipelines", "verify", str(copy))
    if name.endswith(".tar"):
        assert f"are indexed, not {name}" in said("pipelines", "index", str(copy))


@pytest.mark.integration
@pytest.mark.slow
def test_a_pipe_among_the_images(image_folder: Path, tmp_path: Path) -> None:
    """Is passed over, and told; the others are packed."""
    shutil.copytree(image_folder / "val", tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "amber" / "pipe.jpg")
    (tmp_path / "photos" / "amber" / "zero.jpg").symlink_to("/dev/zero")
    said("pipelines", "pack", "imagefolder", f"{tmp_path}/photos", f"{tmp_path}/set")
    rejected = (tmp_path / "set" / "rejected.jsonl").read_text()
    assert "pipe.jpg" in rejected
    assert "zero.jpg" in rejected


RUNS = ("status.json", "config.yaml", "metrics.jsonl", "events.jsonl", "owner", "checkpoints/{}/meta.json")


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_pipe_in_a_run(name: str, shard_sets: Path, tmp_path: Path) -> None:
    """For another start of the run, for `evaluate`, and for `slurm status`."""
    run = tmp_path / "runs" / "a"
    words = [f"--data.train={shard_sets}/train", f"--data.val={shard_sets}/val", f"--run.dir={run}", *SMALL]
    said("dist_train", *words, "--train.max_steps=1")
    path = run / name.format(max(os.listdir(run / "checkpoints"), key=len))
    path.unlink()
    os.mkfifo(path)
    said("dist_train", *words, "--train.max_steps=2")
    said("dist_train", "evaluate", str(run))
    said("slurm", "status", "--root", str(tmp_path / "runs"))
