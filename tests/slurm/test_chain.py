"""`submit --chain`: jobs that are never requeued; each continues the run, and what is left at its end leaves."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from dist_train.rundir import events
from tests.helpers.compare import assert_same_run, status
from tests.slurm.conftest import User
from tests.slurm.private_cluster import wait_for

pytestmark = pytest.mark.slurm
LEFT = "this run has ended before: nothing is left to do for job {} of its chain"


def submit(user: User, name: str, length: int, *words: str) -> list[str]:
    """Submits a chain on 2 nodes x 2 tasks. Returns its job numbers."""
    first = int(user.submit(name, f"--chain={length}", *words))
    return [str(first + number) for number in range(length)]


def shown(user: User, name: str) -> list[str]:
    """The cells that `status` shows for a run."""
    return re.split(" {2,}", user.slurm("status", name).splitlines()[1])


@pytest.mark.slow
def test_a_chain_goes_on_after_a_stop_and_leaves_nothing(user: User, uninterrupted: Path) -> None:
    jobs = submit(user, "chained", 3)
    process = user.freeze("chained", jobs[0], rank=3)
    assert shown(user, "chained")[1:3] == [f"{jobs[0]} (1 of 3, 2 left)", "RUNNING"]
    user.cluster.run("scancel", "--signal=USR2", jobs[0])  # as at its time limit
    user.thaw(process, signal.SIGUSR2)
    last = user.stopped("chained")
    user.wait("chained", jobs[1], "done")
    assert user.starts("chained") == ["", last]
    assert_same_run(user.run("chained"), uninterrupted)
    wait_for(lambda: user.cluster.job(jobs[2]) == "CANCELLED", 10, "the last one to be cancelled")
    assert [user.cluster.job(job) for job in jobs] == ["COMPLETED", "COMPLETED", "CANCELLED"]
    for job in jobs:
        assert "Requeue=0 Restarts=0" in user.cluster.run("scontrol", "show", "job", job)
    assert shown(user, "chained")[1:4] == [f"{jobs[1]} (2 of 3, 0 left)", "COMPLETED", "done"]
    log = user.slurm("logs", "chained")
    assert 0 < log.find("epoch 1/") < log.find(f"continuing from {last}") < log.find("epoch 3/3")
    told = events.read(user.run("chained"))
    assert [event["event"] for event in told] == ["start", "end", "requeued", "start", "end"]
    assert (told[1]["state"], told[1]["requeued"], told[4]["state"]) == ("stopped", True, "done")


@pytest.mark.slow
def test_a_crash_is_taken_over_and_what_cannot_be_cancelled_leaves(user: User, uninterrupted: Path) -> None:
    """Here the nodes have no scancel."""
    (user.home / "bin").mkdir()
    (user.home / "bin" / "scancel").write_text("#!/bin/sh\nexit 1\n")
    (user.home / "bin" / "scancel").chmod(0o755)
    user.environment["PATH"] = f"{user.home}/bin:{user.environment['PATH']}"
    jobs = submit(user, "crashed", 4)
    process = user.freeze("crashed", jobs[0], rank=2)
    os.kill(process, signal.SIGKILL)
    user.wait("crashed", jobs[1], "done")
    assert len(user.starts("crashed")) == 2
    assert_same_run(user.run("crashed"), uninterrupted)
    wait_for(lambda: user.cluster.job(jobs[3]) == "COMPLETED", 30, "the last job to leave")
    assert [user.cluster.job(job) for job in jobs] == ["FAILED", "COMPLETED", "COMPLETED", "COMPLETED"]
    log = user.slurm("logs", "crashed")
    assert log.splitlines()[-2:] == [LEFT.format(job) for job in jobs[2:]]
    assert len(user.starts("crashed")) == 2, "nothing of Python was started"
    assert shown(user, "crashed")[1] == f"{jobs[1]} (2 of 4, 0 left)"


@pytest.mark.slow
def test_cancel_ends_a_chain_and_requeue_submits_a_new_one(user: User, uninterrupted: Path) -> None:
    jobs = submit(user, "mind changed", 3)
    process = user.freeze("mind changed", jobs[0], rank=0)
    cancelling = user.start("cancel", "mind changed")
    user.thaw(process, signal.SIGUSR2)
    out, err = cancelling.communicate(timeout=60)
    last = user.stopped("mind changed")
    assert f"mind changed: jobs {', '.join(jobs)} are cancelled; saved: {last}" in out, err
    assert [user.cluster.job(job) for job in jobs] == ["CANCELLED"] * 3
    assert shown(user, "mind changed")[3] == "cancelled"
    again = re.findall(r"\d+", user.slurm("requeue", "mind changed").partition(" are ")[0])
    assert again == [str(int(jobs[-1]) + number) for number in (1, 2, 3)]
    assert "as a chain, which is not requeued: cancel it first" in user.slurm("requeue", "mind changed", code=2)
    user.wait("mind changed", again[0], "done")
    assert user.starts("mind changed") == ["", last]
    assert_same_run(user.run("mind changed"), uninterrupted)


@pytest.mark.slow
def test_a_chain_without_progress_is_given_up_after_three_starts(user: User) -> None:
    (user.home / "torch.py").write_text("raise OSError('the driver is gone')")  # found first, in the job's directory
    jobs = submit(user, "broken", 6, "--nodes=1", "--gpus-per-node=1")
    wait_for(lambda: not user.cluster.run("squeue", "-h"), 120, "the queue to be empty")
    assert [user.cluster.job(job) for job in jobs] == ["FAILED"] * 4 + ["CANCELLED"] * 2
    assert len(user.starts("broken")) == 3
    assert "no progress in 3 starts" in status(user.run("broken"))["reason"]


@pytest.mark.slow
def test_chains_of_one_name_do_not_wait_for_each_other(user: User, tmp_path: Path) -> None:
    """Two runs of one name in different places; singleton goes by the name of the job."""
    here = submit(user, "twin", 2, "--nodes=1", "--gpus-per-node=1", "--train.epochs=9000")
    user.home = tmp_path / "elsewhere"
    user.home.mkdir()
    there = submit(user, "twin", 2, "--nodes=1", "--gpus-per-node=1", "--train.epochs=9000")
    for job in (here[0], there[0]):
        wait_for(lambda job=job: user.cluster.job(job) == "RUNNING", 30, f"job {job} to run")
    assert [user.cluster.job(job) for job in (here[1], there[1])] == ["PENDING"] * 2
