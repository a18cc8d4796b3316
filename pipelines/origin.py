"""Origin of a shard set: how a repeated pack recognises its work and reports differences; where a set may be made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import SourceError
from pipelines.files import read_file, write_atomically
from pipelines.folders import Found, is_litter
from pipelines.limits import USUAL
from pipelines.manifest import LARGEST, MANIFEST, Manifest, ShardError
from pipelines.quarantine import QUARANTINE
from pipelines.rows import mapped
from pipelines.scan import REJECTED
from pipelines.scanned import WORK
from pipelines.shards import INDEX
from pipelines.sources import ImageFolder, Item, Source, called, inventory
from pipelines.speech import in_line

FILES = "files.npy"  # in a set: the user's files that were packed
MANY = 10**6  # files of a source
PACKED = np.dtype([("name", "<u8"), ("size", "<i8")])  # hash of the name; bytes
# Files of an unfinished set besides shards and hidden ones; and those from before: `slurm submit pack` logs there.
OURS = {MANIFEST, INDEX, REJECTED, QUARANTINE, FILES}
BEFORE = {"slurm"}
SHOWN = 5  # names listed in a message


class Fingerprints(NamedTuple):
    """Hashes, in hex, of everything that determines the bytes of a set.

    Attributes:
        fingerprint: of the names and sizes of the files, the classes and the options.
        small_kept: the same with small images kept, if they are not: before `keep_small` existed they always were,
            and it was not hashed.
        earlier: the same by earlier versions of this program, which did not hash sizes.
    """

    fingerprint: str
    small_kept: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()

    @property
    def counts(self) -> tuple[str, ...]:
        """Fingerprints of sets that count as finished."""
        return (self.fingerprint, *self.small_kept, *self.earlier)


def fingerprints(source: Source, directory: Path, stored: dict[str, Any], split: str) -> Fingerprints:
    """Fingerprints of a source packed with these options. Raises SourceError.

    Args:
        stored: the options of `pack`.
    """
    classes, items = inventory(source)
    if not items:
        expected = "SRC/<class>/<image>" if isinstance(source, ImageFolder) else f"items of {called(source)}"
        raise SourceError(f"no images to pack into {directory}: expected {expected}")
    sizes = [file.size for file in source.files.found] if source.files else None
    return _fingerprints(classes, items, sizes, stored, split)


def refuse_incomparable(items: Sequence[Item]) -> None:
    """Raises SourceError for items of which `listing` and `fingerprints` cannot be made."""
    _json(list(items))


def listing(source: Source) -> str:
    """Hash, in hex, of the classes and items of a source."""
    classes, items = inventory(source)
    return _hash(_json([items, classes]))


def packed_earlier(source: Source, manifest: Manifest, stored: dict[str, Any], split: str) -> bool:
    """True if an earlier version of this program, which listed files differently, packed this source into the set."""
    if not source.files or not manifest.source:
        return False
    classes, items = source.files.before()
    return manifest.source in _fingerprints(classes, items, None, stored, split).counts


def write_files(directory: Path, files: Sequence[Found]) -> None:
    """Records which files are packed."""
    data = BytesIO()
    np.save(data, np.array([(_short(file.name), file.size) for file in files], PACKED))
    write_atomically(directory / FILES, data.getvalue())


def another(source: Source, directory: Path, manifest: Manifest, stored: dict[str, Any]) -> ShardError:
    """The error to raise if a set is not what would be packed now."""
    was, stored = (USUAL.as_options() | options for options in (manifest.stored, stored))
    changed = [name for name in stored if name in was and was[name] != stored[name]]
    if not manifest.source:
        why = "made into a set by `index`"
    elif changed:
        how = " ".join(f"--{name.replace('_', '-')} {was[name]}" for name in changed)
        why = f"packed with {in_line(how)} and not {', '.join(str(stored[name]) for name in changed)}"
    elif told := _changes(source, directory):
        why = f"packed before the source changed ({told})"
    else:
        why = "packed from another source, or into a directory of another name"
    holds = f"already holds {manifest.samples:,} images in {len(manifest.shards)} shards, {why}"
    return ShardError(
        f"{directory} {holds}: pack into another directory, or remove {directory} with all of these first"
    )


def newer(source: Source, directory: Path) -> int:
    """Number of files of the source that changed after the set was finished."""
    finished = (directory / MANIFEST).stat().st_mtime_ns
    return sum(file.changed > finished for file in source.files.found) if source.files else 0


def not_reached(source: Source, directory: Path) -> tuple[int, int]:
    """For a set of an earlier version of this program: number of files it did not see, such as behind a link, and
    number of those it saw that are skipped now."""
    if not source.files or (directory / FILES).exists():
        return 0, 0
    was, now = {item.name for item in source.files.before()[1]}, {item.name for item in source.items}
    return len(now - was), len(was - now)


def refuse_strangers(directory: Path, source: Source | None = None) -> None:
    """Raises ShardError for a directory with files other than a set of ours, or inside its own source, and SourceError
    for a source whose classes look like splits. A set that is finished or begun is accepted."""
    if (directory / MANIFEST).exists():
        return
    for folder in source.image_folders if source else ():
        if directory.resolve().is_relative_to(folder.root.resolve()):
            what = "whose folders are the classes" if folder is source else "a folder of images"
            raise ShardError(f"{directory} lies in {folder.root}, {what}: pack into a directory beside it")
    begun = (directory / WORK).exists()
    if isinstance(source, ImageFolder) and not begun:
        source.refuse_splits()
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ShardError(f"{directory} is a file: name a directory to pack into")
    names = sorted(path.name for path in directory.iterdir())
    strange = [
        name
        for name in names
        if not (
            name in BEFORE or is_litter(name) or (begun and (name in OURS or re.fullmatch(r"shard-\d+\.tar", name)))
        )
    ]
    if strange:
        raise ShardError(
            f"{directory} holds {some(strange)}, which `pack` did not make: pack into an empty or a new directory"
        )


def refuse_inside(directory: Path, source: Source) -> None:
    """Raises ShardError for a directory inside one of the source's folders, by whatever path."""
    above = [path.stat() for path in (directory, *directory.absolute().parents) if path.exists()]
    for folder in source.image_folders:
        if folder.keys & {(status.st_dev, status.st_ino) for status in above}:
            raise ShardError(
                f"{directory} lies in a folder of images of {folder.root}: pack into a directory beside it"
            )


