"""RUN/report.html while a run goes on: kept fresh by a process beside it that cannot harm it, right at its end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config, MonitorConfig, RunConfig
from dist_train.monitor import drawings, page_process
from dist_train.monitor import page as reader
from dist_train.monitor.page import PageRun
from dist_train.monitor.reader import Shown
from dist_train.monitor.readers import READERS, Readers
from dist_train.page import report
from tests.helpers.drills import until
from tests.helpers.launch import Run, alive, at, finish, launch, start
from tests.helpers.strange import MINE

PAGE = "--monitor.page=true"
STEP, CHECKED = {"kind": "step", "step": 9}, {"kind": "validation", "step": 10}
DONE = {"event": "end", "state": "done"}


def summary(run: Path) -> str:
    """The first line of the page."""
    (found,) = re.findall(r'<p class="run".*?</p>', (run / "report.html").read_text(), re.DOTALL)
    return re.sub(r"<[^>]*>", "", found)


@pytest.fixture(scope="module")
def finished(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a run"
    result = launch(shard_sets, run, "--train.max_steps=2", PAGE, ranks=0)
    assert result.returncode == 0, result.stderr
    assert "page" not in result.stderr
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


@pytest.fixture
def shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Readers, list[str]]]:
    """Shows that run with the page's reader, and others that are named; its process writes twice a second."""
    monkeypatch.setattr(page_process, "PERIOD", 0.5)

    def show(**others: Any) -> tuple[Readers, list[str]]:
        for name in set(READERS) - {"page"}:
            monkeypatch.delitem(READERS, name)
        for name, make in others.items():
            monkeypatch.setitem(READERS, name, make)
        said: list[str] = []
        config = replace(Config(), run=RunConfig(name="run", dir=str(run)), monitor=MonitorConfig())
        token = (run / "owner").read_text()
        readers = Readers(Shown(run, config, said.append, *sizes(run), token=token))
        readers.open()
        return readers, said

    return show


def sizes(run: Path) -> list[int]:
    return [(run / name).stat().st_size for name in ("metrics.jsonl", "events.jsonl")]


def add(run: Path, readers: Readers, **line: Any) -> None:
    """A line of the record, or of the events."""
    name = "metrics.jsonl" if "kind" in line else "events.jsonl"
    with open(run / name, "a") as file:
        file.write(str(line).replace("'", '"') + "\n")
    readers.wake()


def begun(run: Path, readers: Readers) -> int:
    """The process that writes the page, once it does."""
    (run / "report.html").unlink()
    time.sleep(0.6)
    add(run, readers, **STEP)
    until((run / "report.html").exists)
    return writers()[0]


def writers(pid: int | None = None) -> list[int]:
    """The processes that write pages, started by some thread of this process, or another."""
    threads = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
    found = [int(child) for thread in threads for child in thread.read_text().split()]
    return [one for one in found if b"page_process" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.integration
def test_however_a_run_ends_its_page_says_so(shard_sets: Path, finished: Path, tmp_path: Path) -> None:
    """Runs of less than a minute."""
    assert "done" in summary(finished)
    runs: dict[str, tuple[Run, int]] = {}
    for state, fault, code in (
        ("stopped", at("step", 3, "SIGTERM"), 75),
        ("failed: left in haste", at("step", 3, "SIGINT SIGINT, hang"), 1),
        ("diverged", at("step", 3, "nan"), 70),
        ("failed", at("step", 3, "error"), 1),
    ):
        runs[state] = start(shard_sets, tmp_path / state, PAGE, ranks=0, fault=fault), code
    for state, (process, code) in runs.items():
        result = finish(process)
        assert result.returncode == code, result.stderr
        assert state.partition(":")[0] in summary(tmp_path / state)
        assert not list((tmp_path / state).glob(".*.tmp"))


@pytest.mark.integration
def test_no_page_that_is_not_wanted(shard_sets: Path, tmp_path: Path) -> None:
    assert launch(shard_sets, tmp_path / "run", "--train.max_steps=1", ranks=0).returncode == 0
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.integration
@pytest.mark.parametrize("end", ["killed", "done"])
def test_the_page_is_rewritten_beside_the_run(shard_sets: Path, tmp_path: Path, end: str) -> None:
    """By a process that takes no CPU that another wants, loads no torch, and ends with the run, even if that is
    killed."""
    run = tmp_path / "run"
    env = {"PAGE_SECONDS": "0.5", "STEP_SECONDS": "0.2"}
    process = start(shard_sets, run, PAGE, "--train.epochs=3", ranks=0, fault={}, env=env)
    until((run / "report.html").exists)
    first = (run / "report.html").stat()
    (pid,) = writers(process.pid)
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16] == "19"
    assert b"torch" not in Path(f"/proc/{pid}/maps").read_bytes()
    assert "running" in summary(run)
    until(lambda: (run / "report.html").stat().st_ino != first.st_ino)
    if end == "killed":
        process.kill()
        until(lambda: not alive(pid))
    assert finish(process).returncode == {"killed": -signal.SIGKILL, "done": 0}[end]
    assert not alive(pid)
    assert ("done" in summary(run)) == (end == "done")


