"""The manifest of a shard set: what the set holds, and which index and tars belong to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import write_atomically

VERSION = 1
MANIFEST = "manifest.json"


class ShardError(UserError):
    """A shard set that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """Description of a shard set.

    Attributes:
        classes: class names; the place in the list is the label.
        shards: for each shard its `name`, number of `samples`, `bytes` and `sha256`, and the checksum of its `rows` of
            the index. Sets of an earlier day lack the last, and the sides.
        index_sha256: of `index.npy`.
        mean, std: per RGB channel, pixels scaled to [0, 1].
        eigenvalues, eigenvectors: of the 3x3 covariance of RGB values scaled to [0, 1], largest first;
            eigenvectors are columns.
        stored: how the images were stored (shorter side, quality, seed).
        source: fingerprint of what was packed, so that a repeated pack knows its own work.
        sides: the least and the largest shorter side of the images, in pixels.
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
        """Write atomically, with a checksum over everything else."""
        body = asdict(self)
        body["checksum"] = _checksum(body)
        write_atomically(directory / MANIFEST, json.dumps(body, indent=1, ensure_ascii=False).encode())

    @staticmethod
    def read(directory: Path) -> Manifest:
        """The manifest of a set. Raises ShardError with the remedy if there is no usable one."""
        path = directory / MANIFEST
        if not path.exists():
            if not any(directory.glob("*.tar")):
                raise ShardError(f"no shards in {directory}: make them with `python -m pipelines pack ... {directory}`")
            raise ShardError(
                f"{directory} has shards but no {MANIFEST}: repeat the pack command to finish an interrupted pack, "
                f"or run `python -m pipelines index {directory}` on shards of another tool"
            )
        try:
            body = json.loads(path.read_bytes())
            if body.pop("checksum") != _checksum(body):
                raise ValueError("its checksum does not match")
            if (version := body["version"]) == VERSION:  # else its fields are others
                known = {f.name for f in fields(Manifest)}
                return Manifest(**{name: value for name, value in body.items() if name in known})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            remedy = f"run `python -m pipelines index {directory}` to make it anew"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        raise ShardError(f"{path} has format version {version}, this program reads {VERSION}: pack anew")


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
