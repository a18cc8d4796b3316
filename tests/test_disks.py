"""Run directories on slow, full, foreign or vanishing file systems: no step waits, no best checkpoint is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from dist_train.config import Config
from dist_train.outcomes import LeaseLost, NotSaved
from dist_train.rundir import postmortem, record, status
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.checkpoint import CheckpointError, find, newest_name
from dist_train.rundir.directory import ClaimError, RunDirectory
from dist_train.rundir.errors import Failure
from dist_train.rundir.lease import GONE, TAKEN
from dist_train.rundir.state import Step
from pipelines.files import write_atomically
from tests.helpers.drills import until
from tests.helpers.launch import finish, start

FULL = OSError(errno.ENOSPC, "No space left on device")


class Begun(RunDirectory):
    """A run directory that is claimed; keeps what it says."""

    def __init__(self, path: Path) -> None:
        self.told: list[str] = []
        super().__init__(path, self.told.append, keep=2, writes=True)
        self.claim(Config(), [], 0, newest_name(path))

    def save(self, epoch: int, best: int) -> None:
        """The state after so many epochs of ten steps, and after how many it was best."""
        meta = {"step": 10 * epoch, "epoch": epoch, "validated": True, "best_epoch": best - 1}
        self.store.save({"w": torch.full((3,), float(epoch))}, meta)
        self.store.join()


def names(run: Path) -> list[int]:
    """Epochs of the checkpoints."""
    return [int(path.name[5:13]) // 10 for path in sorted((run / "checkpoints").glob("step-*"))]


def best(run: Path) -> int:
    found = find(run, "best", bad=print)
    assert found is not None
    return int(torch.load(found.path / "state.pt", weights_only=True)["w"][0])


def raising(error: OSError) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(error.errno, error.strerror)

    return fails


# The best checkpoint


def test_a_best_state_that_could_not_be_saved_is_saved_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, not those of the time at which the disk has room again."""
    run = Begun(tmp_path)
    run.save(1, best=1)
    with monkeypatch.context() as full:
        full.setattr(torch, "save", raising(FULL))
        run.save(2, best=2)
    assert "No space left" in str(run.store.error)
    assert names(tmp_path) == [1]
    for epoch in (3, 4, 5):
        run.save(epoch, best=2)
    assert names(tmp_path) == [2, 4, 5]
    assert best(tmp_path) == 2
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-00000020-validated"


