"""The files of a run, as one start of it writes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dist_train.config import Config, dump
from dist_train.ranks import kin
from dist_train.rundir import restarts
from dist_train.rundir.checkpoint import newest_name
from dist_train.rundir.confusion import ConfusionFile
from dist_train.rundir.events import Events
from dist_train.rundir.lease import Lease
from dist_train.rundir.ledger import Ledger
from dist_train.rundir.record import Record
from dist_train.rundir.status import Status
from dist_train.rundir.store import Store
from dist_train.rundir.writer import Writer
from pipelines.errors import UserError
from pipelines.files import write_atomically

CONFIG = "config.yaml"


class ClaimError(UserError):
    """The run directory cannot be written, or another start has saved in it since this one looked."""


class RunDirectory:
    """A run directory and the one lease that everything in it is written under.

    Args:
        path: of the directory, which need not exist yet.
        say: shows the user a line, from rank 0.
        keep: how many of the newest checkpoints stay.
        writes: whether this is rank 0; the others write nothing.

    Attributes:
        earlier: settings of the start before this one, flat, once the run is claimed (rank 0).
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, keep: int, writes: bool) -> None:
        self.path, self.say = path, say
        self.earlier: dict[str, Any] = {}
        self.lease, self.ledger = Lease(path), Ledger(kin.began())
        self._writer = Writer()
        self.status = Status(self.lease, say, self._writer, writes=writes, ledger=self.ledger.state_dict)
        self.record = Record(self.lease, say, self._writer)
        self.events = Events(self.lease, say, self._writer)
        self.confusion = ConfusionFile(self.lease, say, self._writer, writes=writes)
        self.store = Store(self.lease, keep, say, self.record.settle)

    def claim(self, config: Config, bad: list[str], record_bytes: int, newest: str) -> str:
        """Take the run over, from rank 0. Returns the name of this start. Raises ClaimError.

        Args:
            bad: names of checkpoints that are damaged; they are set aside.
            record_bytes: of the record that stay.
            newest: the name of the newest checkpoint, good or not, when this start looked.
        """

        def still() -> None:
            if (now := newest_name(self.path)) != newest:
                raise ClaimError(
                    f"another start has saved {now} in {self.path} meanwhile: see that it has ended (`python -m slurm "
                    f"status`, or its processes), then repeat the command"
                )

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for stale in self.path.glob(".*.tmp"):  # what killed starts left may be a full disk's last bytes
                with suppress(OSError):
                    stale.unlink()
            still()
            self.lease.acquire()
            still()  # after this, whoever had the lease saves no more
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
        """All that was written beside training is on the disk, or cannot be had there."""
        self.store.join()
        for lines in (self.record, self.events):
            with suppress(OSError):  # told
                lines.settle()
        self.status.insist()
        self._writer.wait()


def _settings(path: Path) -> dict[str, Any]:
    """Those of a configuration, flat; none if it is not there, or damaged. Raises OSError."""
    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        groups = None
    groups = groups if isinstance(groups, dict) else {}
    found = {name: group for name, group in groups.items() if isinstance(group, dict)}
    return {f"{name}.{key}": value for name, group in found.items() for key, value in group.items()}
