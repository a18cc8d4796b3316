"""The table of runs, for `runs` and for Slurm's `status`. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_train.rundir.overview import Overview, overview, runs_in
from pipelines.files import as_text
from pipelines.speech import columns, in_line, show_anew, unheard

HEADS = ("RUN", "STATE", "EPOCH", "IMAGES/S", "BEST ERROR", "GOODPUT", "TO GO", "AGE", "SETTINGS")
RUN, STATE, SETTINGS = HEADS[0], HEADS[1], HEADS[-1]
# After name and state, the most important first: on a narrow terminal each that still has room.
FIRST = (
    *("BEST ERROR", "EPOCH", "SLURM", SETTINGS, "JOB", "JOB LEFT", "IMAGES/S", "TO GO", "GOODPUT", "HEARTBEAT"),
    *("RESTARTS", "AGE"),
)
WIDEST = 80  # characters of a cell, the name's and the settings' aside: reasons may be long
FOLDED = (RUN, STATE, SETTINGS)  # on a terminal; what is short stays in one piece
ROOM = 24  # columns that a terminal has for each of these before others are left out
LINES = 3  # of settings in a row
WIDE = 1 << 24  # columns of what is no terminal: a line per run, whatever its length
APART = re.compile(r" (?=\w+\.\S+=)")  # between two settings
COLOURS = {"running": "green", "starting": "green", "silent": "yellow", "stopped": "yellow"}
COLOURS |= dict.fromkeys(("failed", "diverged", "damaged"), "red")


def listed_runs(root: Path, now: float) -> list[Overview]:
    """The runs in a folder, named relative to it: the newest last, the runs of a sweep together, in the order of their
    numbers. Raises OSError if the folder cannot be read."""
    groups = defaultdict[Path, list[Overview]](list)
    for run in runs_in(root):
        name = as_text(str(run.relative_to(root)) if run != root else os.path.basename(os.path.abspath(root)))
        groups[run if run.parent == root else run.parent].append(replace(overview(run, now), name=name))

    def begun(runs: list[Overview]) -> float:
        return min(run.began if run.began is not None else _changed(run.directory) for run in runs)

    return [run for runs in sorted(groups.values(), key=begun) for run in runs]


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def as_json(runs: Sequence[Overview]) -> str:
    """The overviews as a list of objects."""
    return json.dumps([vars(run) | {"directory": as_text(str(run.directory))} for run in runs], indent=1)


def cells(run: Overview, now: float) -> dict[str, str]:
    """The cells of a run, by the head of their column."""
    return {
        RUN: run.name,
        STATE: shown_state(run, now),
        "EPOCH": _epoch(run),
        "IMAGES/S": _cell(run.images_per_s, lambda rate: f"{rate:.0f}"),
        "BEST ERROR": _cell(run.best_error, lambda error: f"{error:.1%}"),
        "GOODPUT": _cell(run.goodput, lambda share: f"{share:.0%}"),
        "TO GO": _cell(run.left, duration),
        "AGE": _cell(run.began, lambda began: duration(now - began)),
        SETTINGS: " ".join(f"{key}={setting(value)}" for key, value in run.differs.items())
        or ("-" if run.epochs is not None else ""),  # not known of a damaged run
    }


def shown_state(run: Overview, now: float) -> str:
    """The state of a run and, unless it goes on as it should, the reason."""
    if run.state == "silent":
        return f"silent for {duration(now - (run.heartbeat or now))}" + (f" ({run.reason})" if run.reason else "")
    told = run.reason and run.state not in ("running", "stopped", "done")
    return f"{run.state}: {run.reason}" if told else run.state


def setting(value: Any) -> str:
    """The value of a setting as it may be typed."""
    return value if isinstance(value, str) and " " not in value else json.dumps(value, separators=(",", ":"))


def duration(seconds: float) -> str:
    """A duration as text: `8 s`, `12 min`, `5 h`, `3 d`."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{max(0, int(seconds / size))} {unit}"
    return f"{int(seconds / 86400)} d"


