"""Readers of the record: what they receive, and that a run continues whatever happens to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from dist_train.config import Config
from dist_train.monitor.reader import RecordReader, Shown
from dist_train.monitor.readers import READERS, Readers
from dist_train.rundir import events, record
from tests.helpers.compare import status
from tests.helpers.drills import until
from tests.helpers.launch import STEPS, at, finish, launch, start

ROOT = Path(__file__).parents[1]
Take = Callable[[dict[str, Any]], None]

# A program that is not of this package. Each reader notes what it was given in a file of its own.
OUTSIDE = '''
"""The trainer, and somebody's own readers of the record."""

import json
import os
import sys
import time
from pathlib import Path

from dist_train import __main__
from dist_train.monitor.readers import READERS
from dist_train.ranks import launcher


class Mine:
    """Notes what it is given, and does something at some moment; see FAULTS."""

    def __init__(self, shown, name):
        self.shown, self.name, self.tried = shown, name, 0

    def note(self, what):
        with open(Path(os.environ["NOTES"]) / f"{self.name}-{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(what) + "\\n")

    def begin(self):
        self.reach("begin")
        return self.shown.record_bytes

    def take(self, line):
        self.tried += 1
        self.reach("take")
        if self.tried % 2:
            self.reach("every other take")
        self.note(line)

    def close(self):
        self.reach("close")
        self.note("closed")

    def reach(self, moment):
        at, _, do = self.name.partition(": ")
        if moment == at and do == "error":
            raise RuntimeError(f"no {moment}")
        if moment == at and do == "hang":
            time.sleep(3600)


for name in os.environ["READERS"].split(", "):
    READERS[name] = lambda shown, name=name: Mine(shown, name)

if __name__ == "__main__":
    launcher.leave_with(__main__.main)
'''
RAISE = ("begin: error", "take: error", "every other take: error", "close: error")
HANG = ("begin: hang", "take: hang", "close: hang")


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, Any]:
    """How to start that program."""
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "notes").mkdir()
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "NOTES": str(tmp_path / "notes")}
    return {"module": "outside", "how": "exec", "env": env}


def notes(tmp_path: Path, name: str) -> list[Any]:
    """What a reader of rank 0 has noted."""
    path = tmp_path / "notes" / f"{name}-0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.integration
@pytest.mark.slow
def test_readers_of_ones_own(shard_sets: Path, tmp_path: Path, outside: dict[str, Any]) -> None:
    """One is given everything, in order and once. Others fail or hang in every way: each is told of once, and the run
    is done."""
    run, names = tmp_path / "run", ["mine", *RAISE, *HANG]
    outside["env"]["READERS"] = ", ".join(names)
    result = launch(shard_sets, run, "--run.stop_timeout=4", "--train.epochs=1", **outside)
    assert result.returncode == 0, result.stderr
    assert status(run)["state"] == "done"
    lines, story = record.read(run), events.read(run)
    assert [line["kind"] for line in lines].count("step") == STEPS
    assert story[-1]["event"] == "end"
    for name in ("mine", "every other take: error", "close: error", "close: hang"):
        noted = notes(tmp_path, name)
        assert [line for line in noted if "kind" in line] == lines, name
        assert [line for line in noted if "event" in line] == story, name
        assert noted.count("closed") == (0 if name.startswith("close") else 1), name
    assert notes(tmp_path, "begin: error") == notes(tmp_path, "begin: hang") == notes(tmp_path, "take: hang") == []
    assert notes(tmp_path, "take: error") == ["closed"]
    assert not list((tmp_path / "notes").glob("*-1.jsonl")), "rank 1 shows nothing"
    said = result.stderr.splitlines()
    for name in RAISE:
        (told,) = (line for line in said if line.startswith(name))
        assert told == f"{name} does not show the run (RuntimeError: no {name.partition(':')[0]}): training goes on"
    for name in HANG:
        (told,) = (line for line in said if line.startswith(name))
        assert told == f"{name} has not ended within 4 s: the run ends without it"
    assert not [line for line in said if line.startswith("mine")]


@pytest.mark.integration
@pytest.mark.slow
def test_a_record_that_is_cut_back(shard_sets: Path, tmp_path: Path, outside: dict[str, Any]) -> None:
    """A run that is killed goes on from its last checkpoint: what was recorded behind that comes again, what was
    recorded before does not, and neither do the events of the start before."""
    run = tmp_path / "run"
    extra = ("--train.epochs=1", "--checkpoint.steps=4")
    finish(start(shard_sets, run, *extra, fault=at("step", 8, "kill all"), env={"STEP_SECONDS": "0.4"}))
    before, told = record.read(run), len(events.read(run))
    outside["env"]["READERS"] = "mine"
    result = launch(shard_sets, run, *extra, **outside)
    assert result.returncode == 0, result.stderr
    noted, whole = [line for line in notes(tmp_path, "mine") if "kind" in line], record.read(run)
    kept = len(whole) - len(noted)
    assert 0 < kept < len(before)
    assert whole == before[:kept] + noted
    assert [line["step"] for line in whole if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [line for line in notes(tmp_path, "mine") if "event" in line] == events.read(run)[told:]


@pytest.mark.integration
def test_the_reader_of_the_manual(shard_sets: Path, tmp_path: Path) -> None:
    """The program in docs/monitoring.md, as it stands there."""
    manual = (ROOT / "docs" / "monitoring.md").read_text()
    program = re.search(r"```python\n(from dist_train import __main__\n.*?)```", manual, re.DOTALL)
    assert program
    (tmp_path / "mine.py").write_text(program[1])
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = launch(shard_sets, tmp_path / "run", ranks=0, module="mine", how="exec", env=env)
    errors = [line["top5_error"] for line in record.read(tmp_path / "run") if line["kind"] == "validation"]
    assert len(errors) == 2
    shown = [line for line in result.stderr.splitlines() if line.startswith("top-5 error")]
    assert shown == [f"top-5 error {error:.2%}" for error in errors], result.stderr


class Reader:
    """Keeps what it is given; `take`, if there is one, is called first."""

    def __init__(self, place: int = 0, take: Take | None = None) -> None:
        self.place, self.first, self.closed = place, take, False
        self.taken: list[dict[str, Any]] = []

    def begin(self) -> int:
        return self.place

    def take(self, line: dict[str, Any]) -> None:
        if self.first:
            self.first(line)
        self.taken.append(line)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Readers, list[str]]]:
    """Opens the readers of a run in tmp_path: those that are made by what is given. Returns what they say, too."""

    def open_them(events_bytes: int = 0, **makers: Callable[[Shown], RecordReader | None]) -> tuple[Readers, list[str]]:
        said: list[str] = []
        for name in tuple(READERS):
            monkeypatch.delitem(READERS, name)
        for name, make in makers.items():
            monkeypatch.setitem(READERS, name, make)
        readers = Readers(Shown(tmp_path, Config(), said.append, events_bytes=events_bytes))
        readers.open()
        return readers, said

    return open_them


def step(number: int) -> bytes:
    return json.dumps({"kind": "step", "step": number}).encode() + b"\n"


def add(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def test_lines_that_are_damaged_or_not_whole(tmp_path: Path, opened: Any) -> None:
    """What is no JSON object is passed over; half a line is waited for."""
    reader, path = Reader(), tmp_path / record.FILE
    readers, said = opened(mine=lambda shown: reader)
    readers.wake()  # there is no file yet
    add(path, step(1) + b'{"kind": "st\0\0\xff\n[2]\n\n' + step(3) + step(4)[:9])
    readers.wake()
    until(lambda: len(reader.taken) == 2)
    add(path, step(4)[9:])
    readers.wake()
    until(lambda: len(reader.taken) == 3)
    add(path, step(5)[:-1])
    readers.close(60)
    assert [line["step"] for line in reader.taken] == [1, 3, 4]
    assert reader.closed
    assert not said


def test_from_which_byte_on(tmp_path: Path, opened: Any) -> None:
    """A reader says it of the record; events are those of this start."""
    add(tmp_path / record.FILE, step(1) + step(2))
    add(tmp_path / events.FILE, b'{"event": "end"}\n')
    all_of_it, rest = Reader(), Reader(len(step(1)))
    readers, _ = opened(len(b'{"event": "end"}\n'), all_of_it=lambda shown: all_of_it, rest=lambda shown: rest)
    add(tmp_path / events.FILE, b'{"event": "start"}\n')
    readers.close(60)
    assert [line.get("step") for line in all_of_it.taken] == [1, 2, None]
    assert [line.get("step") for line in rest.taken] == [2, None]
    assert rest.taken[-1] == {"event": "start"}


def test_a_line_that_cannot_be_taken_comes_again(tmp_path: Path, opened: Any) -> None:
    """Each of them at first, also the last: none is lost, none comes twice, and it is told once."""
    seen = set[int]()

    def not_yet(line: dict[str, Any]) -> None:
        if line["step"] not in seen:
            seen.add(line["step"])
            raise OSError(f"not yet {line['step']}")

    reader = Reader(take=not_yet)
    readers, said = opened(mine=lambda shown: reader)
    for number in range(1, 8):
        add(tmp_path / record.FILE, step(number))
        readers.wake()
    readers.close(60)
    assert [line["step"] for line in reader.taken] == list(range(1, 8))
    assert said == ["mine does not show the run (OSError: not yet 1): training goes on"]


def test_a_line_that_is_never_taken(tmp_path: Path, opened: Any) -> None:
    """What comes behind it waits, but not the events, and the end is not waited for."""

    def never_2(line: dict[str, Any]) -> None:
        if line.get("step") == 2:
            raise ValueError("of no use")

    reader = Reader(take=never_2)
    add(tmp_path / record.FILE, step(1) + step(2) + step(3))
    add(tmp_path / events.FILE, b'{"event": "start"}\n')
    readers, said = opened(mine=lambda shown: reader)
    for _ in range(3):
        readers.wake()
    readers.close(60)
    assert reader.taken == [{"kind": "step", "step": 1}, {"event": "start"}]
    assert reader.closed
    assert said == ["mine does not show the run (ValueError: of no use): training goes on"]


def test_readers_that_are_not_wanted_or_cannot_be_made(opened: Any) -> None:
    def broken(shown: Shown) -> RecordReader:
        raise ImportError("there is no such package")

    readers, said = opened(unwanted=lambda shown: None, broken=broken)
    readers.wake()
    readers.close(60)
    assert said == ["broken does not show the run (ImportError: there is no such package): training goes on"]


def test_the_end_waits_for_nobody_longer(tmp_path: Path, opened: Any) -> None:
    """Meanwhile somebody is told that this process is alive."""
    go_on, alive = Event(), list[int]()

    def hang(line: dict[str, Any]) -> None:
        go_on.wait(60)

    slow, quick = Reader(take=hang), Reader()
    readers, said = opened(slow=lambda shown: slow, quick=lambda shown: quick)
    add(tmp_path / record.FILE, step(1))

    def patient() -> bool:
        alive.append(1)
        return True

    readers.close(0.5, patient)
    assert [line.partition(" within")[0] for line in said] == ["slow has not ended"]
    assert alive
    assert quick.closed
    assert not slow.closed
    go_on.set()
    until(lambda: slow.closed)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), RuntimeError("no\nway " + 999 * "x")])
def test_whatever_is_raised_is_one_sentence(tmp_path: Path, opened: Any, error: BaseException) -> None:
    def fails(line: dict[str, Any]) -> None:
        raise error

    reader = Reader(take=fails)
    readers, said = opened(bad=lambda shown: reader)
    add(tmp_path / record.FILE, step(1))
    readers.close(60)
    (sentence,) = said
    assert sentence.startswith(f"bad does not show the run ({type(error).__name__}")
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert reader.closed


def test_one_that_cannot_be_hurried_keeps_nobody(tmp_path: Path, opened: Any) -> None:
    class Bad(Reader):
        def hurry(self, *, last: bool) -> None:
            raise ValueError("hurry")

    go_on, hurried = Event(), list[bool]()

    class Good(Reader):
        def hurry(self, *, last: bool) -> None:
            hurried.append(last)

    readers, said = opened(
        bad=lambda _: Bad(take=lambda _: go_on.wait(60)), good=lambda _: Good(take=lambda _: go_on.wait(60))
    )
    add(tmp_path / record.FILE, step(1))
    readers.close(0.5)
    assert hurried == [True]
    assert any("ValueError: hurry" in line for line in said)
    go_on.set()
