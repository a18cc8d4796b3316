"""Full check of a shard set against itself: hashes, tars, images, labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines import quarantine
from pipelines.errors import first_line, of_the_system
from pipelines.files import lost, regular, sha256
from pipelines.limits import USUAL, Limits, limited
from pipelines.manifest import MANIFEST, Manifest, Shard, ShardError
from pipelines.order import Ints
from pipelines.parallel import parallel, tick
from pipelines.rows import SAMPLE, Rows, checksum, fault, mapped, sides
from pipelines.sample import read_sample
from pipelines.shards import INDEX, TURNED, ShardSet
from pipelines.shown import refused
from pipelines.tars import tar_samples

Problem = dict[str, Any]  # name, shard, reason, and the row limited the shard if it concerns one sample


class _Task(NamedTuple):
    """A shard and the range of its rows in the index. Workers read the rows, so that no process holds all of them."""

    path: Path
    sha256: str
    rows: range
    turned: bool = False


def verify(
    directory: Path, *, workers: int, allowed: Limits = USUAL, tell: Callable[[Problem], None] = lambda _: None
) -> list[Problem]:
    """Decodes every sample and compares it with manifest and index.

    Returns the problems and writes them to `quarantine.jsonl`, so that these samples are never shown; `tell` is called
    with each before that, since the set may be read-only. Raises ShardError if manifest or index cannot be used at all,
    or if the list cannot be written.

    Args:
        allowed: how large an image may be.
    """
    with limited(allowed):
        shards = ShardSet(directory, listed=False)
    manifest, path = shards.manifest, directory / INDEX
    if sha256(path) != manifest.index_sha256:
        raise ShardError(f"{path} is missing or damaged: run `python -m pipelines index {directory}`")
    if gone := next(filter(None, (lost(directory / name) for name in shards.names)), ""):
        raise ShardError(gone)
    index, start, tasks = mapped(path), 0, []
    for shard in manifest.shards:
        rows = range(start, start + shard["samples"])
        if "rows" in shard and (what := _disagrees(index[rows.start : rows.stop], shard, manifest)):
            raise ShardError(f"{path} and {MANIFEST} disagree ({what}): run `python -m pipelines index {directory}`")
        tasks.append(_Task(directory / shard["name"], shard["sha256"], rows, TURNED in manifest.stored))
        start = rows.stop
    if manifest.sides and sides(index) != tuple(manifest.sides):
        raise ShardError(f"{path} and {MANIFEST} disagree (sides): run `python -m pipelines index {directory}`")
    with limited(allowed):
        found = parallel(_verify_shard, tasks, workers=workers, images=manifest.samples, label="verify")
    looked_at = [problem for problems in found for problem in problems]
    problems = [problem for problem in looked_at if problem["reason"]] + refused(
        shards, _odd_samples(shards, looked_at)
    )
    for problem in problems:
        tell(problem)
    try:
        quarantine.write(directory, manifest.index_sha256, problems)
    except OSError as error:
        raise ShardError(_unwritten(directory / quarantine.QUARANTINE, len(problems), error.strerror)) from error
    return problems


def _odd_samples(shards: ShardSet, found: list[Problem]) -> Ints:
    """Samples that are whole but not plain, except in tars with a problem of their own."""
    numbers = {name: number for number, name in enumerate(shards.names)}
    firsts = shards.firsts
    broken = {problem["shard"] for problem in found if "row" not in problem}
    odd = [problem for problem in found if not problem["reason"] and problem["shard"] not in broken]
    return np.array([firsts[numbers[problem["shard"]]] + problem["row"] for problem in odd], np.int64)


def _unwritten(path: Path, problems: int, why: str | None) -> str:
    if problems:
        remedy = "training will meet them one by one, and count them against data.max_bad"
        return f"{problems} problems in {path.parent}, but their list could not be written ({why}): {remedy}"
    return f"{path.parent} has no problems any more, but its old list could not be removed ({why}): remove {path.name}"


def _disagrees(rows: Rows, shard: Shard, manifest: Manifest) -> str:
    """How a shard's rows contradict the manifest; empty if they do not. A set without checksums is not compared: it may
    have been damaged before there were any; then its samples are reported as problems."""
    if checksum(rows) != shard["rows"]:
        return f"rows of {shard['name']}"
    found = fault(rows, np.uint64(shard["bytes"]), len(manifest.classes), manifest.sides)
    return f"row {found[0]} of {shard['name']} {found[1]}" if found else ""


def _verify_shard(task: _Task, tick: Callable[[], None] = tick) -> list[Problem]:
    shard, problems = task.path.name, list[Problem]()
    try:
        for problem in _problems(task, tick):
            problems.append(problem)
    except FileNotFoundError:
        return [{"shard": shard, "name": shard, "reason": "is missing"}]
    except OSError as error:  # one bad tar must not hide the problems of the others
        problems.append({"shard": shard, "name": shard, "reason": f"cannot be read: {first_line(error)}"})
    return problems


def _problems(task: _Task, tick: Callable[[], None]) -> Iterator[Problem]:
    shard = task.path.name
    if sha256(task.path) != task.sha256:
        yield {"shard": shard, "name": shard, "reason": "its sha256 differs: copy it again"}
    index = mapped(task.path.parent / INDEX)
    members: dict[int, tuple[str, Any]] = {}
    try:
        for key, group in tar_samples(task.path):
            members |= {member.offset_data: (key, group) for member in group.values()}
    except ShardError as error:
        yield {"shard": shard, "name": shard, "reason": str(error)}
    with open(task.path, "rb", opener=regular) as file:
        for row, indexed in enumerate(index[task.rows.start : task.rows.stop].tolist()):
            key, group = members.get(indexed[0], (f"sample {row}", None))
            if (reason := _difference(file, group, indexed, task.turned)) is not None:
                yield {"shard": shard, "row": row, "name": f"{shard}/{key}", "reason": reason}
            tick()


def _difference(file: Any, group: Any, indexed: tuple[int, ...], turned: bool) -> str | None:
    """Reason to reject a sample; None if it is good; empty if it is whole but DALI must be asked as well."""
    if group is None:
        return "is not in the tar where the index says"
    try:
        sample = read_sample(file, group, turn=turned)
    except Exception as error:  # decoders raise anything on garbage
        if of_the_system(error):
            raise
        return f"cannot be read: {first_line(error)}"
    names = SAMPLE.names or ()
    changed = [name for name, a, b in zip(names, sample.row, indexed, strict=True) if a != b]
    # Never "differs": earlier versions hashed the bytes of quarantine.jsonl into the fingerprint of a set.
    return f"{' and '.join(changed)} differ from the index" if changed else None if sample.plain else ""
