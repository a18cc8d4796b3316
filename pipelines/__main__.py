"""`python -m pipelines pack|index|verify|preview|bench`, or `dist-train-data`: make shard sets and look at them."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

from pipelines import cli, kinds, origin
from pipelines.cli import Parser, Verb, as_module, interrupted, natural, positive, run_verb
from pipelines.errors import SourceError, UsageError, UserError
from pipelines.files import read_file, read_text
from pipelines.folders import PASSED_OVER
from pipelines.kinds import SIDE_HELP, Kind, SetPlan
from pipelines.manifest import MANIFEST, Manifest, ShardError
from pipelines.misc import cpus
from pipelines.quarantine import QUARANTINE
from pipelines.resolve import is_code, trust
from pipelines.rows import labels_used, mapped, sides
from pipelines.scan import REJECTED, reasons
from pipelines.shards import INDEX, ShardSet
from pipelines.sources import SOURCES, ImageFolder, Source, looks_like_split
from pipelines.speech import begin, in_line, say, show
from pipelines.torchvision_sets import is_data_set
from pipelines.unpacked import pack_command

PACK_USAGE = """
pack imagefolder SRC DST        SRC/<class>/<image> into the shard set DST, as in the paper at a shorter side of 256
pack fashion-mnist DST          a torchvision data set (stl10, cifar10, ...) into DST/train and DST/val
pack module:name [SRC ...] DST  a source of your own (docs/data.md) into DST, or DST/train and DST/val if it has splits

