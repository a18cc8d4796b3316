"""`python -m pipelines pack|index|verify|preview|bench`: make shard sets and look at them."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from pipelines.shards import QUARANTINE, Manifest, ShardError
from pipelines.sources import ImageFolder, Source, SourceError, Torchvision

PACK = """
pack imagefolder SRC DST   SRC/<class>/<image> into the shard set DST, as in the paper at shorter side 256
pack fashion-mnist DST     a torchvision data set (stl10, cifar10, ...) into DST/train and DST/val
"""


def pack(args: Namespace) -> None:
    from pipelines.pack import Options
    from pipelines.pack import pack as pack_source

    folder = args.source == "imagefolder"
    if len(args.paths) != 1 + folder:
        raise SourceError(f"pack {args.source} takes {'SRC and DST' if folder else 'DST alone'}:\n{PACK}")
    destination = args.paths[-1]
    sets: list[tuple[Source, Path]]
    if folder:
        sets = [(ImageFolder(args.paths[0]), destination)]
    else:
        raw = destination / "raw"
        sets = [(Torchvision(args.source, split == "train", raw), destination / split) for split in ("train", "val")]
    side = args.shorter_side if args.shorter_side is not None else 256 * folder
    options = Options(side, args.quality, args.shard_mb, args.seed)
    for source, directory in sets:
        _tell(pack_source(source, directory, options, split=directory.name, workers=args.workers), directory)


def index(args: Namespace) -> None:
    from pipelines.pack import index as index_tars

    names = args.classes.read_text().splitlines() if args.classes else None
    _tell(index_tars(args.directory, classes=names, split=args.directory.name, workers=args.workers), args.directory)


def verify(args: Namespace) -> None:
    from pipelines.verify import verify as verify_set

    problems = verify_set(args.directory, workers=args.workers)
    for problem in problems:
        print(f"{problem['name']}: {problem['reason']}")
    if problems:
        raise ShardError(f"{len(problems)} problems in {args.directory}, listed in {args.directory / QUARANTINE}")
    print(f"{args.directory}: all samples decode, and all hashes and labels are right")


def preview(args: Namespace) -> None:
    from pipelines.preview import draw

    draw(args.directory, args.out, resize=args.resize, crop=args.crop, rows=args.rows, seed=args.seed)
    print(args.out)


def bench(args: Namespace) -> None:
    from pipelines.bench import measure

    print(measure(args.directory, resize=args.resize, crop=args.crop, batch=args.batch, read_ms=args.read_ms))


def _tell(manifest: Manifest, directory: Path) -> None:
    from pipelines.scan import REJECTED

    count = (directory / REJECTED).read_text().count("\n")
    rejected = f"; {count} rejected, see {directory / REJECTED}" if count else ""
    print(
        f"{directory}: {manifest.samples} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards, "
        f"{sum(shard['bytes'] for shard in manifest.shards) / 1e6:.0f} MB{rejected}"
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m pipelines", description="Make shard sets and look at them.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    cpus = len(os.sched_getaffinity(0))

    verb = verbs.add_parser("pack", help="labelled images into WebDataset shards", usage=PACK)
    verb.add_argument("source", help="imagefolder, or the name of a torchvision data set")
    verb.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    verb.add_argument("--shorter-side", type=int, metavar="PX", help="scale larger images down to it; 0: keep them")
    verb.add_argument("--quality", type=int, default=90, help="of JPEGs that are written anew, 1 to 95 (90)")
    verb.add_argument("--shard-mb", type=float, default=64, help="aimed size of a shard in 10^6 bytes (64)")
    verb.add_argument("--workers", type=_positive, default=cpus, help=f"processes ({cpus})")
    verb.add_argument("--seed", type=int, default=0, help="of the order of the samples in the shards (0)")
    verb.set_defaults(run=pack)

    verb = verbs.add_parser("index", help="manifest and index for shards that another tool made")
    verb.add_argument("directory", type=Path, help="holds *.tar with jpg, jpeg, png or webp, and cls")
    verb.add_argument("--classes", type=Path, help="text file: one class name a line, in the order of the labels")
    verb.add_argument("--workers", type=_positive, default=cpus, help=f"processes ({cpus})")
    verb.set_defaults(run=index)

    verb = verbs.add_parser("verify", help="decode everything, compare hashes and labels, list bad samples")
    verb.add_argument("directory", type=Path, help="a shard set")
    verb.add_argument("--workers", type=int, default=cpus, help=f"processes ({cpus})")
    verb.set_defaults(run=verify)

    for name, run, text in (
        ("preview", preview, "a picture of originals beside their augmented versions"),
        ("bench", bench, "speed of the loader: images a second, CPU microseconds an image"),
    ):
        verb = verbs.add_parser(name, help=text, formatter_class=ArgumentDefaultsHelpFormatter)
        verb.add_argument("directory", type=Path, help="a shard set")
        verb.add_argument(
            "--resize", type=_positive, default=256, help="shorter side that the crop is cut from, in pixels"
        )
        verb.add_argument("--crop", type=_positive, default=227, help="side of the net's input, in pixels")
        verb.set_defaults(run=run)
        if run is preview:
            verb.add_argument("out", type=Path, help="the PNG to write")
            verb.add_argument("--rows", type=_positive, default=6, help="samples to draw")
            verb.add_argument("--seed", type=int, default=0, help="of order and augmentation")
        else:
            verb.add_argument("--batch", type=_positive, default=128, help="images a batch")
            verb.add_argument("--read-ms", type=float, default=0.0, help="added to each read, as a slow disk would")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"{text} is not a positive number")
    return number


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.run in (preview, bench) and args.crop > args.resize:
        parser.error(f"--crop {args.crop} is larger than --resize {args.resize}: it is cut from that")
    try:
        args.run(args)
    except (ShardError, SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
