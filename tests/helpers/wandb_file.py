"""Contents of wandb's files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7


class Logged(NamedTuple):
    """One file of wandb's.

    Attributes:
        id: of the run; empty if the file has not got that far.
        rows: what was logged, by wandb's own step.
        metrics: the definitions of metrics, by their names.
        summary: as it was last.
        artifacts: (type, the paths in it) of each, tables included.
        code: the exit code that it was finished with; None if it was not.
    """

    id: str
    run: Any
    rows: dict[int, dict[str, Any]]
    metrics: dict[str, Any]
    summary: dict[str, Any]
    alerts: list[tuple[str, str, str]]
    artifacts: list[tuple[str, list[str]]]
    preempting: bool
    code: int | None


def messages(path: Path) -> Iterator[Record]:
    """The messages in a file of wandb's: a LevelDB log (blocks of 32 KiB; records with checksum, length and kind, of
    which 1 and 4 end a message) behind 7 bytes of its own."""
    data, place, message = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if (rest := BLOCK - place % BLOCK) < HEADER:
            place += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        message += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4) and place <= len(data):
            yield Record.FromString(message)
            message = b""


def logged(path: Path) -> Logged:
    """What a file of wandb's tells, as far as it is written."""
    run: Any = None
    rows, metrics, summary, alerts, artifacts, preempting, code = {}, {}, {}, [], [], False, None
    for message in messages(path):
        kind = message.WhichOneof("record_type")
        if kind == "run":
            run = message.run
        elif kind == "history":
            row = _items(message.history.item)
            rows[int(row["_step"])] = row
        elif kind == "summary":
            summary |= _items(message.summary.update)
        elif kind == "metric":
            metrics[message.metric.name or message.metric.glob_name] = message.metric
        elif kind == "alert":
            alerts.append((message.alert.title, message.alert.text, message.alert.level))
        elif kind == "request" and message.request.WhichOneof("request_type") == "log_artifact":
            artifact = message.request.log_artifact.artifact
            artifacts.append((artifact.type, [entry.path for entry in artifact.manifest.contents]))
        elif kind == "artifact":
            artifacts.append((message.artifact.type, [entry.path for entry in message.artifact.manifest.contents]))
        elif kind == "preempting":
            preempting = True
        elif kind == "exit":
            code = message.exit.exit_code
    return Logged(run.run_id if run else "", run, rows, metrics, summary, alerts, artifacts, preempting, code)


def files(run: Path) -> list[Path]:
    """Those of a run directory, one for each start that was shown."""
    return sorted(run.glob("wandb/*run-*/run-*.wandb"))


def _items(found: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found}
