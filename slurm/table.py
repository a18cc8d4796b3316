"""Table of `status` and text of `logs`."""

from __future__ import annotations

import codecs
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.rundir import record, status
from dist_train.rundir.ledger import spent
from pipelines.errors import UserError
from pipelines.files import as_text, regular
from pipelines.speech import in_line, show, show_bytes, unheard
from pipelines.valid import Torn, objects_of
from slurm.cluster import Entry, current, entry, look
from slurm.submissions import SlurmError, Submission, SubmittedRun

HEAD = (
    "RUN",
    "JOB",
    "SLURM",
    "STATE",
    "EPOCH",
    "STEP",
    "IMAGES/S",
    "TOP-1 ERROR",
    "HEARTBEAT",
    "RESTARTS",
    "ELAPSED",
    "GOODPUT",
    "TIME LEFT",
)
STATE = HEAD.index("STATE")
ENDED = ("done", "diverged", "failed")  # states that say more than that the run was cancelled
TAIL = 1 << 16  # bytes read from the end of the record
PIECE = 1 << 20  # bytes of a log
WIDEST = 80  # characters of a cell, the name's aside: reasons may be long
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
    """Table of a header line and one line per run, with long cells cut; of a single run its whole state follows, if
    that was cut.

    Args:
        queue: from `in_queue`.
    """
    cells = [_guarded_row(run, queue.get(run.name), time.time()) for run in runs]
    rows = [HEAD, *((in_line(as_text(name)), *map(_cut, others)) for name, *others in cells)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(HEAD))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in rows]
    if len(cells) == 1 and rows[1][STATE] != (whole := in_line(cells[0][STATE])):
        lines.append(whole)
    return "\n".join(lines)


def _cut(text: str) -> str:
    """A text in one line, cut before it is escaped."""
    return in_line(text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}...")


def _guarded_row(run: SubmittedRun, place: Entry | None, now: float) -> tuple[str, ...]:
    """Like `row`; of a damaged run, which must not hide the others, the state says which file is at fault."""
    try:
        return row(run, place, now)
    except (UserError, OSError) as error:
        job, why = "", str(error)
        with suppress(UserError, OSError):
            job = run.last.job
        if isinstance(error, OSError) and error.filename and not isinstance(error, UserError):
            why = f"{os.fsdecode(error.filename)} ({error.strerror})"
        why = why.removeprefix(f"{run.directory}/").replace(" is damaged (", " (", 1)
        return (run.name, job, "", f"damaged: {why}", *[""] * (len(HEAD) - 4))


def row(run: SubmittedRun, place: Entry | None, now: float) -> tuple[str, ...]:
    """Cells of one run, in the columns of HEAD. Raises UserError and OSError if one of its files is damaged."""
    now_at = status.read(run.directory)
    if crash := run.crash(now_at):
        now_at |= {"state": "failed", "reason": crash}
    history = run.history()
    state, heartbeat = _state(now_at, place, now)
    if place and place.active and not crash and now_at.get("state") in ("failed", "diverged"):
        submitted = history[-1].get("time", 0.0) if history and "submitted" in history[-1] else 0.0
        if submitted > now_at.get("heartbeat", 0.0):  # the reason is that of the submission before
            state = f"{now_at['state']}, then submitted again"
    if run.last.cancelled and not (place and place.active) and now_at.get("state") not in ENDED:
        state = "cancelled"
    rate, error = _newest_numbers(run.directory / record.FILE)
    starts = sum("start" in line for line in history)
    seconds = spent(now_at)
    whole = sum(seconds.values())
    return (
        run.name,
        _job(run, place),
        _slurms(place),
        state,
        f"{now_at['epoch']}/{run.config()['train']['epochs']}" if "epoch" in now_at else "-",
        str(now_at.get("step", "-")),
        rate,
        error,
        heartbeat,
        str(max(0, starts - 1)),
        duration(whole) if whole else "-",
        f"{seconds['training'] / whole:.0%}" if whole and "training" in seconds else "-",
        place.left if place and place.state == "RUNNING" and place.left else "-",
    )


def duration(seconds: float) -> str:
    """A duration as text: `8 s`, `12 min`, `5 h`, `3 d`."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{max(0, int(seconds / size))} {unit}"
    return f"{int(seconds / 86400)} d"


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


def _state(found: dict[str, Any], place: Entry | None, now: float) -> tuple[str, str]:
    """Cells of state and heartbeat, from status.json and the queue. A run that died has left "running" behind."""
    if not found:
        return "not started", "-"
    state, age = str(found["state"]), now - found.get("heartbeat", now)
    heartbeat = f"{duration(age)} ago"
    told = f"{state}: {found['reason']}" if found.get("reason") else state
    if state in ("starting", "running"):
        if place and place.state == "PENDING":
            return "interrupted", heartbeat  # it wrote no reason: a lost node
        if age > status.SILENT:
            return f"silent for {duration(age)}" + (f" ({told})" if state == "starting" else ""), "-"
        if not (place and place.active):
            return f"{state}, but not in the queue", heartbeat
    return (state if state in ("running", "stopped") else told), heartbeat


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


def _newest_numbers(path: Path) -> tuple[str, str]:
    """Latest speed and validation error of a record, as cells."""
    try:
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            text = file.read(TAIL)
    except FileNotFoundError:
        return "-", "-"
    if size > TAIL:
        text = text.partition(b"\n")[2]  # the start of the first line is cut off
    lines, wrong = objects_of(record.RecordLine, text)
    for error in wrong.values():
        if not isinstance(error, Torn):
            raise UserError(f"{path} is damaged (a line at its end: {error}): restore it, or move it away")
    newest = {line["kind"]: line for line in lines}
    rate = f"{record.rate(newest['step']) or 0:.0f}" if "step" in newest else "-"
    errors = newest.get("validation", {})
    return rate, f"{errors['top1_error']:.1%}" if "top1_error" in errors else "-"
