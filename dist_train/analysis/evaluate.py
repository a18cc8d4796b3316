"""`python -m dist_train evaluate RUN [RUN ...]`: exact errors over one, five or ten crops, of one net or of several.

"averaging the predictions made by the network's softmax layer on the ten patches" (section 4.1); the predictions of
several nets are averaged too (table 2: "5 CNNs").
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from dist_train.analysis.predict import predict, summarise
from dist_train.analysis.trained import RunError, Trained, open_run
from dist_train.config import ConfigError
from dist_train.ranks.world import USAGE, World, join, rank_of_launcher
from pipelines.files import write_atomically
from pipelines.shards import ShardError

VIEWS = {"one": 1, "five": 5, "ten": 10}  # of pipelines.augment.fixed_views
CLASSES, CONFUSIONS = 20, 10  # rows that are printed; the JSON holds all


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr; under a launcher, for which non-zero means "restart
    me", always 0."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        options = _parse(argv)
        world = join(options.device)
    except ValueError as error:
        if rank_of_launcher() == 0:
            print(f"error: {str(error).replace('train.device', '--device')}", file=sys.stderr)
        return 0 if launched else USAGE
    try:
        code = _evaluate(options, world)
        dist.barrier()  # leave together
    except KeyboardInterrupt:
        code = 130
    finally:
        dist.destroy_process_group()
    return 0 if launched else code


def _evaluate(options: Namespace, world: World) -> int:
    try:
        runs = open_runs(options.runs, world, options.checkpoint, options.split)
        views = VIEWS[options.crops]
        table = predict(runs, world, views=views, batch=options.batch)
        report = {"crops": options.crops, "views": views} | summarise(table, runs)
        if world.rank == 0:
            print(describe(report))
            _write(report, options)
    except (RunError, ShardError, OSError) as error:  # on all ranks, but for a file that rank 0 cannot write
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return USAGE
    return 0


def open_runs(directories: Sequence[Path], world: World, which: str, split: Path | None) -> list[Trained]:
    """The same checkpoints on all ranks: rank 0 chooses, since a run may be going on.

    Raises RunError on all ranks where one cannot be opened, or where their classes or images are not the same.
    """
    runs: list[Trained] = []
    names = [which] * len(directories)
    for ranks in ({0}, set(range(1, world.size))):
        error: Exception | None = None
        if world.rank in ranks:
            try:
                runs = [open_run(d, world.device, n, split) for d, n in zip(directories, names, strict=True)]
                _check_alike(runs)
            except (ValueError, OSError) as failure:
                error = failure
        if message := world.first_error(error):
            raise RunError(message)
        names = world.share([run.checkpoint for run in runs])
    return runs


def _check_alike(runs: Sequence[Trained]) -> None:
    """Raises RunError where the predictions of the runs cannot be averaged."""
    first = runs[0]
    for run in runs[1:]:
        if run.classes != first.classes:
            odd = sorted(set(run.classes) ^ set(first.classes))[:3]
            how = f"in {', '.join(odd)}" if odd else "in their order"
            raise RunError(
                f"the classes of {run.directory} and {first.directory} differ {how}, so their predictions cannot be "
                f"averaged: evaluate them one by one"
            )
        if run.val.fingerprint != first.val.fingerprint:
            raise RunError(
                f"{run.directory} and {first.directory} have other validation sets ({run.val.directory} and "
                f"{first.val.directory}): choose one with --split"
            )


def describe(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    rows = [
        ("images", f"{report['images']} of {report['split']}"),
        ("crops", report["crops"]),
    ]
    if report["left_out"]:
        rows.append(("left out", f"{report['left_out']} images that cannot be decoded"))
    lines = [f"{label:>9}  {text}" for label, text in rows]
    lines += ["", "top-1 error  top-5 error"]
    for run in report["runs"]:
        where = f"{run['run']}, {run['checkpoint']} (step {run['step']}, {run['epoch']} epochs)"
        lines.append(f"{run['top1_error']:11.2%}  {run['top5_error']:11.2%}  {where}")
    if len(report["runs"]) > 1:
        lines.append(f"{report['top1_error']:11.2%}  {report['top5_error']:11.2%}  mean of these softmax outputs")
    met = [row for row in report["classes"] if row["samples"]]
    met.sort(key=lambda row: -row["top1_error"])
    lines += ["", "top-1 error   images  class"]
    lines += [f"{row['top1_error']:11.2%}  {row['samples']:7}  {row['class']}" for row in met[:CLASSES]]
    if len(met) > CLASSES:
        lines.append(f"{'...':>11}  {'':7}  {len(met) - CLASSES} more, with fewer errors")
    if report["confusions"]:
        lines += ["", "      count  true -> predicted"]
    lines += [f"{row['count']:11}  {row['true']} -> {row['predicted']}" for row in report["confusions"][:CONFUSIONS]]
    return "\n".join(lines)


def _write(report: dict[str, Any], options: Namespace) -> None:
    """The whole report as JSON: where it was asked for, else into the run. Of several runs only where asked for."""
    if not options.json and len(options.runs) > 1:
        return
    path = options.json or options.runs[0] / f"evaluation-{options.crops}.json"
    try:
        write_atomically(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): choose another place with --json") from error
    print(f"\n{path}")


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parse(argv: Sequence[str]) -> Namespace:
    """Raises ConfigError; exits for --help."""
    parser = _Parser(
        prog="dist_train evaluate",
        description="Exact errors of a run on every validation image, or of several runs whose predictions are "
        "averaged. Under torchrun the images are shared out, and the numbers are the same.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--crops", choices=list(VIEWS), default="one", help="centre; and corners; and reflections of these five"
    )
    parser.add_argument("--split", type=Path, metavar="DIR", help="shard set in the place of the validation set")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the name of one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the net computes")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images of a forward pass on each device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers go")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, cutoff=0)[0]
        raise ConfigError(f"unknown option {unknown[0]}: did you mean {nearest}?")
    if options.batch < 1:
        raise ConfigError(f"--batch is {options.batch}: it must be at least 1")
    return options
