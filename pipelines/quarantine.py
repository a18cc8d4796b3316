"""The list of the samples that `verify` found to be bad. It names rows, and so it is bound to an index: its first line
says to which."""

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
    """What a set's list says.

    Attributes:
        rows: the bad ones, sorted, int64 [n].
        earlier: the fingerprint that an earlier program, for which these rows did not exist, gave to the set.
    """

    rows: Ints
    earlier: str


def write(directory: Path, index: str, problems: Sequence[dict[str, Any]]) -> None:
    """Write the list for the index of this SHA-256, or remove the one that is there if there are no problems."""
    path = directory / QUARANTINE
    if problems:
        write_atomically(path, jsonl([{"index": index}, *problems]))
    elif path.exists():  # on a read-only file system, what is not there cannot be removed
        path.unlink()


def read(directory: Path, manifest: Manifest, ends: Ints) -> Quarantine | None:
    """What a set's list says; None without one, or if it is of another index, which is told.

    Args:
        ends: the row behind the last one of each shard.

    Raises ShardError for a list that means no rows.
    """
    path = directory / QUARANTINE
    if not path.exists():
        return None
    remedy = f"run `python -m pipelines verify {directory}`"
    try:
        bound, text = _bound(path.read_bytes())
        if bound not in (None, manifest.index_sha256):
            if os.environ.get("RANK", "0") == "0":  # of the ranks of a run, one tells
                say(f"{path} is of another index than the set's, and is not used: {remedy}")
            return None
        rows = _rows([json.loads(line) for line in text.splitlines()], manifest, ends)
    except (ValueError, TypeError, LookupError) as error:
        raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
    return Quarantine(rows, hashlib.sha256(manifest.index_sha256.encode() + text).hexdigest())


def of_index(directory: Path, index: str, before: str) -> bool:
    """Whether the list that is there counts for an index, by the SHA-256 of that and of the index before it."""
    try:
        bound, _ = _bound((directory / QUARANTINE).read_bytes())
    except (OSError, ValueError):
        bound = None
    return index == (before if bound is None else bound)


def _bound(text: bytes) -> tuple[str | None, bytes]:
    """The index that a list is bound to, and the lines behind that; an earlier program's is bound to none, and counts
    for the index that is there."""
    first, _, rest = text.partition(b"\n")
    head = json.loads(first) if first.strip() else None
    return (str(head["index"]), rest) if isinstance(head, dict) and "index" in head else (None, text)


def _rows(lines: list[dict[str, Any]], manifest: Manifest, ends: Ints) -> Ints:
    """The rows that the lines name, sorted, int64 [n]. Raises ValueError, TypeError or LookupError."""
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
