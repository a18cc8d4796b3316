"""Options of `submit` and `submit pack`."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from pathlib import Path

from pipelines.cli import Parser, limit_options, natural, positive
from pipelines.kinds import DEVKIT_HELP, SIDE_HELP
from pipelines.misc import ceil_div
from slurm import sbatch
from slurm.submissions import SlurmError

PACK_USAGE = """
submit pack SRC DST --tasks N --time T             SRC/<class>/<image> into the shard set DST
submit pack KIND [SRC ...] DST --tasks N --time T  any source of `python -m pipelines pack`
"""


def submit_options(parser: Parser) -> None:
    parser.epilog = (
        "Every other option goes to the trainer: --config FILE, --optim.lr 0.02 (see `python -m dist_train --help`)."
    )
    resources(parser, gpus=1)
    _cluster(parser)
    parser.add_argument("--array", type=Path, metavar="FILE", help="a sweep: one line of overrides per run")
    parser.add_argument(
        "--at-once", type=positive, metavar="N", help="runs of a sweep at once (default: as Slurm decides; --local: 1)"
    )
    parser.add_argument(
        "--chain", type=positive, metavar="N", help="N jobs, one after another, in place of one that is requeued"
    )
    parser.add_argument(
        "--live-code",
        action="store_true",
        help="import the code that is there when a job starts, rather than a copy of the present one",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script, and where each line is from")
    parser.add_argument("--local", action="store_true", help="run the same job in processes of this machine")


def refuse_pairs(options: Namespace) -> None:
    """Raises SlurmError for options of `submit` that do not go together, once a site file has completed them."""
    if options.local:
        if options.nodes > 1:
            raise SlurmError("--local has one node: leave --nodes out")
        if options.chain:
            raise SlurmError("--local has no time limit that a chain would be needed for: leave --chain out")
        if options.dry_run:
            raise SlurmError("--local has no sbatch script to print: leave --dry-run out")
    if options.chain and options.array:
        raise SlurmError("--chain is for one run: submit each line of --array by itself, with its own --run.name")
    if options.at_once and not options.array:
        raise SlurmError("--at-once is for the runs of a sweep: give --array FILE, or leave it out")


def submit_pack_options(parser: Parser) -> None:
    parser.usage = PACK_USAGE
    parser.add_argument(
        "first",
        type=Path,
        metavar="[KIND] SRC",
        help="the folder to pack, or another kind of source, such as module:name, before its own",
    )
    parser.add_argument("second", type=Path, metavar="DST", help="the shard set to make, or the folder of two")
    parser.add_argument("more", type=Path, nargs="*", help=SUPPRESS)
    parser.add_argument(
        "--tasks", type=positive, required=True, help="tasks of the array, each of which packs a range of shards"
    )
    parser.add_argument("--devkit", type=Path, metavar="FILE", help=DEVKIT_HELP)
    parser.add_argument("--shorter-side", type=natural, metavar="PX", help=SIDE_HELP)
    parser.add_argument("--keep-small", action="store_true", help="do not enlarge images whose shorter side is less")
    parser.add_argument("--quality", type=positive, default=90, help="quality of re-encoded JPEGs, 1 to 95")
    parser.add_argument("--shard-mb", type=float, default=64.0, help="target size of a shard in 10^6 bytes")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the order of the samples in the shards")
    limit_options(parser)
    resources(parser, gpus=0)
    _cluster(parser)


def resources(parser: Parser, *, gpus: int) -> None:
    """Declare the resources of a job. What is not typed is None; then a site file may say it, or else `standard`."""
    standard = {"nodes": 1, "gpus_per_node": gpus, "signal_before": 120}
    parser.set_defaults(standard=standard)
    parser.add_argument("--nodes", type=positive, help="nodes of the job (default: 1)")
    parser.add_argument(
        "--gpus-per-node",
        type=natural,
        help=f"one task per GPU; 0: one task per node, on its CPUs (default: {gpus})",
    )
    parser.add_argument(
        "--time",
        type=_time,
        help="time limit of one start, 12:00:00; the job is then requeued and continues"
        + ("; not needed with --local" if gpus else ""),
    )
    for name in ("partition", "account", "qos", "constraint", "exclude", "mem", "comment"):
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument("--cpus-per-gpu", type=positive, metavar="N", help="CPUs per task")
    parser.add_argument(
        "--signal-before",
        type=natural,
        metavar="S",
        help=f"seconds before the limit at which the run saves (default: {standard['signal_before']})",
    )


def _cluster(parser: Parser) -> None:
    """Declare what a site wants besides."""
    parser.add_argument(
        "--sbatch",
        type=_sbatch,
        action="append",
        metavar="KEY[=VALUE]",
        help="any other option of sbatch, such as reservation=x, gres=gpu:h100:8, exclusive; may be repeated",
    )
    parser.add_argument(
        "--site",
        type=Path,
        metavar="FILE",
        help="defaults, setup lines and variables of a cluster (default: slurm.yaml here, then "
        "~/.config/dist_train/slurm.yaml; /dev/null: none)",
    )
    parser.instead = lambda word, argv: sbatch.instead(word, argv, parser.names)


def _sbatch(text: str) -> tuple[str, str]:
    try:
        return sbatch.read(text)
    except SlurmError as error:
        raise ArgumentTypeError(str(error)) from error


def _time(text: str) -> int:
    try:
        return minutes(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a time: write 12:00:00 or 2-12:00:00") from error


def minutes(text: str) -> int:
    """Whole minutes, rounded up, of a time in Slurm's formats: `90`, `90:00`, `12:00:00`, `2-12`, `2-12:00:00`."""
    if not (found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)):
        raise ValueError(text)
    days, first, second, third = (int(number or 0) for number in found.groups())
    if found[1] or found[4]:  # [days-]hours[:minutes[:seconds]]
        hours, mins, secs = first, second, third
    else:  # minutes[:seconds]
        hours, mins, secs = 0, first, second
    return max(1, ceil_div(((days * 24 + hours) * 60 + mins) * 60 + secs, 60))
