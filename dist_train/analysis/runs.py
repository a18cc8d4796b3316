"""The verb `runs`: the table of all runs in a folder. Imports no torch."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from dist_train.rundir.listing import as_json, cells, drawn_table, listed_runs, repeat
from dist_train.rundir.named import RUNS
from dist_train.rundir.overview import Overview
from pipelines.errors import UsageError, UserError
from pipelines.speech import in_line, show


def start(args: Namespace) -> int:
    """Print the runs, as a table or as JSON."""
    root: Path = args.dir
    if args.json and args.watch:
        raise UsageError("--json is printed once: leave out --watch")
    if root != RUNS and not root.is_dir():
        raise UsageError(f"there is no folder {root}: name one that holds runs (default: {RUNS}/)")
    if args.json:
        show(as_json(_found(root)))
    elif args.watch:
        repeat(lambda: _table(root), args.watch)
    else:
        show(_table(root), drawn=True)
    return 0


def _found(root: Path) -> list[Overview]:
    try:
        return listed_runs(root, time.time()) if root.is_dir() else []
    except OSError as error:
        raise UserError(f"{root} cannot be read ({error.strerror}): name a folder that can") from error


def _table(root: Path) -> str:
    runs = _found(root)
    now = time.time()
    none = in_line(f"no runs under {root}/: name the folder that holds them")
    return drawn_table([cells(run, now) for run in runs]) if runs else none
