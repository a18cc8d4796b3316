"""The table of runs: in a pipe a line per run, on a terminal of any width no line that is wider."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from dist_train.__main__ import main
from dist_train.rundir.listing import HEADS, as_json, cells, drawn_table, listed_runs
from dist_train.rundir.overview import Overview
from pipelines.speech import UNPRINTED
from slurm.table import HEADS as SLURMS

NOW = 1_800_000_000.0
ROOT = Path(__file__).parent.parent
SGR = re.compile("\033\\[[0-9;]*m")
SETTINGS = {"optim.lr": 0.02, "schedule.milestones": [2, 3], "optim.name": "a b", "model.width": None}
RUNS = [
    Overview(Path("a"), "配置-学習-🦊-a", "running", epoch=1, epochs=3, progress=1.43, began=NOW - 7300, left=64.0),
    Overview(Path("b"), "[red]b[/red]", "failed", reason="no GPU " * 30, best_error=0.4071, differs={"train.seed": 1}),
    Overview(Path("c"), "x" * 100, "done", images_per_s=812.3, goodput=0.874, differs={"train.seed": 1, **SETTINGS}),
    Overview(Path("d"), "d\033[2J\nd", "damaged", reason="status.json (\u202e)"),
]


def test_in_a_pipe_a_run_is_one_line() -> None:
    """Whole, with its columns under their heads, and in plain text."""
    head, *lines = drawn_table([cells(run, NOW) for run in RUNS], width=0).splitlines()
    assert not any(UNPRINTED.search(line) for line in (head, *lines))
    assert tuple(re.split(" {2,}", head)) == HEADS
    assert len(lines) == len(RUNS)
    at = cell_len(head[: head.index("STATE")])
    for line, name in zip(lines, ("配置-学習-🦊-a", "[red]b[/red]", "x" * 100, r"d\x1b[2J\nd"), strict=True):
        assert line.startswith(f"{name} ")
        assert cell_len(line[: re.search(r"(?<=  )(running|failed|done|damaged)", line).start()]) == at  # type: ignore[union-attr]
    assert re.split(" {2,}", lines[0])[1:] == ["running", "1.4/3", "-", "-", "-", "64 s", "2 h", "-"]
    assert lines[2].endswith('  train.seed=1 optim.lr=0.02 schedule.milestones=[2,3] optim.name="a b" model.width=null')


@pytest.mark.parametrize("heads", [HEADS, SLURMS])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(
    heads: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the names are; the columns that have no room are named, and those that are left are whole."""
    monkeypatch.setenv("TERM", "xterm")
    rows = [cells(run, NOW) | {"JOB": "123", "SLURM": "RUNNING"} for run in RUNS]
    text = drawn_table(rows, heads, width)
    assert "\033[1m" in text
    assert not UNPRINTED.search(SGR.sub("", text).replace("\n", ""))
    *lines, _ = SGR.sub("", text).splitlines() if width < 200 else [*SGR.sub("", text).splitlines(), ""]
    assert max(map(cell_len, lines)) <= width
    shown = re.split(" {2,}", lines[0].strip())
    missing = [head for head in heads if head not in shown]
    assert shown == [head for head in heads if head not in missing]
    assert {"RUN", "STATE"} <= set(shown)
    assert width == 40 or "EPOCH" in shown  # as many as have room
    assert (width < 80) == ("BEST ERROR" not in shown)
    assert not missing or text.splitlines()[-1].startswith(f"no room for {', '.join(missing)}: ")
    monkeypatch.setenv("TERM", "dumb")
    assert drawn_table(rows, heads, width).splitlines() == [line.rstrip() for line in SGR.sub("", text).splitlines()]


def test_no_long_name_or_reason_takes_the_room_of_the_settings() -> None:
    """The three columns that fold share what is there; what one of them does not need is the others'."""
    long = Overview(Path("a"), "n" * 300, "failed", "no GPU " * 30)
    rows = [cells(replace(long, differs={"model.name": letter * 500}), NOW) for letter in "mn"]
    head = SGR.sub("", drawn_table(rows, width=200)).splitlines()[0]
    starts = [head.index(name) for name in ("STATE", "EPOCH", "SETTINGS")]
    assert min(starts[0], starts[1] - starts[0], 200 - starts[2]) > 35
    short = SGR.sub("", drawn_table([row | {"RUN": "n", "STATE": "done"} for row in rows], width=200)).splitlines()[0]
    assert 200 - short.index("SETTINGS") > 100


