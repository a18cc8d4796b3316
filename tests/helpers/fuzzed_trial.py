"""A subject that ends in each way in which a child can end, for the test of the fuzz test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from pipelines.errors import UserError
from tests.helpers import fuzz
from tests.helpers.fuzz import Damage, Subject


def raise_(error: BaseException) -> None:
    raise error


WAYS: dict[str, Callable[[], object]] = {
    "success": lambda: None,
    "sentence": lambda: raise_(UserError("a is damaged: restore it")),
    "no sentence": lambda: raise_(UserError("two\nlines")),
    "traceback": lambda: raise_(KeyError("a")),
    "exit": lambda: raise_(SystemExit(3)),
    "signal": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: time.sleep(60),
    "much memory": lambda: b"x" * (fuzz.MEMORY + (64 << 20)),
    "all memory": lambda: bytes(2 * fuzz.MORE),
    "vanished": lambda: os._exit(0),
}


def trial(_: Path) -> Subject:
    def make(folder: Path, damage: Damage) -> list[str]:
        (folder / "way").write_text(damage[0], encoding="utf-8")
        return [damage[0]]

    def read(folder: Path) -> None:
        WAYS[(folder / "way").read_text(encoding="utf-8")]()

    fuzz.SECONDS = 0.5
    return Subject(st.tuples(st.sampled_from(sorted(WAYS)), st.just([])), make, read)


SUBJECTS = {"trial": trial}
