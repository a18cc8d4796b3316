"""Shards that a node keeps, in one directory for all its processes and jobs.

DIR/<sha256>.tar           a whole shard, named by its content: sets and jobs that have it in common share it
DIR/<sha256>.<size>.part   one that is being fetched, or whose fetching was interrupted; it counts with its whole size
DIR/sets/                  manifests and indices, which do not count

Locks (flock, which the kernel takes from a process that ends): whoever fetches a shard has its part locked; whoever
reads one has it locked, together with other readers, and only what nobody has locked is removed. Files that another
user made, links, and files of another size are not taken for shards.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.files import HeldFile, StrangeFile, locked, no_link, private_folder
from pipelines.opened import Absent
from pipelines.remote.places import Distant

KEPT = re.compile(r"[0-9a-f]{64}\.(?:tar|(\d{1,15})\.part)")
PIECE = 1 << 22  # bytes that are read at a time of what is there


class Wanted(NamedTuple):
    """A file that is fetched.

    Attributes:
        name: of the file at its place.
        kept: path of the copy.
        size: in bytes.
        sha256: of the content, in hex.
    """

    place: Distant
    name: str
    kept: Path
    size: int
    sha256: str

    @property
    def unfinished(self) -> Path:
        """Path of the copy while it is not whole."""
        return self.kept.with_suffix(f".{self.size}.part")

    @property
    def come(self) -> int:
        """Bytes that have been fetched, while it is not whole."""
        try:
            return self.unfinished.lstat().st_size
        except FileNotFoundError:
            return 0


class Full(Exception):
    """All that could be removed is needed earlier, or in use."""


class Cache:
    """The directory. Methods raise OSError.

    Args:
        gigabytes: GB (10^9 bytes) that shards may take there; 0: what the disk has.
    """

    def __init__(self, directory: Path, gigabytes: float = 0) -> None:
        self.directory, self.budget = directory, round(gigabytes * 1e9)
        private_folder(directory)

    def shard(self, place: Distant, name: str, size: int, sha256: str) -> Wanted:
        """A shard as a file of this cache."""
        return Wanted(place, name, self.directory / f"{sha256}.tar", size, sha256)

    def holds(self, wanted: Wanted) -> bool:
        """Whether a file is here."""
        try:
            return _ours(os.lstat(wanted.kept), wanted.size)
        except FileNotFoundError:
            return False

    def open(self, wanted: Wanted) -> HeldFile | None:
        """Opens a file for reading; while it is open, it is not removed. None if it is not here."""
        try:
            file = HeldFile(wanted.kept, opener=no_link)
        except (FileNotFoundError, StrangeFile, PermissionError):
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file.fileno())
        if not (found.st_nlink and _ours(found, wanted.size)):  # removed while it was being opened
            return None
        with suppress(OSError):  # of the administrator's files
            os.utime(file.fileno())
        return file

    def mend(self, wanted: Wanted) -> None:
        """Removes a file that is not what it should be, so that it is fetched again."""
        if file := self.open(wanted):
            with file, suppress(FileNotFoundError):
                wrong = _digest(file).hexdigest() != wanted.sha256
                if wrong and os.path.samestat(os.lstat(wanted.kept), os.fstat(file.fileno())):
                    wanted.kept.unlink()

    def begin(self, wanted: Wanted, spare: Container[str] | None = None) -> HeldFile | None:
        """Makes room and takes the right to fetch a file, for `fill`. None if another process has it, or the file is
        here by now. Raises Full.

        Args:
            spare: names of the files that must not be removed; None: the file is needed now, so any may be, and if all
                are in use it gets a place beside them: two jobs never wait for each other.
        """
        with self._alone():
            if (file := locked(wanted.unfinished)) is None:
                return None
            if self.holds(wanted):
                wanted.unfinished.unlink()
                return None
            if not self._room(wanted, spare) and spare is not None:
                if not wanted.come:
                    wanted.unfinished.unlink()
                raise Full
            return file

    def fill(self, file: HeldFile, wanted: Wanted) -> None:
        """Fetches a file, from where the last try ended, and puts it in place. Raises Absent."""
        with file:
            for _ in range(2):  # what was there may have been wrong
                if self._come(file, wanted) == wanted.sha256:
                    os.replace(wanted.unfinished, wanted.kept)
                    return
                file.truncate(0)
        remedy = f"verify {wanted.place.name} where it lies, then repeat the command"
        raise Absent("its sha256 is not the manifest's", passing=False, remedy=remedy)

    def _come(self, file: HeldFile, wanted: Wanted) -> str:
        """Fetches what is missing. Returns the SHA-256 of the whole."""
        digest = _digest(file)
        begun = at = file.tell()
        try:
            for piece in wanted.place.pieces(wanted.name, at, wanted.size) if at < wanted.size else ():
                self._write(file, piece, at, wanted)
                digest.update(piece)
                at += len(piece)
        except Absent as error:
            error.came = at > begun
            raise
        return digest.hexdigest()

    def _write(self, file: HeldFile, piece: bytes, at: int, wanted: Wanted) -> None:
        rest = memoryview(piece)
        while rest:
            try:
                done = os.pwrite(file.fileno(), rest, at)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                with self._alone():
                    freed = self._free(1, spare=())
                if not freed:
                    raise Absent(
                        f"{self.directory} has no room for its {wanted.size} bytes, and nothing in it can be removed",
                        passing=True,  # what other processes use now may go soon
                        remedy="put data.cache on a disk with room",
                    ) from error
            else:
                rest, at = rest[done:], at + done

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time counts and makes room."""
        number = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            yield
        finally:
            os.close(number)

    def _room(self, wanted: Wanted, spare: Container[str] | None) -> bool:
        """Whether a file fits the budget, after others were removed."""
        if not self.budget or wanted.kept.parent != self.directory:
            return True
        sizes = {name: size for _, name, size in self._files()} | {wanted.unfinished.name: wanted.size}
        excess = sum(sizes.values()) - self.budget
        return excess <= 0 or self._free(excess, spare or ())

    def _free(self, excess: int, spare: Container[str]) -> bool:
        """Removes least recently used files until so many bytes are free. False if fewer are."""
        for _, name, size in sorted(self._files()):
            if name not in spare and self._remove(self.directory / name):
                excess -= size
            if excess <= 0:
                return True
        return False

    def _remove(self, path: Path) -> bool:
        """Removes a file, unless it is in use or not this user's shard."""
        try:
            with HeldFile(path, opener=no_link) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = os.fstat(file.fileno())
                if found.st_uid != os.geteuid() or not os.path.samestat(os.lstat(path), found):
                    return False
                path.unlink()
                return True
        except OSError:
            return False

    def _files(self) -> Iterator[tuple[float, str, int]]:
        """When each file was last used, its name, and the bytes that it has or will have."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if (kept := KEPT.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        yield found.st_mtime, entry.name, int(kept[1] or found.st_size)


def _digest(file: HeldFile) -> hashlib._Hash:
    """SHA-256 of what a file holds; it is read to its end."""
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(PIECE):
        digest.update(data)
    return digest


def _ours(found: os.stat_result, size: int) -> bool:
    """Whether a file is a shard that this user has fetched, or the administrator."""
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and found.st_size == size