Links are followed. What is hidden, and what systems leave among images (__MACOSX, @eaDir, lost+found, Thumbs.db), is
passed over. DST/rejected.jsonl names that, and each other file that became no sample, with the reason.
"""


CONTINUES = "the same command continues"


def pack_options(parser: Parser) -> None:
    parser.usage = PACK_USAGE
    parser.add_argument("source", help=f"{', '.join(SOURCES)}, a torchvision data set, or module:name")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="SRC, if it takes one, and DST")
    parser.add_argument("--shorter-side", type=natural, metavar="PX", help=SIDE_HELP)
    parser.add_argument("--keep-small", action="store_true", help="do not enlarge images whose shorter side is less")
    parser.add_argument("--quality", type=natural, default=90, help="quality of re-encoded JPEGs, 1 to 95")
    parser.add_argument("--shard-mb", type=float, default=64.0, help="target size of a shard in 10^6 bytes")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the order of the samples in the shards")
    _decoding(parser)


def start_pack(args: Namespace) -> int:
    from pipelines import pack

    kind, planned = _planned(args.source, args.paths)
    side = kind.shorter_side if args.shorter_side is None else args.shorter_side
    enlarge = 0 if args.keep_small else side
    options = pack.Options(side, args.quality, args.shard_mb, args.seed, args.keep_small, *cli.chosen_limits(args))
    try:
        for one in planned:  # before anything is fetched
            origin.refuse_strangers(one.directory)
        sets = [(kind.source(one), one.directory) for one in planned]
        for source, directory in sets:  # before one is made
            origin.refuse_strangers(directory, source)
        for source, directory in sets:
            already = (directory / MANIFEST).exists()  # it is written last
            if not already and isinstance(source, ImageFolder):
                say(f"{source.root}: {origin.named(source.classes)}{_doubt(source.classes)}")
            manifest = pack.pack(
                source, directory, options, split=directory.name or directory.resolve().name, workers=args.workers
            )
            _report(manifest, directory, _already(source, manifest, directory, enlarge) if already else "")
            if empty := _without_image(manifest, directory):
                say(f"{directory}: there is no image of {origin.some(empty)}; labels count them as classes")
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
    if name in SOURCES or (is_code(name) and not place.exists()) or is_data_set(name):
        return ""
    wanted = "pack wants the kind of source first"
    if place.is_dir() and len(paths) < 2:
        return f"{wanted}: did you mean `{pack_command(place, *paths)}`?"
    if os.sep in name or place.suffix or place.exists():
        there = "is no folder" if place.exists() else f"does not exist in {Path.cwd()}"
        return f"{wanted}, {', '.join(SOURCES)}, a data set of torchvision, or module:name; {name} {there}"
    if len(paths) == 2 and paths[0].is_dir():
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


def _without_image(manifest: Manifest, directory: Path) -> list[str]:
    """The classes without a sample."""
    try:
        used = labels_used(mapped(directory / INDEX), len(manifest.classes))
    except (OSError, ValueError, IndexError):  # as above
        return []
    return [name for name, is_used in zip(manifest.classes, used.tolist(), strict=True) if not is_used]


def index_options(parser: Parser) -> None:
    parser.add_argument("directory", type=Path, help="holds *.tar with jpg, jpeg, png or webp, and cls")
    parser.add_argument("--classes", type=Path, help="text file: one class name per line, in the order of the labels")
    _decoding(parser)


def start_index(args: Namespace) -> int:
    from pipelines import mixing, pack

    names = _class_names(args.classes) if args.classes else None
    directory = args.directory
    try:
        split, allowed = directory.name or directory.resolve().name, cli.chosen_limits(args)
        manifest = pack.index(directory, classes=names, split=split, workers=args.workers, allowed=allowed)
        rejected = [json.loads(line) for line in read_file(directory / REJECTED).splitlines()]
        show(_contents(manifest, directory))
        if rejected:
            show(
                f"{directory}: {len(rejected)} members or samples were left out, see {directory / REJECTED}: "
                f"{reasons(rejected)}"
            )
        if empty := _without_image(manifest, directory):
            show(f"{directory}: there is no image of {len(empty)} of the classes: {origin.some(empty)}")
        if told := mixing.advice(ShardSet(directory)):
            show(told)
    except KeyboardInterrupt:
        return interrupted(CONTINUES)
    return 0


def _class_names(path: Path) -> list[str]:
    """The lines of a file of class names, without blank ones at its end. Raises UserError."""
    names = read_text(path).removeprefix("\ufeff").rstrip().splitlines()
    if blank := [number for number, name in enumerate(names, 1) if not name.strip()]:
        raise UserError(
            f"line {blank[0]} of {path} is blank: it takes one class name per line, in the order of the labels"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} names the class {twice[0]} more than once: each label has a name of its own")
    return names


def verify_options(parser: Parser) -> None:
    parser.add_argument("directory", type=Path, help="a shard set")
    _decoding(parser)


def start_verify(args: Namespace) -> int:
    from pipelines import verify

    def tell(problem: verify.Problem) -> None:
        show(in_line(f"{problem['name']}: {problem['reason']}"))

    if problems := verify.verify(args.directory, workers=args.workers, allowed=cli.chosen_limits(args), tell=tell):
        raise ShardError(f"{len(problems)} problems in {args.directory}, listed in {args.directory / QUARANTINE}")
    show(f"{args.directory}: all samples decode, and all hashes and labels are right")
    return 0


def preview_options(parser: Parser) -> None:
    cli.view_options(parser)
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--rows", type=positive, default=6, help="number of samples to draw")
    parser.add_argument("--seed", type=natural, default=0, help="seed of order and augmentation")


def start_preview(args: Namespace) -> int:
    cli.check_view(args)
    from pipelines import preview

    preview.draw(args.directory, args.out, resize=args.resize, crop=args.crop, rows=args.rows, seed=args.seed)
    show(str(args.out))
    return 0


def bench_options(parser: Parser) -> None:
    cli.view_options(parser)
    parser.add_argument("--batch", type=natural, default=0, help="images per batch; 0: 128, or fewer on a small set")
    parser.add_argument("--read-ms", type=float, default=0.0, help="milliseconds added to each read, as by a slow disk")


def start_bench(args: Namespace) -> int:
    cli.check_view(args)
    if not 0 <= args.read_ms < 1e6:
        raise UsageError(f"--read-ms is {args.read_ms:g}: it must be 0 or more milliseconds")
    from pipelines import bench

    show(bench.measure(args.directory, resize=args.resize, crop=args.crop, batch=args.batch, read_ms=args.read_ms))
    return 0


def _decoding(parser: Parser) -> None:
    cli.limit_options(parser)
    parser.add_argument("--workers", type=positive, default=cpus(), help="number of processes")


def _report(manifest: Manifest, directory: Path, more: str = "") -> None:
    """Print the contents of a packed set."""
    lines = read_file(directory / REJECTED) if (directory / REJECTED).exists() else b""
    passed_over = lines.count(f'"reason": "{PASSED_OVER}'.encode())
    counts = {"rejected": lines.count(b"\n") - passed_over, "passed over": passed_over}
    if told := ", ".join(f"{count} {how}" for how, count in counts.items() if count):
        more = f"; {told}, see {directory / REJECTED}{more}"
    show(_contents(manifest, directory) + more)


def _contents(manifest: Manifest, directory: Path) -> str:
    return (
        f"{directory}: {manifest.samples} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards, "
        f"{sum(shard['bytes'] for shard in manifest.shards) / 1e6:.0f} MB"
    )


VERBS = {
    "pack": Verb("labelled images into WebDataset shards", pack_options, start_pack),
    "index": Verb("manifest and index for shards that another tool made", index_options, start_index),
    "verify": Verb(
        "decode everything, compare hashes and labels, list bad samples",
        verify_options,
        start_verify,
    ),
    "preview": Verb(
        "a picture of originals beside their augmented versions",
        preview_options,
        start_preview,
    ),
    "bench": Verb("speed of the loader: images/s, CPU microseconds per image", bench_options, start_bench),
}


def main() -> int:
    begin()
    return run_verb("python -m pipelines", VERBS, sys.argv[1:])


def console() -> int:
    """The console script; returns the exit code."""
    as_module()
    return main()


if __name__ == "__main__":
    sys.exit(main())
