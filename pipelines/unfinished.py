"""The working folder of a set while it is made: who works there, and on what. Whoever comes again goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TextIO

from pipelines.manifest import ShardError
from pipelines.origin import Fingerprints
from pipelines.scan import WORK
from pipelines.speech import say


class Work(Enum):
    """Who works on a set."""

    PACK = "one process, which packs what is missing and finishes the set"
    SHARE = "one of several processes, which pack different shards and leave the finish to a PACK"
    INDEX = "one process, on tars that are there already"


@contextmanager
def working_folder(directory: Path, plan: Fingerprints, work: Work) -> Iterator[None]:
    """Hold the set's working folder while the body works, only for the plan that it was begun with. It is removed
    when the set is finished. Raises ShardError."""
    folder = directory / WORK
    folder.mkdir(parents=True, exist_ok=True)
    lock = fcntl.LOCK_SH if work is Work.SHARE else fcntl.LOCK_EX
    with os.fdopen(os.open(folder / "plan", os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="ascii") as begun:
        try:
            fcntl.flock(begun, lock | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"{directory} is being packed by another process: wait for it") from error
        except OSError as error:  # Lustre's default, and others': it would be no remedy to pack elsewhere and copy
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            say(f"{directory} cannot be locked ({error.strerror}): see to it that no other process packs into it")
        _settle(begun, directory, plan, work)
        yield
    if work is not Work.SHARE:
        shutil.rmtree(folder)


def _settle(file: TextIO, directory: Path, plan: Fingerprints, work: Work) -> None:
    """Write the plan, or go on with it if it is the one that was begun. Raises ShardError for another one."""
    begun = file.read()
    line = f"{'index' if work is Work.INDEX else 'pack'} {plan.fingerprint}"
    if begun == line:
        return
    if begun and begun not in [f"pack {earlier}" for earlier in plan.earlier]:
        indexed = begun.startswith("index ")
        if indexed and work is not Work.INDEX:
            tars = len(list(directory.glob("*.tar")))
            raise ShardError(
                f"{directory} holds {tars} tars of which an index was begun: pack into another directory, or finish it "
                f"with `python -m pipelines index {directory}`"
            )
        if not indexed:
            kept = begun in [f"pack {kept}" for kept in plan.small_kept]
            of = "that keeps small images" if kept else "of other files, or sizes of them, or with other options"
            remedy = "go on with --keep-small" if kept else "repeat what began it"
            done = len(list(directory.glob("shard-*.tar")))
            raise ShardError(
                f"{directory} holds an unfinished pack {of}: {remedy}, pack into another directory, or remove "
                f"{directory} with the {done} shards that are done"
            )
        for old in (directory / WORK).glob("*.json"):  # scans of tars that have changed since
            old.unlink()
    file.seek(0)  # two shares that begin at once write the same
    file.write(line)
    file.truncate()
