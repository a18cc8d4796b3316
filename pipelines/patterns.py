"""Tars by name: a folder, a tar, a glob, or a brace pattern as Hugging Face and webdataset write it. A folder may hold
the tars of several splits, which no set mixes."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from braceexpand import braceexpand

from pipelines.errors import UsageError
from pipelines.files import lost
from pipelines.folders import is_utf8
from pipelines.manifest import ShardError
from pipelines.origin import some
from pipelines.sources import SPLITS, looks_like_split
from pipelines.speech import in_line, say
from pipelines.tars import passed_over
from pipelines.unpacked import SETS, unpacked

MOST = 100_000  # names that a pattern may stand for: a manifest of more shards would be too large
SHOWN = 3  # names in a message
INNERMOST = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?")
ELSEWHERE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+:/")  # a path has lost one slash of a URL
DIGITS = 18  # of a number in a range
SAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def refuse_urls(patterns: Sequence[Path], to: Path | None) -> None:
    """Raises UsageError for what is no place of a file system: a URL, or a command as webdataset takes them."""
    for path in (*patterns, *([to] if to else [])):
        if ELSEWHERE.match(name := str(path)) and not os.path.lexists(path):
            told = in_line(name.replace(":/", "://", 1))  # as it was before it was a path
            first = "fetch the tars first, as with `hf download`"
            raise UsageError(f"{told} is no file: {'name a directory for --to' if path is to else first}")


def refuse_without_to(patterns: Sequence[Path]) -> None:
    """Raises UsageError unless it is one folder, into which its set may be written."""
    name = str(patterns[0])
    tar = os.path.exists(name) or _is_pattern(name) or name.endswith(".tar")
    if patterns[1:] or (tar and not os.path.isdir(name)):
        raise UsageError(
            f"index needs --to for tars that are named one by one or by a pattern: the directory to make the set in, "
            f"of links to them, `python -m pipelines index {_quoted(patterns)} --to DIR`"
        )


def tars_of(patterns: Sequence[Path], to: Path) -> list[Path]:
    """The tars that patterns name, as absolute paths sorted by name; links are not resolved. Raises ShardError if some
    are missing, if two have the same name, or if one pattern holds several splits.

    Args:
        to: the directory of their set, for the commands in messages.
    """
    found, paths, missing = list[Path](), list[Path](), list[str]()
    for pattern in patterns:
        folder = os.path.isdir(pattern)  # unlike Path, takes a name of any length
        here = tars_in(pattern) if folder else _named(pattern, missing)
        if folder or _is_pattern(str(pattern)):
            refuse_splits(here, to)
            found += here
        else:
            paths += here
    if missing:
        count = f"missing: {len(missing)} of {len(missing) + len(found) + len(paths)}"
        raise ShardError(f"there is no {some(missing)} ({count}): put them there, or name the tars that there are")
    refuse_splits(paths, to)  # a shell may have replaced a pattern by all these
    return _distinct(sorted((path.absolute() for path in (*found, *paths)), key=lambda tar: tar.name))


def tars_in(directory: Path) -> list[Path]:
    """The tars directly in a folder, sorted by name; what else looks like tars of a set is told. Raises ShardError if
    there is none, or if one is a link that leads nowhere."""
    found = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if gone := next(filter(None, map(lost, found)), ""):
        raise ShardError(gone)
    tars = [path for path in found if path.is_file()]
    if passed := passed_over(directory, tars):
        say(f"{directory}: only uncompressed *.tar files directly in it are indexed, not {in_line(passed)}")
    if not tars and any(inside.is_dir() for inside in directory.glob("[!.]*")):
        raise ShardError(unpacked(directory))
    if not tars:
        raise ShardError(f"no shards in {directory}: expected uncompressed *.tar files of WebDataset samples")
    return tars


def refuse_names(tars: Sequence[Path]) -> None:
    """Raises ShardError for a name that a manifest does not take."""
    if strange := [tar for tar in tars if not is_utf8(os.fsencode(tar.name)) or in_line(tar.name) != tar.name]:
        name, folder = os.fsencode(strange[0].name), strange[0].parent
        raise ShardError(f"the tar {name!r} in {folder} has a name that is not UTF-8, or not in one line: rename it")


def refuse_splits(tars: Sequence[Path], to: Path | None = None) -> None:
    """Raises ShardError if the names of tars hold words of different splits: a set of all would train on validation
    images. The message has the command for each split.

    Args:
        to: where the set was to be made, if not among the tars.
    """
    splits = dict[frozenset[str], list[Path]]()
    for tar in tars:
        if words := frozenset(SAME.get(word, word) for word in _split_words(tar)):
            splits.setdefault(words, []).append(tar)
    if len(splits) < 2:
        return
    base = SETS if to is None else to.parent if looks_like_split(to.name) else to
    names, lines = list[str](), list[str]()
    for mine in splits.values():
        others = [tar for tar in tars if tar not in mine]
        names.append("-".join(_split_words(mine[0])))
        lines.append(f"`{_command([_pattern_of(mine, others)], base / names[-1])}`")
    raise ShardError(
        f"{tars[0].parent} holds tars of {' and '.join(names)}, and a set is one split: index each, "
        f"{' and '.join(lines)}"
    )


def _command(patterns: Sequence[str | Path], to: Path) -> str:
    return f"python -m pipelines index {_quoted(patterns)} --to {shlex.quote(str(to))}"


def _quoted(patterns: Sequence[str | Path]) -> str:
    told = [shlex.quote(str(pattern)) for pattern in patterns[:SHOWN]]
    return " ".join([*told, "..."] if len(patterns) > SHOWN else told)


def _split_words(tar: Path) -> list[str]:
    return [word for word in re.findall("[a-z]+", tar.stem.lower()) if word in SPLITS]


def _pattern_of(mine: Sequence[Path], others: Sequence[Path]) -> str:
    """A pattern that matches these tars and no others."""
    name, words = mine[0].name, _split_words(mine[0])
    starts = [name[: name.lower().index(word) + len(word)] for word in words]
    tried = [f"{glob.escape(start)}*.tar" for start in starts] + [f"*{word}*.tar" for word in words]
    fits = [all(fnmatchcase(tar.name, one) == (tar in mine) for tar in (*mine, *others)) for one in tried]
    listed = ",".join(tar.name for tar in mine)
    short = next((one for one, fit in zip(tried, fits, strict=True) if fit), f"{{{listed}}}" if mine[1:] else listed)
    return os.path.join(glob.escape(str(mine[0].parent)), short)


def _is_pattern(name: str) -> bool:
    return not os.path.lexists(name) and ("{" in name or glob.has_magic(name))


def _named(pattern: Path, missing: list[str]) -> list[Path]:
    """The tars of a pattern that is not a folder. Adds to `missing` those that it names and that are not there. Raises
    ShardError."""
    tars, others = list[Path](), list[str]()
    for name in _expanded(str(pattern)):
        globbed = _is_pattern(name)
        paths = sorted(glob.glob(name)) if globbed else [name]
        if not paths:
            raise ShardError(f"{name} matches no file: name tars, or the folder that holds them")
        for path in map(Path, paths):
            if gone := lost(path):
                raise ShardError(gone)
            if path.suffix == ".tar" and path.is_file():
                tars.append(path)
            elif globbed:
                others.append(path.name)
            elif path.exists():
                raise ShardError(f"{path} is not an uncompressed *.tar file: name tars, or the folder that holds them")
            else:
                missing.append(name)
    if others:
        say(f"{pattern}: only uncompressed *.tar files are indexed, not {some(others)}")
    if not tars and not missing:
        raise ShardError(f"{pattern} matches no *.tar file: name tars, or the folder that holds them")
    return tars


def _expanded(pattern: str) -> list[str]:
    """The names that a brace pattern stands for. Raises ShardError."""
    if "{" not in pattern or os.path.lexists(pattern):
        return [pattern]
    if _most(pattern) > MOST:
        raise ShardError(f"{pattern} stands for more than {MOST} names, and a set has fewer tars: correct its ranges")
    try:
        return list(braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{pattern} has unmatched braces: close each, as in {{0000..1023}}") from error


def _most(pattern: str) -> int:
    """At least the number of names that a brace pattern stands for."""
    most = 1
    while most <= MOST and (found := INNERMOST.search(pattern)):
        if numbers := RANGE.fullmatch(found[1]):
            if max(map(len, filter(None, numbers.groups()))) > DIGITS:
                return MOST + 1
            most *= abs(int(numbers[2]) - int(numbers[1])) // (int(numbers[3] or 1) or 1) + 1
        else:
            most *= 52 if LETTERS.fullmatch(found[1]) else found[1].count(",") + 1
        pattern = pattern[: found.start()] + pattern[found.end() :]
    return most


def _distinct(tars: Sequence[Path]) -> list[Path]:
    """Each tar once. Raises ShardError if two have the same name."""
    found = list[Path]()
    for name, same in groupby(tars, lambda tar: tar.name):
        first, *others = dict.fromkeys(same)
        if others:
            raise ShardError(
                f"{first} and {others[0]} have the same name, and a set is one folder: link to one {name} by another "
                f"name, or index each folder by itself"
            )
        found.append(first)
    return found
