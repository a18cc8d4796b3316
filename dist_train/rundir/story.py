"""Events that a start logs first: the end of the previous start, its own beginning, and what changed in between.
Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dist_train.config import Config
from dist_train.flat import as_dict
from dist_train.ranks import launcher
from dist_train.rundir import events
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.status import CRASH, OVER

COMPUTES = ("sources", "own")  # hashes of the modules that compute a run; see `code.version`
PLACES = ("run.name", "run.root", "run.dir")  # differ if a run is moved, or named by another path


def tell_start(run: RunDirectory, before: Mapping[str, Any], config: Config, **start: Any) -> None:
    """Log that a start has claimed the run; to be called before it logs any other event.

    Args:
        before: content of status.json when this start began.
        config: settings of this start.
        start: further entries of the event: step, checkpoint, nodes and the like.
    """
    told = events.read(run.path)
    last: dict[str, Any] = next((event for event in reversed(told) if event.get("event") == "start"), {})
    _tell_end(run, told, last, before)
    job, restart = launcher.job(), launcher.restarts() + launcher.brought_back()
    if launcher.brought_back() or (launcher.submitted() and last.get("job") == job):
        run.events.append("requeued", job=job, restart=restart)
    run.events.append("start", **start, job=job, restart=restart)
    changed: dict[str, Any] = {}
    if settings := differences(run.earlier, config):
        changed["settings"] = settings
    was, code = last.get("code"), start["code"]
    if isinstance(was, dict) and [was.get(key) for key in COMPUTES] != [code.get(key) for key in COMPUTES]:
        changed["code"] = [was, code]
        if start["step"]:
            changed["exact_until"] = start["step"]
            run.say(f"the code has changed since the last start: after step {start['step']} the bits may differ")
    if changed:
        run.events.append("changed", step=start["step"], **changed)


def differences(earlier: Mapping[str, Any], config: Config) -> dict[str, list[Any]]:
    """Settings that differ from those of the previous start: {key: [was, is]}.

    Args:
        earlier: flat; a missing key counts as its default.
    """
    if not earlier:
        return {}
    defaults, now = _plain(as_dict(Config())), _plain(as_dict(config))
    was = _plain({key: earlier.get(key, default) for key, default in defaults.items()})
    return {key: [was[key], now[key]] for key in now if key not in PLACES and was[key] != now[key]}


def _tell_end(
    run: RunDirectory, told: list[dict[str, Any]], last: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Log how the previous start ended, if it did not do so itself."""
    if before.get("state") == "starting" and "start" not in before:
        run.events.append("killed", of="", heartbeat=before.get("heartbeat"), reason=before.get("reason", ""))
    name = before.get("start") or last.get("start")
    if not name or any(event.get("event") == "end" and event.get("start") == name for event in told):
        return
    if not told and before.get("state") in OVER:  # from a version without events
        return
    about = {key: before[key] for key in ("step", "epoch") if key in before}
    own = before.get("start") == name  # else a later start failed before claiming the run
    if own and before.get("state") in OVER and not {"error", CRASH} & before.keys():
        how = {key: before.get(key, "") for key in ("state", "reason")}
        run.events.append("end", **about | how | {"start": name})
        return
    nodes = last.get("nodes") if last.get("start") == name else None
    about["node"] = (own and before.get("node")) or (nodes[0] if isinstance(nodes, list) and nodes else "")
    if own and before.get("state") == "failed":
        about["reason"] = before.get("reason", "")
    run.events.append("killed", of=name, heartbeat=before.get("until", before.get("heartbeat")), **about)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values` after a round trip through JSON: tuples become lists, other types from a configuration text; what has a
    date or a mapping as its key is left out."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str, skipkeys=True))
    return plain
