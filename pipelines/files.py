"""Writes files, for all packages: never half, and never through a link, which may be a stranger's; checksums, JSON and
JSON lines."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from pipelines.errors import UserError

SPECIAL = "is no file but a pipe, a socket or a device: put the right one there"
MOST = 1 << 28  # bytes of a file that is read whole
TEMPORARY = ".tmp"  # ends the names of files that are being written, which begin with a dot
LEFT = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # such names, as `replacing` gives them
FORGOTTEN = 3600.0  # seconds without a write, after which nobody writes such a file any more


class HeldFile(FileIO):
    """A file that closes with its last reference, be that in a cache or in a thread."""

    def __del__(self) -> None:
        self.close()


class StrangeFile(OSError, UserError):
    """A path that is not opened, since a stranger may have put there what is there; the message names the remedy."""

    def __str__(self) -> str:
        return f"{os.fsdecode(self.filename)} {self.strerror}"


def no_link(path: str, flags: int) -> int:
    """Opens a file for writing, but follows no link, and waits for no pipe. Raises OSError."""
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise StrangeFile(errno.ELOOP, "is a link, which is not followed: remove it", path) from error
        if error.errno == errno.ENXIO:
            raise StrangeFile(errno.EINVAL, SPECIAL, path) from error
        raise
    return _checked(number, path)


def regular(path: str, flags: int) -> int:
    """Opens a file for reading if it is a regular one: a pipe would be waited for, and a device has no end. Raises
    OSError, without waiting."""
    return _checked(os.open(path, flags | os.O_NONBLOCK), path)


def _checked(number: int, path: str) -> int:
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return number
    os.close(number)
    if stat.S_ISDIR(mode):
        raise StrangeFile(errno.EISDIR, "is a folder: put the right file there", path)
    raise StrangeFile(errno.EINVAL, SPECIAL, path)


def read_file(path: str | bytes | Path, most: int = MOST) -> bytes:
    """All bytes of a regular file. Raises OSError, also for one of more than `most` bytes."""
    with open(path, "rb", opener=regular) as file:
        if os.fstat(file.fileno()).st_size > most:  # it may be a hole, which takes no room on the disk
            raise StrangeFile(errno.EFBIG, f"has more than {most} bytes: put the right file there", os.fsdecode(path))
        return file.read()


def new_file(path: Path) -> BinaryIO:
    """Opens a file that is not there yet, for writing. Raises FileExistsError if anything is, be it a link."""
    return open(path, "xb", opener=no_link)


def appended(path: Path) -> HeldFile:
    """Opens a file for appending, unbuffered. Raises OSError if it is a link."""
    return HeldFile(path, "ab", opener=no_link)


def locked(path: Path) -> HeldFile | None:
    """Opens a file for reading and writing, made if there is none, and locks it until it is closed. None if another
    process has locked it, or has moved it away in this moment. What is no file of this user is removed first. Raises
    OSError."""
    try:
        file = HeldFile(path, "r+b", opener=lambda name, flags: no_link(name, flags | os.O_CREAT))
        strange = os.fstat(file.fileno()).st_uid != os.geteuid()
    except (StrangeFile, PermissionError):
        strange = True
    if strange:
        path.unlink()
        return None
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.lstat(path), os.fstat(file.fileno())):
            return file
    return None


def private_folder(path: Path) -> None:
    """`folder`, whose files nobody else can see if it is made here."""
    folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(0o700)
    folder(path)


def folder(path: Path) -> None:
    """Makes a folder, and those above it, if there is none. Raises OSError if it is a link, through which others' files
    would be written, or removed."""
    if os.path.lexists(path) and not path.is_dir():
        raise StrangeFile(errno.ENOTDIR, "is no folder: move it away", str(path))
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise StrangeFile(errno.ELOOP, "is a link, which is not followed: put the folder itself there", str(path))


def linked(path: Path, target: Path) -> bool:
    """Whether a symbolic link to this place is there. Raises OSError if something else is that `link` does not
    replace."""
    there = os.readlink(path) if path.is_symlink() else ""
    if there == str(target):
        return True
    if lost(path) or not os.path.lexists(path):
        return False
    what = f"is a link to {there}, and not" if there else "is there already, and no link"
    raise StrangeFile(errno.EEXIST, f"{what} to {target}: remove it, or name another directory", str(path))


def link(path: Path, target: Path) -> None:
    """Makes a symbolic link, in place of one that leads nowhere. Raises OSError."""
    if lost(path):
        path.unlink()
    path.symlink_to(target)


def lost(path: str | Path) -> str:
    """The sentence on a link that leads nowhere; empty for anything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    return f"{path} is a link to {os.readlink(path)}, where nothing is: mount its file system, or put it back"


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes to a temporary file, flushes, renames: after a crash the file is either the old or the new one. A link at
    `path` is replaced. `durable`: as for `replacing`."""
    with replacing(path, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A temporary file next to `path`, written piece by piece; it replaces `path` when the body ends. On failure it is
    removed: it may hold the disk's last free bytes.

    Args:
        durable: flush to disk, which takes seconds on a busy file system. Otherwise a power failure may leave neither
            the old file nor the new one.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(8)}{TEMPORARY}")
    try:
        with new_file(temporary) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):  # which nobody has named
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def sweep(directory: Path, after: float = FORGOTTEN) -> None:
    """Removes what killed processes were writing into a folder when they ended, so many seconds ago. Links and other
    files stay."""
    for path in (path for path in directory.iterdir() if LEFT.fullmatch(path.name)):
        with suppress(OSError):
            found = path.lstat()
            old = time.time() - found.st_mtime >= after
            if old and stat.S_ISREG(found.st_mode):
                path.unlink()


def as_text(name: str) -> str:
    """A file name decoded as UTF-8 in any locale; bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=regular) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """Content of a text file that the user has named, be it a pipe of his shell's. Raises OSError, and UserError if it
    is not UTF-8, or endless."""
    with open(path, "rb") as file:
        text = file.read(MOST + 1)
    if len(text) > MOST:
        raise UserError(f"{path} has more than {MOST} bytes: name a text file")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 ({error.reason}): save it as UTF-8") from error


def read_json(path: Path) -> Any:
    """Value of a JSON file. Raises UserError if it is damaged."""
    return parsed_json(path, read_file(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object per line; empty if there is no such file. Raises UserError for a damaged line."""
    return [parsed_json(path, line) for line in read_file(path).splitlines()] if path.exists() else []


def parsed_json(path: Path, text: bytes) -> Any:
    """JSON value of `text`, which was read from `path`. Raises UserError naming the file if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or move it away") from error


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """Objects as JSON lines. Bytes of file names that are not UTF-8 are escaped."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode(errors="backslashreplace")