def drawn_table(rows: Sequence[Mapping[str, str]], heads: Sequence[str] = HEADS, width: int | None = None) -> str:
    """A table of a line of heads and one per run, with long cells cut; of a single run its whole state follows, if that
    was cut. On a terminal, settings that all runs share stand below the table once, long settings are cut, and columns
    that have no room are left out, and named; elsewhere all stand in the line of their run, however long.

    Args:
        rows: from `cells`, with further columns; what a row lacks is empty.
        width: columns of the terminal, 0 if it is none; None: those of stdout.
    """
    width, whole = columns() if width is None else width, [dict(row) for row in rows]
    below = [in_line(whole[0][STATE])] if len(whole) == 1 and len(whole[0][STATE]) > WIDEST else []
    if width and len(whole) > 1:
        below += _take_shared(whole)
    lines = [{head: _cut(row.get(head, ""), head) for head in heads} for row in whole]
    wide = {head: max(cell_len(text) for text in (head, *(line[head] for line in lines))) for head in heads}
    kept = _kept(heads, wide, width) if width else list(heads)
    if left_out := [head for head in heads if head not in kept]:
        below.append(f"no room for {', '.join(left_out)}: use a wider terminal, or `| less -S`")
    return "\n".join([_drawn(kept, lines, wide, width), *below])


def _kept(heads: Sequence[str], wide: Mapping[str, int], width: int) -> list[str]:
    """The columns for which there is room."""
    kept = [RUN, STATE]
    for head in (head for head in FIRST if head in heads):
        if sum(min(wide[h], ROOM) if h in FOLDED else wide[h] for h in (*kept, head)) + 2 * len(kept) <= width:
            kept.append(head)
    return [head for head in heads if head in kept]


def repeat(draw: Callable[[], str], seconds: float) -> None:
    """Shows a table every `seconds`, with the time, until Ctrl-C or until nobody reads it any more."""
    try:
        while not unheard():
            show_anew(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{draw()}")
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass


def _drawn(heads: Sequence[str], lines: Sequence[Mapping[str, str]], wide: Mapping[str, int], width: int) -> str:
    """Lines of text, with colours on a terminal that has them. `wide`: columns that each column would fill."""
    height = len(lines)  # without, a dumb terminal has 80 columns
    console = Console(
        file=StringIO(), width=width or WIDE, height=height, force_terminal=bool(width), legacy_windows=False
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, collapse_padding=True)
    free = width - 2 * (len(heads) - 1) - sum(wide[head] for head in heads if head not in FOLDED)
    sizes = dict[str, int]()
    for i, head in enumerate(heads):
        folds = bool(width) and head in FOLDED
        others = [wide[h] for h in heads[i + 1 :] if h in FOLDED]
        most = free - sum(min(each, max(ROOM, free // (len(others) + 1))) for each in others)
        sizes[head] = max(1, min(wide[head], most)) if folds else wide[head]
        free -= sizes[head] if folds else 0
        table.add_column(Text(head, "bold"), width=sizes[head], overflow="fold", no_wrap=not folds)
    for line in lines:
        if width and len(text := line.get(SETTINGS, "")) > (most := LINES * sizes.get(SETTINGS, 0)):
            line = {**line, SETTINGS: f"{text[: most - 3].rpartition(' ')[0]} ..."}
        colour = COLOURS.get(line[STATE].replace(":", " ").replace(",", " ").partition(" ")[0], "")
        table.add_row(*(Text(line[head], colour if head == STATE else "") for head in heads))
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def _take_shared(rows: list[dict[str, str]]) -> list[str]:
    """Takes the settings that all rows have out of them, as a line of its own; of the others those that few rows have
    come first."""
    settings = [APART.split(row[SETTINGS]) for row in rows if row.get(SETTINGS)]
    times = Counter(word for words in settings for word in words if word != "-")
    shared = [word for word, count in times.items() if count == len(settings)]
    for row in (row for row in rows if row.get(SETTINGS)):
        words = [word for word in APART.split(row[SETTINGS]) if word in times and word not in shared]
        row[SETTINGS] = " ".join(sorted(words, key=times.__getitem__)) or "-"
    return [in_line(f"all runs: {' '.join(shared)}")] if shared else []


def _cut(text: str, head: str) -> str:
    """A text in one line, cut before it is escaped."""
    long = len(text) > WIDEST and head not in (RUN, SETTINGS)
    return in_line(f"{text[: WIDEST - 3]}..." if long else text)


def _cell(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _epoch(run: Overview) -> str:
    """Epochs done, with the fraction of the present one, and those that there will be."""
    if (done := run.progress) is None:
        return "-"
    return f"{int(done * 10) / 10:g}" + (f"/{run.epochs}" if run.epochs is not None else "")
