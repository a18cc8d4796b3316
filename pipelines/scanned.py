"""What is stored of each finished shard while its set is unfinished."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipelines.files import as_text, read_file
from pipelines.manifest import LARGEST, Shard, ShardError
from pipelines.rows import LABELS, Rows, fault, mapped
from pipelines.valid import Count, Invalid, made_of

WORK = ".pack"  # in an unfinished set: the plan, and the scan of each finished shard
WHITE = 255  # largest level
Sums = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]


@dataclass
class Scan:
    """What is stored of a shard. `read_scan` checks `rejected`, which may name files that are not UTF-8."""

    shard: Shard
    pixels: Count
    total: Sums
    products: Annotated[list[Sums], Field(min_length=3, max_length=3)]
    rejected: list[dict[str, str]]
    turned: Count = 0
    repeats: Count = 0
    odd: list[Count] = field(default_factory=list)
    enlarged: Count = 0
    unchanged: Count = 0


def read_scan(tar: Path) -> Scan:
    """The scan of a tar. Raises ShardError unless it is one that `scan_shard` may have made: it decides what the index
    and the manifest say."""
    path = scan_file(tar)
    text = read_file(path, LARGEST)
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise Invalid("it should be an object")
        rejected = values.get("rejected")
        if not (isinstance(rejected, list) and all(map(_is_rejected, rejected))):
            raise Invalid("rejected should be a list of files with reasons")
        scan = made_of(Scan, values | {"rejected": []})
        shard, pixels = scan.shard, scan.pixels
        if shard["name"] != as_text(tar.name) or shard["bytes"] != tar.stat().st_size:
            raise Invalid("it is of another tar")
        if pixels < shard["samples"] or max(scan.odd, default=-1) >= shard["samples"]:
            raise Invalid(f"pixels or odd are not those of {shard['samples']} samples")
        if max(scan.total) > WHITE * pixels or max(map(max, scan.products)) > WHITE**2 * pixels:
            raise Invalid(f"total or products are larger than those of {pixels} pixels")
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({error}): remove it, and repeat the command") from error
    return replace(scan, rejected=rejected)


def _is_rejected(line: Any) -> bool:
    return isinstance(line, dict) and all(type(line.get(key)) is str for key in ("file", "reason"))


def rows_of(tar: Path, scan: Scan) -> Rows:
    """The rows of a tar's samples. Raises ShardError."""
    path = rows_file(tar)
    try:
        rows = mapped(path)
        if len(rows) != scan.shard["samples"]:
            raise ValueError(f"it has {len(rows)} rows for {scan.shard['samples']} samples")
        if found := fault(rows, np.uint64(scan.shard["bytes"]), LABELS, ()):
            raise ValueError("row {} {}".format(*found))
    except ValueError as error:
        raise ShardError(
            f"{path} is damaged ({error}): remove it and {scan_file(tar)}, and repeat the command"
        ) from error
    return rows


def scan_file(path: Path) -> Path:
    """Path of a shard's scan while its set is unfinished. It is written last: if it exists, so does the shard."""
    return path.parent / WORK / f"{path.name}.json"


def rows_file(path: Path) -> Path:
    """Path of the rows of a scan."""
    return path.parent / WORK / f"{path.name}.npy"