def test_what_all_runs_share_stands_below_the_table_once() -> None:
    """On a terminal; what few runs have comes first, and a damaged run has none."""
    rows = [
        cells(
            Overview(Path(n), n, "done", epochs=9, differs={"optim.lr": 0.1, "model.name": "a b", "train.seed": n}), NOW
        )
        for n in "abc"
    ]
    rows += [
        cells(
            Overview(
                Path("d"),
                "d",
                "done",
                differs={"optim.lr": 0.1, "model.name": "a b", "train.seed": "c", "train.epochs": 1},
            ),
            NOW,
        )
    ]
    lines = SGR.sub("", drawn_table([*rows, cells(RUNS[3], NOW)], width=200)).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:5]] == [
        *("train.seed=a", "train.seed=b", "train.seed=c", "train.epochs=1 train.seed=c"),
    ]
    assert lines[6:] == ['all runs: optim.lr=0.1 model.name="a b"']


def made(run: Path, began: float) -> None:
    run.mkdir(parents=True)
    body = {"state": "done", "heartbeat": began + 5, "began": began, "epoch": 1}
    (run / "status.json").write_text(json.dumps(body))


def test_the_newest_run_is_the_last(tmp_path: Path) -> None:
    """The runs of a sweep stay together, in the order of their numbers."""
    for name, began in (("new", 30.0), ("old", 10.0), ("lr/10-a", 25.0), ("lr/2-b", 40.0)):
        made(tmp_path / name, began)
    (tmp_path / "old" / "status.json").write_text("{}")
    os.utime(tmp_path / "old", (1, 1))
    found = listed_runs(tmp_path, NOW)
    assert [run.name for run in found] == ["old", "lr/2-b", "lr/10-a", "new"]
    assert [run.state for run in found] == ["damaged", "done", "done", "done"]


def no_permission(path: Path) -> None:
    """What the system says to everybody but root."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs under runs/: name the folder that holds them\n"
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    made(tmp_path / "runs" / "a", 10.0)
    (tmp_path / "runs" / "strange").mkdir()
    (tmp_path / "runs" / "strange" / "status.json").write_text("[1]")
    assert main(["runs"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert (head.split()[0], [line.split()[:2] for line in lines]) == ("RUN", [["a", "done"], ["strange", "damaged:"]])
    assert main(["runs", "runs/a", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert (only["directory"], only["name"], only["epoch"], only["began"]) == ("runs/a", "a", 1, 10.0)
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert main(["runs", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "a"
    monkeypatch.setattr(os, "scandir", no_permission)
    assert main(["runs", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be read (Permission denied): name a folder that can\n" in capsys.readouterr().err
    assert main(["runs", "nowhere"]) == 2
    assert main(["runs", "--json", "--watch"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_the_keys_of_the_json_are_the_documented_ones() -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    table = page.split("## All runs")[1].split("| key | |")[1].split("\n\n")[0]
    keys = [key for line in table.splitlines() for key in re.findall("`(\\w+)`", line.split("|")[1] if line else "")]
    assert sorted(keys) == sorted(json.loads(as_json(RUNS[:1]))[0])


@pytest.mark.integration
def test_a_watch_on_a_terminal(tmp_path: Path) -> None:
    """Shows again what has changed, in the width of the terminal, until Ctrl-C."""
    made(tmp_path / "a", time.time())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    words = [sys.executable, "-m", "dist_train", "runs", str(tmp_path), "--watch", "1"]
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    text = b""
    while text.count(b"\033[2J") < 2:
        text += os.read(ours, 4096)
        (tmp_path / "a" / "status.json").write_text('{"state": "diverged", "reason": "the loss is NaN"}')
    while b"diverged: the loss is NaN" not in text:
        text += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    os.close(ours)
    assert b"a    done" in SGR.sub("", text.decode()).encode()
