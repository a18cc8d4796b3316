"""Findings of a part of the GPU report, in a file from the start: they can be read even if the part is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.files import write_atomically
from pipelines.speech import show

STATES = ("ok", "left out", "warn", "failed")  # of a part, in the order in which one hides another


class Findings:
    """Findings of one part.

    Attributes:
        result: the findings by name.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._state = STATES[0]
        self._reasons: list[str] = []
        self.result: dict[str, Any] = {}
        self._write()

    def keep(self, name: str, value: Any, under: str = "") -> None:
        """Add to the result, or to a group in it."""
        (self.result.setdefault(under, {}) if under else self.result)[name] = value
        self._write()

    def say(self, state: str, reason: str) -> None:
        """Raise the part to at least this state. With "ok", the reason is a remark."""
        self._state = max(self._state, state, key=STATES.index)
        self._reasons.append(reason)
        self._write()

    def tell(self, text: str) -> None:
        """Show the user the current activity."""
        show(text)

    def _write(self) -> None:
        found = {"state": self._state, "reason": "; ".join(self._reasons), "result": self.result}
        write_atomically(self._file, json.dumps(found).encode())
