"""What Slurm adds to the table of runs, and the text of `logs`."""

from __future__ import annotations

import codecs
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dist_train.rundir import listing, status
from dist_train.rundir.listing import RUN, SETTINGS, STATE, cells, drawn_table, duration, shown_state
from dist_train.rundir.overview import Overview, damage, looked_at
from pipelines.errors import UserError
from pipelines.files import as_text, regular
from pipelines.speech import show, show_bytes, unheard
from slurm.cluster import Entry, current, entry, look
from slurm.submissions import SlurmError, Submission, SubmittedRun

HEADS = (RUN, "JOB", "SLURM", *listing.HEADS[1:-1], "HEARTBEAT", "RESTARTS", "JOB LEFT", SETTINGS)
ENDED = ("done", "diverged", "failed")  # states that say more than that the run was cancelled
PIECE = 1 << 20  # bytes of a log
COLOURS = re.compile("\033\\[[0-9;]*m")  # ECMA-48, SGR


def in_queue(runs: list[SubmittedRun]) -> dict[str, Entry]:
    """Queue entries by run name, without runs that have none or whose file is damaged."""
    submissions: dict[str, tuple[Submission, str]] = {}
    for run in runs:
        with suppress(UserError, OSError):
            submissions[run.name] = (run.last, _started(run))
    queue = look(submission for submission, _ in submissions.values())
    places = {name: current(submission, queue, started) for name, (submission, started) in submissions.items()}
    return {name: place for name, place in places.items() if place}


def status_table(runs: list[SubmittedRun], queue: Mapping[str, Entry]) -> str:
    """The table of these runs, see `listing`, with what Slurm knows of them.

    Args:
        queue: from `in_queue`.
    """
    return drawn_table([_guarded_row(run, queue.get(run.name), time.time()) for run in runs], HEADS)


def _guarded_row(run: SubmittedRun, place: Entry | None, now: float) -> dict[str, str]:
    """Like `row`; of a damaged run, which must not hide the others, the state says which file is at fault."""
    try:
        return row(run, place, now)
    except (UserError, OSError) as error:
        job = ""
        with suppress(UserError, OSError):
            job = run.last.job
        return {RUN: as_text(run.name), "JOB": job, STATE: f"damaged: {damage(run.directory, error)}"}


def row(run: SubmittedRun, place: Entry | None, now: float) -> dict[str, str]:
    """Cells of one run, by the heads of their columns. Raises UserError and OSError if one of its files is damaged."""
    found, history = looked_at(run.directory, now), run.history()
    found = replace(found, name=as_text(run.name), epochs=run.config()["train"]["epochs"])
    if crash := run.crash(status.read(run.directory)):
        found = replace(found, state="failed", reason=crash)
    state = _state(found, place, now)
    if place and place.active and not crash and found.state in ("failed", "diverged"):
        submitted = history[-1].get("time", 0.0) if history and "submitted" in history[-1] else 0.0
        if submitted > (found.heartbeat or 0.0):  # the reason is that of the submission before
            state = f"{found.state}, then submitted again"
    if run.last.cancelled and not (place and place.active) and found.state not in ENDED:
        state = "cancelled"
    starts = sum("start" in line for line in history)
    alive = found.heartbeat is not None and not state.startswith("silent")
    return cells(found, now) | {
        "JOB": _job(run, place),
        "SLURM": _slurms(place),
        STATE: state,
        "HEARTBEAT": f"{duration(now - (found.heartbeat or now))} ago" if alive else "-",
        "RESTARTS": str(max(0, starts - 1)),
        "JOB LEFT": place.left if place and place.state == "RUNNING" and place.left else "-",
    }


def read_log(run: SubmittedRun, rank: int, follow: bool) -> Iterator[bytes]:
    """Yields the log of one rank over all restarts, piece by piece; with `follow`, until the job ends. Raises
    SlurmError."""
    if not 0 <= rank < run.last.tasks:
        raise SlurmError(f"{run.name} has no rank {rank}: its ranks are 0 to {run.last.tasks - 1}")
    if not follow and not any(link.log(rank).exists() for link in run.last.links):
        path = run.last.log(rank)
        raise SlurmError(f"{run.name} has not started yet, so there is no {path}: see `status`, or add --follow")
    places, asked = defaultdict[Path, int](int), float("-inf")
    active = follow
    while True:
        submission = run.last  # anew, since a run that waits for its turn gets its job later
        if follow and time.monotonic() - asked > 3:
            active, asked = entry(submission).active, time.monotonic()
        for path in (link.log(rank) for link in submission.links):
            if path.exists():
                with open(path, "rb", opener=regular) as file:
                    file.seek(places[path])
                    while piece := file.read(PIECE):
                        places[path] += len(piece)
                        yield piece
        if not active:  # determined before the last read, so nothing is missed
            return
        time.sleep(0.3)


def show_log(run: SubmittedRun, rank: int, follow: bool, raw: bool) -> None:
    """Prints the pieces of `read_log` as they come, as long as somebody reads them: as text without colours, with a
    line for each state of a progress bar; or as they are if `raw`."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in read_log(run, rank, follow):
        if raw:
            show_bytes(piece)
        else:
            show(COLOURS.sub("", decoder.decode(piece)).replace("\r\n", "\n").replace("\r", "\n"), end="")
        if unheard():
            return


def _state(found: Overview, place: Entry | None, now: float) -> str:
    """The state, from status.json and the queue. A run that died has left "running" behind."""
    if found.state in ("starting", "running", "silent"):
        if place and place.state == "PENDING":
            return "interrupted"  # it wrote no reason: a lost node
        if found.state != "silent" and not (place and place.active):
            return f"{found.state}, but not in the queue"
    return shown_state(found, now)


def _started(run: SubmittedRun) -> str:
    """The job that was the last to start; empty before the first."""
    return next((str(line["start"]) for line in reversed(run.history()) if "start" in line), "")


def _job(run: SubmittedRun, place: Entry | None) -> str:
    """Cell of the job; of a chain which one it is, and how many are left."""
    jobs = [link.job for link in run.last.links]
    job = (place.job if place else "") or _started(run)
    if len(jobs) == 1 or job not in jobs:
        return run.last.job
    return f"{job} ({jobs.index(job) + 1} of {len(jobs)}, {place.waiting if place else 0} left)"


def _slurms(place: Entry | None) -> str:
    """Cell of Slurm's own state."""
    if place is None:
        return "not in the queue"
    return f"{place.state} ({place.reason})" if place.reason else place.state