def test_a_better_state_takes_the_place_of_one_that_could_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Begun(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(torch, "save", raising(FULL))
        run.save(1, best=1)
    run.save(2, best=2)
    assert names(tmp_path) == [2]
    assert best(tmp_path) == 2


def test_without_links_the_best_is_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT, CIFS and in object stores; a link to an older one does not stay."""
    run = Begun(tmp_path)
    run.save(1, best=1)
    monkeypatch.setattr(Path, "symlink_to", raising(OSError(errno.EPERM, "Operation not permitted")))
    for epoch in range(2, 7):
        run.save(epoch, best=2)
    assert run.store.error is None
    assert names(tmp_path) == [2, 5, 6]
    assert best(tmp_path) == 2
    assert not os.path.lexists(tmp_path / "checkpoints" / "best")
    (said,) = run.told
    assert said.startswith(
        f"{tmp_path / 'checkpoints' / 'best'} cannot be a link to step-00000020-validated, the best "
    )


def test_a_copy_without_links(tmp_path: Path) -> None:
    """`cp -rL`: its `best` is a directory, which grows old."""
    run = Begun(tmp_path / "run")
    run.save(1, best=1)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, symlinks=False)
    run = Begun(copy)
    for epoch in range(2, 6):
        run.save(epoch, best=2)
    assert run.store.error is None
    assert names(copy) == [2, 4, 5]
    assert best(copy) == 2
    assert [text for text in run.told if "cannot be a link" in text]


def test_a_best_that_is_gone_is_not_replaced_in_silence(tmp_path: Path) -> None:
    run = Begun(tmp_path)
    for epoch in (1, 2, 3):
        run.save(epoch, best=min(epoch, 2))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000020-validated")
    with pytest.raises(CheckpointError, match=r"the best checkpoint was not saved, or is not in .*: choose last"):
        find(tmp_path, "best")


def test_a_checkpoint_that_was_moved_away_and_linked_back(tmp_path: Path) -> None:
    """To make room, say: the run goes on, takes its link away in its time, and touches nothing behind it."""
    run = Begun(tmp_path / "run")
    run.save(1, best=1)
    run.save(2, best=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("step-00000010-validated", "step-00000020-validated"):
        shutil.move(tmp_path / "run" / "checkpoints" / name, elsewhere)
        (tmp_path / "run" / "checkpoints" / name).symlink_to(elsewhere / name)
    assert best(tmp_path / "run") == 1
    run = Begun(tmp_path / "run")
    for epoch in (3, 4, 5):
        run.save(epoch, best=5 if epoch == 5 else 1)
        assert run.store.error is None
    assert names(tmp_path / "run") == [4, 5]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["step-00000010-validated", "step-00000020-validated"]
    Begun(tmp_path / "run")


def test_what_the_user_keeps_among_the_checkpoints(tmp_path: Path) -> None:
    """Is no checkpoint, whatever it is called, and stays."""
    run = Begun(tmp_path)
    run.save(1, best=1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000010-validated", folder / "step-00000010-mine")
    (folder / "step-00000030-validated.tar.gz").touch()
    (folder / "step-00000099").touch()
    for epoch in range(2, 6):
        run.save(epoch, best=2)
    assert run.store.error is None
    assert sorted(path.name for path in folder.iterdir() if path.name != "best") == [
        "step-00000010-mine",
        "step-00000020-validated",
        "step-00000030-validated.tar.gz",
        "step-00000040-validated",
        "step-00000050-validated",
        "step-00000099",
    ]
    assert newest_name(tmp_path) == "step-00000050-validated"
    assert best(tmp_path) == 2


def test_another_start_has_saved_meanwhile(tmp_path: Path) -> None:
    """Two starts at once: whoever comes later does not go on from less than there is, and says so."""
    first = Begun(tmp_path)
    first.save(1, best=1)
    second = RunDirectory(tmp_path, print, keep=2, writes=True)
    looked = newest_name(tmp_path)
    first.save(2, best=2)
    with pytest.raises(ClaimError, match=r"another start has saved step-00000020-validated in .* meanwhile"):
        second.claim(Config(), [], 0, looked)
    assert first.lease.holds(), "it goes on"


# A full disk


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold a full disk's last bytes."""
    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", raising(FULL))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and the start does not take itself for one that was superseded."""
    status.write(tmp_path, "done", step=7)
    monkeypatch.setattr(os, "fsync", raising(FULL))
    run = RunDirectory(tmp_path, print, keep=2, writes=True)
    with pytest.raises(
        ClaimError, match=r"cannot be written \(.*No space left on device\): make room, or choose another"
    ):
        run.claim(Config(), [], 0, "")
    assert not run.lease.token
    assert not run.lease.lost
    Announcement(tmp_path / "other", writes=True).fail("no room")
    announcement = Announcement(tmp_path, writes=True)
    announcement._ours = b"{}"  # what it says stands over a run that was done
    announcement.fail("the run directory cannot be written")
    found = status.read(tmp_path)
    assert (found["state"], found["step"]) == ("failed", 7), "there is room in the place of what was said before"


def test_what_killed_starts_left_is_removed(tmp_path: Path) -> None:
    hexadecimal = "0123456789abcdef"
    for name in (f".owner.{hexadecimal}.tmp", f".metrics.jsonl.{hexadecimal}.tmp", ".mine.tmp"):
        (tmp_path / name).write_bytes(bytes(9))
    (tmp_path / f".linked.{hexadecimal}.tmp").symlink_to(".mine.tmp")
    Begun(tmp_path)
    left = sorted(path.name for path in tmp_path.glob(".*.tmp"))
    assert left == [f".linked.{hexadecimal}.tmp", ".mine.tmp"], "what a user has put there stays"


def test_half_a_line_is_no_line(tmp_path: Path) -> None:
    """A disk with room for part of a line takes it without an error."""
    run = Begun(tmp_path)
    run.record.append("step", step=1)
    run.record.settle()
    whole = run.record._file

    class Short:
        def write(self, line: bytes) -> int:
            assert whole is not None
            return whole.write(line[:5])

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

    run.record._file = Short()  # type: ignore[assignment]
    run.record.append("step", step=2)
    with pytest.raises(OSError, match="No space left"):
        run.record.settle()
    run._writer.wait()  # which tries, too
    assert record.read(tmp_path) == [{"kind": "step", "step": 1}]
    run.record._file = whole
    run.record.settle()
    assert [line["step"] for line in record.read(tmp_path)] == [1, 2]
    (said,) = run.told
    assert said.startswith("metrics.jsonl cannot be written ([Errno 28] No space left on device): ")


def test_a_run_that_diverges_on_a_full_disk_has_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", raising(FULL))
    said = postmortem.diverged(tmp_path, Step(0, 6, 6, 0.1), float("nan"), ["a", "b"], writes=True)
    assert "the loss is not finite at step 7" in said
    assert "diverged.json cannot be written: [Errno 28]" in said


# A slow disk


def test_a_step_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record, status and checkpoint are asked for while nothing can be written; then all is there, in order."""
    run = Begun(tmp_path)
    answers, holds = Event(), type(run.lease).holds
    monkeypatch.setattr(type(run.lease), "holds", lambda lease: answers.wait(30) and holds(lease))
    for step in range(1, 4):
        run.record.append("step", step=step)
        run.status.heartbeat(step=step)
    run.store.save({}, {"step": 3, "epoch": 0, "validated": False})
    run.status.set("stopped", "a stop", step=3)
    assert not answers.is_set(), "nobody has waited"
    assert record.read(tmp_path) == []
    answers.set()
    run.close()
    assert [line["step"] for line in record.read(tmp_path)] == [1, 2, 3]
    found = status.read(tmp_path)
    assert (found["state"], found["step"]) == ("stopped", 3)
    assert names(tmp_path) == [0]


@pytest.mark.slow
@pytest.mark.integration
def test_a_stop_while_a_save_is_waited_for(shard_sets: Path, tmp_path: Path) -> None:
    """Saves that are due more often than they can be done: the one that was waited for is left to that of the stop."""
    run = tmp_path / "run"
    options = ["--train.global_batch=2", "--checkpoint.steps=3", "--run.stop_timeout=25"]
    going = start(shard_sets, run, *options, fault={"fsync": 5}, env={"STEP_SECONDS": "0.05"}, ranks=0)
    until((run / "samples-0.jsonl").exists)
    until(lambda: len((run / "samples-0.jsonl").read_text().splitlines()) >= 6)
    time.sleep(1)  # the save of step 6 waits for that of step 3
    os.kill(going.pid, signal.SIGTERM)
    assert finish(going).returncode == 75
    assert status.read(run)["state"] == "stopped"
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert saved == ["step-00000003", "step-00000008"]


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_on_a_slow_disk(shard_sets: Path, tmp_path: Path) -> None:
    """Each file takes three seconds to be flushed, as on a busy NFS: no step notices, and a stop saves in its time,
    though a save was under way: both, with all that belongs to them, take four flushes one after the other."""
    run = tmp_path / "run"
    options = ["--train.global_batch=2", "--checkpoint.steps=60", "--run.stop_timeout=16"]  # 120 steps an epoch
    going = start(shard_sets, run, *options, fault={"fsync": 3}, env={"STEP_SECONDS": "0.05"}, ranks=0)
    until((run / "samples-0.jsonl").exists)
    until(lambda: len((run / "samples-0.jsonl").read_text().splitlines()) > 80)
    os.kill(going.pid, signal.SIGTERM)
    assert finish(going).returncode == 75
    assert status.read(run)["state"] == "stopped"
    times = [json.loads(line)["time"] for line in (run / "samples-0.jsonl").read_text().splitlines()]
    gaps = [after - before for before, after in pairwise(times[1:])]
    assert max(gaps) < 2.5, "the save, the records and the heartbeats were beside the steps"
    stands = json.loads((sorted((run / "checkpoints").glob("step-*"))[-1] / "meta.json").read_text())
    assert stands["step"] == len(times)


def test_an_end_that_cannot_be_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BETWEEN", 0.0)
    run, failures = Begun(tmp_path), [OSError(errno.ESTALE, "Stale file handle")] * 2
    written = status.write_atomically

    def fails(*args: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        written(*args, **options)

    monkeypatch.setattr(status, "write_atomically", fails)
    run.status.set("done")
    run.close()
    assert status.read(tmp_path)["state"] == "done"
    assert run.told == ["status.json cannot be written ([Errno 116] Stale file handle)"]


def test_a_record_that_has_lost_its_end_is_told(tmp_path: Path) -> None:
    run = Begun(tmp_path)
    run.record.append("step", step=1)
    run.close()
    run.record.open(99)
    assert run.told == ["metrics.jsonl has 28 of the 99 bytes that the checkpoint covers: lines are missing"]


def test_a_heartbeat_is_not_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end is: after a loss of power it is still known."""
    run = Begun(tmp_path)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    run.status.heartbeat(step=1)
    run.close()
    assert (status.read(tmp_path)["state"], flushed) == ("running", [])
    run.status.set("done")
    run.close()
    assert len(flushed) == 1


def test_a_checkpoint_has_its_record_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else it would cover what a loss of power takes away."""
    run = Begun(tmp_path)
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushes(handle: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renames(*names: Any) -> None:
        order.append("renamed")
        rename(*names)

    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(os, "rename", renames)
    run.record.append("step", step=1)
    run.save(1, best=1)
    at = order.index("renamed")
    assert sorted(order[:at]) == ["meta.json", "metrics.jsonl", "state.pt"]
    assert order[at + 1] == "checkpoints"


def test_a_record_that_cannot_be_written_is_not_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Begun(tmp_path)
    run.record.append("step", step=1)
    with monkeypatch.context() as full:
        full.setattr(record.Record, "_write", raising(FULL))
        run.save(1, best=1)
    assert "No space left" in str(run.store.error)
    assert names(tmp_path) == []
    run.save(1, best=1)
    assert names(tmp_path) == [1]


def test_a_failure_is_not_said_over_an_end(tmp_path: Path) -> None:
    """Nor is a heartbeat over a failure, however late the disk takes it."""
    failure = Failure(0, "a", "OSError", "OSError: as it was left")
    run = Begun(tmp_path / "a")
    run.status.set("done")
    run.status.fail(failure)
    run.close()
    assert status.read(tmp_path / "a")["state"] == "done"
    run = Begun(tmp_path / "b")
    run.status.fail(failure)
    run.status.heartbeat(step=1)
    run.close()
    assert status.read(tmp_path / "b")["state"] == "failed"


# A directory that is gone


def test_a_run_directory_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    """With the first write: it does not train for hours towards nothing. Another start's token is another end."""
    run = Begun(tmp_path / "run")
    run.save(1, best=1)
    (tmp_path / "run").rename(tmp_path / "moved")
    run.status.heartbeat(step=11)
    run.close()
    assert run.lease.lost == GONE
    end = run.lease.loss(run.lease.lost)
    assert isinstance(end, NotSaved)
    assert str(end).endswith("/run was moved or removed while the run went on")
    assert not (tmp_path / "run").exists()

    run = Begun(tmp_path / "moved")
    Begun(tmp_path / "moved")
    assert not run.lease.holds()
    assert run.lease.lost == TAKEN
    assert isinstance(run.lease.loss(TAKEN), LeaseLost)
    assert json.loads((tmp_path / "moved" / "checkpoints" / "step-00000010-validated" / "meta.json").read_text())
