"""Where the wall time of a run went, over all its starts. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field

# State of rank 0, in seconds:
#     training     steps that led to the present weights, without data
#     data         waits of these steps for data: at each step, of the rank that waited longest
#     validation   with its counts
#     saving       training paused for a save; most of a save is written beside training
#     compiling    torch.compile, if the first step of a start waits for it
#     startup      from the start of the launcher to the first step
#     queue        from submission, or a stop after which Slurm requeued the job, to the start
#     down         from the last heartbeat (every ten seconds) of a start that failed or was killed to the next start
#     stopped      from a requested end to the next start, including what is shown and sent at that end
#     lost         steps and validations that were in no checkpoint when a start ended
PHASES = ("training", "data", "validation", "saving", "compiling", "startup", "queue", "down", "stopped", "lost")
REPEATED = ("training", "data", "validation")  # repeated by a start from an older checkpoint
LONGEST = 1e12  # seconds: more is not a valid time
Seconds = Annotated[float, Field(ge=0, lt=LONGEST, allow_inf_nan=False)]
KEPT = ("began", "until", "seconds", "goodput")  # keys of status.json that cover all starts


class Ledger:
    """Wall time of a run by phase; the phases sum to the time since the run began.

    Args:
        begin: when this start began, Unix time in seconds.

    Attributes:
        began: when the run began, likewise.
        seconds: of this start, by phase.
        last: seconds of the last `during` block.
    """

    def __init__(self, begin: float) -> None:
        self.began, self.begin = begin, begin
        self.seconds, self.last = dict.fromkeys(PHASES, 0.0), 0.0
        self._earlier = dict.fromkeys(PHASES, 0.0)  # of earlier starts and the gaps between them
        self._phase = "startup"
        self._since = time.monotonic() - max(0.0, time.time() - begin)

    def go_on(
        self, before: Mapping[str, Any], restored: Mapping[str, Any], submitted: float = 0.0, *, requeued: bool = False
    ) -> None:
        """Take over the times of the earlier starts.

        Args:
            before: content of status.json when this start began, as far as it is known.
            restored: `state_dict` in the checkpoint that this start resumes from; empty at the beginning of a run.
            submitted: when the job was submitted, Unix time in seconds, if this is its first start.
            requeued: whether Slurm has requeued the job.
        """
        # A checkpoint may be newer than the last heartbeat.
        known = max(before, restored, key=lambda told: _number(told.get("until")) or 0.0 if spent(told) else -1.0)
        announced = _number(before.get("announced")) or 0.0  # of the first start since that claimed nothing
        until = _number(known.get("until")) or submitted or announced or self.begin
        self.began = _number(known.get("began")) or until
        phases, kept = self._earlier, spent(restored)
        phases |= spent(known)
        for phase in REPEATED:
            lost = max(0.0, phases[phase] - kept.get(phase, 0.0))
            phases[phase] -= lost
            phases["lost"] += lost
        asked = bool(before.get("orderly"))
        phase = "queue" if 0 < submitted < until or (asked and requeued) else "stopped" if asked else "down"
        for moment, behind in sorted(((submitted, "queue"), (announced, "down"), (self.begin, ""))):
            if until <= moment <= self.begin:
                phases[phase] += moment - until
                until, phase = moment, behind
        if until > self.begin:  # that start was still running, or on another node's clock: counted already
            self.enter("startup")
            self.seconds["startup"] -= min(self.seconds["startup"], until - self.begin)

    def enter(self, phase: str) -> str:
        """Count time as this phase from now on. Returns the previous phase."""
        now, before = time.monotonic(), self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the time in the `with` block as this phase."""
        before, began = self.enter(phase), time.monotonic()
        yield
        self.last = time.monotonic() - began
        self.enter(before)  # not after an exception: it ends the run

    def waited(self, seconds: float) -> None:
        """Move this many seconds of the steps from training to data."""
        self.enter(self._phase)
        moved = min(seconds, self.seconds["training"])
        self.seconds["training"] -= moved
        self.seconds["data"] += moved

    @property
    def stepping(self) -> float:
        """Seconds of the steps of this start, data included."""
        self.enter(self._phase)
        return self.seconds["training"] + self.seconds["data"]

    def state_dict(self) -> dict[str, Any]:
        """Entries for status.json and checkpoints, see KEPT. The seconds sum to `until` - `began`."""
        self.enter(self._phase)
        seconds = {phase: self._earlier[phase] + value for phase, value in self.seconds.items()}
        until, goodput = self.began + sum(seconds.values()), seconds["training"] / max(1e-9, sum(seconds.values()))
        seconds = {phase: round(value, 3) for phase, value in seconds.items()}
        return {"began": self.began, "until": until, "seconds": seconds, "goodput": round(goodput, 3)}


def spent(told: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by phase from status.json, an event or a checkpoint; invalid entries are left out."""
    found = told.get("seconds")
    pairs = found.items() if isinstance(found, dict) else ()
    return {phase: seconds for phase, value in pairs if phase in PHASES and (seconds := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """`value` if it is a valid time, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LONGEST
    return float(value) if good else None


def accounted(seconds: Mapping[str, float]) -> str:
    """Elapsed time and its largest phases: `1:02:03: 87% training, 9% data, 4% startup`."""
    whole = sum(seconds.values())
    shares = sorted(((value / max(1e-9, whole), phase) for phase, value in seconds.items()), reverse=True)
    phases = ", ".join(f"{share:.0%} {phase}" for share, phase in shares if share >= 0.005)
    return f"{clock(whole)}: {phases}" if phases else clock(whole)


def clock(seconds: float) -> str:
    """Formats a duration: `1:02:03`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
