"""How a process that cannot continue exits: at once, but only after reporting why. Imports no torch.

It reports to stderr, to torchrun, to errors/<start>/ and to status.json, which holds the first failure of any rank: its
consequences on the other ranks (closed connections, a launcher that ends them) are not the reason. Whoever is not
watching gets a message as well. Nothing here waits for another rank, and it waits only seconds for a file system or a
server.
"""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NoReturn, TypeVar

from dist_train.outcomes import FAILED, STOPPED, Ended
from dist_train.ranks import kin, launcher
from dist_train.rundir import status as statuses
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.checkpoint import newest_name
from dist_train.rundir.errors import Failure, Standstill
from dist_train.rundir.status import STAYS, Status
from pipelines.speech import cry, flush

T = TypeVar("T")
LIMIT, EACH = 5.0, 2.0  # seconds for everything, and for each piece: a file system may hang
LEAST = 0.5  # seconds kept for what needs no file system of the run, if that has used up all others
BACK, TELLING = 1.0, 3.0  # further seconds: to ask whether the job is requeued, and for all tellers together
GATHERING = 2.0  # seconds for the other ranks to report where they are stuck
RECORDING = 1.0  # seconds for rank 0 to record the end of the run
SHOWING = 1.0  # seconds for ranks ended by a signal to print their stacks
KILLED = "another rank is gone and gave no reason: it was killed, perhaps for lack of memory"
LOST = re.compile(r"(Connection (closed|reset) by peer|Broken pipe)( \[[^\]]*\]:\d+)?")  # gloo's, with the address


