"""What a person asks of a run: how it stands, how good it is, how fast, and what is special about it. Imports no torch,
and is quick: of the record only what no checkpoint covers is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dist_train.config import Config
from dist_train.flat import as_dict
from dist_train.rundir import checkpoint, events, record, status
from dist_train.rundir.ledger import LONGEST, spent
from dist_train.rundir.named import MARKS, shown_name
from pipelines import yamls
from pipelines.errors import UserError
from pipelines.files import read_file, regular
from pipelines.valid import Torn, objects_of

CONFIGS = ("config.yaml", "slurm/config.yaml")  # the latter of a run that waits for its first start
# Settings that say where a run and its data lie, not what it is.
PLACES = ("run.name", "run.root", "run.dir", "data.train", "data.val", "data.cache", "data.raw")
TAIL, PIECE = 1 << 16, 1 << 20  # bytes of the record: at its end, and before that at once
WORDY = 200  # characters of a setting
DEEPEST = 3  # folders below which a run may lie: runs/experiments/depth/lr-0
STARTED, VALIDATED = b'"event": "start"', b'"kind": "validation"'  # as json.dumps writes them


@dataclass(frozen=True)
class Overview:
    """A run at one moment. Times are Unix times in seconds; errors are top-1, as fractions of 1; None: not known.

    Attributes:
        name: relative to `runs/` if it lies there.
        state: starting, running, stopped, done, diverged or failed, as in status.json; "silent" if it should run and
            has no heartbeat; "not started"; "damaged" if a file holds what no program here writes.
        reason: of the state; of a silent run that had not begun to train also that it was starting; of a damaged one
            the file and what is wrong in it.
        since: when the state began; of a run that goes on, its present start.
        step, epoch: done so far.
        epochs: that it is to train.
        progress: epochs done, with the fraction of the present one.
        left: seconds to the last step at the present rate, without validations; None too behind that, and if it
            does not run.
        images_per_s: in the newest step of the record.
        best_epoch: number of the epoch, from 1, whose validation error is the lowest.
        last_error: of the newest validation, as far as the end of the record has it.
        goodput: fraction of `elapsed`, the wall time of all starts and between them, that was training.
        restarts: starts but the first.
        began: when the run began.
        differs: settings that are not the program's defaults, flat, without those of `PLACES`.
    """

    directory: Path
    name: str
    state: str
    reason: str = ""
    since: float | None = None
    heartbeat: float | None = None
    step: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    progress: float | None = None
    left: float | None = None
    images_per_s: float | None = None
    best_error: float | None = None
    best_epoch: int | None = None
    last_error: float | None = None
    goodput: float | None = None
    elapsed: float | None = None
    restarts: int = 0
    began: float | None = None
    differs: dict[str, Any] = field(default_factory=dict)


def overview(run: Path, now: float) -> Overview:
    """The overview of a run directory, whatever lies in it: raises nothing. `now`: Unix time in seconds."""
    try:
        return looked_at(run, now)
    except (UserError, OSError) as error:
        return Overview(run, shown_name(run), "damaged", damage(run, error))


def damage(run: Path, error: UserError | OSError) -> str:
    """The file of a run that is damaged, by its name in the run, and what is wrong in it."""
    why = str(error)
    if isinstance(error, OSError) and error.filename and not isinstance(error, UserError):
        why = f"{os.fsdecode(error.filename)} ({error.strerror})"
    return why.removeprefix(f"{run}/").replace(" is damaged (", " (", 1)


def runs_in(root: Path) -> list[Path]:
    """The run directories in a folder, those of sweeps too, in the order of their names, in which numbers count; the
    folder itself if it is one. Links are followed, but in no circle. Raises OSError if the folder cannot be read."""
    return [root] if _is_run(root) else sorted(_below(root, DEEPEST, ()), key=_order)


def _is_run(path: Path) -> bool:
    return any(os.path.exists(path / name) for name in MARKS if not name.startswith("code/"))  # a sweep has one copy


def _below(folder: Path, depth: int, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The runs below a folder; `above`: the folders that lead to it."""
    found = os.stat(folder)
    here = (found.st_dev, found.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
    for path in (folder / name for name in names):
        if _is_run(path):
            yield path
        elif depth > 1:
            try:
                yield from _below(path, depth - 1, (*above, here))
            except OSError:  # another user's, or gone meanwhile
                continue


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _order(path: Path) -> list[list[tuple[int, str]]]:
    """A path as what sorts it: `2-b` comes before `10-a`."""
    names = [name.replace("-", " - ").split() for name in path.parts]
    return [[(int(w), "") if w.isdecimal() and len(w) < 20 else (1 << 62, w) for w in words] for words in names]


def looked_at(run: Path, now: float) -> Overview:
    """Like `overview`. Raises UserError and OSError for a damaged run."""
    told, settings = status.read(run), _settings(run)
    state, reason = str(told.get("state", "not started")), str(told.get("reason", ""))
    heartbeat, goes_on = told.get("heartbeat"), state in status.GOING
    if goes_on and heartbeat is not None and now - heartbeat > status.SILENT:
        state, reason, goes_on = "silent", reason and f"{state}: {reason}", False
    first, last, starts = _starts(run)
    own = last if last.get("start") == told.get("start") else {}
    since = own.get("time") if goes_on else heartbeat
    numbers = _numbers(run)
    step, epochs = numbers.get("step", {}), _epochs(settings)
    epoch = told.get("epoch")
    progress = float(max(step["progress"], epoch or 0)) if "progress" in step else epoch  # either may be behind
    if step and not told:
        state, reason = "damaged", f"{status.FILE} is missing"
    rate = record.rate(step)
    seconds = spent(told)
    whole = sum(seconds.values())
    best_error, best_epoch = numbers.get("best", (None, None))
    return Overview(
        run,
        shown_name(run),
        state,
        reason,
        since=since or (told.get("announced") if state == "starting" else None),
        heartbeat=heartbeat,
        step=told.get("step"),
        epoch=epoch,
        epochs=epochs,
        progress=progress,
        left=_left(step, epochs, settings.get("train.max_steps", 0)) if state == "running" else None,
        images_per_s=rate,
        best_error=best_error,
        best_epoch=best_epoch,
        last_error=numbers.get("validation", {}).get("top1_error"),
        goodput=seconds["training"] / whole if whole and "training" in seconds else None,
        elapsed=whole or None,
        restarts=max(0, starts - 1),
        began=told.get("began") or first.get("time"),
        differs={key: value for key, value in settings.items() if key not in PLACES and value != _defaults().get(key)},
    )


@cache
def _defaults() -> dict[str, Any]:
    defaults: dict[str, Any] = json.loads(json.dumps(as_dict(Config())))
    return defaults


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run as flat keys, those that this program knows; of a net, an optimizer or a schedule its
    options one by one. Raises UserError and OSError."""
    for name in CONFIGS:
        try:
            found = yamls.groups(yamls.load(yamls.read(run / name)))
        except yamls.NoYaml as error:
            raise UserError(f"{run / name} {error}") from error
        except (FileNotFoundError, NotADirectoryError):
            continue
        flat = {f"{group}.{key}": value for group, values in found.items() for key, value in values.items()}
        plain = {key: _plain(flat[key]) for key in _defaults() if key in flat and not isinstance(flat[key], dict)}
        for key, options in flat.items():
            if key in _defaults() and isinstance(options, dict):
                plain |= {f"{key}.{str(option)[:WORDY]}": _plain(value) for option, value in options.items()}
        return plain
    return {}


def _plain(value: Any) -> Any:
    """A value as JSON knows it, and none that is long: text in place of others."""
    if isinstance(value, list) and len(value) <= WORDY:
        return [_plain(each) if not isinstance(each, list) else str(each)[:WORDY] for each in value]
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < 1 << 64):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)[:WORDY]


def _epochs(settings: Mapping[str, Any]) -> int | None:
    found = settings.get("train.epochs", _defaults()["train.epochs"]) if settings else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _starts(run: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The first and the last start of the event log, and how many there are. Raises OSError."""
    try:
        text = read_file(run / events.FILE, events.MOST)
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}, 0
    lines = b"\n".join(line for line in text.split(b"\n") if STARTED in line)
    found, _ = objects_of(events.Event, lines)
    return (found[0], found[-1], len(found)) if found else ({}, {}, 0)