@pytest.mark.integration
def test_a_page_that_is_a_link(run: Path, shown: Any, victim: Path) -> None:
    """It is replaced, by the process and at the end."""
    readers, said = shown()
    begun(run, readers)
    for write in (lambda: until(lambda: not (run / "report.html").is_symlink()), lambda: readers.close(60)):
        (run / "report.html").unlink()
        (run / "report.html").symlink_to(victim)
        write()
    assert victim.read_bytes() == MINE
    assert not (run / "report.html").is_symlink()
    assert "done" in summary(run)
    assert said == []
    assert not writers()


@pytest.mark.integration
@pytest.mark.parametrize("how", ["is lost", "is closed", "is abandoned"])
def test_a_run_that_another_start_has_taken_over(run: Path, shown: Any, how: str) -> None:
    """Its page is the other's: it is left alone."""
    readers, said = shown()
    pid = begun(run, readers)
    (run / "owner").write_text("another")
    if how == "is abandoned":
        readers.abandon()
    until(lambda: not alive(pid))
    (run / "report.html").write_bytes(MINE)
    if how == "is closed":
        readers.close(60)
    else:
        add(run, readers, **STEP)
        time.sleep(1)
    assert (run / "report.html").read_bytes() == MINE
    assert said == []
    readers.abandon()


@pytest.mark.integration
def test_a_page_that_cannot_be_written(run: Path, shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is in its place, then the disk is full: each is a sentence, and said once. Later it is written again."""
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    readers, said = shown()

    def goes_on() -> list[str]:
        add(run, readers, **STEP)
        return said

    until(goes_on)
    until(lambda: goes_on() and writers(), 30)  # it tries again
    until(lambda: goes_on() and not writers(), 30)
    assert len(said) == 1, said
    assert re.fullmatch(r"the page is not rewritten \(.*Is a directory.*\): training goes on", said[0])
    assert "--out" not in said[0], "an option of `report`, which a run does not have"
    (run / "report.html").rmdir()
    until(lambda: goes_on() and (run / "report.html").exists())

    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "report.html"))

    monkeypatch.setattr(report, "write", full)
    readers.close(60)
    assert len(said) == 2
    assert said[1].startswith("page does not show the run (OSError: [Errno 28] No space left on device")
    assert not writers()


@pytest.mark.integration
def test_a_process_that_hangs_is_left_behind(run: Path, shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    readers, said = shown()
    pid = begun(run, readers)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    readers.close(60)
    assert time.monotonic() - began < 10
    assert not alive(pid)
    assert said == []


def test_the_end_may_come_before_the_last_lines_of_the_record(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are lines of two files, which are read one after the other while both grow."""
    Drawn.begun = []
    monkeypatch.setattr(drawings, "Drawing", Drawn)
    monkeypatch.setattr(reader, "LONG", 0)
    page = reader.PageRun(Shown(run, replace(Config(), run=RunConfig(name="run", dir=str(run))), print))
    for line in (CHECKED, DONE, STEP):
        page.take(line)
    page.close()
    assert Drawn.begun == ["wrong", "kernels"]


class Drawn:
    """In place of a drawing: it notes that it was begun, and is done once it was waited for."""

    begun: list[str]
    failed = ""

    def __init__(self, run: Path, what: str) -> None:
        self._path = run / "pictures" / f"{what}.png"
        self.begun.append(what)

    def poll(self) -> Path:
        return self._path

    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("quiet", "long", "drawn"),
    [
        (60, 60, []),  # a run of less than a minute is over as soon as it was
        (0, 60, ["inputs", "wrong", "kernels"]),  # the second validation is within ten minutes
        (0, 0, ["inputs", "wrong", "kernels", "wrong", "kernels"]),
    ],
)
def test_pictures_for_the_page(
    run: Path, shown: Any, monkeypatch: pytest.MonkeyPatch, quiet: float, long: float, drawn: list[str]
) -> None:
    """None in the first minutes; the newest net's at the end of a run that was long."""
    Drawn.begun = []
    monkeypatch.setattr(drawings, "Drawing", Drawn)
    monkeypatch.setattr(reader, "QUIET", quiet)
    monkeypatch.setattr(reader, "LONG", long)
    monkeypatch.setattr(page_process, "PERIOD", 60.0)
    readers, said = shown()
    for line in (STEP, CHECKED, STEP, CHECKED | {"step": 20}, STEP, DONE):
        add(run, readers, **line)
    readers.close(60)
    assert Drawn.begun == drawn
    assert said == []


def test_pictures_are_drawn_once_for_all_readers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is given a line first begins them; who takes them gets all."""
    Drawn.begun = []
    monkeypatch.setattr(drawings, "Drawing", Drawn)
    pictures = Shown(run, Config(), print).pictures
    for _ in ("wandb", "page"):
        pictures.draw_inputs()
        pictures.validated(10)
        pictures.draw()
    assert Drawn.begun == ["inputs", "wrong", "kernels"]
    assert sorted(pictures.taken()) == ["pictures/inputs", "pictures/kernels", "pictures/wrong"]
    assert pictures.taken() == {}
    for _ in ("wandb", "page"):
        pictures.validated(20)
        pictures.draw(last=True)
    assert Drawn.begun == ["inputs", "wrong", "kernels", "wrong", "kernels"]
    assert PageRun.wanted(Shown(run, Config(monitor=MonitorConfig(page=False)), print)) is None
