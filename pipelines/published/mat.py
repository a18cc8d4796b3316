"""An array of structures in a Matlab file, which may be a stranger's: scipy's reader crashes on damaged ones, and
allocates what they claim.

Format: "MAT-File Format", MathWorks, chapter 1, Level 5 MAT-Files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator
from typing import Any

MOST = 16 << 20  # bytes of a file's content, once it is decompressed
HEAD = 128  # bytes before the first element
ENDIAN = {b"IM": "<", b"MI": ">"}  # the header's last two bytes
MATRIX, COMPRESSED = 14, 15  # types of data elements: table 1-1
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
STRUCTURES, TEXT = 2, 4  # classes of arrays: table 1-3


def structures(data: bytes, name: str, fields: Collection[str]) -> list[dict[str, Any]]:
    """The elements of the array of structures `name`: per field its text, its number if it is a single one, or else
    None. Raises ValueError."""
    order = ENDIAN.get(data[HEAD - 2 : HEAD], "")
    if not order:
        raise ValueError("it is not a Matlab file of level 5")
    left = MOST
    for kind, body in _elements(memoryview(data)[HEAD:], order):
        if kind == COMPRESSED:
            try:
                body = memoryview(zlib.decompressobj().decompress(body, left + 1))
            except zlib.error as error:
                raise ValueError(f"it is damaged, {error}") from error
        left -= len(body)
        if left < 0:
            raise ValueError(f"it has more than {MOST} bytes")
        inside = [body for kind, body in _elements(body, order) if kind == MATRIX] if kind == COMPRESSED else [body]
        for matrix in inside:
            parts = list(_elements(matrix, order))
            if len(parts) > 2 and bytes(parts[2][1]) == name.encode():
                return _rows(parts, order, fields)
    raise ValueError(f"it has no array {name}")


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each data element. Raises ValueError."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("it breaks off")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        after = start + size + (-size % 8 if kind != COMPRESSED else 0)
        if kind >> 16:  # a small data element: its size, its type, and up to 4 bytes
            kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if start + size > min(after, len(data)):
            raise ValueError("it breaks off")
        yield kind, data[start : start + size]
        at = after


def _rows(parts: list[tuple[int, memoryview]], order: str, fields: Collection[str]) -> list[dict[str, Any]]:
    """Of flags, dimensions, name, length of a field's name, names, and then the values of each structure."""
    if _class(parts, order) != STRUCTURES or len(parts) < 5 or len(parts[3][1]) != 4:
        raise ValueError("it is not an array of structures")
    (length,) = struct.unpack(f"{order}i", parts[3][1])
    text = bytes(parts[4][1]).decode("latin-1")
    names = [text[at : at + length].partition("\0")[0] for at in range(0, len(text), length)] if length > 0 else []
    if lacking := [field for field in fields if field not in names]:
        raise ValueError(f"it has no field {lacking[0]}")
    values = [body for kind, body in parts[5:] if kind == MATRIX]
    if len(values) % len(names):
        raise ValueError("it breaks off")
    places = {field: names.index(field) for field in fields}
    return [
        {field: _value(values[first + place], order) for field, place in places.items()}
        for first in range(0, len(values), len(names))
    ]


def _value(matrix: memoryview, order: str) -> str | float | None:
    parts = list(_elements(matrix, order))
    if len(parts) < 4:
        return None
    kind, body = parts[3]
    if _class(parts, order) == TEXT:
        wide = "utf-16-le" if order == "<" else "utf-16-be"
        return bytes(body).decode({2: "latin-1", 4: wide, 17: wide}.get(kind, "utf-8"))  # UnicodeError is a ValueError
    form = NUMBERS.get(kind, "")
    if not form or len(body) != struct.calcsize(f"{order}{form}"):
        return None
    number: float = struct.unpack(f"{order}{form}", body)[0]
    return number


def _class(parts: list[tuple[int, memoryview]], order: str) -> int:
    """The class of an array: the lowest byte of its flags."""
    flags = bytes(parts[0][1][:4])
    return flags[0 if order == "<" else 3] if len(flags) == 4 else 0
