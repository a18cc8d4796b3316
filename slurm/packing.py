"""Packing on the cluster: an array of tasks, each of which packs its part of the shards, and one that ends it."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from pipelines import kinds, origin
from pipelines.cli import chosen_limits
from pipelines.resolve import is_code, trust
from pipelines.sources import inventory
from pipelines.speech import say
from slurm.job import Pack
from slurm.script import check_text, hand_over, parameters
from slurm.site import SiteFile


class SubmittedPack(NamedTuple):
    """A set that is packed on the cluster: job numbers of the array and of the task that writes the manifest, the set,
    and the folder of the logs."""

    array: str
    last: str
    directory: Path
    folder: Path


def submit_pack(options: Namespace, site: SiteFile) -> list[SubmittedPack]:
    """Submits, per set, a packing array and a final task that writes the manifest. Raises UserError or OSError."""
    name, paths = kind_first([options.first, options.second, *options.more])
    trust(name)  # it was typed
    kind = kinds.kind("submit pack", name)
    paths = kinds.with_devkit(name, paths, options.devkit)
    kind.refuse_paths(paths)
    planned = kind.planned([path.absolute() for path in paths[:-1]], paths[-1].absolute())
    for one in planned:  # before anything is fetched
        origin.refuse_strangers(one.directory)
        check_text(one.directory)
    told = ""
    for one in planned:
        source = kind.source(one)
        # So that wrong classes are noticed before the queue. What may take long to list is not listed; the files of
        # others are fetched here, where there is a network.
        classes = source.classes if source.stands else inventory(source)[0]
        before, told = told, f"{', '.join(map(str, one.paths)) or name}: {origin.named(classes)}"
        if told != before:  # of two sets with the same classes
            say(told)
        origin.refuse_strangers(one.directory, source)
    side = kind.shorter_side if options.shorter_side is None else options.shorter_side
    return [_submit_set(options, name, one, side, site) for one in planned]


def _submit_set(options: Namespace, name: str, planned: kinds.SetPlan, side: int, site: SiteFile) -> SubmittedPack:
    from pipelines.pack import Options

    paths, train, directory = planned
    limits = chosen_limits(options)
    stored = asdict(Options(side, options.quality, options.shard_mb, options.seed, options.keep_small, *limits))
    folder = directory / "slurm"
    wanted = parameters(options, f"pack {directory.name}", folder, site)
    del wanted["teardown"]  # the final task packs what a crashed task leaves undone
    shares = [Pack(paths, directory, stored, (i, options.tasks), name, train) for i in range(options.tasks)]
    array, _, _ = hand_over(folder, wanted, shares, local=False)[0].partition("_")
    wanted["additional_parameters"] = {**wanted["additional_parameters"], "dependency": f"afterany:{array}"}
    (last,) = hand_over(folder, wanted, [Pack(paths, directory, stored, None, name, train)], local=False)
    return SubmittedPack(array, last, directory, folder)


def kind_first(words: list[Path]) -> tuple[str, list[Path]]:
    """The kind of source and the paths that follow it: SRC and DST alone are a folder and its set."""
    name = str(words[0])
    folder = words[0].is_dir() or os.sep in name
    if kinds.own(name) and not (folder and len(words) == 2):
        return name, words[1:]
    if len(words) == 2 and (folder or not (is_code(name) or kinds.meant(name))):
        return kinds.IMAGEFOLDER, words
    return name, words[1:]