def refuse_foreign(directory: Path) -> None:
    """Raises ShardError if manifest or index are files of another program."""
    body: Any = {"checksum": ""}
    with suppress(OSError, ValueError, RecursionError):  # missing, or a damaged one of ours
        body = json.loads(read_file(directory / MANIFEST, LARGEST))
    if not (isinstance(body, dict) and "checksum" in body):
        raise ShardError(f"{directory / MANIFEST} is another program's: move it away")
    if (directory / INDEX).exists():
        try:
            mapped(directory / INDEX)
        except ValueError as error:
            if not (directory / MANIFEST).exists():
                raise ShardError(f"{directory / INDEX} is not an index of ours: move it away") from error


def refuse_other_tars(directory: Path, names: Collection[str]) -> None:
    """Raises ShardError for a directory that holds anything but a set of these tars, finished or begun."""
    if directory.exists() and not directory.is_dir():
        raise ShardError(f"{directory} is a file: name a directory for the set")
    begun = any((directory / ours).exists() for ours in (MANIFEST, WORK))
    inside = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    strange = [
        name for name in inside if not (name in names or name in BEFORE or is_litter(name) or (begun and name in OURS))
    ]
    if strange:
        raise ShardError(
            f"{directory} holds {some(strange)}, which is none of the set: name an empty or a new directory for --to"
        )


def named(classes: Sequence[str]) -> str:
    """Number of classes, and the first of their names."""
    return f"{len(classes)} classes: {some(classes)}"


def some(names: Sequence[str]) -> str:
    """The first few of a list of names that may hold thousands."""
    return ", ".join([*map(in_line, names[:SHOWN]), *(["..."] if len(names) > SHOWN else [])])


def _fingerprints(
    classes: list[str], items: list[Item], sizes: list[int] | None, stored: dict[str, Any], split: str
) -> Fingerprints:
    head = _json([items, classes, split])[:-1]
    known = {name: value for name, value in stored.items() if name != "keep_small"}
    # Earlier versions wrote 64 for the default and 64.0 for a given value.
    ways = [known | {"shard_mb": kind(known["shard_mb"])} for kind in (float, int)]
    kept = tuple(_hash(f"{head}, {json.dumps(way)}]") for way in ways)
    enlarges = stored["shorter_side"] and not stored["keep_small"]
    names = tuple(_hash(f"{way}, small images enlarged") for way in kept) if enlarges else kept
    if sizes is None:
        return Fingerprints(names[0], kept if enlarges else (), names[1:])
    sized, sized_kept = (_hash(f"{way[0]}, of {sizes} bytes") for way in (names, kept))
    return Fingerprints(sized, (sized_kept, *kept) if enlarges else (), names)


def _changes(source: Source, directory: Path) -> str:
    """How the files of the source differ from those that were packed; empty if that is unknown."""
    try:
        rows = mapped(directory / FILES, PACKED)
        if len(rows) > MANY + 10 * len(source.files.found if source.files else ()):
            return ""  # not what was packed from anything like this source
        was = dict(zip(rows["name"].tolist(), rows["size"].tolist(), strict=True))
    except (OSError, ValueError):  # missing, or garbage
        return ""
    now = {_short(file.name): file for file in source.files.found} if source.files else {}
    sizes = [file.name for key, file in now.items() if was.get(key, file.size) != file.size]
    new = [file.name for key, file in now.items() if key not in was]
    gone = len(was.keys() - now.keys())
    told = [f"{len(names)} {what}: {names[0]}" for what, names in (("of another size", sizes), ("new", new)) if names]
    return "; ".join(told + ([f"{gone} gone"] if gone else []))


def _json(values: list[Any]) -> str:
    try:
        return json.dumps(values, default=str, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"the references of a source cannot be compared ({error}): make them names, numbers, or lists of these"
        ) from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _short(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
