"""What a run records and shows: metrics.jsonl, status.json, a progress bar or plain lines, wandb, the curves.

`metrics.jsonl` is the record: one line a logged step, one a validation. All else reads the same records.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_train.config import MonitorConfig
from dist_train.rundir.lease import Owner, Superseded
from pipelines.files import write_atomically

METRICS, STATUS = "metrics.jsonl", "status.json"
HEARTBEAT = 10.0  # seconds between two updates of status.json


class Monitor:
    """Records and shows a run; on ranks other than 0 it is silent and writes nothing.

    Args:
        directory: of the run.
        speaks: whether this is rank 0.
        owner: of the run directory; checked before every write.

    Attributes:
        superseded: another start has taken over the run; nothing is written any more.
        error: why the record could not be written, until it could.
    """

    def __init__(self, directory: Path, config: MonitorConfig, owner: Owner, *, speaks: bool) -> None:
        self.directory, self.config, self.owner, self.speaks = directory, config, owner, speaks
        self.superseded = False
        self.error: OSError | None = None
        self._records: Any = None
        self._size = 0
        self._unwritten: list[bytes] = []
        self._bar: tqdm[Any] | None = None
        self._wandb: Any = None
        self._told = self._heartbeat = 0.0
        self._where: dict[str, int] = {}

    def open(self, size: int, settings: dict[str, Any]) -> None:
        """Begin or continue the record: what lies behind byte `size`, the restored state's, is cut off."""
        if not self.speaks:
            return
        path = self.directory / METRICS
        kept = path.read_bytes()[:size] if path.exists() else b""
        write_atomically(path, kept)  # a new file: a stale process that still has the old one open cannot add to it
        self._records = open(path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        self._size = len(kept)
        if self.config.wandb != "disabled":
            self._wandb = _start_wandb(self.directory, self.config, settings)
            self.publish(self.size())

    def size(self) -> int:
        """Bytes of the record that are on the disk."""
        if self._records is not None:
            self._write()
            with suppress(OSError):
                os.fsync(self._records.fileno())
        return self._size

    def record(self, kind: str, **values: Any) -> None:
        """Append one line: {"kind": step | validation | changed, "step": ..., ...}."""
        if self.speaks:
            self._unwritten.append((json.dumps({"kind": kind, **values}) + "\n").encode())
            self._write()

    def _write(self) -> None:
        """Write what is not yet written. Where that fails, say so once and keep it for the next time."""
        try:
            self.owner.check()
            while self._unwritten:
                self._records.write(self._unwritten[0])
                self._size += len(self._unwritten.pop(0))
            self.error = None
        except Superseded:
            self.superseded = True
        except OSError as error:
            if self.error is None:
                self.say(f"{METRICS} cannot be written ({error}): the records are kept and written later")
            self.error = error
            with suppress(OSError):
                self._records.truncate(self._size)  # a full disk leaves half a line

    def publish(self, size: int) -> None:
        """Send to wandb what a checkpoint covers: the records up to byte `size`."""
        if not self._wandb:
            return
        mark = self.directory / "wandb" / "sent"
        sent = int(mark.read_text()) if mark.exists() else 0
        with open(self.directory / METRICS, "rb") as file:
            file.seek(sent)
            for line in file.read(max(0, size - sent)).splitlines():
                values = json.loads(line)
                if (kind := values.pop("kind")) != "changed":
                    named = {f"{kind}/{k}": v for k, v in values.items()}
                    self._wandb.log(named | {"images": values["images"]}, step=values["step"])
        write_atomically(mark, str(max(sent, size)).encode())

    def begin_epoch(self, epoch: int, epochs: int, start: int, steps: int) -> None:
        if self.speaks and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=start, desc=f"epoch {epoch + 1}/{epochs}", unit="step", dynamic_ncols=True
            )

    def end_epoch(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def progress(self, step: int, epoch: int, line: Callable[[], str]) -> None:
        """Show the state of training: in the bar, or as a line every half minute where the output is not a terminal."""
        if not self.speaks:
            return
        self._where = {"step": step, "epoch": epoch}
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
            if now - self._told > 0.5:
                self._bar.set_postfix_str(line())
                self._told = now
        elif now - self._told > 30:
            self.say(f"epoch {epoch + 1} step {step}: {line()}")
            self._told = now
        self.heartbeat()

    def heartbeat(self) -> None:
        """The run is alive: freshen status.json now and then."""
        if time.monotonic() - self._heartbeat > HEARTBEAT:
            self.status("running")

    def say(self, text: str) -> None:
        """One line for the user, from rank 0 only."""
        if self.speaks:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def status(self, state: str, reason: str = "", **where: Any) -> None:
        """state: running, stopped, done, diverged or failed."""
        if not self.speaks:
            return
        self._where |= where
        self._heartbeat = time.monotonic()
        body = {"state": state, "reason": reason, **self._where, "heartbeat": time.time(), "pid": os.getpid()}
        try:
            self.owner.check()
            write_atomically(self.directory / STATUS, (json.dumps(body, indent=1) + "\n").encode())
        except Superseded:
            self.superseded = True
        except OSError as error:
            self.say(f"{STATUS} cannot be written ({error})")

    def close(self) -> None:
        self.end_epoch()
        if self._records is not None:
            self._records.close()
        if self._wandb:
            self._wandb.finish()


def read_records(directory: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    path = directory / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _start_wandb(directory: Path, config: MonitorConfig, settings: dict[str, Any]) -> Any:
    """The run's one wandb run over all restarts: its id is kept in the run directory. Falls back to offline, then to
    nothing, and says so: showing a run must never end it."""
    (directory / "wandb").mkdir(exist_ok=True)
    mark = directory / "wandb" / "id"
    mode = config.wandb
    while mode != "disabled":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # wandb's, of its own dependencies
                import wandb
            if not mark.exists():
                write_atomically(mark, uuid.uuid4().hex[:8].encode())
            run = wandb.init(
                project=config.wandb_project,
                id=mark.read_text(),
                name=directory.name,
                dir=str(directory),
                mode=mode,
                resume="allow" if mode == "online" else None,
                config=settings,
                settings=wandb.Settings(init_timeout=60, console="off", silent=True),
            )
            run.define_metric("*", step_metric="images")
            return run
        except Exception as error:  # no network, no key, a server that answers nonsense
            fallback: Any = "offline" if mode == "online" else "disabled"
            print(f"wandb {mode} does not work ({error}): {fallback} instead", file=sys.stderr)
            mode = fallback
    return None
