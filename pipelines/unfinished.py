"""Working folder of a set that is being made: its lock and its plan, from which a later start continues."""

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

from pipelines import files
from pipelines.files import no_link
from pipelines.manifest import ShardError
from pipelines.origin import Fingerprints
from pipelines.scanned import WORK
from pipelines.speech import say

PLAN = 1000  # characters of a plan, at most


class Work(Enum):
    """Kind of work done on a set, and by how many processes."""

    PACK = "one process, which packs what is missing and finishes the set"
    SHARE = "one of several processes, which pack different shards and leave the finish to a PACK"
    INDEX = "one process, on tars that are there already"


@contextmanager
def working_folder(directory: Path, plan: Fingerprints, work: Work) -> Iterator[None]:
    """Holds the set's working folder during the body, if the plan is the one it was begun with. The folder is removed
    when the set is finished. Raises ShardError."""
    folder = directory / WORK
    files.folder(folder)
    lock = fcntl.LOCK_SH if work is Work.SHARE else fcntl.LOCK_EX
    with os.fdopen(
        no_link(str(folder / "plan"), os.O_RDWR | os.O_CREAT), "r+", encoding="ascii", errors="replace"
    ) as begun:
        try:
            fcntl.flock(begun, lock | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"{directory} is being packed by another process: wait for it") from error
        except OSError as error:  # the default of Lustre and others; "pack elsewhere and copy" would be no remedy
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            say(f"{directory} cannot be locked ({error.strerror}): make sure that no other process packs into it")
        _settle(begun, directory, plan, work)
        files.sweep(directory)
        yield
    if work is not Work.SHARE:
        shutil.rmtree(folder)


def _settle(file: TextIO, directory: Path, plan: Fingerprints, work: Work) -> None:
    """Writes the plan, or accepts the one that is there if it is the same. Raises ShardError if it is another."""
    begun = file.read(PLAN)
    line = f"{'index' if work is Work.INDEX else 'pack'} {plan.fingerprint}"
    if begun == line:
        return
    if begun and begun not in [f"pack {earlier}" for earlier in plan.earlier]:
        indexed = begun.startswith("index ")
        if indexed and work is not Work.INDEX:
            tars = len(list(directory.glob("*.tar")))
            raise ShardError(
                f"{directory} holds {tars} tars whose index was begun: pack into another directory, or finish it "
                f"with `python -m pipelines index {directory}`"
            )
        if not indexed:
            kept = begun in [f"pack {kept}" for kept in plan.small_kept]
            of = "that keeps small images" if kept else "of other files or file sizes, or with other options"
            remedy = "continue with --keep-small" if kept else "repeat the command that began it"
            done = len(list(directory.glob("shard-*.tar")))
            raise ShardError(
                f"{directory} holds an unfinished pack {of}: {remedy}, pack into another directory, or remove "
                f"{directory} with the {done} shards that are done"
            )
        for old in (directory / WORK).glob("*.json"):  # scans of tars that have changed since then
            old.unlink()
    file.seek(0)  # shares that begin at the same time write the same
    file.write(line)
    file.truncate()
