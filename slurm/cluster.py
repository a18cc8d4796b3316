"""Wrappers of Slurm's commands. sacct is not used: many clusters have none."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

CONTROLLER, QUEUE = "submitit.local._local", "slurm.local"  # modules that run a local job, and a sweep of them


@dataclass(frozen=True)
class Entry:
    """A job in the queue: Slurm's state, the reason for it, and the time left in Slurm's format.

    Attributes:
        job: its number; of a chain that of the job which runs, will run next, or ran last.
        waiting: how many further jobs of its chain are in the queue.
    """

    state: str
    reason: str = ""
    left: str = ""
    job: str = ""
    waiting: int = 0

    @property
    def active(self) -> bool:
        """True if the job runs or will run."""
        return self.state not in FINISHED


def look(submissions: Iterable[Submission]) -> dict[str, Entry]:
    """Entries by job, of a chain one per job, from squeue or the process table. Slurm forgets finished jobs after some
    minutes."""
    entries, jobs = {}, []
    for submission in submissions:
        job = submission.job
        if not submission.local:
            jobs += [link.job for link in submission.links]
        elif not submission.waits and _is(job, CONTROLLER, submission.folder):
            entries[job] = Entry("RUNNING", "local", job=job)
        elif (
            submission.waits and _is(job.split("_")[0], QUEUE, submission.folder) and not submission.no_requeue.exists()
        ):
            entries[job] = Entry("PENDING", "local, after others", job=job)
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
                entries[job] = Entry(state, "" if reason == "None" else reason, left, job)
    return entries


def current(submission: Submission, queue: Mapping[str, Entry], started: str = "") -> Entry | None:
    """Entry of a submission; of a chain that of the job which runs or will run next, or else of the one that ran last.

    Args:
        queue: from `look`.
        started: the job that was the last to start, if that is known.
    """
    entries = [queue[link.job] for link in submission.links if link.job in queue]
    active = sorted((entry for entry in entries if entry.active), key=lambda entry: entry.state == "PENDING")
    if active:
        return replace(active[0], waiting=len(active) - 1)
    return next((entry for entry in entries if entry.job == started), next(iter(entries), None))


def entry(submission: Submission) -> Entry:
    """Entry of one submission; an unknown job counts as completed."""
    return current(submission, look([submission])) or Entry("COMPLETED", "not in the queue")


def belongs(submission: Submission, *, to_anybody: bool = False) -> bool:
    """True if all its jobs that are in the queue are this user's, and have their logs in its folder: the number of any
    other job may stand in the file of a run. Raises SlurmError.

    Args:
        to_anybody: whether they may be another user's.
    """
    if submission.local:
        return True  # `look` knows its process by the folder
    jobs = [job for job, place in look([submission]).items() if place.active]
    if not jobs:
        return True
    form = "JobArrayID:|,UserID:|,STDOUT:|"
    text = command("squeue", "--noheader", "--array", "--states=all", f"--Format={form}", "--jobs=" + ",".join(jobs))
    found = [line.rstrip("|").split("|", 2) for line in text.splitlines() if line.count("|") >= 3]
    folder = os.path.realpath(submission.folder)
    ours = {
        job
        for job, user, log in found
        if (to_anybody or user == str(os.getuid())) and os.path.realpath(os.path.dirname(log)) == folder
    }
    return ours >= set(jobs)


def ended(submission: Submission) -> bool:
    """True if the job neither runs nor will run."""
    return not entry(submission).active


def stop(submission: Submission) -> None:
    """Asks all ranks to save and exit."""
    if submission.local:
        os.kill(int(submission.job), signal.SIGTERM)  # the controller passes it on
    else:
        command("scancel", "--signal=USR2", entry(submission).job)


def end(submission: Submission) -> None:
    """Cancels the job, whatever its state, and all others of its chain."""
    if not submission.local:
        end_jobs([job for job, place in look([submission]).items() if place.active])
    elif not submission.waits and _is(submission.job, CONTROLLER, submission.folder):
        os.kill(int(submission.job), signal.SIGINT)


def end_jobs(jobs: Sequence[str]) -> None:
    """Cancels jobs of Slurm, if there are any."""
    if jobs:
        command("scancel", *jobs)


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


def _is(process: str, module: str, folder: str) -> bool:
    """True if this process of ours runs this module for the jobs of this folder; any other process may have its number
    by now, or ever since."""
    try:
        place = Path(f"/proc/{process}")
        words = [os.fsdecode(word) for word in (place / "cmdline").read_bytes().split(b"\0")]
        return (
            place.stat().st_uid == os.getuid()
            and words[1:3] == ["-m", module]
            and os.path.realpath(words[3]) == os.path.realpath(folder)
        )
    except (IndexError, OSError):
        return False
