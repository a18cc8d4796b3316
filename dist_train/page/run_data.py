"""One run as the page shows it: read once, whatever is damaged or missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dist_train.config import Config
from dist_train.page.bottleneck import bottleneck
from dist_train.page.inlined import Picture, pictures
from dist_train.page.marks import Happening, Mark, happenings, marks
from dist_train.page.series import Point, Recorded, logarithmic, recorded, short
from dist_train.page.told import Confused, Phase, confused, phases
from dist_train.page.wording import moment, percent, plainly, spoken, whole
from dist_train.rundir import confusion, events, record, status
from dist_train.rundir.ledger import spent
from dist_train.rundir.overview import Overview, overview
from pipelines.errors import UserError

T = TypeVar("T")

GLYPHS = {  # beside the word of a state, so that no state is a colour alone
    "starting": "◔",
    "running": "▶",
    "stopped": "❚❚",
    "done": "✓",
    "diverged": "↯",
    "failed": "✕",
    "silent": "?",
    "not started": "○",
    "damaged": "!",
}
LATEST = 200  # happenings in the story
PICTURES = 2_000_000  # characters of all pictures of a page: that of a run stays below 3 MB


@dataclass
class RunPage:
    """What the template takes of a run.

    Attributes:
        name: of the run; `shown` is the same, but for what would turn other text around.
        facts: of the first line, after the state.
        limit: the sentence on the speed; may be empty.
        notes: what could not be read, or is not there.
        data: for the curves; see page.js.
    """

    overview: Overview
    name: str
    shown: str
    glyph: str
    facts: list[str]
    limit: str
    phases: list[Phase]
    story: list[tuple[str, str, Happening]]
    notes: list[str] = field(default_factory=list)
    confused: Confused | None = None
    pictures: list[Picture] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def run_page(run: Path, now: float, name: str, index: int, runs: int) -> RunPage:
    """Reads a run.

    Args:
        name: that the page calls it by.
        index: its number among the runs of the page.
        runs: how many these are; they share the room for pictures and curves.
    """
    notes: list[str] = []
    found = overview(run, now)
    told = _read(lambda: status.read(run), dict[str, Any](), [])  # the overview says what is wrong with it
    lines = _read(lambda: recorded(run, runs), Recorded(), notes)
    log = _read(lambda: events.read(run), list[dict[str, Any]](), notes)
    happened = happenings(log)
    if lines.damaged[1]:
        first, count = lines.damaged
        notes.append(f"{count} line{'s' if count > 1 else ''} of {record.FILE} left out: {first}")
    placed = marks(happened, lines.per_step, lines.images)
    page = RunPage(
        found,
        name,
        plainly(name),
        GLYPHS.get(found.state, "?"),
        _facts(found, now),
        _limit(found, lines, happened, spent(told), gpu=_on_gpu(log)),
        phases(spent(told)),
        [(moment(each.time), whole(each.step), each) for each in happened[-LATEST:]],
        notes,
        data=_data(found, plainly(name), lines, placed, index),
    )
    page.pictures, wrong = pictures(run, PICTURES // runs)
    notes += wrong
    if (run / confusion.FILE).exists():
        page.confused = _read(lambda: confused(run), None, notes)
    return page


def _facts(found: Overview, now: float) -> list[str]:
    """since when, time left, best error so far"""
    facts = []
    if found.since is not None:
        facts.append(f"since {moment(found.since)}")
    if found.state == "silent" and found.heartbeat is not None:
        facts.append(f"no heartbeat for {spoken(now - found.heartbeat)}")
    if found.left is not None:
        facts.append(f"{spoken(found.left)} left")
    if found.best_error is not None:
        epoch = f" after epoch {found.best_epoch}" if found.best_epoch is not None else ""
        facts.append(f"best error {percent(found.best_error, 2)}{epoch}")
    else:
        facts.append("not validated yet")
    return facts


def _limit(found: Overview, lines: Recorded, happened: list[Happening], seconds: dict[str, float], *, gpu: bool) -> str:
    begun = next((each.step for each in reversed(happened) if each.kind in ("begin", "restart")), 0)
    recent = [line for line in lines.recent if line.get("step", 0) > begun][1:]
    side = found.differs.get("data.resize", Config().data.resize)
    return bottleneck(recent, lines.validation, seconds, side, gpu=gpu)


def _on_gpu(log: list[dict[str, Any]]) -> bool:
    return next((event.get("device") for event in reversed(log) if event["event"] == "start"), "") == "cuda"


def _data(found: Overview, name: str, lines: Recorded, placed: list[Mark], index: int) -> dict[str, Any]:
    """What page.js draws: rows that were recorded, and of each curve its values at some of them."""
    every = [*lines.curves.values(), *lines.extremes.values()]
    rows = sorted({point[:3] for points in every for point in points})
    places = {row: i for i, row in enumerate(rows)}

    def drawn(curves: dict[str, list[Point]]) -> dict[str, dict[str, list[Any]]]:
        return {
            key: {"at": [places[point[:3]] for point in points], "y": [short(point.value) for point in points]}
            for key, points in curves.items()
        }

    curves, extremes = drawn(lines.curves), drawn(lines.extremes)
    return {
        "name": name,
        "state": found.state,
        "heartbeat": found.heartbeat,
        "rows": {
            "images": [short(row[0]) for row in rows],
            "step": [row[1] for row in rows],
            "epoch": [short(row[2]) for row in rows],
        },
        "curves": curves,
        "extremes": extremes,
        "logarithmic": [key for key in curves if logarithmic((extremes.get(key) or curves[key])["y"])],
        "marks": [mark._asdict() | {"images": short(mark.images)} for mark in placed],
        "index": index,
    }


def _read(read: Callable[[], T], default: T, notes: list[str]) -> T:
    """What `read` returns; if the file is damaged, `default` and a note."""
    try:
        return read()
    except (OSError, UserError) as error:
        notes.append(plainly(error))
        return default
