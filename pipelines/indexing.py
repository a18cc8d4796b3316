"""Manifest and index for tars that another tool made. A killed run is continued by the next."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipelines import origin, quarantine
from pipelines.errors import UserError
from pipelines.files import as_text, link, linked, read_text, write_atomically
from pipelines.limits import USUAL, Limits, limited
from pipelines.manifest import Manifest, ShardError, refuse_tar
from pipelines.order import Ints
from pipelines.parallel import parallel
from pipelines.patterns import refuse_names, refuse_splits, tars_in, tars_of
from pipelines.scan import finish, odd_samples, scan_shard
from pipelines.scanned import WORK, scan_file
from pipelines.shards import ShardSet
from pipelines.speech import say
from pipelines.statistics import ALL, ENOUGH, MANY, OfSample, measure_of, usual_mode
from pipelines.tars import tar_samples
from pipelines.unfinished import Work, working_folder

LINKING = "linking"  # in the working folder: links to tars are being made


def index(
    directory: Path,
    *,
    classes: Sequence[str] | None,
    split: str,
    workers: int,
    allowed: Limits = USUAL,
    statistics: str | None = None,
    patterns: Sequence[Path] = (),
) -> Manifest:
    """Makes manifest and index for tars of another tool, or remakes those of a set of ours.

    Args:
        directory: the set. Nothing is written outside of it.
        classes: class names in the order of their labels; None: those of an existing manifest, or the numbers
            themselves.
        allowed: how large an image may be.
        statistics: a mode, as of `statistics_mode`; None: the usual one.
        patterns: name the tars, to which links are made in the directory; none: the tars that are in it.
    """
    origin.refuse_foreign(directory)
    sources = tars_of(patterns, directory) if patterns else _tars_inside(directory)
    refuse_names(sources)
    if patterns:
        origin.refuse_other_tars(directory, {tar.name for tar in sources})
    tars = [directory / tar.name for tar in sources]
    if classes is None:
        classes = _known_names(directory)
    # 3: scans of earlier versions did not turn images, then not take labels from json.
    plan = json.dumps([3] + [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in sources])
    if allowed != USUAL:
        plan += str(tuple(allowed))
    mode = statistics or _mode(directory, sources)
    if mode != ALL:
        plan += "headers"  # such scans have no sums
    fingerprint = hashlib.sha256(plan.encode()).hexdigest()
    with (
        limited(allowed),
        _writable(directory, patterns),
        working_folder(directory, origin.Fingerprints(fingerprint), Work.INDEX),
    ):
        if patterns:
            _link(tars, sources)
        _scan(tars, decode=mode == ALL, workers=workers, label=f"index {split}")
        odd = np.array(odd_samples(tars), np.int64)
        measure = measure_of(mode, workers=workers, label=f"decode {split}")
        manifest = finish(directory, tars, classes, as_text(split), {}, "", [], measure)
        _list_refused(directory, manifest, odd, measure.broken if isinstance(measure, OfSample) else {})
        return manifest


def _mode(directory: Path, tars: Sequence[Path]) -> str:
    """How the statistics come about if nobody says."""
    mode = usual_mode(tars)
    if mode != ALL:
        say(
            f"{directory}: more than {MANY} images, of which {ENOUGH} are decoded for mean and deviation; "
            f"--statistics all decodes all"
        )
    return mode


def _tars_inside(directory: Path) -> list[Path]:
    """The tars of a set that is made where they are. Raises ShardError."""
    refuse_tar(directory)
    if (directory / WORK / LINKING).exists():
        raise ShardError(
            f"{directory} does not have the links to all of its tars yet: repeat the command that began to make them, "
            f"`python -m pipelines index ... --to {directory}`"
        )
    tars = tars_in(directory)
    try:
        known = {shard["name"] for shard in Manifest.read(directory).shards}
    except ShardError:
        known = set()
    if not known.issuperset(as_text(tar.name) for tar in tars):  # else they are one set by somebody's decision
        refuse_splits(tars)
    return tars


def _link(tars: Sequence[Path], sources: Sequence[Path]) -> None:
    """Makes the links of a set. Until all are there, a mark tells that some are missing."""
    directory = tars[0].parent
    pairs = [pair for pair in zip(tars, sources, strict=True) if not pair[1].parent.samefile(directory)]
    missing = [pair for pair in pairs if not linked(*pair)]  # before the first is made
    mark = directory / WORK / LINKING
    if missing:
        write_atomically(mark, b"")
    for tar, source in missing:
        link(tar, source)
    mark.unlink(missing_ok=True)


@contextmanager
def _writable(directory: Path, patterns: Sequence[Path]) -> Iterator[None]:
    """Raises ShardError, which tells of --to, if the body fails since the directory cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or os.access(directory, os.W_OK | os.X_OK):
            raise
        command = f"`python -m pipelines index {shlex.quote(str(directory))} --to DIR`"
        elsewhere = f"leave the tars there and make the set elsewhere, {command}"
        remedy = "name another directory for --to" if patterns else elsewhere
        raise ShardError(f"{directory} cannot be written ({error.strerror}): {remedy}") from error


