"""Manifest of a shard set: its content, and the index and tars that belong to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from pipelines.errors import UserError
from pipelines.files import read_file, write_atomically
from pipelines.speech import in_line
from pipelines.unpacked import unpacked
from pipelines.valid import SHOWN, Count, Finite, Invalid, parsed

VERSION = 1
MANIFEST = "manifest.json"
LARGEST = 32 << 20  # bytes of a manifest: one of 10^5 shards has 21 MB
LEAST = 1024  # bytes of a sample: header and data of its image
IMAGENET = "imagenet"  # whose usual statistics may stand in place of those of the images
CLASSES, SAMPLES = 10**6, 10**8  # classes of a set, and samples of a shard, at most: memory grows with them

Hash = Annotated[str, Field(min_length=64, max_length=64)]
Level = Annotated[float, Field(ge=0, le=1)]  # for pixels in [0, 1]: a mean, a deviation
Part = Annotated[float, Field(ge=-1.01, le=1.01)]  # of a vector of length 1; rounded
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Colour = Annotated[list[Level], Field(min_length=3, max_length=3)]
Errors = Annotated[list[Error], Field(min_length=3, max_length=3)]
Vector = Annotated[list[Part], Field(min_length=3, max_length=3)]


class ShardError(UserError):
    """An unusable shard set; the message names the file and the remedy."""


class Shard(TypedDict):
    """A shard as the manifest describes it. A dict, since there may be 10^5."""

    name: str
    samples: Annotated[int, Field(ge=0, le=SAMPLES)]
    bytes: Count
    sha256: Hash
    rows: NotRequired[Count]


@dataclass(frozen=True)
class Estimate:
    """What is known of statistics that are those of a sample.

    Attributes:
        images: number of images that were drawn and decoded.
        mean, std, eigenvalues: standard errors of these fields of the manifest.
    """

    images: Annotated[Count, Field(ge=1)]
    mean: Errors
    std: Errors
    eigenvalues: Errors


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
        estimate: if mean, std, eigenvalues and eigenvectors are those of a sample of the images.
        usual: "imagenet" if these four are the usual ones of ImageNet, and not those of the images.
    """

    split: str
    samples: Count
    classes: Annotated[list[str], Field(max_length=CLASSES)]
    shards: list[Shard]
    index_sha256: Hash
    mean: Colour
    std: Colour
    eigenvalues: Colour
    eigenvectors: Annotated[list[Vector], Field(min_length=3, max_length=3)]
    stored: dict[str, bool | int | Finite | str] = field(default_factory=dict)
    source: str = ""
    sides: list[Annotated[int, Field(ge=1, le=65535)]] = field(default_factory=list)
    version: int = VERSION
    estimate: Estimate | None = None
    usual: Literal["", "imagenet"] = ""

    def write(self, directory: Path) -> None:
        """Writes the manifest atomically, with a checksum over everything else."""
        body = asdict(self)
        for name in ("estimate", "usual"):  # most sets have neither, and the bytes of earlier versions
            if not body[name]:
                del body[name]
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
        remedy = f"run `python -m pipelines index {directory}` to rebuild it"
        return Manifest.of(read_file(path, LARGEST), str(path), remedy)

    @staticmethod
    def of(text: bytes, path: str, remedy: str) -> Manifest:
        """The manifest in a file's text. Raises ShardError, which names the path and the remedy."""
        try:
            body = json.loads(text)
            if not isinstance(body, dict):
                raise Invalid("it should be an object")
            foreign, version = "checksum" not in body, body.get("version")
            if not foreign and body.pop("checksum") != _checksum(body):
                raise Invalid("its checksum does not match")
            if not foreign and version == VERSION:  # another version has other fields
                manifest = parsed(Manifest, text)
                if wrong := _contradiction(manifest):
                    raise Invalid(wrong)
                for shard in manifest.shards:
                    if not shard["name"].isascii():
                        shard["name"] = os.fsdecode(shard["name"].encode())  # the same name in any locale
                return manifest
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        if foreign:
            raise ShardError(f"{path} is another program's: move it away, then make a set here")
        raise ShardError(f"{path} has format version {version!r:.{SHOWN}}, this program reads {VERSION}: pack again")


def refuse_tar(directory: Path) -> None:
    """Raises ShardError if a tar, or a pattern of tars, is given in place of the directory of a set."""
    if directory.is_file() or (not directory.is_dir() and re.search(r"[{}*]|\.tar$", str(directory))):
        raise ShardError(
            f"{directory} is {'a file' if directory.is_file() else 'no directory'}: give the directory of a set, which "
            f"`python -m pipelines index {shlex.quote(str(directory))} --to DIR` makes of tars of another tool"
        )


def _contradiction(manifest: Manifest) -> str:
    """How fields that are right by themselves contradict each other; empty if they do not."""
    names = {shard["name"] for shard in manifest.shards}
    if len(names) < len(manifest.shards):
        return "shards has a name twice"
    together = "".join(names)
    if names & {"", ".", ".."} or "/" in together or in_line(together) != together:
        return "shards has a name that is not that of a file in the set"
    if (total := sum(shard["samples"] for shard in manifest.shards)) != manifest.samples:
        return f"samples is {manifest.samples}, and the shards have {total}"
    if any(shard["samples"] * LEAST > shard["bytes"] for shard in manifest.shards):
        return "shards has one of more samples than its bytes can hold"
    if manifest.sides and not (len(manifest.sides) == 2 and manifest.sides[0] <= manifest.sides[1]):
        return "sides should be the least and the largest one"
    if manifest.estimate and manifest.usual:
        return "estimate and usual should not be there together"
    if manifest.estimate and manifest.estimate.images > manifest.samples:
        return f"estimate.images is {manifest.estimate.images}, and there are {manifest.samples} samples"
    return ""


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
