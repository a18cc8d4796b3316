"""status.json and errors/ of a start that waits, is refused or fails, and who may overwrite them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.rundir import announcement, status
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.errors import Errors, Failure, Standstill
from dist_train.rundir.last_words import compared
from dist_train.rundir.lease import Lease
from dist_train.rundir.status import Status
from dist_train.rundir.writer import Writer
from pipelines.errors import UserError

FIRST = Failure(1, "b", "ShardError", "ShardError: the tar is another one")
LATER = Failure(0, "a", "RuntimeError", "RuntimeError: Connection closed by peer")


class AtOnce(Writer):
    """A writer that is never behind."""

    def ask(self, name: str, work: Callable[[], None]) -> None:
        work()


def claimed(run: Path, ranks: int = 1) -> list[Lease]:
    """The lease of a start, as each of its ranks knows it."""
    leases = [Lease(run) for _ in range(ranks)]
    leases[0].acquire()
    for lease in leases:
        lease.token = leases[0].token
    return leases


def written(run: Path, state: str, ago: float = 0) -> bytes:
    """A status of another start."""
    path = run / status.FILE
    status.write(run, state, "its reason", step=7, epoch=1)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"heartbeat": time.time() - ago}))
    return path.read_bytes()


def test_a_start_is_announced_before_the_run_is_claimed(tmp_path: Path) -> None:
    """With what it waits for, and why the start before it failed; the place of the run stays."""
    written(tmp_path, "failed")
    announcement = Announcement(tmp_path, writes=True)
    announcement.say("4 ranks are waited for")
    announcement.say("FashionMNIST is packed")
    found = status.read(tmp_path)
    assert (found["state"], found["step"], found["epoch"]) == ("starting", 7, 1)
    assert found["reason"] == "FashionMNIST is packed; the start before this one failed: its reason"


@pytest.mark.parametrize("state", ["stopped", "failed", "diverged", ""])
def test_a_start_that_is_refused_leaves_all_as_it_was(tmp_path: Path, state: str) -> None:
    run = tmp_path / "runs" / "one"
    if state:
        run.mkdir(parents=True)
        written(run, state)
        os.utime(run / status.FILE, ns=(10**18, 10**18 + 1))
        before = (run / status.FILE).read_bytes()
    announcement = Announcement(run, writes=True)
    announcement.say("2 ranks are waited for")
    assert status.read(run)["state"] == "starting"
    announcement.retract()
    if state:
        assert (run / status.FILE).read_bytes() == before
        assert (run / status.FILE).stat().st_mtime_ns == 10**18 + 1
    else:
        assert list(tmp_path.iterdir()) == []


def test_nobody_announces_anything_over_a_run_that_is_done_or_alive(tmp_path: Path) -> None:
    for state, ago, kept in (("done", 1e6, True), ("running", 5, True), ("running", 120, False)):
        before = written(tmp_path, state, ago)
        announcement = Announcement(tmp_path, writes=True)
        announcement.say("2 ranks are waited for")
        announcement.fail("ModuleNotFoundError: no module named torch")
        assert ((tmp_path / status.FILE).read_bytes() == before) is kept, state


def test_the_first_of_the_ranks_that_cannot_begin_is_told(tmp_path: Path) -> None:
    first, other = Announcement(tmp_path, writes=True), Announcement(tmp_path, writes=False)
    first.say("2 ranks are waited for")
    assert first.failed() is None
    assert other.fail("no GPU", rank=1, node="b", error="NotHere")
    assert first.failed() == Failure(1, "b", "NotHere", "no GPU")
    first.say("the run is looked at")
    assert not first.fail("a peer is gone", rank=0, node="a", error="Lost")
    first.retract()
    found = status.read(tmp_path)
    assert (found["state"], found["reason"], found["rank"]) == ("failed", "no GPU", 1)


def test_of_ranks_that_fail_at_once_one_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each start, however many look before any has written."""
    monkeypatch.setattr(Announcement, "failed", lambda _: None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for start in range(3):
        ranks = [Announcement(tmp_path, writes=rank == 0) for rank in range(4)]
        if start == 1:
            ranks[0].say("torch is imported")
        said = [each.fail("no GPU", rank=rank, node="a", error="NotHere") for rank, each in enumerate(ranks)]
        assert said == [True, False, False, False], start
        os.utime(tmp_path / announcement.FIRST, (1, 1))  # the next start is later


def test_a_rank_that_is_lost_is_no_reason_beside_one(tmp_path: Path) -> None:
    """In an attempt that follows the one that has failed for good."""
    written(tmp_path, "failed")
    Announcement(tmp_path, writes=True).fail("a peer is gone", rank=0, node="a", error="Lost")
    assert status.read(tmp_path)["reason"] == "its reason"
    Announcement(tmp_path, writes=True).fail("no GPU", rank=0, node="a", error="NotHere")
    assert status.read(tmp_path)["reason"] == "no GPU"


def test_a_restart_knows_that_the_attempt_before_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fresh its heartbeat."""
    written(tmp_path, "running", 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    announcement = Announcement(tmp_path, writes=True)
    announcement.say("torch is imported")
    assert status.read(tmp_path)["state"] == "starting"
    announcement.fail("no module named torch", rank=0, node="a", error="ModuleNotFoundError")
    assert status.read(tmp_path)["reason"] == "no module named torch"


def test_the_first_failure_is_what_counts(tmp_path: Path) -> None:
    """Whichever rank it is, and whoever writes it: status.json says it however late rank 0 wakes up."""
    ranks = [Status(lease, print, AtOnce(), writes=i == 0) for i, lease in enumerate(claimed(tmp_path, 2))]
    ranks[0].set("running", step=5, epoch=0)
    ranks[1].set("running", step=4, epoch=0)
    assert ranks[1].errors.enter(FIRST) == FIRST
    assert ranks[0].errors.enter(LATER) == FIRST
    ranks[1].fail(FIRST)
    ranks[0].set("running")  # it had looked before
    ranks[0].fail(ranks[0].errors.enter(LATER))
    found = status.read(tmp_path)
    assert [found[key] for key in ("state", "rank", "node", "error", "reason")] == [
        "failed",
        1,
        "b",
        "ShardError",
        "ShardError: the tar is another one",
    ]
    ranks[0]._asked = -1e9
    ranks[0].heartbeat(step=6)
    assert status.read(tmp_path) == found, "a rank that has not noticed yet does not say that it runs"


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', "[1]", "null", '{"state": "running", "heartbeat": null}', '{"state": "running", "heartbeat": "x"}'],
)
def test_what_is_no_state(tmp_path: Path, text: str) -> None:
    """JSON, but nothing that this program writes: a start begins as if there were nothing."""
    (tmp_path / status.FILE).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        status.read(tmp_path)
    assert status.known(tmp_path) == {}
    Announcement(tmp_path, writes=True).say("torch is imported")
    assert status.read(tmp_path)["state"] == "starting"


def test_an_end_is_not_overwritten(tmp_path: Path) -> None:
    """By what a rank meets on its way out; by the failure of a later start it is."""
    for state in ("done", "stopped", "diverged"):
        now = Status(claimed(tmp_path)[0], print, AtOnce(), writes=True)
        now.set(state)
        now.fail(LATER)
        assert status.read(tmp_path)["state"] == state
    later = Status(claimed(tmp_path)[0], print, AtOnce(), writes=True)
    now.fail(FIRST)
    assert status.read(tmp_path)["state"] == "diverged", "a start that has lost the run writes nothing"
    later.fail(LATER)
    assert status.read(tmp_path)["state"] == "failed"


def test_which_rank_is_behind(tmp_path: Path) -> None:
    """By what the ranks have written themselves."""
    stands = [Standstill(0, "a", 8, "read (dist_train/ranks/vote.py:66)"), Standstill(1, "node b", 7, "sleep (x.py:1)")]
    errors = [Errors(lease) for lease in claimed(tmp_path, 2)]
    for stand, each in zip(stands, errors, strict=True):
        each.write(stand.rank, f"{stand}\n\nstacks")
    found = errors[0].places()
    assert found == stands
    assert compared(found, 2) == f"{stands[1]}, which is behind: others are at step 8"
    assert compared(found[:1], 2).startswith("rank 1 gives no answer: behind, or stopped; ")
    assert compared(found[:1], 4).startswith("ranks 1, 2, 3 give no answer")


HUNG = """
import sys, threading, time
from pathlib import Path
from dist_train.rundir.errors import Errors
from dist_train.rundir.last_words import LastWords
from dist_train.rundir.lease import Lease
from dist_train.rundir.status import Status
from dist_train.rundir.writer import Writer

run = Path(sys.argv[1])
lease = Lease(run)
lease.acquire()
words = LastWords(run)
words.claimed(run, Status(lease, print, Writer(), writes=True), 2)
Errors.folder = property(lambda self: time.sleep(3600))
Status.fail = lambda *_: time.sleep(3600)
if sys.argv[2] == "hang":
    words.hang(4, 7, "read (vote.py:1)", "the stacks")
try:
    raise ValueError("as it is")
except ValueError as error:
    words.fail(error)
"""


@pytest.mark.integration
@pytest.mark.parametrize("how", ["hang", "fail"])
def test_a_run_directory_that_does_not_answer_holds_nobody(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG, str(tmp_path), how], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert ("the stacks" if how == "hang" else "ValueError: as it is") in done.stderr


LATE = """
import sys, threading, time
from pathlib import Path
from dist_train.outcomes import Done
from dist_train.rundir.last_words import LastWords
from dist_train.rundir.lease import Lease
from dist_train.rundir.status import Status
from dist_train.rundir.writer import Writer

run = Path(sys.argv[1])
lease = Lease(run)
lease.acquire()
words, status = LastWords(run), Status(lease, print, Writer(), writes=True)
words.claimed(run, status, 2)
words.ended(Done())
threading.Timer(float(sys.argv[2]), lambda: status.set("done")).start()
status._state = "done"
try:
    raise RuntimeError("while it leaves")
except RuntimeError as error:
    words.fail(error)
"""


@pytest.mark.integration
@pytest.mark.parametrize(("late", "code"), [(0.3, 0), (3600, 1)])
def test_a_rank_that_fails_before_the_end_is_recorded_waits_for_it(tmp_path: Path, late: float, code: int) -> None:
    """Rank 0 writes it while the others leave already. If it never does, the failure is one."""
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(tmp_path), str(late)],
        env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("the run had ended before: RuntimeError: while it leaves" in done.stderr) == (code == 0)
