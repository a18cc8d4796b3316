"""The tables that Kaggle's "ImageNet Object Localization Challenge" adds to ILSVRC-2012.

Its page "Data" describes them: LOC_val_solution.csv has ImageId and PredictionString, the latter five words per box, of
which the first is the class; all boxes of an image are of one class. A line of LOC_synset_mapping.txt is a WordNet id
and words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import SourceError
from pipelines.files import read_file
from pipelines.published.devkit import WORDS, Labels
from pipelines.speech import in_line

SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
LARGEST = 256 << 20  # bytes of a table
ROW = re.compile(r'"?([^",/]{1,255}?)(?:\.jpe?g)?"?,\s*"?(n\d{8})\b', re.IGNORECASE)
LINE = re.compile(rf"(n\d{{8}}) (\S.{{0,{WORDS}}})")


def read_table(path: Path, mapping: Path | None) -> Labels:
    """The labels of a csv whose rows begin with an image's file name, with or without .JPEG, and the WordNet id of its
    class, and the words of a mapping if there is one. Raises SourceError."""
    labels = dict[str, str]()
    for number, line in _lines(path):
        row = ROW.match(line)
        if row is None:
            if number == 1:  # names of columns
                continue
            raise SourceError(
                f"line {number} of {path} is {in_line(repr(line[:60]))}: it should be an image and the WordNet id of "
                f"its class, such as ILSVRC2012_val_00000001,n01440764"
            )
        if labels.setdefault(row[1], row[2]) != row[2]:
            raise SourceError(
                f"line {number} of {path} gives {in_line(row[1])} the class {row[2]}, an earlier one "
                f"{labels[row[1]]}: an image has one class"
            )
    if not labels:
        raise SourceError(f"{path} names no image: give {SOLUTION}, or rows such as ILSVRC2012_val_00000001,n01440764")
    return Labels(path, read_mapping(mapping) if mapping else {}, labels)


def read_mapping(path: Path) -> dict[str, str]:
    """Words by WordNet id. Raises SourceError."""
    words = {}
    for number, line in _lines(path):
        row = LINE.fullmatch(line)
        if row is None or in_line(line) != line:
            raise SourceError(
                f"line {number} of {path} is {in_line(repr(line[:60]))}: it should be a WordNet id and words, such "
                f"as n01440764 tench, Tinca tinca"
            )
        words[row[1]] = row[2]
    return words


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Raises SourceError."""
    try:
        text = read_file(path, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a text file in UTF-8 ({error.reason}): save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()
