"""What a person sees of runs on the cluster: the table of `status`, and `logs`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm.cluster import Entry, entry, look
from slurm.submissions import Run, SlurmError

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
    "TIME LEFT",
)
SILENT = 60.0  # seconds; a run writes its heartbeat every 10
TAIL = 1 << 16  # bytes of metrics.jsonl that are read from its end


def table(runs: list[Run]) -> str:
    """One row a run."""
    queue = look(run.last for run in runs)
    rows = [HEAD, *(row(run, queue, time.time()) for run in runs)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in rows)


def row(run: Run, queue: dict[str, Entry], now: float) -> tuple[str, ...]:
    """The cells under HEAD."""
    status, place = run.status(), queue.get(run.last.job)
    state, age = status.get("state", "not started"), now - status.get("heartbeat", now)
    heartbeat = f"{duration(age)} ago" if status else "-"
    if state == "running" and place and place.state == "PENDING":
        state = "interrupted"  # without a word: a lost node, a crash
    elif state == "running" and age > SILENT:
        state, heartbeat = f"silent for {duration(age)}", "-"
    elif state == "running" and not (place and place.active):
        state = "running, but not in the queue"
    elif reason := status.get("reason") if state in ("failed", "diverged") else "":
        state = f"{state}: {reason}"
    rate, error = _last(run.directory / "metrics.jsonl")
    starts = sum("start" in line for line in run.story())
    return (
        run.name,
        run.last.job,
        "not in the queue" if place is None else f"{place.state}{f' ({place.reason})' if place.reason else ''}",
        state,
        f"{status['epoch']}/{run.config()['train']['epochs']}" if "epoch" in status else "-",
        str(status.get("step", "-")),
        rate,
        error,
        heartbeat,
        str(max(0, starts - 1)),
        place.left if place and place.state == "RUNNING" and place.left else "-",
    )


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `5 h`, `3 d`."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{max(0, int(seconds / size))} {unit}"
    return f"{int(seconds / 86400)} d"


def read_log(run: Run, rank: int, follow: bool) -> Iterator[str]:
    """What a rank said over all restarts, as pieces of text. With `follow` to the end of the job. Raises SlurmError."""
    if not 0 <= rank < run.last.tasks:
        raise SlurmError(f"{run.name} has no rank {rank}: its ranks are 0 to {run.last.tasks - 1}")
    path = run.last.log(rank)
    if not path.exists() and not follow:
        raise SlurmError(f"{run.name} has not started yet, so there is no {path}: see `status`, or add --follow")
    place, asked = 0, float("-inf")
    active = follow
    while True:
        if follow and time.monotonic() - asked > 3:
            active, asked = entry(run.last).active, time.monotonic()
        if path.exists():
            with open(path, "rb") as file:
                file.seek(place)
                text = file.read()
                place += len(text)
            yield text.decode(errors="replace")
        if not active:  # asked before the last read: nothing is missed
            return
        time.sleep(0.3)


def show_log(run: Run, rank: int, follow: bool) -> None:
    """Print what `read_log` gives as it comes."""
    for text in read_log(run, rank, follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def _last(path: Path) -> tuple[str, str]:
    """The newest speed and validation error of a record."""
    if not path.exists():
        return "-", "-"
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    newest: dict[str, dict[str, Any]] = {}
    for line in lines[1:] if path.stat().st_size > TAIL else lines:
        record = json.loads(line)
        newest[record["kind"]] = record
    rate = f"{newest['step']['images_per_s']:.0f}" if "step" in newest else "-"
    error = f"{newest['validation']['top1_error']:.1%}" if "validation" in newest else "-"
    return rate, error
