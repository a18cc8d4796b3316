"""Files of an earlier version (tests/fixtures) open, and its run resumes from its step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from submitit.helpers import DelayedSubmission

from dist_train.rundir.checkpoint import Checkpoint, CheckpointError
from dist_train.rundir.resume import earlier_set
from pipelines import quarantine
from pipelines.indexing import index
from pipelines.shards import ShardSet
from pipelines.verify import verify
from slurm.job import Job, Pack

FIXTURES = Path(__file__).parent / "fixtures" / "old"
ROOT = Path(__file__).parent.parent
STEP = 21  # at which the run was stopped


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that holds sets/ and run/, as the old program left them."""
    shutil.copytree(FIXTURES, tmp_path / "old")
    return tmp_path / "old"


def python(old: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` in that folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=old, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def went_on(run: Path) -> None:
    """The run is done, and its record has each step once."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, STEP + 3 + 1))
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_a_shard_set(old: Path) -> None:
    shards = ShardSet(old / "sets" / "train")
    assert (len(shards), shards.classes, shards.sides) == (48, ["amber", "blue", "green"], (72, 72))
    assert verify(old / "sets" / "train", workers=1) == []
    fingerprint = shards.fingerprint
    index(old / "sets" / "train", classes=None, split="train", workers=1)
    assert ShardSet(old / "sets" / "train").fingerprint == fingerprint  # which every checkpoint's meta holds


@pytest.mark.integration
def test_a_run(old: Path) -> None:
    result = python(old, "dist_train", "--config=run/config.yaml", "--run.dir=run", "--train.epochs=4")
    assert result.returncode == 0, result.stderr
    assert f"continuing from step-{STEP:08d}: epoch 4, step {STEP}" in result.stderr
    assert result.stderr.count("from here on the bits may differ") == 1
    went_on(old / "run")
    lines = (old / "run" / "metrics.jsonl").read_text().splitlines()
    changed = [line for line in map(json.loads, lines) if line["kind"] == "changed"]
    assert changed == [{"kind": "changed", "step": STEP, "numerics": 2, "train.epochs": 4}]
    again = python(old, "dist_train", "--config=run/config.yaml", "--run.dir=run", "--train.epochs=5")
    assert "the bits may differ" not in again.stderr


def test_a_run_past_a_quarantine(old: Path) -> None:
    """That program left the samples out of its order: only with no sample in it was that order the set's."""
    train, run = old / "sets" / "train", old / "run"
    whole = ShardSet(train).fingerprint
    other = Checkpoint(run / "checkpoints", {"training set": whole[:16]})
    row = {"shard": "shard-000001.tar", "name": "x", "reason": "y", "row": 3}
    tar = {"shard": "shard-000001.tar", "name": "x", "reason": "its sha256 differs: copy it again"}
    for line, kept in ((row, False), (tar, True)):
        text = json.dumps(line) + "\n"
        (train / "quarantine.jsonl").write_text(text)
        then = hashlib.sha256((whole + text).encode()).hexdigest()[:16]
        begun = Checkpoint(run / "checkpoints", {"training set": then})
        for again in (False, True):  # the list of this program has the same lines
            if again:
                quarantine.write(train, whole, [line])
            if kept:
                assert earlier_set(begun, run, ShardSet(train)) == {"training set": then}
            else:
                with pytest.raises(CheckpointError, match=r"an older version, whose order leaves out the samples"):
                    earlier_set(begun, run, ShardSet(train))
            assert earlier_set(other, run, ShardSet(train)) == {}


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_of_a_program_that_knew_fewer_keys(old: Path) -> None:
    """A key that a checkpoint does not know counts as its default; one with another value than that is refused."""
    meta = old / "run" / "checkpoints" / f"step-{STEP:08d}" / "meta.json"
    body = json.loads(meta.read_text())
    for key in ("data.lighting", "model.lrn_alpha", "optim.momentum"):
        body.pop(key, None)
        del body["config"][key]
    meta.write_text(json.dumps(body))
    words = ("dist_train", "--config=run/config.yaml", "--run.dir=run", "--train.epochs=4")
    refused = python(old, *words, "--data.lighting=0.2")
    assert refused.returncode == 2
    assert "data.lighting was 0.1, now 0.2" in refused.stderr
    result = python(old, *words)
    assert result.returncode == 0, result.stderr
    assert "momentum" not in result.stderr, "its default is no change"
    went_on(old / "run")


@pytest.mark.integration
@pytest.mark.slow
def test_a_job(old: Path) -> None:
    """The pickle that waits in the queue, in a directory of another name."""
    folder = old / "run" / "slurm"
    (pickled,) = folder.glob("*_submitted.pkl")
    waiting = DelayedSubmission.load(pickled)
    assert type(waiting.function) is Job
    waiting.function.directory = old / "run"
    pickled = pickled.rename(folder / f"{os.getpid()}_submitted.pkl")  # of the local controller
    waiting.dump(pickled)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 400", "epochs: 4"))
    here = {"JOB_ID": pickled.name.partition("_")[0], "NTASKS": "1", "GLOBALID": "0", "LOCALID": "0"}
    here |= {"NNODES": "1", "NODEID": "0"}
    env = {f"SUBMITIT_LOCAL_{key}": value for key, value in here.items()}
    result = python(old, "submitit.core._submit", str(folder), SUBMITIT_EXECUTOR="local", **env)
    assert result.returncode == 0, result.stderr
    assert "continuing from step-" in result.stderr
    went_on(old / "run")


def test_a_packing_job(old: Path) -> None:
    waiting = DelayedSubmission.load(old / "pack_submitted.pkl")
    assert type(waiting.function) is Pack
    assert waiting.function.part == (0, 2)
    assert "keep_small" not in waiting.function.options
    photographs = old / "photographs"
    for i in range(4):
        (photographs / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30)).save(photographs / "a" / f"{i}.png")
    for part in ((0, 2), (1, 2), None):  # the tasks of its array, and the last one
        task = Pack(photographs, old / "packed", waiting.function.options, part)
        task()
    assert ShardSet(old / "packed").sides == (20, 23)  # small images stay as they are, as in the tasks that ran then
