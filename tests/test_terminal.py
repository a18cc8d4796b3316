"""What a run shows while it trains: the live line of a terminal, and the plain lines without one."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from dist_train.config import TrainConfig
from dist_train.monitor import terminal
from dist_train.rundir.state import Progress
from pipelines import speech

LINE: dict[str, Any] = {"kind": "step", "epoch": 0, "step": 60, "progress": 60 / 468, "images": 60 * 128}
LINE |= {"loss": 1.2344, "train_error": 0.45, "lr": 0.01}
WAITS: dict[str, Any] = {"data_wait": 0.03, "data_wait_worst": 0.07, "worst_rank": 3, "worst_node": "gpu-07"}
LINE["machine"] = {"images_per_s": 509.2, **WAITS}
BEHIND = {**LINE, "machine": {**LINE["machine"], "data_wait_worst": 0.31}}  # a rank holds the others up
ALL = ("loss 1.234", "error 45%", "lr 0.01", "509 images/s", "data wait 3%", "0:01:42 left")
WORST = "rank 3 on gpu-07 31%"


def frames(columns: int, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any] = LINE) -> list[str]:
    """What stands on a terminal of so many columns, one after the other."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        shown = terminal.Terminal(is_first=True)
        shown.begin_epoch(Progress(step=59, step_in_epoch=59), TrainConfig(epochs=1), 468)
        shown.tick()
        shown.take(line)
        shown.begin_validation(Progress(), 79)
        shown.validated()
        shown.end_epoch()
        monkeypatch.undo()
        text = b""
        while select.select([ours], [], [], 0.2)[0]:
            text += os.read(ours, 4096)
    os.close(ours)
    return [frame for frame in text.decode().split("\r") if frame.strip()]


@pytest.mark.parametrize(("columns", "numbers"), [(130, ALL), (80, (ALL[0], ALL[1], ALL[5])), (60, (ALL[5],))])
def test_the_bar_keeps_its_room(columns: int, numbers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """lr, data wait and rate go first where there is no room for all numbers."""
    shown = frames(columns, monkeypatch)
    assert max(map(len, shown)) <= columns
    before, bar, after = next(frame for frame in shown if "left" in frame).split("|")
    assert before == "60 of 468 steps of epoch 1/1 "
    assert len(bar) >= 10
    assert after.strip() == ", ".join(numbers)
    assert shown[0].startswith("59 of 468 steps of epoch 1/1 |")
    assert shown[-1].startswith("0 of 79 batches of validation 1/1 |")


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [
        (140, (*ALL[:5], WORST, ALL[5])),
        (130, (*ALL[:2], *ALL[3:5], WORST, ALL[5])),
        (120, ALL),  # what is shorter keeps the room that a rank's name lacks
        (110, (*ALL[:2], *ALL[3:])),
        (95, (ALL[0], ALL[1], ALL[3], ALL[5])),
    ],
)
def test_a_rank_that_waits_much_longer_is_named(
    columns: int, numbers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the mean, and before the learning rate where there is no room for both."""
    shown = frames(columns, monkeypatch, BEHIND)
    assert max(map(len, shown)) <= columns
    assert next(frame for frame in shown if "left" in frame).split("|")[2].strip() == ", ".join(numbers)


def test_plain_lines_count_the_steps_that_are_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of `train.max_steps`, where it ends the run before its last epoch; at most one line in half a minute."""
    clock = iter((100.0, 110.0, 131.0))
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    shown = terminal.Terminal(is_first=True)
    for last, line in ((0, LINE), (500, LINE), (100, BEHIND)):
        shown.begin_epoch(Progress(step=59, step_in_epoch=59), TrainConfig(epochs=3, max_steps=last), 468)
        shown.tick()
        shown.take(line)
    assert capsys.readouterr().err.splitlines() == [
        "60 of 468 steps of epoch 1/3: " + ", ".join((*ALL[:5], "0:05:37 left")),
        "60 of 100 steps of epoch 1/3: " + ", ".join((*ALL[:5], WORST, "0:00:10 left")),
    ]


def test_a_bar_without_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with speech.bar(3, "pack val", "img", lines=True) as bar:
        speech.say("a line")
        bar.update(3)
    lines = stream.getvalue().split("\n")
    assert [line.split(",")[0] for line in lines] == ["pack val: 0 of 3", "a line", "pack val: 3 of 3", ""]


def test_a_terminal_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with suppress(OSError), os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        shown = terminal.Terminal(is_first=True)
        shown.begin_epoch(Progress(), TrainConfig(epochs=1), 468)
        os.close(ours)
        shown.take(LINE)
        shown.tick()
        shown.end_epoch()
        monkeypatch.undo()
