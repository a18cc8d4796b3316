"""Wrappers of Slurm's commands. sacct is not used: many clusters have none."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from slurm.submissions import SlurmError, Submission

FINISHED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Entry:
    """A job in the queue: Slurm's state, the reason for it, and the time left in Slurm's format."""

    state: str
    reason: str = ""
    left: str = ""

    @property
    def active(self) -> bool:
        """True if the job runs or will run."""
        return self.state not in FINISHED


def look(submissions: Iterable[Submission]) -> dict[str, Entry]:
    """Entries by job, from squeue or the process table. Slurm forgets finished jobs after some minutes."""
    entries, jobs = {}, []
    for submission in submissions:
        if not submission.local:
            jobs.append(submission.job)
        elif _controller(submission.job):
            entries[submission.job] = Entry("RUNNING", "local")
    if jobs:
        try:
            text = command(
                "squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%L", "--jobs=" + ",".join(jobs)
            )
        except SlurmError:  # an unknown job, or no Slurm here: the run directory must do
            text = ""
        for line in text.splitlines():
            if line.count("|") >= 3:
                job, state, rest = line.split("|", 2)
                reason, _, left = rest.rpartition("|")
                entries[job] = Entry(state, "" if reason == "None" else reason, left)
    return entries


def entry(submission: Submission) -> Entry:
    """Entry of one job; an unknown job counts as completed."""
    return look([submission]).get(submission.job, Entry("COMPLETED", "not in the queue"))


def ended(submission: Submission) -> bool:
    """True if the job neither runs nor will run."""
    return not entry(submission).active


def stop(submission: Submission) -> None:
    """Asks all ranks to save and exit."""
    if submission.local:
        os.kill(int(submission.job), signal.SIGTERM)  # the controller passes it on
    else:
        command("scancel", "--signal=USR2", submission.job)


def end(submission: Submission) -> None:
    """Cancels the job, whatever its state."""
    if not submission.local:
        command("scancel", submission.job)
    elif _controller(submission.job):
        os.kill(int(submission.job), signal.SIGINT)


def requeue(submission: Submission, exclude: str) -> None:
    """Requeues a job that Slurm still knows, excluding the nodes `exclude`. A running job is sent SIGTERM first, so it
    saves. Slurm accepts an exclusion only for a pending job, hence the hold."""
    job = submission.job
    if entry(submission).state != "PENDING":
        command("scontrol", "requeuehold", job)
        wait(lambda: entry(submission).state in ("PENDING", "REQUEUE_HOLD"), 300, f"job {job} does not leave its nodes")
        if exclude:
            command("scontrol", "update", f"JobId={job}", f"ExcNodeList={exclude}")
        command("scontrol", "release", job)
    elif exclude:
        command("scontrol", "update", f"JobId={job}", f"ExcNodeList={exclude}")


def wait(until: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Polls `until` twice per second. Raises SlurmError with the complaint after `seconds`."""
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise SlurmError(f"{complaint}: look at `squeue`, then repeat the command")
        time.sleep(0.5)


def command(*words: str) -> str:
    """Output of a command. Raises SlurmError with its error message."""
    try:
        return subprocess.run(words, check=True, capture_output=True, encoding="utf-8", errors="replace").stdout
    except FileNotFoundError as error:
        raise SlurmError(f"there is no {words[0]} here: use a node of the cluster, or submit with --local") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"{words[0]} failed: {' '.join(error.stderr.split())}") from error


def _controller(process: str) -> bool:
    """True if this process is a live submitit controller, and not another process that reuses its number."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
