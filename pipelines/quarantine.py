"""List of the samples that `verify` found bad. It names rows, so it is bound to an index, named in its first line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pipelines.files import jsonl, read_file, write_atomically
from pipelines.here import Here
from pipelines.manifest import LARGEST, Manifest, ShardError
from pipelines.order import Ints
from pipelines.speech import say
from pipelines.valid import SHOWN, Count, Invalid, parsed

T = TypeVar("T")
QUARANTINE = "quarantine.jsonl"


@dataclass
class _Head:
    index: str | None = None


@dataclass
class _Line:
    """Without `row` it is about a whole shard, or in the way of `_Head`."""

    shard: str = ""
    row: Count = -1


class Quarantine(NamedTuple):
    """Contents of a set's list.

    Attributes:
        rows: the bad rows, sorted, int64 [n].
        earlier: fingerprint of the set in an earlier version of this program, for which these rows did not exist.
    """

    rows: Ints
    earlier: str


def write(directory: Path, index: str, problems: Sequence[dict[str, Any]]) -> None:
    """Writes the list for the index with this SHA-256; without problems, removes the existing list."""
    path = directory / QUARANTINE
    if problems:
        write_atomically(path, jsonl([{"index": index}, *problems]))
    elif path.exists():  # on a read-only file system, unlinking a missing file fails too
        path.unlink()


def read(directory: Path, manifest: Manifest, ends: Ints, here: Here) -> Quarantine | None:
    """Contents of a set's list; None if there is none, or if it belongs to another index, which is reported.

    Args:
        ends: one past the last row of each shard.
        here: names the set in messages.

    Raises ShardError if the list cannot be read as rows.
    """
    path = directory / QUARANTINE
    if not path.exists():
        return None
    shown, remedy = here.path(QUARANTINE), f"run {here.command('verify')}"
    try:
        bound, text = _bound(read_file(path, LARGEST))
        if bound not in (None, manifest.index_sha256):
            if os.environ.get("RANK", "0") == "0":  # one rank per run reports it
                say(f"{shown} belongs to another index and is not used: {remedy}")
            return None
        rows = _rows(text, manifest, ends)
    except Invalid as error:
        raise ShardError(f"{shown} is damaged ({error}): {remedy}") from error
    return Quarantine(rows, hashlib.sha256(manifest.index_sha256.encode() + text).hexdigest())


def of_index(directory: Path, index: str, before: str) -> bool:
    """True if the existing list applies to an index; both it and the index before it are given by SHA-256."""
    try:
        bound, _ = _bound(read_file(directory / QUARANTINE, LARGEST))
    except (OSError, ValueError):
        bound = None
    return index == (before if bound is None else bound)


def _bound(text: bytes) -> tuple[str | None, bytes]:
    """SHA-256 of the index that a list is bound to, and the lines after it. Lists of earlier versions are bound to none
    and apply to whatever index is there."""
    first, _, rest = text.partition(b"\n")
    index = _of_line(_Head, first).index if first.strip() else None
    return (None, text) if index is None else (index, rest)


def _rows(text: bytes, manifest: Manifest, ends: Ints) -> Ints:
    """Rows named by the lines, sorted, int64 [n]. Raises Invalid."""
    number = {shard["name"]: i for i, shard in enumerate(manifest.shards)}
    bad = set[int]()
    for line in (_of_line(_Line, one) for one in text.splitlines()):
        if line.row < 0:
            continue
        name = f"{line.shard!r:.{SHOWN}}"
        if (shard := number.get(line.shard)) is None:
            raise Invalid(f"there is no shard {name}")
        first = int(ends[shard - 1]) if shard else 0
        if line.row >= ends[shard] - first:
            raise Invalid(f"shard {name} has no row {line.row}")
        bad.add(first + line.row)
    return np.array(sorted(bad), np.int64)


def _of_line(kind: type[T], line: bytes) -> T:
    """What a line holds. It may name a file that is not UTF-8, whose bytes JSON can escape, and pydantic refuses."""
    try:
        return parsed(kind, json.dumps(json.loads(line), ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise Invalid(str(error)) from error
