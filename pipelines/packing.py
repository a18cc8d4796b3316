"""The verb `pack`: its options, its start, and what it says at its end."""

from __future__ import annotations

import os
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import cli, kinds, origin
from pipelines.cli import Parser, interrupted, natural
from pipelines.errors import SourceError, UserError
from pipelines.files import read_jsonl
from pipelines.folders import PASSED_OVER
from pipelines.kinds import SIDE_HELP, Kind, SetPlan
from pipelines.manifest import MANIFEST, Manifest
from pipelines.resolve import is_code, trust
from pipelines.rows import labels_used, mapped, sides
from pipelines.scan import HOW, REJECTED, reasons
from pipelines.shards import INDEX, ShardSet
from pipelines.sources import SOURCES, ImageFolder, Source, looks_like_split
from pipelines.speech import say, show
from pipelines.torchvision_sets import is_data_set
from pipelines.unpacked import pack_command

if TYPE_CHECKING:
    from pipelines.pack import Packed

USAGE = """
pack imagefolder SRC DST        SRC/<class>/<image> into the shard set DST, as in the paper at a shorter side of 256
pack imagenet TRAIN.tar VAL.tar DEVKIT.tar.gz DST
                                ILSVRC-2012 as it is distributed, or Kaggle's folder, into DST/train and DST/val
pack parquet FOLDER DST         Hugging Face's train-*.parquet and validation-*.parquet into DST/train and DST/val
pack fashion-mnist DST          a torchvision data set (stl10, cifar10, ...) into DST/train and DST/val
pack module:name [SRC ...] DST  a source of your own (docs/data.md) into DST, or DST/train and DST/val if it has splits

Links are followed. What is hidden, and what systems leave among images (__MACOSX, @eaDir, lost+found, Thumbs.db), is
passed over. DST/rejected.jsonl names that, and each other file that became no sample, with the reason.
"""
CONTINUES = "the same command continues"


def options(parser: Parser) -> None:
    parser.usage = USAGE
    parser.add_argument("source", help=f"{', '.join(SOURCES)}, a torchvision data set, or module:name")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="SRC, if it takes one, and DST")
    parser.add_argument("--devkit", type=Path, metavar="FILE", help=kinds.DEVKIT_HELP)
    parser.add_argument("--shorter-side", type=natural, metavar="PX", help=SIDE_HELP)
    parser.add_argument("--keep-small", action="store_true", help="do not enlarge images whose shorter side is less")
    parser.add_argument("--quality", type=natural, default=90, help="quality of re-encoded JPEGs, 1 to 95")
    parser.add_argument("--shard-mb", type=float, default=64.0, help="target size of a shard in 10^6 bytes")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the order of the samples in the shards")
    cli.decoding_options(parser)


def start(args: Namespace) -> int:
    from pipelines import mixing, pack

    kind, planned = _planned(args.source, kinds.with_devkit(args.source, args.paths, args.devkit))
    side = kind.shorter_side if args.shorter_side is None else args.shorter_side
    enlarge = 0 if args.keep_small else side
    options = pack.Options(side, args.quality, args.shard_mb, args.seed, args.keep_small, *cli.chosen_limits(args))
    try:
        for one in planned:  # before anything is fetched
            origin.refuse_strangers(one.directory)
        sets = [(kind.source(one), one.directory) for one in planned]
        for source, directory in sets:  # before one is made
            origin.refuse_strangers(directory, source)
            if isinstance(source, ImageFolder) and not (directory / MANIFEST).exists():
                say(f"{source.root}: {origin.named(source.classes)}{_doubt(source.classes)}")
        for (source, directory), guess in zip(sets, pack.estimates(sets, options), strict=True):
            already = (directory / MANIFEST).exists()  # it is written last
            split = directory.name or directory.resolve().name
            packed = pack.pack_told(source, directory, options, split=split, workers=args.workers, guess=guess)
            _report(packed, directory, _already(source, packed.manifest, directory, enlarge) if already else "")
            if empty := without_image(packed.manifest, directory):
                say(f"{directory}: there is no image of {origin.some(empty)}; labels count them as classes")
            if source.groups is not None and not already and (told := mixing.advice(ShardSet(directory))):
                show(told)
    except KeyboardInterrupt:
        return interrupted(CONTINUES)
    return 0


