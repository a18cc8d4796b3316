"""`python -m dist_train evaluate RUN [RUN ...]`: exact errors over one, five or ten crops, of one net or of several.

"averaging the predictions made by the network's softmax layer on the ten patches" (section 4.1); the predictions of
several nets are averaged too (table 2: "5 CNNs").
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.analysis.options import CROPS, check_place
from dist_train.analysis.predict import predict, summarise
from dist_train.analysis.trained import RunError, Trained, device_option, open_run
from dist_train.data import difference
from dist_train.ranks import launcher
from dist_train.ranks.world import World, join
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.speech import show

CLASSES, CONFUSIONS = 20, 10  # rows that are printed; the JSON holds all


def start(args: Namespace) -> int:
    """Write the errors as JSON and print them. Returns the exit code of this rank. Raises UsageError."""
    with device_option():
        world = join(args.device)
    code = _evaluate(args, world)
    world.leave()
    return code


def _evaluate(args: Namespace, world: World) -> int:
    try:
        if args.json:
            world.together(lambda: check_place(args.json, "--json"), on=[0], failure=UserError, catch=(UserError,))
        runs = open_runs(args.runs, world, args.checkpoint, args.split, trusting=args.trust)
        views = CROPS[args.crops]
        table = predict(runs, world, views=views, batch=args.batch)
        report = {"crops": args.crops, "views": views} | summarise(table, runs)
        if world.rank == 0:
            try:
                path = _write(report, args)
            finally:  # what has taken hours is shown in any case
                show(describe(report))
            if path:
                show(f"\n{path}")
    except (UserError, OSError) as error:  # on all ranks, except for a file that rank 0 cannot write
        return launcher.end_refused(error)
    return 0


def open_runs(
    directories: Sequence[Path], world: World, which: str, split: str, *, trusting: bool = False
) -> list[Trained]:
    """The runs, opened at the same checkpoints on all ranks: those that rank 0 finds, since a run may be training.

    Raises RunError on all ranks if one cannot be opened, or if their classes or images are not the same.
    """

    def opened(names: Sequence[str]) -> list[Trained]:
        named = zip(directories, names, strict=True)
        runs = [open_run(d, world.device, name, split, trusting=trusting) for d, name in named]
        _check_alike(runs)
        return runs

    caught = (ValueError, OSError)  # ValueError: what torch makes of a model's sizes
    runs = world.together(lambda: opened([which] * len(directories)), on=[0], failure=RunError, catch=caught)
    names = world.share([run.checkpoint for run in runs or ()])
    others = world.together(lambda: opened(names), on=range(1, world.size), failure=RunError, catch=caught)
    return runs or others or []


def _check_alike(runs: Sequence[Trained]) -> None:
    """Raises RunError if the predictions of the runs cannot be averaged."""
    first = runs[0]
    for run in runs[1:]:
        if run.classes != first.classes:
            how = difference(run.classes, first.classes)
            raise RunError(
                f"the classes of {run.directory} and {first.directory} differ {how}, so their predictions cannot be "
                f"averaged: evaluate them one by one"
            )
        same = np.array_equal(run.val.quarantined, first.val.quarantined)
        if run.val.fingerprint != first.val.fingerprint or not same:
            raise RunError(
                f"{run.directory} and {first.directory} have different validation sets ({run.val.place} and "
                f"{first.val.place}): choose one with --split"
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
    if name := _always(report):
        lines += ["", f"always names {name}, whatever the image shows"]
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


def _always(report: dict[str, Any]) -> str:
    """The class that was named for every image, if there is one and the images have several classes; else nothing."""
    named = {row["predicted"] for row in report["confusions"]}
    named |= {row["class"] for row in report["classes"] if row["samples"] and row["top1_error"] < 1}
    several = sum(row["samples"] > 0 for row in report["classes"]) > 1
    return named.pop() if several and len(named) == 1 else ""


def _write(report: dict[str, Any], args: Namespace) -> Path | None:
    """Write the whole report as JSON to --json; without it into the run, if there is only one. Returns where it is."""
    path: Path | None = args.json
    if path is None and len(args.runs) == 1:
        path = args.runs[0] / f"evaluation-{args.crops}.json"
    if path is None:
        return None
    try:
        write_atomically(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): choose another place with --json") from error
    return path
