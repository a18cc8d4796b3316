"""Files that are never half written; checksums, JSON and JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.errors import UserError


class HeldFile(FileIO):
    """A file that closes with its last reference, be that in a cache or in a thread."""

    def __del__(self) -> None:
        self.close()


def no_link(path: str, flags: int) -> int:
    """Opens a file, but follows no link: somebody else may have put it there. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, data: bytes, by: str = "", *, durable: bool = True) -> None:
    """Writes to a temporary file, flushes, renames: after a crash the file is either the old or the new one.

    Args:
        by: name of the writer, if several processes may write at once.
        durable: as for `replacing`.
    """
    with replacing(path, by, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, by: str = "", *, durable: bool = True) -> Iterator[BinaryIO]:
    """A temporary file next to `path`, written piece by piece; it replaces `path` when the body ends. On failure it is
    removed: it may hold the disk's last free bytes.

    Args:
        durable: flush to disk, which takes seconds on a busy file system. Otherwise a power failure may leave neither
            the old file nor the new one.
    """
    temporary = path.with_name(f".{path.name}{by}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def as_text(name: str) -> str:
    """A file name decoded as UTF-8 in any locale; bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """Content of a text file written by a person. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 ({error.reason}): save it as UTF-8") from error


def read_json(path: Path) -> Any:
    """Value of a JSON file. Raises UserError if it is damaged."""
    return parsed_json(path, path.read_bytes())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object per line; empty if there is no such file. Raises UserError for a damaged line."""
    return [parsed_json(path, line) for line in path.read_bytes().splitlines()] if path.exists() else []


def readable_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Objects of a JSONL file, and the numbers, from 1, of its damaged lines; both empty if there is no such file."""
    found, damaged = list[dict[str, Any]](), list[int]()
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict):
            found.append(values)
        else:
            damaged.append(number)
    return found, damaged


def parsed_json(path: Path, text: bytes) -> Any:
    """JSON value of `text`, which was read from `path`. Raises UserError naming the file if it is damaged."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or move it away") from error


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """Objects as JSON lines. Bytes of file names that are not UTF-8 are escaped."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode(errors="backslashreplace")