def _list_refused(directory: Path, manifest: Manifest, odd: Ints, broken: dict[int, str]) -> None:
    """Quarantines samples that DALI refuses, and those that were drawn and cannot be decoded (`broken`, with reasons),
    unless there is a list for this index."""
    if (directory / quarantine.QUARANTINE).exists():
        return
    if len(odd := np.setdiff1d(odd, list(broken))) or broken:
        from pipelines.shown import problem_of, refused  # imports torch

        shards = ShardSet(directory)
        found = refused(shards, odd)
        if problems := found + [problem_of(shards, sample, reason) for sample, reason in broken.items()]:
            quarantine.write(directory, manifest.index_sha256, problems)
        many = {"cannot be decoded by DALI, which feeds the net": found, "of those drawn cannot be decoded": broken}
        for what in (what for what, bad in many.items() if bad):
            say(
                f"{directory}: {len(many[what])} samples {what}: they are listed in {quarantine.QUARANTINE}, and "
                f"others are shown in their place"
            )


def _scan(tars: Sequence[Path], *, decode: bool, workers: int, label: str) -> None:
    """Scans those that are not scanned yet."""
    if todo := [tar for tar in tars if not scan_file(tar).exists()]:
        tasks = [(tar, decode) for tar in todo]
        parallel(_index_shard, tasks, workers=workers, images=_expected(todo), label=label)


def _index_shard(task: tuple[Path, bool]) -> None:
    path, decode = task
    scan_shard(path, [], count=True, decode=decode)


def _expected(tars: Sequence[Path]) -> int:
    """Number of samples in tars, guessed from the first and the last of them. Raises ShardError."""
    ends = [*tars[:1], *tars[1:][-1:]]
    samples = sum(1 for tar in ends for _ in tar_samples(tar))
    whole, read = (sum(tar.stat().st_size for tar in some) for some in (tars, ends))
    return round(samples * whole / max(1, read))


def _known_names(directory: Path) -> list[str] | None:
    """Class names of an existing manifest; None if there is none, or if its names are just the numbers."""
    try:
        names = Manifest.read(directory).classes
    except ShardError:
        return None
    return None if names == [str(k) for k in range(len(names))] else names


def class_names(path: Path) -> list[str]:
    """The lines of a file of class names, without blank ones at its end. Raises UserError."""
    names = read_text(path).removeprefix("\ufeff").rstrip().splitlines()
    if blank := [number for number, name in enumerate(names, 1) if not name.strip()]:
        raise UserError(
            f"line {blank[0]} of {path} is blank: it takes one class name per line, in the order of the labels"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} names the class {twice[0]} more than once: each label has a name of its own")
    return names
