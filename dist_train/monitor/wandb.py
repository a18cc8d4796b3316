"""The run in wandb: a reader of the same records."""

from __future__ import annotations

import json
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dist_train.config import MonitorConfig
from dist_train.rundir import record
from pipelines.files import write_atomically

Mode = Literal["disabled", "offline", "online"]
FALLBACK: dict[Mode, Mode] = {"online": "offline", "offline": "disabled"}
TIMEOUT = 60  # seconds that wandb may take to begin


class WandbRun:
    """The run's one wandb run over all its starts: the id is kept in the run directory.

    Falls back to offline, then to nothing, and says so: showing a run must never end it.

    Args:
        run: directory of the run.
        say: shows the user a line.
    """

    def __init__(self, run: Path, config: MonitorConfig, say: Callable[[str], None]) -> None:
        self._path, self._config, self._say = run, config, say
        self._folder, self._record = run / "wandb", run / record.FILE
        self._run: Any = None
        self._told = False

    def open(self, settings: dict[str, Any]) -> None:
        """Begin, or go on, on the one rank that shows the run; `settings` is the configuration."""
        mode: Mode = self._config.wandb
        while mode != "disabled" and self._run is None:
            try:
                self._run = self._begin(mode, settings)
            except Exception as error:  # no network, no key, a server that answers nonsense
                self._say(f"wandb {mode} does not work ({error}): {FALLBACK[mode]} instead")
                mode = FALLBACK[mode]

    def publish(self, size: int) -> None:
        """Send the records up to byte `size` that were not sent yet: a checkpoint covers them, so they are never cut
        off."""
        if self._run:
            self._attempt(lambda: self._send(size))

    def close(self) -> None:
        if self._run:
            self._attempt(self._run.finish)

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do it. A failure is told once, and what was not sent is sent the next time."""
        try:
            work()
        except Exception as error:  # a service that has died, a full disk
            if not self._told:
                self._say(f"wandb is not told ({type(error).__name__}: {error}): training goes on, see {self._folder}")
            self._told = True

    def _send(self, size: int) -> None:
        mark = self._folder / "sent"
        sent = int(mark.read_text(encoding="utf-8")) if mark.exists() else 0
        with open(self._record, "rb") as file:
            file.seek(sent)
            lines = file.read(max(0, size - sent))
            for line in lines.splitlines():
                values = json.loads(line)
                if (kind := values.pop("kind")) not in ("begun", "changed"):
                    named = {f"{kind}/{k}": v for k, v in values.items()}
                    self._run.log(named | {"images": values["images"]}, step=values["step"])
        write_atomically(mark, str(sent + len(lines)).encode(), durable=False)

    def _begin(self, mode: Mode, settings: dict[str, Any]) -> Any:
        self._folder.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # wandb's, of its own dependencies
            import wandb
        mark = self._folder / "id"
        if not mark.exists():
            write_atomically(mark, uuid.uuid4().hex[:8].encode())
        with _nobody_is_asked():
            began = wandb.init(
                project=self._config.wandb_project,
                id=mark.read_text(encoding="utf-8"),
                name=self._path.name,
                dir=str(self._path),
                mode=mode,
                resume="allow" if mode == "online" else None,  # offline wandb takes none; `wandb sync` merges by id
                config=settings,
                settings=wandb.Settings(init_timeout=TIMEOUT, console="off", silent=True),
            )
        began.define_metric("*", step_metric="images")
        return began


@contextmanager
def _nobody_is_asked() -> Iterator[None]:
    """Without a key wandb asks for one where stdin is a terminal, and waits; where it is none, it raises an error."""
    usual = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = usual
