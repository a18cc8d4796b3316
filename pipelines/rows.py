"""Rows of an index: their fields, and the checks that a shard's rows are whole and sane."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import first_line
from pipelines.files import regular

HEADER = 512  # bytes of the ustar header directly before each member's data
NAME = 100  # its first field: the name
SIZE = slice(124, 136)  # its size field, in octal
LABELS = 1 << 31  # what a label is below
LARGEST = 1 << 32  # pixels that two sides of 16 bits can have
TOO_LARGE = "pixels of max_pixels"  # in the reason why a row is none
CHUNK = 1 << 20  # rows per pass when all rows are scanned

# One sample: place of its image in the shard, sides, label, and the CRC-32 of its member name and of its bytes.
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


def mapped(path: Path, kind: np.dtype[Any] = SAMPLE) -> Rows:
    """Array of records as `np.save` writes it, memory-mapped: nothing is read yet but its header, of at most 64 kB.
    Raises ValueError if the file is not exactly that, and OSError."""
    with open(path, "rb", opener=regular) as file:
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("its header is none that this program writes")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # numpy raises anything on garbage
            raise ValueError(first_line(error)) from error
        if dtype != kind or len(shape) != 1:
            raise ValueError("it holds something else")
        begin, there = file.tell(), file.seek(0, os.SEEK_END)
        if there != begin + shape[0] * kind.itemsize:
            raise ValueError(f"it has {there} bytes, which are not those of {shape[0]} rows")
        return np.memmap(file, kind, "r", begin, shape).view(np.ndarray) if shape[0] else np.empty(0, kind)


def is_header(header: bytes, name: int, size: int) -> bool:
    """True if a tar header is that of the indexed sample, by the CRC-32 of its name field and the member's size."""
    if len(header) != HEADER or crc32(header[:NAME]) != name:
        return False
    try:
        return int(header[SIZE].strip(b" \0"), 8) == size
    except ValueError:
        return False


def checksum(rows: Rows) -> int:
    """CRC-32 of rows. It detects damage, not forgery, at a third of the cost of SHA-256."""
    return crc32(np.ascontiguousarray(rows).view(np.uint8).data)  # contiguous rows are not copied


def fault(
    rows: Rows, tar_bytes: np.uint64 | NDArray[np.uint64], classes: int, sides: Sequence[int], pixels: int = LARGEST
) -> tuple[int, str] | None:
    """Position of the first row that cannot be right and the reason, or None.

    Args:
        tar_bytes: size of the tar that the rows point into, or one size per row.
        classes: number of classes.
        sides: least and largest allowed shorter side of an image, or empty.
        pixels: of an image, at most.
    """
    checks = {
        "lies outside the tar": inside(rows, tar_bytes),
        "has no pixels": (rows["width"] > 0) & (rows["height"] > 0),
        f"has more than the {pixels} {TOO_LARGE}": rows["width"].astype(np.uint64) * rows["height"] <= pixels,
        f"has a label out of range for {classes} classes": (rows["label"] >= 0) & (rows["label"] < classes),
    }
    if len(sides):  # they decide whether images are resized
        least, largest = sides
        shorter = np.minimum(rows["width"], rows["height"])
        checks["has other sides than the manifest says"] = (least <= shorter) & (shorter <= largest)
    return next(((int(good.argmin()), reason) for reason, good in checks.items() if not good.all()), None)


def inside(rows: Rows, tar_bytes: np.uint64 | NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each row is a place behind a header in a tar of this size, bool [n]."""
    behind = rows["offset"] + rows["size"]
    found: NDArray[np.bool_] = (rows["offset"] >= HEADER) & (rows["offset"] < behind) & (behind <= tar_bytes)
    return found


def top_label(rows: Rows) -> int:
    """Largest label."""
    return max(int(some["label"].max()) for some in _chunks(rows))


def labels_used(rows: Rows, classes: int) -> NDArray[np.bool_]:
    """Classes that have a sample, bool [classes]. Raises IndexError for a label out of range."""
    used = np.zeros(classes, np.bool_)
    for some in _chunks(rows):
        used[some["label"]] = True
    return used


def sides(rows: Rows) -> tuple[int, int]:
    """Least and largest shorter side, in pixels."""
    found = [np.minimum(some["width"], some["height"]) for some in _chunks(rows)]
    return int(min(side.min() for side in found)), int(max(side.max() for side in found))


def _chunks(rows: Rows) -> Iterator[Rows]:
    """All rows in chunks, so that no array grows with the set."""
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
