"""The development kit of ILSVRC-2012: the classes, and the labels of the validation images.

Its readme.txt, section 3: the ground truth gives a validation image's ILSVRC2012_ID, which data/meta.mat maps to a
WordNet id. These ids are not in the order of any labels in use.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import SourceError, first_line
from pipelines.files import read_file
from pipelines.published.mat import structures
from pipelines.speech import in_line
from pipelines.tars import tar_members

LARGEST = 64 << 20  # bytes of a devkit, packed or not
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
WNID = re.compile(r"n\d{8}")
WORDS = 1000  # characters of a class's words
FIELDS = ("ILSVRC2012_ID", "WNID", "words", "num_children")
GZIP = b"\x1f\x8b"
EXPECTED = "give ILSVRC2012_devkit_t12.tar.gz"


class Labels(NamedTuple):
    """What is known of classes and validation images, by WordNet id.

    Attributes:
        path: where this comes from, for messages.
        words: of each class.
        labels: WordNet id of each validation image, by file name without extension.
    """

    path: Path
    words: dict[str, str]
    labels: dict[str, str]


def read_devkit(path: Path) -> Labels:
    """What a devkit says, be it a tar.gz, its tar, or its folder. Raises SourceError."""
    files = {name: _file(path, name) for name in (META, TRUTH)} if path.is_dir() else _unpacked(path)
    for name in (META, TRUTH):
        if name not in files:
            raise SourceError(f"the devkit {path} has no {name}: {EXPECTED}")
    leaves, words = _leaves(path, files[META])
    labels = {}
    for number, line in enumerate(files[TRUTH].split(), 1):
        wnid = leaves.get(int(line)) if re.fullmatch(rb"\d{1,9}", line) else None
        if not wnid:
            raise SourceError(
                f"line {number} of {TRUTH} in {path} is {in_line(repr(line[:20])[1:])}, which is the ILSVRC2012_ID of "
                f"no class in {META}: {EXPECTED} as published"
            )
        labels[f"ILSVRC2012_val_{number:08d}"] = wnid
    return Labels(path, words, labels)


def _file(folder: Path, name: str) -> bytes:
    try:
        return read_file(folder / name, LARGEST)
    except FileNotFoundError as error:
        raise SourceError(f"the devkit {folder} has no {name}: {EXPECTED}") from error


def _unpacked(path: Path) -> dict[str, bytes]:
    """The two files in a devkit. Raises SourceError."""
    data = read_file(path, LARGEST)
    try:
        if data.startswith(GZIP):
            stream = zlib.decompressobj(wbits=31)
            data = stream.decompress(data, LARGEST + 1)
            if len(data) > LARGEST:
                raise ValueError(f"unpacked, it has more than {LARGEST} bytes")
            if not stream.eof:
                raise ValueError("it breaks off")
        found = {}
        for member in tar_members(BytesIO(data)):
            for name in (META, TRUTH):
                if f"/{member.name}".endswith(f"/{name}") and member.isreg():
                    found[name] = data[member.offset_data : member.offset_data + member.size]
    except Exception as error:  # tarfile raises anything on garbage
        raise SourceError(f"{path} is not a whole devkit ({first_line(error)}): {EXPECTED}, fetched anew") from error
    return found


def _leaves(path: Path, meta: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """WordNet ids by ILSVRC2012_ID, and words by WordNet id, of the classes: the leaves of the tree. Raises
    SourceError."""
    try:
        rows = [row for row in structures(meta, "synsets", FIELDS) if _number(row, "num_children") == 0]
        leaves = {_number(row, "ILSVRC2012_ID"): _text(row, "WNID") for row in rows}
        words = {_text(row, "WNID"): _text(row, "words") for row in rows}
        if not rows:
            raise ValueError("synsets has no class without children")
        if len({*leaves.values()}) < len(rows):
            raise ValueError(f"two classes are {_twice(rows, leaves)}")
        if odd := [wnid for wnid in words if not WNID.fullmatch(wnid)]:
            raise ValueError(f"WNID is {odd[0]!r:.40}, which is not of the form n01440764")
    except ValueError as error:
        raise SourceError(f"{META} in the devkit {path} cannot be read ({error}): {EXPECTED} as published") from error
    return leaves, words


def _twice(rows: list[dict[str, Any]], leaves: dict[int, str]) -> str:
    name = "ILSVRC2012_ID" if len(leaves) < len(rows) else "WNID"
    return f"{name} {Counter(str(row[name]) for row in rows).most_common(1)[0][0]:.40}"


def _number(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if not isinstance(value, int | float) or value != value or not 0 <= value < 1 << 31 or value != int(value):
        raise ValueError(f"{name} should be a number, and is {value!r:.40}")
    return int(value)


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= WORDS or in_line(value) != value:
        raise ValueError(f"{name} should be a line of text, and is {value!r:.40}")
    return value
