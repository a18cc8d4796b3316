"""A private cluster for all tests in this folder, and a user who works on it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.compare import status
from tests.helpers.launch import EMPTY, SMALL, launch
from tests.slurm.private_cluster import Cluster, missing, process_with, wait_for

EPOCHS = 3
TRAINING = [*SMALL, f"--config={EMPTY}", f"--train.epochs={EPOCHS}", "--checkpoint.steps=3"]
SIZE = ("--nodes=2", "--gpus-per-node=2")
REPOSITORY = Path(__file__).resolve().parents[2]


def job_of(said: str) -> str:
    """First job number in a command's output."""
    found = re.search(r"\bjob (\w+)", said)
    assert found, said
    return found[1]


class User:
    """Works in a directory on a cluster.

    Args:
        home: where `runs/` is.
        cluster: None for a machine without Slurm.
    """

    def __init__(self, home: Path, cluster: Cluster | None, sets: Path) -> None:
        self.home, self._cluster = home, cluster
        self.training = [*TRAINING, f"--data.train={sets / 'train'}", f"--data.val={sets / 'val'}"]
        variables = cluster.environment if cluster else os.environ
        self.environment = {**variables, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.environment |= {"XDG_CONFIG_HOME": str(home / ".config"), "XDG_STATE_HOME": str(home / ".state")}
        self.python = sys.executable

    @property
    def cluster(self) -> Cluster:
        assert self._cluster
        return self._cluster

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`python -m slurm ...`, without waiting for it."""
        return subprocess.Popen(
            [self.python, "-m", "slurm", *words],
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def slurm(self, *words: str, code: int = 0) -> str:
        """Output of `python -m slurm ...`, or its error message if `code` is not 0."""
        process = self.start(*words)
        out, err = process.communicate(timeout=200)
        assert process.returncode == code, out + err
        return err if code else out

    def submit(self, name: str, *words: str) -> str:
        """Submits a new run on 2 nodes x 2 tasks. Returns its job number."""
        return job_of(self.slurm("submit", *SIZE, "--time=30", *self.training, f"--run.name={name}", *words))

    def run(self, name: str) -> Path:
        return self.home / "runs" / name

    def log(self, name: str, rank: int = 0) -> str:
        return "".join(path.read_text() for path in self.run(name).glob(f"slurm/*_{rank}_log.out"))

    def wait(self, name: str, job: str, state: str, seconds: float = 120) -> None:
        """Waits until the run and Slurm both say that it ended in `state`."""

        def ended() -> bool:
            path = self.run(name) / "status.json"
            return path.exists() and status(self.run(name))["state"] == state

        try:
            wait_for(ended, seconds, f"{name} to be {state}")
            wait_for(lambda: self.cluster.job(job) not in ("RUNNING", "COMPLETING"), 60, f"job {job} to end")
        except AssertionError as error:
            queue = self.cluster.run("squeue", "-t", "all", "-l")
            raise AssertionError(f"{error}\n{self.slurm('status')}\n{queue}\n{self.log(name)}") from error

    def _process(self, job: str, rank: int) -> int:
        if self._cluster:
            return self._cluster.process(job, rank)
        return process_with({f"SUBMITIT_LOCAL_JOB_ID={job}", f"SUBMITIT_LOCAL_GLOBALID={rank}"})

    def processes(self, job: str, ranks: range) -> list[int]:
        """Processes of the ranks; waits until they exist."""
        wait_for(lambda: all(self._process(job, rank) for rank in ranks), 60, f"the ranks of job {job}", every=0.01)
        return [self._process(job, rank) for rank in ranks]

    def told(self, name: str, words: str, seconds: float = 60) -> None:
        """Waits until `status` shows this for a run."""
        said: list[str] = []

        def does() -> bool:
            said[:] = [self.slurm("status", name)]
            return words in said[0]

        try:
            wait_for(does, seconds, f"status to say {words!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{said}\n{self.log(name)}") from error

    def freeze(self, name: str, job: str, rank: int, newer: str = "") -> int:
        """Stop the process of a rank once the run has a checkpoint newer than `newer`: training stands still in the
        middle of an epoch, however fast the machine. Returns the process."""
        # first the start that follows that checkpoint, so as not to find a rank of the start before
        wait_for(lambda: self.starts(name)[-1:] == [newer], 60, f"the start after {newer}")
        wait_for(lambda: self._process(job, rank), 60, f"rank {rank} of job {job}")
        process = self._process(job, rank)
        wait_for(lambda: self.newest(name) > newer, 120, f"{name} to save\n{self.log(name)}", every=0.01)
        os.kill(process, signal.SIGSTOP)
        wait_for(lambda: field(process, "State").startswith("T"), 10, "the process to stand still", every=0.01)
        assert status(self.run(name))["state"] == "running", "frozen too late"
        return process

    def thaw(self, process: int, number: signal.Signals) -> None:
        """Lets a frozen process continue once a signal is pending for it."""

        def come() -> bool:
            pending = int(field(process, "ShdPnd"), 16) >> (number - 1) & 1
            return bool(pending) or not field(process, "State").startswith("T")  # Slurm sends SIGCONT before SIGTERM

        wait_for(come, 90, f"{number.name} for process {process}")
        os.kill(process, signal.SIGCONT)

    def newest(self, name: str) -> str:
        """The newest checkpoint."""
        return max((path.name for path in (self.run(name) / "checkpoints").glob("step-*")), default="")

    def stopped(self, name: str) -> str:
        """Wait for a clean stop; returns the checkpoint of the very step at which training stopped."""
        wait_for(lambda: status(self.run(name))["state"] == "stopped", 60, f"{name} to stop\n{self.log(name)}")
        return f"step-{status(self.run(name))['step']:08d}"

    def starts(self, name: str) -> list[str]:
        """Checkpoints found by the starts, one per start."""
        lines = (self.run(name) / "slurm" / "starts.jsonl").read_text().splitlines()
        return [line["checkpoint"] for line in map(json.loads, lines) if "start" in line]


def field(process: int, name: str) -> str:
    """Field of /proc/<process>/status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)[name]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(lacking)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=4)
    yield cluster
    cluster.close()


@pytest.fixture
def user(tmp_path: Path, cluster: Cluster, shard_sets: Path) -> Iterator[User]:
    yield User(tmp_path, cluster, shard_sets)
    cluster.run("scancel", f"--user={os.getuid()}", "--signal=KILL", "--full")
    cluster.run("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not cluster.run("squeue", "-h"), 60, "the queue to be empty")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shard_sets: Path) -> Path:
    """The run that all others must equal: four ranks of torchrun, never stopped."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = launch(shard_sets, run, f"--train.epochs={EPOCHS}", ranks=4)
    assert result.returncode == 0, result.stderr
    return run
