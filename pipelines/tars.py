"""The samples of a tar, as any WebDataset tool groups them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.manifest import ShardError
from pipelines.rows import HEADER


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Samples of a tar, grouped as WebDataset does: neighbours whose names agree up to the first dot of the file name.

    Yields (key, {extension: member}). Raises ShardError if the tar is truncated, damaged or compressed.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            key, members = "", dict[str, tarfile.TarInfo]()
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not member.isreg() or not extension:
                    continue
                if (name := f"{folder}/{stem}" if folder else stem) != key:
                    if members:
                        yield key, members
                    key, members = name, {}
                members[extension.lower()] = member
            if members:
                yield key, members
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(HEADER) != bytes(HEADER):  # tarfile takes a damaged header for the end and says nothing
                    raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a whole, uncompressed tar ({error}): copy or make it anew") from error
