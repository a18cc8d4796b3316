"""List of the samples that `verify` found bad. It names rows, so it is bound to an index, named in its first line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.files import jsonl, write_atomically
from pipelines.manifest import Manifest, ShardError
from pipelines.order import Ints
from pipelines.speech import say

QUARANTINE = "quarantine.jsonl"


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


def read(directory: Path, manifest: Manifest, ends: Ints) -> Quarantine | None:
    """Contents of a set's list; None if there is none, or if it belongs to another index, which is reported.

    Args:
        ends: one past the last row of each shard.

    Raises ShardError if the list cannot be read as rows.
    """
    path = directory / QUARANTINE
    if not path.exists():
        return None
    remedy = f"run `python -m pipelines verify {directory}`"
    try:
        bound, text = _bound(path.read_bytes())
        if bound not in (None, manifest.index_sha256):
            if os.environ.get("RANK", "0") == "0":  # one rank per run reports it
                say(f"{path} belongs to another index and is not used: {remedy}")
            return None
        rows = _rows([json.loads(line) for line in text.splitlines()], manifest, ends)
    except (ValueError, TypeError, LookupError) as error:
        raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
    return Quarantine(rows, hashlib.sha256(manifest.index_sha256.encode() + text).hexdigest())


def of_index(directory: Path, index: str, before: str) -> bool:
    """True if the existing list applies to an index; both it and the index before it are given by SHA-256."""
    try:
        bound, _ = _bound((directory / QUARANTINE).read_bytes())
    except (OSError, ValueError):
        bound = None
    return index == (before if bound is None else bound)


def _bound(text: bytes) -> tuple[str | None, bytes]:
    """SHA-256 of the index that a list is bound to, and the lines after it. Lists of earlier versions are bound to none
    and apply to whatever index is there."""
    first, _, rest = text.partition(b"\n")
    head = json.loads(first) if first.strip() else None
    return (str(head["index"]), rest) if isinstance(head, dict) and "index" in head else (None, text)


def _rows(lines: list[dict[str, Any]], manifest: Manifest, ends: Ints) -> Ints:
    """Rows named by the lines, sorted, int64 [n]. Raises ValueError, TypeError or LookupError."""
    number = {shard["name"]: i for i, shard in enumerate(manifest.shards)}
    bad = set[int]()
    for line in lines:
        if not isinstance(line, dict):
            raise ValueError(f"{line!r} is no object")
        if "row" in line:
            shard, row = number[line["shard"]], line["row"]
            first = int(ends[shard - 1]) if shard else 0
            if type(row) is not int or not 0 <= row < ends[shard] - first:
                raise ValueError(f"{line['shard']} has no row {row!r}")
            bad.add(first + row)
    return np.array(sorted(bad), np.int64)
