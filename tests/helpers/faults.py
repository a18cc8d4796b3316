"""The trainer with one fault in it: `python -m tests.helpers.faults ...` is `python -m dist_train ...` and $FAULT.

FAULT is JSON: {"at": moment, "n": at which occurrence, "rank": of which rank (-1: of all), "do": what}. Moments:
meeting (before the ranks meet), step (before a step), loader (before a step's batch is put together), validation (at a
batch of it), save:written, save:flushed, save:renaming, save:renamed, save:pruning, record (before the run directory
is written), showing:line, showing:end (of a reader of the record), summary (before rank 0 shows it), leaving (before
the ranks leave together). What can be done: `Faults.do`. It is done once in the life of a run directory, which keeps a
mark `fault-<rank>`; with "always" in every start, from the n-th occurrence on. With "destroy": "blocks",
`destroy_process_group` waits for ever, as NCCL's does while others are in a collective that this rank never joins.
With "hangs": moment, the process hangs there as well. With "beats", each step is a heartbeat. With "fsync": 2, the disk
takes so many seconds to flush a file. With "late", rank 0 says nothing before another rank has failed. PAGE_SECONDS:
between two rewrites of the page.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed, nn

from dist_train import __main__, run, train, validate
from dist_train.monitor import page_process, readers
from dist_train.monitor.reader import Shown
from dist_train.ranks import launcher, peers, world
from dist_train.rundir import announcement, directory, lease, status, store
from pipelines.loader import Loader
from pipelines.manifest import ShardError
from pipelines.opened import ReadError


class Faults:
    """The fault of this process, by the environment and the command line."""

    def __init__(self) -> None:
        self.fault: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
        self.rank = int(os.environ.get("RANK", 0))
        self.pause = float(os.environ.get("STEP_SECONDS", 0))
        self.directory = Path(next(a.partition("=")[2] for a in sys.argv if a.startswith("--run.dir=")))
        self.seen: Counter[str] = Counter()
        self.model: nn.Module | None = None

    def reach(self, moment: str) -> None:
        """The program has come to a moment; the fault strikes where it is due."""
        self.seen[moment] += 1
        if moment == self.fault.get("hangs"):
            self.do("hang")
        if moment != self.fault.get("at") or self.fault.get("rank", 0) not in (-1, self.rank):
            return
        mark = self.directory / f"fault-{self.rank}"
        if self.fault.get("always"):
            due = self.seen[moment] >= self.fault.get("n", 1)
        else:
            due = self.seen[moment] == self.fault.get("n", 1) and not mark.exists()
        if due:
            if self.directory.exists():
                mark.touch()
            self.strike(self.fault["do"])

    def strike(self, what: str) -> None:
        """Do it; several things, with commas between them, one after the other."""
        for part in what.split(", "):
            self.do(part)

    def do(self, what: str) -> None:
        me = os.getpid()
        if what == "kill":
            os.kill(me, signal.SIGKILL)
        elif what == "kill all":
            for pid in sorted(kin(), key=lambda pid: pid == me):
                os.kill(pid, signal.SIGKILL)
        elif what == "pause":
            os.kill(me, signal.SIGSTOP)
        elif what.startswith("launcher "):
            os.kill(os.getppid(), signal.Signals[what.split()[1]])
        elif what.startswith("SIG"):
            for name in what.split():  # several: one after the other
                os.kill(me, signal.Signals[name])
                time.sleep(2.5 if len(what.split()) > 1 else 0)
        elif what == "hang":
            time.sleep(3600)
        elif what == "loop":
            while True:
                pass
        elif what == "keep the lock":  # Python's, in a C call
            mutex = ctypes.create_string_buffer(64)  # no signal ends this
            for _ in range(2):
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        elif what == "freeze":
            sys.addaudithook(self.frozen)
        elif what == "error":
            raise RuntimeError("a fault of the drill")
        elif what == "wait":
            while status.read(self.directory).get("state") != "failed":
                time.sleep(0.01)
        elif what == "slow":
            time.sleep(3)
        elif what == "disk full":
            raise OSError(28, "No space left on device")
        elif what == "shard error":
            raise ShardError("the tar is not the one that was indexed")
        elif what == "unread":
            raise ReadError("shard-000002.tar could not be read for 60 s")
        elif what == "vanish":
            self.directory.rename(self.directory.with_name("moved away"))
        elif what == "nan":
            assert self.model
            for parameter in self.model.parameters():
                parameter.register_hook(lambda g: g * float("nan"))
        else:
            raise AssertionError(what)

    def frozen(self, event: str, about: tuple[Any, ...]) -> None:
        """The file system of the run directory answers no more: whoever opens, lists or renames in it waits."""
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir"):
            path = about[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(self.directory)):
                time.sleep(3600)

    def before(self, place: Any, name: str, moment: str) -> None:
        """Pass through `moment` before each call of `place.name`."""
        original = getattr(place, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            self.reach(moment)
            return original(*args, **options)

        setattr(place, name, wrapped)

    def log_steps(self) -> None:
        """Note which samples a rank was shown, then take the step."""
        original = train.Trainer.train_step

        def logged(trainer: train.Trainer, batch: Any, lr: float) -> Any:
            self.model = trainer.model
            if self.directory.exists():
                where = {"epoch": trainer.progress.epoch, "step": trainer.progress.step, "start": batch.start}
                line = where | {"samples": batch.samples.tolist(), "time": time.time()}
                with open(self.directory / f"samples-{self.rank}.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            self.reach("step")
            time.sleep(self.pause)
            return original(trainer, batch, lr)

        train.Trainer.train_step = logged  # type: ignore[method-assign]


class Reader:
    """Of the record, whose fault strikes in its own thread."""

    def __init__(self, faults: Faults, shown: Shown) -> None:
        self.faults, self.shown = faults, shown

    def begin(self) -> int:
        return self.shown.record_bytes

    def take(self, line: dict[str, Any]) -> None:
        self.faults.reach("showing:line")

    def close(self) -> None:
        self.faults.reach("showing:end")


def kin() -> list[int]:
    """The processes of this run: the children of this one's parent, its launcher."""
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    return [int(child) for child in children]


def main() -> int:
    faults = Faults()
    faults.directory.mkdir(parents=True, exist_ok=True)
    faults.log_steps()
    faults.before(validate.Tally, "add", "validation")
    faults.before(Loader, "_batch", "loader")
    faults.before(peers, "meet", "meeting")
    directory.Store = partial(store.Store, moment=lambda name: faults.reach(f"save:{name}"))  # type: ignore[misc, assignment]
    faults.before(lease.Lease, "holds", "record")  # what stands before every write of the run directory
    readers.READERS["reader"] = partial(Reader, faults)
    faults.before(run, "summary", "summary")
    faults.before(world.World, "leave", "leaving")
    if seconds := faults.fault.get("fsync"):
        fsync = os.fsync
        os.fsync = lambda handle: (time.sleep(seconds), fsync(handle))[1]  # type: ignore[assignment]
    page_process.PERIOD = float(os.environ.get("PAGE_SECONDS", page_process.PERIOD))
    if faults.fault.get("beats"):
        status.PERIOD = 0.0
    if faults.fault.get("destroy") == "blocks":
        distributed.destroy_process_group = lambda *_: time.sleep(3600)  # type: ignore[assignment]
    if faults.fault.get("late") and faults.rank == 0:
        faults.before(announcement.Announcement, "say", "late")
        faults.fault |= {"at": "late", "rank": 0, "do": "wait"}
    return __main__.main()


if __name__ == "__main__":
    launcher.leave_with(main)