def _planned(name: str, paths: list[Path]) -> tuple[Kind, list[SetPlan]]:
    """The kind of source and the sets to pack. Raises SourceError or NameProblem."""
    if unclear := _no_kind(name, paths):
        raise SourceError(unclear)
    trust(name)  # it was typed
    kind = kinds.kind("pack", name)
    kind.refuse_paths(paths)
    return kind, kind.planned(paths[:-1], paths[-1])


def _no_kind(name: str, paths: list[Path]) -> str:
    """The sentence on a first word that is a path, or no kind and followed by a folder; empty if it may be a kind."""
    place = Path(name)
    if kinds.own(name) or (is_code(name) and not place.exists()) or is_data_set(name):
        return ""
    wanted = "pack wants the kind of source first"
    if place.is_dir() and len(paths) < 2:
        return f"{wanted}: did you mean `{pack_command(place, *paths)}`?"
    if os.sep in name or place.suffix or place.exists():
        there = "is no folder" if place.exists() else f"does not exist in {Path.cwd()}"
        return f"{wanted}, {', '.join(SOURCES)}, a data set of torchvision, or module:name; {name} {there}"
    if len(paths) == 2 and paths[0].is_dir() and not kinds.meant(name):
        return f"{wanted}, and {name} is none: did you mean `{pack_command(*paths)}`?"
    return ""


def _already(source: Source, manifest: Manifest, directory: Path, enlarge: int) -> str:
    """Remark on a finished set: that it is packed already, and how a new pack would differ."""
    try:
        least, _ = manifest.sides or sides(mapped(directory / INDEX))
    except (OSError, ValueError):  # who opens the set is told
        least = enlarge
    missed, extra = origin.not_reached(source, directory)
    changed = origin.newer(source, directory)
    differs = (
        (least < enlarge, "small images as they were"),
        (missed, f"without {missed} files that are found now"),
        (extra, f"with {extra} files that are passed over now"),
        (changed, f"{changed} files of the source have a later date"),
    )
    if told := ", ".join(text for applies, text in differs if applies):
        return f"; already packed, {told}: to have it otherwise, pack into another directory"
    return "; already packed"


def _doubt(classes: list[str]) -> str:
    """Remark on the names of classes if some, or the only one, suggest that SRC is one level too high."""
    if len(classes) > 1 and sum(map(looks_like_split, classes)) < 2:
        return ""
    level = "is that one level too high" if classes else "is that the folder of one class"
    return f"; {level}? The sub-folders of SRC are the classes"


def without_image(manifest: Manifest, directory: Path) -> list[str]:
    """The classes without a sample."""
    try:
        used = labels_used(mapped(directory / INDEX), len(manifest.classes))
    except (OSError, ValueError, IndexError):  # as above
        return []
    return [name for name, is_used in zip(manifest.classes, used.tolist(), strict=True) if not is_used]


def set_line(manifest: Manifest, directory: Path) -> str:
    """What a set holds."""
    return (
        f"{directory}: {manifest.samples} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards, "
        f"{sum(shard['bytes'] for shard in manifest.shards) / 1e6:.0f} MB"
    )


def _left_out(path: Path) -> list[dict[str, str]]:
    """The lines of rejected.jsonl. Raises UserError."""
    lines = read_jsonl(path)
    if not all(isinstance(line, dict) and isinstance(line.get("reason"), str) for line in lines):
        raise UserError(f"{path} is damaged (a line has no reason): restore it, or move it away")
    return lines


def _report(packed: Packed, directory: Path, already: str) -> None:
    """Says what a packed set holds, what was left out and why, and how long it took."""
    manifest = packed.manifest
    lines = _left_out(directory / REJECTED)
    rejected = [line for line in lines if not line["reason"].startswith(PASSED_OVER)]
    counts = {"rejected": len(rejected), "passed over": len(lines) - len(rejected)}
    left = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
    show(set_line(manifest, directory) + (f"; {left}, see {directory / REJECTED}" if left else "") + already)
    if rejected:
        say(f"{directory}: rejected: {reasons(rejected)}")
    told = [] if rejected else ["none rejected"]
    said = dict(zip(HOW, ("small ones enlarged", "stored as they were"), strict=True))
    told += [f"{manifest.stored[name]} {how}" for name, how in said.items() if name in manifest.stored]
    if packed.images:
        who = f"{packed.images} of them packed now," if packed.before else "packed"
        speed = packed.images / max(packed.seconds, 1e-3)
        told.append(f"{who} in {timedelta(seconds=round(packed.seconds))}, {speed:.0f} images/s")
    if told:
        say(f"{directory}: {'; '.join(told)}")
