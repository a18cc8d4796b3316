"""Manifest of a shard set: its content, and the index and tars that belong to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.unpacked import unpacked

VERSION = 1
MANIFEST = "manifest.json"
MOST = 1 << 48  # samples or bytes per shard: their sum stays within 64 bits


class ShardError(UserError):
    """An unusable shard set; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """Description of a shard set.

    Attributes:
        classes: class names; the position in the list is the label.
        shards: per shard its `name`, number of `samples`, `bytes`, `sha256`, and the checksum of its `rows` of the
            index. Older sets lack the last, and `sides`.
        index_sha256: SHA-256 of `index.npy`.
        mean, std: per RGB channel, pixels scaled to [0, 1].
        eigenvalues, eigenvectors: of the 3x3 covariance of RGB values scaled to [0, 1], largest first;
            eigenvectors are columns.
        stored: how the images were stored (shorter side, quality, seed).
        source: fingerprint of what was packed, by which a repeated pack recognises its own work.
        sides: least and largest shorter side of the images, in pixels.
    """

    split: str
    samples: int
    classes: list[str]
    shards: list[dict[str, Any]]
    index_sha256: str
    mean: list[float]
    std: list[float]
    eigenvalues: list[float]
    eigenvectors: list[list[float]]
    stored: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    sides: list[int] = field(default_factory=list)
    version: int = VERSION

    def write(self, directory: Path) -> None:
        """Writes the manifest atomically, with a checksum over everything else."""
        body = asdict(self)
        body["checksum"] = _checksum(body)
        write_atomically(directory / MANIFEST, json.dumps(body, indent=1, ensure_ascii=False).encode())

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Returns the manifest of a set. Raises ShardError with the remedy if there is no usable one."""
        path = directory / MANIFEST
        refuse_tar(directory)
        if not path.exists():
            if not any(directory.glob("*.tar")):
                raise ShardError(unpacked(directory))
            raise ShardError(
                f"{directory} has shards but no {MANIFEST}: repeat the pack command to finish an interrupted pack, "
                f"or run `python -m pipelines index {directory}` on shards of another tool"
            )
        try:
            body = json.loads(path.read_bytes())
            foreign = isinstance(body, dict) and "checksum" not in body
            if not foreign and body.pop("checksum") != _checksum(body):
                raise ValueError("its checksum does not match")
            if not foreign and (version := body["version"]) == VERSION:  # another version has other fields
                known = {f.name for f in fields(Manifest)}
                manifest = Manifest(**{name: value for name, value in body.items() if name in known})
                if wrong := next(_wrong(manifest), None):
                    raise ValueError(f"its {wrong} cannot be right")
                for shard in manifest.shards:
                    shard["name"] = os.fsdecode(shard["name"].encode())  # the same name in any locale
                return manifest
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            remedy = f"run `python -m pipelines index {directory}` to rebuild it"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        if foreign:
            raise ShardError(f"{path} is another program's: move it away, then make a set here")
        raise ShardError(f"{path} has format version {version}, this program reads {VERSION}: pack again")


def refuse_tar(directory: Path) -> None:
    """Raises ShardError if a tar, or a pattern of tars, is given in place of their directory."""
    if directory.is_file() or (not directory.is_dir() and re.search(r"[{}*]|\.tar$", str(directory))):
        raise ShardError(
            f"{directory} is {'a file' if directory.is_file() else 'no directory'}: give the directory that holds the "
            f"tars, after `python -m pipelines index {directory.parent}` if another tool made them"
        )


def _wrong(manifest: Manifest) -> Iterator[str]:
    """Fields with values that this program never writes. Raises numpy's errors for lists that are not numeric."""
    for name, kind in (("split", str), ("classes", list), ("index_sha256", str), ("stored", dict), ("source", str)):
        if type(getattr(manifest, name)) is not kind:
            yield name
    if not all(type(name) is str for name in manifest.classes):
        yield "classes"
    if not _is_count(manifest.samples):
        yield "samples"
    if not (type(manifest.shards) is list and all(map(_is_shard, manifest.shards))):
        yield "shards"
    for name, shape in (("mean", (3,)), ("std", (3,)), ("eigenvalues", (3,)), ("eigenvectors", (3, 3))):
        numbers = np.array(getattr(manifest, name))
        if numbers.shape != shape or numbers.dtype.kind not in "if" or not np.isfinite(numbers).all():
            yield name
    sides = manifest.sides
    if type(sides) is not list or (
        sides and not (len(sides) == 2 and all(map(_is_count, sides)) and 0 < sides[0] <= sides[1])
    ):
        yield "sides"


def _is_shard(shard: Any) -> bool:  # no more checks than needed: there may be 10^5 shards
    return (
        type(shard) is dict
        and type(name := shard.get("name")) is str
        and name not in ("", ".", "..")
        and "/" not in name  # must lie in the set
        and "\0" not in name
        and type(shard.get("sha256")) is str
        and _is_count(shard.get("samples"))
        and _is_count(shard.get("bytes"))
        and _is_count(shard.get("rows", 0))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
