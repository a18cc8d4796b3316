"""Output without a reader ends no run: a full disk, a pipe without a reader, a closed terminal, no output at all; nor
does the end of a run fail because of a name, a line or a disk.

The trainer itself: `test_run.py::test_nobody_reads_what_it_prints`.
"""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.outcomes import Done
from dist_train.pictures.cells import Named
from dist_train.pictures.nearest import draw_nearest
from dist_train.pictures.sweeps import PANELS, Curve, Probed, draw_arms, draw_layers, draw_ratios
from dist_train.pictures.top5 import draw_top5
from dist_train.rundir import record
from dist_train.rundir.state import Progress
from dist_train.summary import summary
from pipelines import speech
from pipelines.png import as_png, fit

ROOT = Path(__file__).parent.parent
NAME = "a $x_{$ b, 日本\n\udcff"
TALKS = """
import logging, sys, warnings
from pipelines import speech
speech.begin()
data = open(sys.argv[1], "w")  # the first file that is opened
with speech.bar(2, "a bar", "img", lines=True) as bar:
    bar.update()
    speech.say("a line")
logging.error("logged")
warnings.warn("warned")
print("printed", file=sys.stderr, flush=True)
sys.stdout.write("kept in a buffer")
speech.show("a result")
lost = speech.unheard()
data.write(f"{data.fileno()} {lost and lost.errno}")
"""
VERB = """
import sys
from pathlib import Path
from pipelines.cli import Verb, run_verb
from pipelines.errors import UserError
from pipelines.speech import begin, show
def start(args):
    for i in range(20000):
        show(f"line {i}")
    Path("work").write_text("done")
    if len(sys.argv) > 1:
        raise UserError("found something")
    return 0
begin()
sys.exit(run_verb("prog", {"verb": Verb("a verb", lambda parser: None, start)}, ["verb"]))
"""


