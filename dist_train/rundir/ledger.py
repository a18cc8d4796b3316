"""Where the wall time of a run has gone, over all its starts. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# What rank 0 does, or what is done to it, in seconds:
#     training     the steps that the weights have come from, but for data
#     data         these steps waited for data: at each one the rank that waited longest
#     validation   and what is counted there
#     saving       training stood still for a save; most of a save is written beside it
#     compiling    torch.compile, where a start's first step waits for it
#     startup      from the beginning of the launcher to the first step
#     queue        from the submission, or a stop that Slurm put back into the queue, to the start
#     down         from the last heartbeat, each ten seconds, of a start that failed, or was killed, to the next one
#     stopped      from an end that was asked for to the next start, with what is shown and sent at such an end
#     lost         steps and validations that no checkpoint had when a start ended
PHASES = ("training", "data", "validation", "saving", "compiling", "startup", "queue", "down", "stopped", "lost")
REPEATED = ("training", "data", "validation")  # what a start from an older checkpoint does once more
LONGEST = 1e12  # seconds: more is no time
KEPT = ("began", "until", "seconds", "goodput")  # the keys of status.json, which know of all starts


class Ledger:
    """The wall time of a run by its phases, whose sum is the time since the run began.

    Args:
        begin: when this start began, in Unix's seconds.

    Attributes:
        began: when the run did.
        seconds: of this start, by phase.
        last: seconds of the last body of `during`.
    """

    def __init__(self, begin: float) -> None:
        self.began, self.begin = begin, begin
        self.seconds, self.last = dict.fromkeys(PHASES, 0.0), 0.0
        self._earlier = dict.fromkeys(PHASES, 0.0)  # of the starts before, and between them
        self._phase = "startup"
        self._since = time.monotonic() - max(0.0, time.time() - begin)

    def go_on(
        self, before: Mapping[str, Any], restored: Mapping[str, Any], submitted: float = 0.0, *, requeued: bool = False
    ) -> None:
        """Take over what the earlier starts have come to.

        Args:
            before: what status.json said when this start began, or as much of it as is known.
            restored: `state_dict` of the checkpoint that this start goes on from; empty at the beginning of a run.
            submitted: when the job was, in Unix's seconds, if this is its first start.
            requeued: Slurm has brought the job back.
        """
        # A checkpoint may be newer than the last heartbeat.
        known = max(before, restored, key=lambda told: _number(told.get("until")) or 0.0 if spent(told) else -1.0)
        announced = _number(before.get("announced")) or 0.0  # when the first start was that has come to nothing since
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
        if until > self.begin:  # a start that was still at work then, or another node's clock: it is counted already
            self.enter("startup")
            self.seconds["startup"] -= min(self.seconds["startup"], until - self.begin)

    def enter(self, phase: str) -> str:
        """From now on the time is of this phase. Returns which one it was of."""
        now, before = time.monotonic(), self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The time in its body is of this phase."""
        before, began = self.enter(phase), time.monotonic()
        yield
        self.last = time.monotonic() - began
        self.enter(before)  # but not after an exception, with which a run ends

    def waited(self, seconds: float) -> None:
        """So much of the steps was waiting for data."""
        self.enter(self._phase)
        moved = min(seconds, self.seconds["training"])
        self.seconds["training"] -= moved
        self.seconds["data"] += moved

    @property
    def stepping(self) -> float:
        """Seconds of the steps of this start, with their data."""
        self.enter(self._phase)
        return self.seconds["training"] + self.seconds["data"]

    def state_dict(self) -> dict[str, Any]:
        """What status.json and a checkpoint hold: see KEPT. The seconds sum to `until` - `began`."""
        self.enter(self._phase)
        seconds = {phase: self._earlier[phase] + value for phase, value in self.seconds.items()}
        until, goodput = self.began + sum(seconds.values()), seconds["training"] / max(1e-9, sum(seconds.values()))
        seconds = {phase: round(value, 3) for phase, value in seconds.items()}
        return {"began": self.began, "until": until, "seconds": seconds, "goodput": round(goodput, 3)}


def spent(told: Mapping[str, Any]) -> dict[str, float]:
    """The seconds by phase that status.json, an event or a checkpoint tells of, as far as they are some."""
    found = told.get("seconds")
    pairs = found.items() if isinstance(found, dict) else ()
    return {phase: seconds for phase, value in pairs if phase in PHASES and (seconds := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """A time that can be one."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LONGEST
    return float(value) if good else None


def accounted(seconds: Mapping[str, float]) -> str:
    """The elapsed time and its largest phases, in words: `1:02:03: 87% training, 9% data, 4% startup`."""
    whole = sum(seconds.values())
    shares = sorted(((value / max(1e-9, whole), phase) for phase, value in seconds.items()), reverse=True)
    phases = ", ".join(f"{share:.0%} {phase}" for share, phase in shares if share >= 0.005)
    return f"{clock(whole)}: {phases}" if phases else clock(whole)


def clock(seconds: float) -> str:
    """`1:02:03`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