class LastWords:
    """Reports the failure of one rank, and ends its process.

    Args:
        run: directory of the run, perhaps not claimed yet; None without one.
        announcement: of this start, until the run is claimed.

    Attributes:
        record: called with errors/<start>/ when the process hangs, to store further diagnostics.
        looks: returns whether what another rank waits for is still arriving; see `waits`.
        tellers: called with the end event, each in its own thread, if this rank was the first to fail.
        close: called last, in order, to flush what others still hold in memory.
    """

    def __init__(self, run: Path | None = None, announcement: Announcement | None = None) -> None:
        self.record: Callable[[Path], None] = lambda _: None
        self.looks: Callable[[], bool] = lambda: False
        self.tellers: list[Callable[..., None]] = []
        self.close: list[Callable[[], None]] = []
        self._run, self._announcement = run, announcement
        self._rank, self._node = launcher.rank(), socket.gethostname()
        self._size = launcher.size()
        self._status: Status | None = None
        self._end: Ended | None = None
        self._leaving = Lock()  # never released: what another thread sees of the exit is not the reason
        self._until = 0.0
        self._entered: Failure | None = None  # the first failure, once the file system has answered
        self._looking: Thread | None = None
        self._asking: Thread | None = None

    def claimed(self, run: Path, status: Status, size: int) -> None:
        """Note that this start has claimed the run; `size` is its number of ranks."""
        self._run, self._status, self._size = run, status, size

    def ended(self, end: Ended) -> None:
        """Note that the run has ended. A failure during clean-up then ends the process with the outcome of the run,
        once status.json records it."""
        self._end = end

    def fail(self, error: BaseException) -> NoReturn:
        """Exit after an unexpected error; to be called where it was caught."""
        kind, reason = type(error).__name__, f"{type(error).__name__}: {error}"
        text = traceback.format_exc()
        self._begin_to_leave(reason)
        if self._size > 1 and isinstance(error, RuntimeError) and (found := LOST.search(reason)):
            self._leave(self._why_lost(f"{KILLED}, or its node is lost ({found[0]})"), text)
        self._leave(self._failure(kind, reason), text)

    def force(self, why: str, *, begun: bool) -> None:
        """Exit without a save; called by `ranks.watch`."""
        self._begin_to_leave(why)
        if run := self._run:
            newest = self._ask(lambda: newest_name(run), "")
            why += f"; the newest checkpoint is {newest}" if newest else "; there is no checkpoint yet"
        if not self._status and self._announcement:
            self._ask(self._announcement.retract, None)
        self._leave(self._failure("Forced" if begun else "Stopped", why), "")

    def hang(self, seconds: float, step: int, place: str, stacks: str) -> None:
        """Exit after `seconds` without a heartbeat; called by `ranks.watch`."""
        self._begin_to_leave(f"no progress for {seconds:.0f} s in {place}")
        began = time.time()
        silence, here = f"no progress for {seconds:.0f} s: ", Standstill(self._rank, self._node, step, place)
        mine = self._failure("Hang", f"{silence}a rank or a file system hangs; {here}")
        self._print(f"{mine.reason}\n{stacks}")
        if status := self._status:
            first = self._enter(mine, status)
            self._ask(lambda: status.errors.write(self._rank, f"{here}\n\n{stacks}"), None)
            time.sleep(self._left(GATHERING))
            places: list[Standstill] = self._ask(status.errors.places, [])
            if first == mine and here in places:
                mine = self._failure("Hang", silence + compared(places, self._size))
                self._ask(lambda: status.errors.amend(mine), None)
                self._ask(lambda: status.fail(mine), None)
                self._ask(lambda: self._tell_launcher(mine, at=began), 0)  # before the ranks that are aborted next
                kin.abort(set(range(self._size)) - {place.rank for place in places})
            self._ask(lambda: self.record(status.errors.folder), None)
            time.sleep(self._left(SHOWING))
        self._leave(mine, "", at=began)

    def follow(self, *, signalled: bool, begun: bool) -> bool:
        """Exit if another rank has failed; called by `ranks.watch`. Returns whether one has reported a hang."""
        found: list[Failure | None] = []
        failed = self._status.failed if self._status else self._announcement.failed if self._announcement else None
        if failed and not (self._looking and self._looking.is_alive()):
            self._looking = _attempt(lambda: found.append(failed()))
            self._looking.join(1)
        if found and (first := found[0]) and first.rank != self._rank:
            if first.kind == "Hang":
                return True
            self._begin_to_leave(first.reason)
            self._leave(first, "")
        if signalled and (launcher.others_said() or kin.gone(begun=begun)):
            self._begin_to_leave(KILLED)
            self._leave(self._why_lost(KILLED), "")
        return False

    def waits(self) -> bool:
        """Whether something has arrived, since the last call, that a rank waits for outside the steps; called by
        `ranks.watch`."""
        found = list[bool]()
        if not (self._asking and self._asking.is_alive()):
            self._asking = _attempt(lambda: found.append(self.looks()))
            self._asking.join(1)
        return found == [True]

    def _why_lost(self, otherwise: str) -> Failure:
        """Failure of another rank that caused this one's, if it can be known."""
        said = self._ask(launcher.others_said, None)
        if said and said.failure:
            return Failure(**said.failure)
        kind = "Refused" if said and said.code in launcher.FINAL else "Lost"
        return self._failure(kind, said.sentence if said else otherwise)

    def _failure(self, kind: str, reason: str) -> Failure:
        return Failure(self._rank, self._node, kind, reason)

    def _tell_launcher(self, first: Failure, **how: Any) -> int:
        who = f"rank {first.rank} on {first.node}: " if self._size > 1 or self._rank else ""
        return launcher.end(FAILED, who + first.reason, failure=asdict(first), **how)

    def _leave(self, failure: Failure, text: str, *, at: float = 0) -> NoReturn:
        """Report `failure` and exit. `text`: a traceback that includes the reason; `at`: as for `launcher.end`."""
        status = self._status
        first = self._enter(failure, status) if status else failure
        if first.rank != self._rank:
            told = f": see {status.errors.folder}" if status else ""
            stopped = first.kind == "Stopped"  # as it was asked for
            why = first.reason if stopped else f"leaving, since rank {first.rank} failed first: {first.reason}{told}"
            shown = f"rank {self._rank}: {why}"
        else:
            traced = text if failure.kind not in ("Lost", "Refused") else ""  # a consequence, not the reason
            shown = traced.rstrip("\n") or f"rank {self._rank}: {failure.reason}"
        self._print(shown)
        final = first.kind in ("Forced", "Stopped")  # it was asked for
        self._ask(lambda: self._tell_launcher(first, at=at, final=final), 0, least=LEAST)
        if status and failure.kind != "Hang":  # already reported in more detail
            self._ask(partial(status.errors.write, self._rank, f"{shown}\n\n{text}"), None)
        is_first = first.rank == self._rank and (self._entered is not None or self._rank == 0)  # if nothing answers
        if first.kind != "Hang" or first.rank == self._rank:  # the first rank finds out more about it
            is_first = self._ask(lambda: self._set(first, is_first), is_first)
        if is_first and not self._end:
            self.tell(first)
        self._close()
        os._exit(FAILED)

    def tell(self, first: Failure, code: int = FAILED) -> None:
        """Have the tellers report an end with this code. Takes at most BACK + TELLING seconds."""
        back, kept = list[bool](), dict[str, Any]()

        def look() -> None:
            back.append(code in (FAILED, STOPPED) and launcher.comes_back())
            found = statuses.known(self._run) if self._run else {}
            kept.update({key: found[key] for key in STAYS if key in found})

        _attempt(look).join(BACK)
        how = {"state": "stopped" if first.kind == "Stopped" else "failed", "reason": first.reason, "code": code}
        who = {"rank": first.rank, "node": first.node, "error": first.kind}
        event = {**dict(kept), **how, "requeued": back == [True], **who}
        telling = [_attempt(partial(tell, "end", **event)) for tell in self.tellers]
        until = time.monotonic() + TELLING
        for thread in telling:
            thread.join(max(0.0, until - time.monotonic()))

    def _enter(self, failure: Failure, status: Status) -> Failure:
        """First failure of all ranks; this rank's if the file system has not answered."""
        self._entered = self._ask(lambda: status.errors.enter(failure), self._entered)
        return failure if self._entered is None or self._entered.rank == self._rank else self._entered

    def _begin_to_leave(self, why: str) -> None:
        """Keep other threads from exiting first. Exits at once if the run had already ended."""
        self._leaving.acquire()
        self._until = time.monotonic() + LIMIT
        end, status = self._end, self._status
        if end and (not end.state or (status and self._ask(partial(self._recorded, status), False))):
            self._print(f"rank {self._rank}: leaving, the run had ended before: {why}")
            self._close()
            os._exit(self._ask(lambda: launcher.end(end.code, str(end)), launcher.exit_code(end.code)))

    def _recorded(self, status: Status) -> bool:
        """Whether status.json says how the run has ended. Rank 0 may be about to write it, which others wait for."""
        until = time.monotonic() + RECORDING * (self._rank > 0)
        while not (over := status.over()) and time.monotonic() < until:
            time.sleep(0.02)
        return over

    def _close(self) -> None:
        for close in self.close:
            self._ask(close, None)
        self._ask(flush, None)

    def _left(self, seconds: float) -> float:
        """The given seconds, or what is left of LIMIT if that is less."""
        return max(0.0, min(seconds, self._until - time.monotonic()))

    def _ask(self, work: Callable[[], T], otherwise: T, least: float = 0.0) -> T:
        """Result of `work`, or `otherwise` if it fails or takes too long. It always gets `least` seconds."""
        done: list[T] = []
        _attempt(lambda: done.append(work())).join(max(least, self._left(EACH)))
        return done[0] if done else otherwise

    def _print(self, text: str) -> None:
        _attempt(lambda: cry(text)).join(max(LEAST, self._left(1)))

    def _set(self, first: Failure, is_first: bool) -> bool:
        """Write the failure to status.json. Returns whether this rank is to send messages: nobody does for a start that
        was stopped before it claimed the run."""
        if self._status:
            self._status.fail(first)
            return is_first
        if self._announcement and first.kind == "Refused" and launcher.attended():
            self._announcement.retract()
        elif self._announcement and first.kind != "Stopped":
            return self._announcement.fail(first.reason, rank=first.rank, node=first.node, error=first.kind)
        return False


def compared(places: list[Standstill], size: int) -> str:
    """Sentence on which of `size` ranks the others wait for, judging by where the reporting ranks are stuck."""
    silent = [str(rank) for rank in range(size) if rank not in {place.rank for place in places}]
    behind = [place for place in places if place.step == min(place.step for place in places)]
    if silent:
        ranks = f"rank {silent[0]} gives" if len(silent) == 1 else f"ranks {', '.join(silent[:8])} give"
        return f"{ranks} no answer: behind, or stopped; {places[0]}"
    if len(behind) < len(places):
        furthest = max(place.step for place in places)
        return f"{behind[0]}, which is behind: others are at step {furthest}"
    return f"a rank or a file system hangs; {'; '.join(map(str, places[:8]))}"


def _attempt(work: Callable[[], object]) -> Thread:
    """Do `work` in a thread of its own, which may hang. Returns the thread."""

    def attempt() -> None:
        with suppress(Exception):  # nothing more can be done about it
            work()

    thread = Thread(target=attempt, daemon=True)
    thread.start()
    return thread