def python_c(text: str, *args: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", text, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)} | options.pop("env", {})
    return subprocess.run(words, cwd=cwd, env=env, text=True, timeout=60, check=False, **options)


@contextmanager
def deaf(kind: str) -> Iterator[int]:
    """A file descriptor that cannot be written to."""
    if kind == "full":
        ours = os.open("/dev/full", os.O_WRONLY)
    else:
        other, ours = os.pipe() if kind == "pipe" else pty.openpty()
        os.close(other)
    try:
        yield ours
    finally:
        os.close(ours)


@pytest.mark.parametrize(("kind", "why"), [("full", errno.ENOSPC), ("pipe", errno.EPIPE), ("terminal", errno.EIO)])
def test_who_does_not_listen_is_spoken_to_in_vain(kind: str, why: int, tmp_path: Path) -> None:
    """Lines, bars, loggers, warnings, and what Python flushes when it ends: no error, and the usual exit code."""
    with deaf(kind) as number:
        done = python_c(TALKS, "data", cwd=tmp_path, stdout=number, stderr=number)
    assert done.returncode == 0
    assert (tmp_path / "data").read_text().split()[1] == str(why)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    words = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", TALKS, "data"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, check=False)
    assert done.returncode == 0
    number, why = (tmp_path / "data").read_text().split()
    assert int(number) > 2
    assert why == "None", "who closes it wants to hear nothing"


def test_what_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    """Python has the bytes of a file's name as `\\udc..` where the locale is ASCII: they go out as they came in."""
    text = "from pipelines import speech; speech.begin(); [f('ä 本 \\udcff') for f in (speech.say, speech.show, print)]"
    for encoding, line in (("ascii", b"\\xe4 \\u672c \xff\n"), ("utf-8", "ä 本 \\udcff\n".encode())):
        words = [sys.executable, "-c", text]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONIOENCODING": encoding}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr, done.stdout) == (0, line, 2 * line)


@pytest.mark.parametrize("broken", [None, "closed", "ascii"])
def test_say_and_bars_never_raise(broken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a program that has not called `begin`."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii") if broken else None
    if broken == "closed" and stream:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    assert not speech.watched()
    with speech.bar(3, "bär", "img", lines=True) as shown:
        shown.update()
        speech.say("ä")
        speech.cry("ä")
        speech.show("ä")
    speech.flush()
    if broken == "ascii" and stream:
        stream.seek(0)
        assert stream.read().count("\\xe4") >= 3


def test_training_waits_only_a_moment_for_one_who_does_not_read(tmp_path: Path) -> None:
    """As with Ctrl-S, or `| less`: the pipe is full. Results are waited for."""
    text = (
        "from pipelines import speech; speech.PATIENCE = 0.2; speech.begin(); speech.train_on(); "
        "[speech.say('x' * 8000) for _ in range(100)]"
    )
    reader, writer = os.pipe()
    began = time.monotonic()
    done = python_c(text, cwd=tmp_path, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert time.monotonic() - began < 10, "a moment, and not for each line"
    with open(reader, "rb") as file:
        assert len(file.read()) >= 1 << 15


FULL = (
    "error: the output could not be written (No space left on device): make room, or send it elsewhere, and try again"
)
FOUND = "error: found something"


@pytest.mark.parametrize(
    ("kind", "words", "code", "said"),
    [
        ("pipe", [], 0, []),
        ("pipe", ["fails"], 2, [FOUND]),
        ("full", [], 1, [FULL]),
        ("full", ["fails"], 2, [FOUND, FULL]),
    ],
)
def test_a_verb_does_its_work_whole_whoever_listens(
    kind: str, words: list[str], code: int, said: list[str], tmp_path: Path
) -> None:
    """`| head` ends quietly; what is wanted and cannot be written is a failure."""
    with deaf(kind) as number:
        done = python_c(VERB, *words, cwd=tmp_path, stdout=number, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.splitlines()) == (code, said)
    assert (tmp_path / "work").read_text() == "done"


@pytest.mark.parametrize("words", [["pipelines", "pack", "--help"], ["dist_train", "--print_config"]])
def test_help_and_a_configuration_are_output_too(words: list[str]) -> None:
    with deaf("full") as number:
        argv = [sys.executable, "-m", *words]
        done = subprocess.run(argv, stdout=number, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output could not be written (No space left on device): ")


def test_a_long_tmpdir_does_not_stop_the_workers(tmp_path: Path) -> None:
    """The path of a Unix socket has 107 bytes at most."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    text = (
        "import operator; from pipelines.parallel import parallel; "
        "print(parallel(operator.neg, [1, 2], workers=2, images=None, label='x'))"
    )
    done = python_c(text, cwd=tmp_path, env={"TMPDIR": str(folder)}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "[-1, -2]\n"), done.stderr


def steps(*more: str) -> str:
    line = '{"kind": "step", "step": 1, "progress": 0.5, "loss": 1.5, "images_per_s": 7}\n'
    return line + '{"kind": "validation", "epoch": 0, "top1_error": 0.25, "top5_error": 0, "lr": 1}\n' + "".join(more)


def test_the_end_of_a_run_shows_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / NAME
    run.mkdir()
    (run / record.FILE).write_text(steps('{"kind": "st\n', "5\n"))
    shown = summary(run, Done(), Progress(epoch=1, step=1), {"training": 60.0})
    assert "curves.png" in shown
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "top-1 75.00%" in shown
    assert "damaged in line 3, 4 of" in shown

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dist_train.pictures.curves.write_atomically", full)
    shown = summary(run, Done(), Progress(epoch=1, step=1), {"training": 60.0})
    assert "curves  cannot be shown (OSError: [Errno 28] No space left on device)" in shown
    (run / record.FILE).write_text('{"kind": "validation"}\n' + steps())
    shown = summary(run, Done(), Progress(epoch=1, step=1), {"training": 60.0})
    assert "accuracy  cannot be shown (KeyError" in shown
    assert "7 (median)" in shown
    assert shown.splitlines()[0].split() == ["outcome", "done"]


def test_a_name_is_a_name_in_every_picture() -> None:
    """Whatever matplotlib makes of it: mathematics, letters that no font has, what is no character."""
    image = Named(np.zeros((8, 8, 3), np.uint8), NAME)
    chances = np.full((1, 2), 0.5, np.float32)
    probed = Probed(
        1, ["conv1"], {key: np.ones((1, 1)) for key in ("signal", "output", "gradient", "dead")}, np.ones(1)
    )
    figures = [
        draw_top5([image], [0], chances, [NAME, NAME], NAME),
        draw_nearest([image], [[image]], np.ones((1, 1), np.float32), np.ones((1, 1), np.bool_), NAME),
        draw_arms({NAME: [Curve([1], [1.0])]}, {NAME: [0.5]}, NAME, "24"),
        *(draw_layers([NAME], [probed], picture, NAME) for picture in PANELS),
        draw_ratios([NAME], [probed], NAME),
    ]
    for figure in figures:
        assert as_png(figure, dpi=30).startswith(b"\x89PNG")
    assert "\n" not in fit(NAME, 500, 8)


@pytest.mark.slow
def test_the_real_wandb_asks_nothing(tmp_path: Path) -> None:
    """In a terminal, without a key."""
    text = (
        "import sys; from pathlib import Path; from dist_train.config import Config; "
        "from dist_train.monitor import reader, wandb; wandb.FALLBACK['online'] = 'disabled'; "
        "assert sys.stdin.isatty() and sys.stderr.isatty(); "
        "wandb.WandbRun(reader.Shown(Path('run'), Config(), print), 'online').begin()"
    )
    (tmp_path / "run").mkdir()
    ours, terminal = pty.openpty()
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd()), "TERM": "xterm"}
    words = [sys.executable, "-c", text]
    done = subprocess.run(
        words, cwd=tmp_path, env=env, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE, timeout=60, check=False
    )
    os.close(terminal)
    os.close(ours)
    assert done.returncode == 0
    assert b"wandb online does not work" in done.stdout
    assert b"wandb login" in done.stdout


def test_text_of_strangers_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2J\r\x07\x9bK\u202eb\u2028\tc"
    seen = r"a\x1b[2J\r\x07\x9bK\u202eb\u2028"
    for speak, read in ((speech.show, "out"), (speech.say, "err"), (speech.cry, "err")):
        speak(f"{evil}\nsecond")
        assert getattr(capsys.readouterr(), read) == f"{seen}\tc\nsecond\n"
    assert speech.in_line(f"{evil}\nsecond") == seen + r"\tc\nsecond"
