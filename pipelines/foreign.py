"""The verb `index`: its options, its start, and what it says at its end."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from pipelines import cli, origin
from pipelines.cli import Parser, interrupted
from pipelines.files import read_jsonl
from pipelines.manifest import Manifest
from pipelines.packing import CONTINUES, set_line, without_image
from pipelines.scan import REJECTED, reasons
from pipelines.shards import ShardSet
from pipelines.speech import show
from pipelines.statistics import statistics_option, told


def options(parser: Parser) -> None:
    what = (
        "a folder of *.tar with jpg, jpeg, png or webp, and cls or json; with --to also a tar, or a pattern in quotes"
    )
    parser.add_argument("patterns", nargs="+", type=Path, metavar="PATTERN", help=f"{what}: 'train-{{0000..1023}}.tar'")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="make the set here, of links: the tars stay where they are"
    )
    parser.add_argument("--classes", type=Path, help="text file: one class name per line, in the order of the labels")
    statistics_option(parser)
    cli.decoding_options(parser)


def start(args: Namespace) -> int:
    from pipelines import indexing, patterns

    names = indexing.class_names(args.classes) if args.classes else None
    patterns.refuse_urls(args.patterns, args.to)
    if not args.to:
        patterns.refuse_without_to(args.patterns)
    directory, sources = (args.to, args.patterns) if args.to else (args.patterns[0], ())
    try:
        manifest = indexing.index(
            directory,
            classes=names,
            split=directory.name or directory.resolve().name,
            workers=args.workers,
            allowed=cli.chosen_limits(args),
            statistics=args.statistics,
            patterns=sources,
        )
        _report(manifest, directory)
    except KeyboardInterrupt:
        return interrupted(CONTINUES)
    return 0


def _report(manifest: Manifest, directory: Path) -> None:
    """Says what a set holds, what was left out and why, and whether its batches would show few classes."""
    from pipelines import mixing

    show(set_line(manifest, directory))
    show(f"{directory}: {told(manifest)}")
    if rejected := read_jsonl(directory / REJECTED):
        show(
            f"{directory}: {len(rejected)} members or samples were left out, see {directory / REJECTED}: "
            f"{reasons(rejected)}"
        )
    if empty := without_image(manifest, directory):
        show(f"{directory}: there is no image of {len(empty)} of the classes: {origin.some(empty)}")
    if advised := mixing.advice(ShardSet(directory)):
        show(advised)
