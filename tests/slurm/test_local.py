"""`submit --local` of a sweep: its runs in turn, in the background, on a machine without Slurm."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.compare import status
from tests.helpers.launch import alive
from tests.slurm.conftest import User, job_of
from tests.slurm.private_cluster import wait_for

pytestmark = pytest.mark.integration
CPU = ("--local", "--train.device=cpu", "--run.name=sweep")  # and no --time


@pytest.fixture
def user(tmp_path: Path, shard_sets: Path) -> User:
    user = User(tmp_path, None, shard_sets)
    user.environment["PATH"] = str(Path(sys.executable).parent)
    return user


def submit(user: User, lines: list[str], *words: str) -> int:
    """Submits a sweep. Returns the process of its queue."""
    (user.home / "sweep.txt").write_text("\n".join(lines))
    said = user.slurm("submit", *CPU, "--array=sweep.txt", *user.training, *words)
    queue, number = job_of(said).split("_")
    assert number == "0"
    assert [f"job {queue}_{i}: " in said for i in range(len(lines))] == [True] * len(lines)
    return int(queue)


def job(user: User, name: str) -> str:
    """The process of a run's controller; waits until it has its turn."""
    path = user.run(name) / "slurm" / "job.json"
    wait_for(lambda: "_" not in json.loads(path.read_text())["job"], 60, f"the turn of {name}")
    return str(json.loads(path.read_text())["job"])


@pytest.mark.slow
def test_one_run_after_another(user: User) -> None:
    queue = submit(user, ["--train.max_steps=1", "--train.max_steps=2"], "--gpus-per-node=0")
    assert os.getsid(queue) == queue, "it outlives the terminal"
    assert "PENDING (local, after others)" in user.slurm("status", "sweep/1")
    log = user.slurm("logs", "sweep/1", "--follow")  # from before its turn
    assert "continuing" not in log
    first, second = (user.run(f"sweep/{name}") for name in ("0-train.max_steps=1", "1-train.max_steps=2"))
    assert [status(run)["state"] for run in (first, second)] == ["done", "done"]
    assert status(first)["heartbeat"] < status(second)["began"] + status(second)["seconds"]["queue"]
    assert status(second)["seconds"]["queue"] > 1, "waiting for a turn is time in the queue"
    wait_for(lambda: not alive(queue), 10, "the queue to end")
    assert user.slurm("status", "sweep").count(" done ") == 2


def test_cancel_asks_all_at_once_and_ends_what_waits(user: User) -> None:
    lines = [f"--train.seed={seed}" for seed in range(3)]
    queue = submit(user, lines, "--gpus-per-node=1", "--at-once=2", "--train.epochs=9000")
    names = [f"sweep/{seed}-train.seed={seed}" for seed in range(3)]
    ranks = [user.freeze(name, job(user, name), rank=0) for name in names[:2]]
    variables = [Path(f"/proc/{rank}/environ").read_bytes().split(b"\0") for rank in ranks]
    assert [f"CUDA_VISIBLE_DEVICES={i}".encode() in its for i, its in enumerate(variables)] == [True, True]
    cancelling = user.start("cancel", "sweep")
    for rank in reversed(ranks):  # the second one has been asked although the first one has not saved
        user.thaw(rank, signal.SIGTERM)
    out, err = cancelling.communicate(timeout=60)
    assert err.startswith("waiting for 2 of 2 to save and end, at most 150 s")
    saved = {name: f"{name}: job {job(user, name)} is cancelled; saved: {user.newest(name)}" for name in names[:2]}
    saved[names[2]] = f"{names[2]}: job {queue}_2 is cancelled; nothing was saved"
    assert sorted(out.splitlines()) == sorted(saved.values())
    wait_for(lambda: not alive(queue), 10, "the queue to end")
    assert user.slurm("status", "sweep").count(" cancelled ") == 3
    assert [status(user.run(name))["state"] for name in names[:2]] == ["stopped"] * 2
    assert not (user.run(names[2]) / "status.json").exists(), "it was not started"
