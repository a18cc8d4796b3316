"""`status --watch`: a table that refreshes, and a message for each run that falls silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from dist_train.monitor.notify import Outbox, silence
from dist_train.monitor.webhook import Message, Webhook
from dist_train.rundir import status
from dist_train.rundir.listing import repeat
from pipelines.errors import UserError
from pipelines.speech import say
from slurm.cluster import Entry
from slurm.submissions import SubmittedRun
from slurm.table import in_queue, status_table


def watch(find: Callable[[], list[SubmittedRun]], seconds: float, otherwise: str) -> None:
    """Shows the table every `seconds` until Ctrl-C or until nobody reads it any more. Raises UserError for an invalid
    address of messages.

    Args:
        find: returns the runs, which may increase in number.
        otherwise: text to show if there is no run.
    """
    webhook, silences = Webhook.wanted(), Silences()
    outbox = Outbox(webhook, say) if webhook else None

    def draw() -> str:
        runs = find()
        queue = in_queue(runs)
        for message in silences.found(runs, queue, time.time()):
            if outbox:
                outbox.put(message)
        return status_table(runs, queue) if runs else otherwise

    repeat(draw, seconds)
    if outbox:
        outbox.close()


class Silences:
    """Runs that fell silent during one watch: those that Slurm lists as running, and those that this watch has seen
    alive, whatever the queue says: a job that was killed, or whose node is lost, may have left it by then."""

    def __init__(self) -> None:
        self._alive = set[str]()
        self._told = set[tuple[str, float]]()  # run and last sign of life

    def found(self, runs: list[SubmittedRun], queue: Mapping[str, Entry], now: float) -> list[Message]:
        """One message per run without a sign of life, once per silence.

        Args:
            queue: from `in_queue`.
            now: Unix time in seconds.
        """
        messages = []
        for run in runs:
            at, place = dict[str, Any](), queue.get(run.name)
            with suppress(UserError, OSError):  # the table tells
                at = status.read(run.directory)
            heartbeat = at.get("heartbeat")
            if at.get("state") not in ("starting", "running") or heartbeat is None:
                self._alive.discard(run.name)
            elif now - heartbeat <= status.SILENT:
                if at["state"] == "running":
                    self._alive.add(run.name)
            elif (run.name in self._alive or (place and place.state == "RUNNING")) and (
                (silent := (run.name, heartbeat)) not in self._told
            ):
                self._told.add(silent)
                self._alive.discard(run.name)
                slurms = place.state if place else "not in the queue"
                messages.append(silence(run.name, heartbeat, step=at.get("step"), Slurm=slurms))
        return messages
