"""The files of a run, as one start of it writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dist_train.config import Config, dump
from dist_train.rundir import restarts
from dist_train.rundir.lease import Lease
from dist_train.rundir.record import Record
from dist_train.rundir.status import Status
from dist_train.rundir.store import Store
from pipelines.files import write_atomically


class RunDirectory:
    """A run directory and the one lease that everything in it is written under.

    Args:
        path: of the directory, which need not exist yet.
        say: shows the user a line, from rank 0.
        keep: how many of the newest checkpoints stay.
        writes: whether this is rank 0; the others write nothing.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, keep: int, writes: bool) -> None:
        self.path, self.say = path, say
        self.lease = Lease(path)
        self.status = Status(self.lease, say, writes=writes)
        self.record = Record(self.lease, say)
        self.store = Store(self.lease, keep)

    def claim(self, config: Config, bad: list[str]) -> str:
        """Take the run over, from rank 0. Returns the name of this start. Raises OSError if it cannot be written.

        Args:
            bad: names of checkpoints that are damaged; they are set aside.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lease.acquire()
        restarts.forget(self.path)
        self.store.clean(bad)
        write_atomically(self.path / "config.yaml", dump(config).encode())
        return self.lease.token
