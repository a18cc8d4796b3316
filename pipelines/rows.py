"""The rows of an index: what one holds, and whether those of a shard are whole and sane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

HEADER = 512  # bytes of the ustar header directly before each member's data
NAME = 100  # the first field of it: the name
SIZE = slice(124, 136)  # another: the size in octal
CHUNK = 1 << 20  # rows that are looked at together where all are

# A sample: its image's place in the shard, size and label, and the CRC-32 of its member name and of its bytes.
SAMPLE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),
        ("name", "<u4"),
        ("crc", "<u4"),
    ]
)

Rows = NDArray[Any]  # SAMPLE [n]


def mapped(path: Path) -> Rows:
    """The rows of an index, of which nothing is read yet. Raises ValueError, and whatever numpy makes of garbage."""
    rows: Rows = np.load(path, mmap_mode="r").view(np.ndarray)
    if rows.dtype != SAMPLE:
        raise ValueError("it holds something else")
    return rows


def is_header(header: bytes, name: int, size: int) -> bool:
    """True if a tar header is that of the indexed sample, by the checksum of its name field and the member's size."""
    if len(header) != HEADER or crc32(header[:NAME]) != name:
        return False
    try:
        return int(header[SIZE].strip(b" \0"), 8) == size
    except ValueError:
        return False


def checksum(rows: Rows) -> int:
    """The CRC-32 of rows. It finds damage, at a third of the cost of SHA-256; it is not there to find forgery."""
    return crc32(np.ascontiguousarray(rows).view(np.uint8).data)  # of rows that follow each other, no copy


def fault(
    rows: Rows, tar_bytes: int | NDArray[np.uint64], classes: int, sides: Sequence[int]
) -> tuple[int, str] | None:
    """Which of these rows cannot be right, and why, or None.

    Args:
        tar_bytes: size of the tar that they point into, or of the one of each.
        classes: how many there are.
        sides: the least and the largest shorter side that an image may have, or nothing.
    """
    behind = rows["offset"] + rows["size"]
    checks = {
        "lies outside the tar": (rows["offset"] >= HEADER) & (rows["offset"] < behind) & (behind <= tar_bytes),
        "has no pixels": (rows["width"] > 0) & (rows["height"] > 0),
        f"has a label out of range for {classes} classes": (rows["label"] >= 0) & (rows["label"] < classes),
    }
    if len(sides):  # from them follows whether images are resized
        least, largest = sides
        shorter = np.minimum(rows["width"], rows["height"])
        checks["has other sides than the manifest says"] = (least <= shorter) & (shorter <= largest)
    return next(((int(good.argmin()), reason) for reason, good in checks.items() if not good.all()), None)


def top_label(rows: Rows) -> int:
    """The largest label."""
    return max(int(some["label"].max()) for some in _chunks(rows))


def labels_used(rows: Rows, classes: int) -> NDArray[np.bool_]:
    """Of which classes there is a sample, bool [classes]. Raises IndexError for a label that is none."""
    used = np.zeros(classes, np.bool_)
    for some in _chunks(rows):
        used[some["label"]] = True
    return used


def sides(rows: Rows) -> tuple[int, int]:
    """The least and the largest shorter side, in pixels."""
    found = [np.minimum(some["width"], some["height"]) for some in _chunks(rows)]
    return int(min(side.min() for side in found)), int(max(side.max() for side in found))


def _chunks(rows: Rows) -> Iterator[Rows]:
    """All rows, so few at a time that no array grows with the set."""
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
