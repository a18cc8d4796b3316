"""Check a shard set against itself, whole: hashes, tars, images, labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import first_line
from pipelines.files import jsonl, sha256, write_atomically
from pipelines.manifest import MANIFEST, Manifest, ShardError
from pipelines.parallel import parallel, tick
from pipelines.rows import SAMPLE, Rows, checksum, fault, mapped, sides
from pipelines.scan import read_sample
from pipelines.shards import INDEX, QUARANTINE
from pipelines.tars import tar_samples

Problem = dict[str, Any]  # name, shard, reason, and the row within the shard if it concerns one sample


class _Task(NamedTuple):
    """A shard and its rows of the index, as a range: a worker reads them, so that nobody holds all."""

    path: Path
    sha256: str
    rows: range


def verify(directory: Path, *, workers: int) -> list[Problem]:
    """Decode every sample and compare with manifest and index.

    Returns the problems, and writes them to `quarantine.jsonl`; `ShardSet` leaves the samples named there out. Raises
    ShardError if manifest or index cannot be used at all.
    """
    manifest = Manifest.read(directory)
    path = directory / INDEX
    if not path.exists() or sha256(path) != manifest.index_sha256:
        raise ShardError(f"{path} is missing or damaged: run `python -m pipelines index {directory}`")
    index, start, tasks = mapped(path), 0, []
    for shard in manifest.shards:
        rows = range(start, start + shard["samples"])
        if "rows" in shard and (what := _disagrees(index[rows.start : rows.stop], shard, manifest)):
            raise ShardError(f"{path} and {MANIFEST} disagree ({what}): run `python -m pipelines index {directory}`")
        tasks.append(_Task(directory / shard["name"], shard["sha256"], rows))
        start = rows.stop
    if manifest.sides and sides(index) != tuple(manifest.sides):
        raise ShardError(f"{path} and {MANIFEST} disagree (sides): run `python -m pipelines index {directory}`")
    found = parallel(_verify_shard, tasks, workers=workers, images=manifest.samples, label="verify")
    problems = [problem for problems in found for problem in problems]
    quarantine = directory / QUARANTINE
    if problems:
        write_atomically(quarantine, jsonl(problems))
    else:
        quarantine.unlink(missing_ok=True)
    return problems


def _disagrees(rows: Rows, shard: dict[str, Any], manifest: Manifest) -> str:
    """What of a shard's rows is not as the manifest says. A set without checksums may have been damaged before they
    were written down: of that, the samples are problems."""
    if checksum(rows) != shard["rows"]:
        return f"rows of {shard['name']}"
    found = fault(rows, shard["bytes"], len(manifest.classes), manifest.sides)
    return f"row {found[0]} of {shard['name']} {found[1]}" if found else ""


def _verify_shard(task: _Task, tick: Callable[[], None] = tick) -> list[Problem]:
    shard = task.path.name
    if not task.path.exists():
        return [{"shard": shard, "name": shard, "reason": "is missing"}]
    problems: list[Problem] = []
    if sha256(task.path) != task.sha256:
        problems.append({"shard": shard, "name": shard, "reason": "its sha256 differs: copy it again"})
    index = mapped(task.path.parent / INDEX)
    members: dict[int, tuple[str, Any]] = {}
    try:
        for key, group in tar_samples(task.path):
            members |= {member.offset_data: (key, group) for member in group.values()}
    except ShardError as error:
        problems.append({"shard": shard, "name": shard, "reason": str(error)})
    with open(task.path, "rb") as file:
        for row, indexed in enumerate(index[task.rows.start : task.rows.stop].tolist()):
            key, group = members.get(indexed[0], (f"sample {row}", None))
            if reason := _difference(file, group, indexed):
                problems.append({"shard": shard, "row": row, "name": f"{shard}/{key}", "reason": reason})
            tick()
    return problems


def _difference(file: Any, group: Any, indexed: tuple[int, ...]) -> str:
    """Reason to reject a sample; empty if there is none."""
    if group is None:
        return "is not in the tar where the index says"
    try:
        row, _ = read_sample(file, group)
    except Exception as error:  # whatever a decoder makes of garbage
        return f"cannot be read: {first_line(error)}"
    names = SAMPLE.names or ()
    changed = [name for name, a, b in zip(names, row, indexed, strict=True) if a != b]
    # Never "differs": the bytes of quarantine.jsonl are in the set's fingerprint, and so in every checkpoint's meta.
    return f"{' and '.join(changed)} differ from the index" if changed else ""
