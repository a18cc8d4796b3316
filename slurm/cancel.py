"""`cancel`: all runs are asked to save at once, then waited for together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import suppress

from dist_train.rundir.checkpoint import newest_name
from pipelines.errors import UserError
from pipelines.speech import bar, say, show, watched
from slurm import cluster
from slurm.submissions import SlurmError, Submission, SubmittedRun

PATIENCE = 30  # seconds that a stopped job may take to end, besides those of its save
POLL = 0.5  # seconds between two looks at the queue


def cancel(runs: Iterable[SubmittedRun], *, now: bool) -> None:
    """Ends runs after a save, each as soon as it has saved, and says so.

    Args:
        now: whether not to wait for a save.
    """
    asked: dict[SubmittedRun, Submission] = {}
    for run in runs:
        if cluster.ended(run.last):
            show(f"{run.name}: job {run.last.job} has ended already")
        else:
            asked[run] = proven(run)
    for submission in asked.values():
        submission.cancel()  # before any of them ends: what waits for its turn does not start then
    saving = {} if now else {run: its for run, its in asked.items() if _stop(its)}
    for run, submission in asked.items():
        if run not in saving:
            _end(run, submission)
    _wait(saving)


def proven(run: SubmittedRun) -> Submission:
    """The submission of a run that is in the queue. Raises SlurmError unless what its file names is this run's."""
    submission = run.last
    run.check_folder(submission)
    if not cluster.belongs(submission):
        raise SlurmError(
            f"{run.job_file} names {submission.subject.rpartition(' ')[0]}, which Slurm does not know as this run's: "
            f"look at `squeue`, and use scancel for a job of yours"
        )
    return submission


def _stop(submission: Submission) -> bool:
    """Asks a run to save and to end. Returns whether there is anything to wait for."""
    queue = cluster.look([submission])
    place = cluster.current(submission, queue)
    if not place or place.state != "RUNNING":
        return False
    cluster.end_jobs([job for job, link in queue.items() if link.state == "PENDING"])  # of its chain
    try:
        cluster.stop(submission)
    except (OSError, SlurmError):
        if not cluster.ended(submission):
            raise
    return True


def _wait(saving: dict[SubmittedRun, Submission]) -> None:
    """Waits until all have ended, as long as the most patient of them allows; ends what has not ended by then."""
    if not saving:
        return
    patience, left = max(map(_patience, saving)), dict(saving)
    deadline = time.monotonic() + patience
    line = bar(None, _waiting(left, saving, patience), "run", live="{desc}, {elapsed} so far", lines=True)
    with line:
        while left and time.monotonic() < deadline:
            queue = cluster.look(left.values())
            for run, submission in list(left.items()):
                place = cluster.current(submission, queue)
                if not (place and place.active):
                    del left[run]
                    line.clear()
                    _end(run, submission)
            said = _waiting(left, saving, patience)
            if watched() or said != line.desc:  # elsewhere each state of the line is a line
                line.set_description_str(said)
            if left:
                time.sleep(POLL)
    for run, submission in left.items():
        say(f"{run.name}: it does not stop: ending it without a save")
        _end(run, submission)


def _waiting(left: dict[SubmittedRun, Submission], saving: dict[SubmittedRun, Submission], patience: float) -> str:
    return f"waiting for {len(left)} of {len(saving)} to save and end, at most {patience:.0f} s"


def _patience(run: SubmittedRun) -> float:
    """Seconds that the run may take to save and to end."""
    with suppress(UserError, KeyError, TypeError):
        patience = run.config()["run"]["stop_timeout"]
        if 0 <= patience < math.inf:
            return PATIENCE + float(patience)
    return PATIENCE


def _end(run: SubmittedRun, submission: Submission) -> None:
    """Ends what is still in the queue, and says what is left of the run."""
    if not cluster.ended(submission):
        cluster.end(submission)
    newest = newest_name(run.directory)
    show(f"{run.name}: {submission.subject} cancelled; {f'saved: {newest}' if newest else 'nothing was saved'}")