def _numbers(run: Path) -> dict[str, Any]:
    """The newest line of each kind at the end of the record, and as `best` the lowest validation error and its epoch.
    Of earlier validations the newest checkpoint knows the best. Raises UserError and OSError."""
    path, about = run / record.FILE, checkpoint.newest_about(run)
    errors = [(about.best_error, about.best_epoch + 1)] if about and about.best_epoch >= 0 else []
    newest = dict[str, Any]()
    try:
        with open(path, "rb", opener=regular) as file:
            for i, text in enumerate(_backwards(file, os.fstat(file.fileno()).st_size)):
                first = text.partition(b"\n")[0]
                if i:
                    text = b"\n".join(line for line in text.split(b"\n") if VALIDATED in line)
                found = _checked(path, text)
                newest = {line["kind"]: line for line in found} | newest if not i else newest
                checked = [line for line in found if line["kind"] == "validation" and "top1_error" in line]
                errors += [(line["top1_error"], line.get("epoch", 0) + 1) for line in checked]
                before, _ = objects_of(record.RecordLine, first)
                if about and before and before[0].get("step", about.step) < about.step:
                    break
    except FileNotFoundError:
        pass
    return newest | ({"best": min(errors)} if errors else {})


def _checked(path: Path, text: bytes) -> list[dict[str, Any]]:
    """The lines of a piece of the record. Raises UserError."""
    found, wrong = objects_of(record.RecordLine, text)
    for error in wrong.values():
        if not isinstance(error, Torn):
            raise UserError(f"{path} is damaged (a line at its end: {error}): restore it, or move it away")
    return found


def _backwards(file: Any, end: int) -> Iterator[bytes]:
    """The lines of a file in pieces, the last ones first; up to a line that is longer than any of a record."""
    rest, size = b"", TAIL
    while end > 0:
        begin = max(0, end - size)
        file.seek(begin)
        piece = file.read(end - begin) + rest
        if begin:
            rest, newline, piece = piece.partition(b"\n")
            rest += newline
            if not newline or len(rest) > PIECE:
                return
        yield piece
        end, size = begin, PIECE


def _left(step: dict[str, Any], epochs: int | None, last: Any) -> float | None:
    """Seconds from a step's line to the last step, at its rate; `last`: `train.max_steps`."""
    rate, progress = record.rate(step), step.get("progress")
    number, images = step.get("step"), step.get("images")
    if not (rate and progress and number and isinstance(images, int) and epochs is not None):
        return None
    steps = max(0.0, (epochs - progress) * number / progress)
    if isinstance(last, int) and last > 0:
        steps = min(steps, max(0, last - number))
    seconds = float(steps * images / number / rate)
    return seconds if 0 < seconds < LONGEST else None
