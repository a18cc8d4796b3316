"""What happened to a run, from its event log: marks in the curves, and its story as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dist_train.page.series import number
from dist_train.page.wording import percent, plainly, whole

APART = 1 / 80  # of the x axis: marks of one kind that are closer become one
TITLES = 3  # that are told of such a one
SETTINGS = 6  # that are told of one change


class Happening(NamedTuple):
    """Something that happened. `kind` is that of a mark: division, restart, world_size, code, settings, bad_samples; or
    begin, end, alert, which are only told."""

    kind: str
    step: int
    time: float
    title: str


class Mark(NamedTuple):
    """A line in the curves at a number of images."""

    kind: str
    images: float
    title: str


MARKED = ("division", "restart", "world_size", "code", "settings", "bad_samples")


def happenings(events: Sequence[Mapping[str, Any]]) -> list[Happening]:
    """What happened, in the order of the log."""
    found: list[Happening] = []
    ranks, ended, steps = None, "", 0
    for event in events:
        kind, step = event["event"], event.get("step", 0)
        steps = max(steps, step)
        if kind == "start":
            size = event.get("world_size")
            found += _start(event, ranks, ended, begun=ranks is not None or any(h.kind == "begin" for h in found))
            ranks, ended = size, ""
        elif kind in ("end", "killed"):
            ended = _ending(event)
            found.append(Happening("end", step or steps, event.get("time", 0.0), ended))
        else:
            found += [Happening(what, step or steps, event.get("time", 0.0), title) for what, title in _told(event)]
    return found


def marks(found: Sequence[Happening], per_step: float, images: float) -> list[Mark]:
    """The marks of a run that has shown so many images, in the order of their places."""
    made: list[Mark] = []
    for kind in MARKED:
        group: list[Happening] = []
        for happening in sorted((h for h in found if h.kind == kind), key=lambda h: h.step):
            if group and (happening.step - group[0].step) * per_step > APART * images:
                made.append(_merged(group, per_step))
                group = []
            group.append(happening)
        made += [_merged(group, per_step)] if group else []
    return sorted(made, key=lambda mark: mark.images)


def _merged(group: Sequence[Happening], per_step: float) -> Mark:
    # Of bad samples the number so far is told: the last one says it all.
    titles = list(dict.fromkeys(h.title for h in group)) if group[0].kind != "bad_samples" else [group[-1].title]
    more = f"; and {len(titles) - TITLES} more" if len(titles) > TITLES else ""
    return Mark(group[0].kind, group[0].step * per_step, "; ".join(titles[:TITLES]) + more)


def _start(event: Mapping[str, Any], ranks: Any, ended: str, *, begun: bool) -> Iterator[Happening]:
    step, when, size = event.get("step", 0), event.get("time", 0.0), event.get("world_size")
    nodes = event.get("nodes") or []
    place = f"{plainly(size)} rank{'' if size == 1 else 's'}" if size else ""
    place += (" on " + ", ".join(map(plainly, nodes[:4])) + (" ..." if len(nodes) > 4 else "")) if nodes else ""
    if not begun:
        yield Happening("begin", step, when, f"begins{' with ' if place else ''}{place}")
        return
    after = f" (before: {ended})" if ended else ""
    yield Happening("restart", step, when, f"goes on from step {whole(step)}{' with ' if place else ''}{place}{after}")
    if size is not None and ranks is not None and size != ranks:
        yield Happening("world_size", step, when, f"world size {plainly(ranks)} → {plainly(size)}")


def _ending(event: Mapping[str, Any]) -> str:
    node = f" on {plainly(event['node'])}" if event.get("node") else ""
    reason = f": {plainly(event['reason'])}" if event.get("reason") else ""
    if event["event"] == "killed":
        return f"ended without notice{node}{reason}"
    return f"{plainly(event.get('state') or 'ended')}{node}{reason}"


def _told(event: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kinds and titles of the other events."""
    kind = event["event"]
    if kind == "division":
        lr, error = number(event.get("lr")), number(event.get("error"))
        after = f" at an error of {percent(error, 2)}" if error is not None else ""
        yield "division", f"learning rate divided, to {lr:g}{after}" if lr is not None else "learning rate divided"
    elif kind == "bad_samples":
        yield "bad_samples", f"{plainly(event.get('samples', '?'))} samples could not be decoded so far"
    elif kind == "alert":
        yield "alert", plainly(event.get("sentence", ""))
    elif kind == "given_up":
        yield "alert", f"given up: {plainly(event.get('reason', ''))}"
    elif kind == "requeued":
        yield "alert", f"requeued by Slurm, job {plainly(event.get('job', ''))}"
    elif kind == "changed":
        settings, code = event.get("settings"), event.get("code")
        if isinstance(settings, dict) and settings:
            told = [f"{plainly(key)}: {_change(value)}" for key, value in list(settings.items())[:SETTINGS]]
            more = f", and {len(settings) - SETTINGS} more" if len(settings) > SETTINGS else ""
            yield "settings", f"settings changed: {', '.join(told)}{more}"
        if code:
            versions = [_version(each) for each in code] if isinstance(code, list) else []
            yield "code", f"the code changed{': ' if versions else ''}{' → '.join(versions)}"


def _change(value: Any) -> str:
    return " → ".join(map(plainly, value)) if isinstance(value, list) else plainly(value)


def _version(code: Any) -> str:
    if not isinstance(code, dict):
        return "?"
    return plainly(str(code.get("commit") or code.get("sources") or code.get("version") or "?")[:9])
