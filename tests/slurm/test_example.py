"""slurm/example.sbatch, the script that a user copies: its runs are stopped and end like one that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.rundir import events
from tests.helpers.compare import assert_same_run, status
from tests.slurm.conftest import REPOSITORY, User, field
from tests.slurm.private_cluster import ROOT, process_with, wait_for

SCRIPT = REPOSITORY / "slurm" / "example.sbatch"

pytestmark = pytest.mark.slurm


def test_bash_and_shellcheck_accept_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def copied(user: User, run: str) -> Path:
    """A user's copy: RUN and TRAIN in its head are his, and the test's Python stands where `activate` would."""
    text = SCRIPT.read_text(encoding="utf-8")
    words = " ".join(f"'{word}'" for word in [*user.training, "--checkpoint.steps=3"])
    for old, new in (
        ("# source .venv/bin/activate", f"PATH={Path(user.python).parent}:$PATH"),
        ("RUN=runs/big", f"RUN='runs/{run}'"),
        ("TRAIN=(--config configs/alexnet_8gpu.yaml --run.dir", f"TRAIN=({words} --run.dir"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (user.home / "my.sbatch").write_text(text, encoding="utf-8")
    return user.home / "my.sbatch"


def sbatch(user: User, run: str, *words: str) -> str:
    """Submits the copy with two GPUs and so two ranks on each of two nodes. Returns the job number."""
    size = ("--gpus-per-node=2", "--cpus-per-task=2", f"--output={user.home}/log")
    command = ["sbatch", "--parsable", *size, *words, str(copied(user, run))]
    done = subprocess.run(command, cwd=user.home, env=user.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log(user: User) -> str:
    path = user.home / "log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def freeze(user: User, job: str, run: str, newer: str = "", rank: int = 3) -> int:
    """Stops the process of a rank once the run has a checkpoint newer than `newer`, so that training stands still."""
    mine = {f"SLURM_JOB_ID={job}", f"RANK={rank}", f"SLURM_CONF={user.cluster.environment['SLURM_CONF']}"}
    wait_for(lambda: user.newest(run) > newer, 120, f"{run} to save", every=0.01)
    process = process_with(mine)
    os.kill(process, signal.SIGSTOP)
    wait_for(lambda: field(process, "State").startswith("T"), 10, "the process to stand still", every=0.01)
    assert status(user.run(run))["state"] == "running", "frozen too late"
    return process


def ended(user: User, job: str, state: str) -> None:
    """Waits for the end of a job, in a state of Slurm's."""
    wait_for(lambda: user.cluster.job(job) == state, 150, f"job {job} to be {state}")


def starts(user: User, run: str) -> list[str]:
    """The checkpoints that the starts of a run continued from."""
    return [event["checkpoint"] for event in events.read(user.run(run)) if event["event"] == "start"]


@pytest.fixture
def me(user: User) -> Iterator[User]:
    """The user, whose queue and log are shown if the test fails."""
    if not ROOT:
        pytest.skip("without root the nodes have no host names, which torchrun's rendezvous needs")
    user.cluster.preempt_with(user_signal=False)
    yield user
    print(user.cluster.run("squeue", "-t", "all", "-l"), log(user))


@pytest.mark.slow
def test_the_signal_before_the_limit_loses_nothing(me: User, uninterrupted: Path) -> None:
    """`scancel --batch` sends the script what Slurm sends it before the time limit."""
    job = sbatch(me, "big")
    process = freeze(me, job, "big")
    me.cluster.run("scancel", "--batch", "--signal=USR2", job)
    me.thaw(process, signal.SIGUSR2)
    last = me.stopped("big")
    ended(me, job, "COMPLETED")
    assert starts(me, "big") == ["", last]
    assert_same_run(me.run("big"), uninterrupted)


@pytest.mark.slow
def test_the_limit_itself_and_a_preemption_lose_nothing(me: User, uninterrupted: Path) -> None:
    """A limit of two minutes, of which the script is told 30 s before its end."""
    job = sbatch(me, "big", "--time=2", "--signal=B:USR2@30")
    process = freeze(me, job, "big")
    me.thaw(process, signal.SIGUSR2)
    stops = ["", me.stopped("big")]
    me.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    process = freeze(me, job, "big", newer=stops[-1])
    me.cluster.run("sbatch", "-p", "high", "-N4", "--ntasks-per-node=8", "-o", "/dev/null", "--wrap", "sleep 1")
    me.thaw(process, signal.SIGTERM)
    stops.append(me.stopped("big"))
    ended(me, job, "COMPLETED")
    assert starts(me, "big") == stops
    assert_same_run(me.run("big"), uninterrupted)


@pytest.mark.slow
def test_scancel_saves_and_a_killed_rank_is_restarted_on_the_spot(me: User, uninterrupted: Path) -> None:
    """What was cancelled comes back only when it is submitted again."""
    job = sbatch(me, "big")
    process = freeze(me, job, "big")
    me.cluster.run("scancel", job)
    me.thaw(process, signal.SIGTERM)
    last = me.stopped("big")
    ended(me, job, "CANCELLED")
    job = sbatch(me, "big")
    os.kill(freeze(me, job, "big", newer=last), signal.SIGKILL)
    ended(me, job, "COMPLETED")
    assert starts(me, "big")[:2] == ["", last]
    assert len(starts(me, "big")) == 3
    assert "Restarts=0" in me.cluster.run("scontrol", "show", "job", job)
    assert_same_run(me.run("big"), uninterrupted)


@pytest.mark.slow
def test_what_no_restart_mends_is_not_requeued(me: User) -> None:
    """Even if an earlier start has left "stopped" in status.json."""
    me.run("big").mkdir(parents=True)
    (me.run("big") / "status.json").write_text('{\n "state": "stopped"\n}')
    (me.home / "dist_train").mkdir()
    (me.home / "dist_train" / "__init__.py").touch()  # found first, and empty
    job = sbatch(me, "big")
    ended(me, job, "FAILED")
    assert "dist_train" in log(me)
    assert "Restarts=0" in me.cluster.run("scontrol", "show", "job", job)
