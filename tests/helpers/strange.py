"""Changes shard sets as a stranger can: with checksums that are right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.rows import checksum

MINE = b"what the user has written\n"  # into the file of the fixture `victim`


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """`change` is given the manifest as a dict, without its checksum."""
    path = directory / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["checksum"]
    change(body)
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body))


def change_rows(directory: Path, change: Callable[[NDArray[Any]], Any], *, older: bool = False) -> None:
    """`change` is given the rows of the index. The manifest says what they then are, and of an `older` set less."""
    rows = np.load(directory / "index.npy")
    change(rows)
    np.save(directory / "index.npy", rows)
    digest = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    shorter = np.minimum(rows["width"], rows["height"])

    def agree(body: dict[str, Any]) -> None:
        body |= {"index_sha256": digest, "sides": [max(1, int(shorter.min())), max(1, int(shorter.max()))]}
        end = 0
        for shard in body["shards"]:
            end += shard["samples"]
            shard["rows"] = checksum(rows[end - shard["samples"] : end])
        if older:
            del body["sides"]
            for shard in body["shards"]:
                del shard["rows"]

    change_manifest(directory, agree)
