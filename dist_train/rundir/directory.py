"""The files of a run, as written by one start."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.config import Config
from dist_train.flat import dump
from dist_train.ranks import kin
from dist_train.rundir import restarts
from dist_train.rundir.announcement import FIRST
from dist_train.rundir.checkpoint import newest_name
from dist_train.rundir.confusion import ConfusionFile
from dist_train.rundir.events import Events
from dist_train.rundir.lease import Lease
from dist_train.rundir.ledger import Ledger
from dist_train.rundir.record import Record
from dist_train.rundir.status import Status
from dist_train.rundir.store import Store
from dist_train.rundir.waiting import Waiting
from dist_train.rundir.writer import Writer
from pipelines import yamls
from pipelines.errors import UserError
from pipelines.files import sweep, write_atomically

CONFIG = "config.yaml"


class ClaimError(UserError):
    """The run directory cannot be written, or another start has saved in it meanwhile."""


class RunDirectory:
    """A run directory, and the one lease under which everything in it is written.

    Args:
        path: of the directory, which need not exist yet.
        say: shows the user a line, on rank 0.
        keep: number of newest checkpoints to keep.
        writes: whether this is rank 0; the others write nothing.

    Attributes:
        earlier: flat settings of the previous start, set by `claim` (rank 0).
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, keep: int, writes: bool) -> None:
        self.path, self.say = path, say
        self.earlier: dict[str, Any] = {}
        self.lease, self.ledger = Lease(path), Ledger(kin.began())
        self._writer = Writer()
        self.status = Status(self.lease, say, self._writer, writes=writes, ledger=self.ledger.state_dict)
        self.waiting = Waiting(self.lease, self.status.waits, say)
        self.record = Record(self.lease, say, self._writer)
        self.events = Events(self.lease, say, self._writer)
        self.confusion = ConfusionFile(self.lease, say, self._writer, writes=writes)
        self.store = Store(self.lease, keep, say, self.record.settle)

    def claim(self, config: Config, bad: list[str], record_bytes: int, newest: str) -> str:
        """Take the run over; called on rank 0. Returns the name of this start. Raises ClaimError.

        Args:
            bad: names of damaged checkpoints, to be set aside.
            record_bytes: of the record to keep.
            newest: name of the newest checkpoint, good or not, that this start found.
        """

        def still() -> None:
            if (now := newest_name(self.path)) != newest:
                raise ClaimError(
                    f"another start has saved {now} in {self.path} meanwhile: see that it has ended (`python -m slurm "
                    f"status`, or its processes), then repeat the command"
                )

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            sweep(self.path, 0)  # leftovers of killed starts may be what fills the disk
            (self.path / FIRST).unlink(missing_ok=True)
            still()
            self.lease.acquire()
            still()  # the previous holder of the lease saves no more from here on
            restarts.forget(self.path)
            self.store.clean(bad)
            self.earlier = _settings(self.path / CONFIG)
            write_atomically(self.path / CONFIG, dump(config).encode())
            self.record.open(record_bytes)
            self.events.begin()
        except OSError as error:
            raise ClaimError(
                f"{self.path} cannot be written ({error}): make room, or choose another run.dir"
            ) from error
        return self.lease.token

    def close(self) -> None:
        """Wait until everything written beside training is on the disk, or cannot be."""
        self.store.join()
        for lines in (self.record, self.events):
            with suppress(OSError):  # reported already
                lines.settle()
        self.status.insist()
        self._writer.wait()


def _settings(path: Path) -> dict[str, Any]:
    """Flat settings of a configuration file; empty if it is missing or damaged. Raises OSError."""
    try:
        groups = yamls.load(yamls.read(path)) if path.exists() else None
    except yamls.NoYaml:
        groups = None
    groups = groups if isinstance(groups, dict) else {}
    found = {name: group for name, group in groups.items() if isinstance(group, dict)}
    return {f"{name}.{key}": value for name, group in found.items() for key, value in group.items()}
