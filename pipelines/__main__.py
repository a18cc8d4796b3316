"""`python -m pipelines pack|index|verify|preview|bench`, or `dist-train-data`: make shard sets and look at them."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from pipelines import cli, foreign, packing
from pipelines.cli import Parser, Verb, as_module, natural, positive, run_verb
from pipelines.errors import UsageError
from pipelines.manifest import ShardError
from pipelines.quarantine import QUARANTINE
from pipelines.speech import begin, in_line, show


def verify_options(parser: Parser) -> None:
    parser.add_argument("directory", type=Path, help="a shard set")
    cli.decoding_options(parser)


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


VERBS = {
    "pack": Verb("labelled images into WebDataset shards", packing.options, packing.start),
    "index": Verb("manifest and index for shards that another tool made", foreign.options, foreign.start),
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
