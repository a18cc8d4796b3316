"""The run in TensorBoard: a reader of the record. Its files are rewritten at each start, so that they match the record
whatever became of the previous start, even one without TensorBoard."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.monitor import names
from dist_train.monitor.reader import Anew, Shown

FOLDER, FILES = "tensorboard", "events.out.tfevents.*"


class TensorBoardRun:
    """Event files in <run>/tensorboard, one event per line of the record; x is the step. Raises ImportError."""

    def __init__(self, folder: Path) -> None:
        # Imported here, in the reader's own thread, since it takes a second or two.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter

        self._folder = folder
        self._writer: Any = None
        self._open: Any = FileWriter
        self._begun: Any = Event(step=0, session_log=SessionLog(status=SessionLog.START))
        self._summary: Any = Summary

    @classmethod
    def wanted(cls, shown: Shown) -> TensorBoardRun | None:
        if not shown.config.monitor.tensorboard:
            return None
        try:
            return cls(shown.run / FOLDER)
        except ImportError as error:
            shown.say(f"monitor.tensorboard is on, but {error}: pip install tensorboard; training goes on without")
            return None

    def begin(self) -> int:
        if self._folder.is_symlink():
            raise OSError(f"{self._folder} is a link, which is not written through")
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        for old in self._folder.glob(FILES):
            if old.is_symlink() or not old.stat().st_size:
                old.unlink()
            else:
                os.truncate(old, 0)  # a running TensorBoard would wait for a deleted file
        self._writer = self._open(self._folder)
        self._writer.add_event(self._begun)  # a running TensorBoard drops what it has read from the old files
        return 0

    def take(self, line: dict[str, Any]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in names.named(line).items()]
        if values:
            try:
                self._writer.add_summary(self._summary(value=values), line["step"])
                self._writer.flush()
            except OSError as error:  # how much of it was written is unknown
                raise Anew from error

    def close(self) -> None:
        self._writer.close()
