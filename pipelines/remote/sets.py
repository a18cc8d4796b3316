"""Opens shard sets, wherever they lie."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from pipelines import quarantine
from pipelines.errors import UserError
from pipelines.files import private_folder, read_file, write_atomically
from pipelines.manifest import LARGEST, MANIFEST, Manifest, ShardError
from pipelines.opened import PATIENCE, ReadError
from pipelines.remote.cache import Cache, Wanted
from pipelines.remote.elsewhere import Elsewhere, brought, patiently
from pipelines.remote.places import expanded, is_url, place_of
from pipelines.rows import SAMPLE
from pipelines.shards import INDEX, ShardSet

SETS = "sets"  # folder of a cache
HEADER = 1 << 16  # bytes of an index beside its rows, at most


def open_set(
    place: str | Path, *, cache: str = "", cache_gb: float = 0.0, patience: float = PATIENCE, listed: bool = True
) -> ShardSet:
    """Opens a set from a directory or an fsspec URL. Raises UserError, ShardError if the set cannot be used, ReadError.

    Args:
        cache: directory of the shards that this node keeps, in which $VARIABLES may stand. A URL needs one; for a
            directory on a slow file system it is optional.
        cache_gb: GB (10^9 bytes) that shards take there, at most; 0: what the disk has.
        patience, listed: as for `ShardSet`.
    """
    if not cache:
        if is_url(place):
            name = place_of(place).name
            raise ShardError(f"{name} is not on this machine: name a directory here for its shards, by data.cache")
        return ShardSet(place, patience, listed=listed)
    if not is_url(place):
        Manifest.read(Path(place))  # its messages know more of a folder
    kept = expanded(cache)
    try:
        here = Elsewhere(place_of(place), Cache(kept, cache_gb), patience)
        shards = ShardSet(_brought(here, patience), patience, listed=listed, here=here)
    except (ReadError, UserError):
        raise
    except OSError as error:
        why = f"{kept} cannot keep shards ({error.strerror})"
        raise UserError(f"{why}: let data.cache be a folder on a disk of this node that can") from error
    shards.waiting = here.spoken
    return shards


def _brought(here: Elsewhere, patience: float) -> Path:
    """Folder of the cache with manifest, index and quarantine of a set. It is named by the content of two of them, so
    what is there stays as it is when the set is changed. The index is fetched once per node."""
    text = _small(here, MANIFEST, patience)
    if text is None:
        raise ShardError(f"{here.path(MANIFEST)} is missing, so this is not a shard set: correct the URL, or pack one")
    manifest = Manifest.of(text, here.path(MANIFEST), f"correct the URL, or run {here.command('index')}")
    bad = _small(here, quarantine.QUARANTINE, patience)
    key = hashlib.sha256(hashlib.sha256(text).digest() + (bad or b"")).hexdigest()
    folder = here.cache.directory / SETS / key
    private_folder(folder)
    for name, data in ((MANIFEST, text), (quarantine.QUARANTINE, bad)):
        if data is not None and not _is(folder / name, data):
            write_atomically(folder / name, data, durable=False)
    _bring_index(here, manifest, folder / INDEX, patience)
    return folder


def _bring_index(here: Elsewhere, manifest: Manifest, kept: Path, patience: float) -> None:
    url, most = here.path(INDEX), manifest.samples * SAMPLE.itemsize + HEADER
    wanted = Wanted(here.place, INDEX, kept, kept.lstat().st_size if kept.exists() else 0, manifest.index_sha256)
    here.cache.mend(wanted)
    if here.cache.holds(wanted):
        return
    try:
        size = patiently(partial(here.place.size, INDEX), url, patience)
        if size > most:
            raise ShardError(f"{url} has {size} bytes, more than {manifest.samples} rows: run {here.command('index')}")
        wanted = wanted._replace(size=size)
        patiently(partial(brought, here.cache, wanted, patience, here.spoken), url, patience).close()
    except FileNotFoundError as error:
        raise ShardError(f"{url} is missing: {here.remedy}") from error


def _small(here: Elsewhere, name: str, patience: float) -> bytes | None:
    """A file of a set; None if there is none. Some stores forbid whatever they do not have, as a quarantine."""
    try:
        return patiently(partial(here.place.small, name, LARGEST), here.path(name), patience)
    except FileNotFoundError:
        return None
    except ReadError as error:
        if name == quarantine.QUARANTINE and isinstance(error.__cause__, PermissionError):
            return None
        raise


def _is(path: Path, data: bytes) -> bool:
    try:
        return read_file(path, LARGEST) == data
    except OSError:
        return False
