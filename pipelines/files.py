"""Files that are never half written, and the checksums and lines in them."""

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
    """A file that is closed when nobody holds it any more: no cache, no thread."""

    def __del__(self) -> None:
        self.close()


def no_link(path: str, flags: int) -> int:
    """Opens a file, but none that a link stands for: somebody else may have put it there. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, data: bytes, by: str = "", *, durable: bool = True) -> None:
    """Write beside, flush to the disk, rename: after a crash the file is the old one or the new one.

    Args:
        by: who writes, where several processes may at once.
        durable: as for `replacing`.
    """
    with replacing(path, by, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, by: str = "", *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file beside `path`, for what is written piece by piece; it takes the place of `path` when the body ends. If
    that fails, nothing of it is left: it may be the disk's last free bytes.

    Args:
        durable: flush it to the disk, for which a busy file system takes seconds. Without, a loss of power may leave
            neither the old file nor the new one.
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
    """A name of the file system as it is in UTF-8, whatever the locale is; bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A text file that a person wrote. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 ({error.reason}): write it anew") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError for a damaged one."""
    return parsed_json(path, path.read_bytes())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object for each line; none if there is no such file. Raises UserError for a damaged line."""
    return [parsed_json(path, line) for line in path.read_bytes().splitlines()] if path.exists() else []


def readable_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a JSONL file, and the numbers, from 1, of the lines that are none. No such file: nothing."""
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
    """The value of `text`, which was read from a file. Raises UserError, which names the file, for a damaged one."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or move it away") from error


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """Objects as lines. File names may hold bytes that are not UTF-8: these are written as escapes."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode(errors="backslashreplace")
