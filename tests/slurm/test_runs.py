"""Runs on a cluster, and what happens to them there: each ends as one that was never stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch import status
from tests.slurm.conftest import EPOCHS, User, same
from tests.slurm.private_cluster import wait_for

pytestmark = pytest.mark.slurm


def test_a_plain_run_and_its_log(user: User, uninterrupted: Path) -> None:
    job = user.submit("plain")
    following = user.start("logs", "plain", "--follow")
    user.wait("plain", job, "done")
    assert same(user.run("plain"), uninterrupted)
    assert user.cluster.job(job) == "COMPLETED"
    said, _ = following.communicate(timeout=30)
    assert said == user.log("plain")
    assert said.count(f"epoch {EPOCHS}/{EPOCHS}: top-1 error") == 1
    assert "top-1 error" not in user.slurm("logs", "plain", "--rank=3")


def test_the_time_limit_loses_nothing(user: User, uninterrupted: Path) -> None:
    job = user.submit("limited", "--time=1", "--signal-before=10")
    process = user.freeze("limited", job, rank=3)
    user.thaw(process, signal.SIGUSR2)
    last = user.stopped("limited")
    user.wait("limited", job, "done")
    assert user.starts("limited") == ["", last]
    assert same(user.run("limited"), uninterrupted)


def test_preemption_by_either_signal_loses_nothing(user: User, uninterrupted: Path) -> None:
    stops = [""]
    user.cluster.preempt_with(user_signal=False)
    job = user.submit("low")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process = user.freeze("low", job, rank=1, newer=stops[-1])
        user.cluster.preempt_with(user_signal=number == signal.SIGUSR2)
        user.cluster.run("sbatch", "-p", "high", "-N4", "--ntasks-per-node=8", "-o", "/dev/null", "--wrap", "sleep 1")
        user.thaw(process, number)
        stops.append(user.stopped("low"))
    user.wait("low", job, "done")
    assert user.starts("low") == stops
    assert same(user.run("low"), uninterrupted)


def test_a_requeue_loses_nothing_and_a_crashed_rank_comes_back(user: User, uninterrupted: Path) -> None:
    """In a run with an odd name."""
    name = "l'été à 100 $HOME"
    job = user.submit(name)
    process = user.freeze(name, job, rank=2)
    user.cluster.run("scontrol", "requeue", job)
    user.thaw(process, signal.SIGTERM)
    last = user.stopped(name)
    process = user.freeze(name, job, rank=2, newer=last)
    os.kill(process, signal.SIGKILL)
    user.wait(name, job, "done")
    assert user.starts(name)[:2] == ["", last]
    assert len(user.starts(name)) == 3
    assert same(user.run(name), uninterrupted)


def test_a_node_crash_and_one_run_in_wandb(user: User, uninterrupted: Path) -> None:
    job = user.submit("crash", "--monitor.wandb=offline")
    user.freeze("crash", job, rank=3)
    node = user.cluster.nodes[1]
    user.cluster.crash(node)
    user.wait("crash", job, "done")
    user.cluster.boot(node)
    assert len(user.starts("crash")) == 2
    assert same(user.run("crash"), uninterrupted)


def test_cancel_saves_and_requeue_goes_on(user: User, uninterrupted: Path) -> None:
    job = user.submit("mind changed")
    process = user.freeze("mind changed", job, rank=0)
    cancelling = user.start("cancel", "mind changed")
    user.thaw(process, signal.SIGUSR2)
    out, err = cancelling.communicate(timeout=60)
    last = f"step-{status(user.run('mind changed'))['step']:08d}"
    assert last in out, out + err
    assert user.cluster.job(job) == "CANCELLED"
    assert status(user.run("mind changed"))["state"] == "stopped"
    assert "mind changed" in user.slurm("status", "mind changed")

    said = user.slurm("requeue", "mind changed", f"--exclude={user.cluster.nodes[0]}")
    job = said.split()[3]
    user.wait("mind changed", job, "done")
    assert user.starts("mind changed") == ["", last]
    assert same(user.run("mind changed"), uninterrupted)
    wait_for(lambda: user.cluster.job(job) == "COMPLETED", 10, "the end")
    story = (user.run("mind changed") / "slurm" / "starts.jsonl").read_text().splitlines()
    assert user.cluster.nodes[0] not in story[-1]
