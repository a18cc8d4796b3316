"""`python -m tests.helpers.fuzz MODULE SUBJECT BASE FOLDER EXAMPLES`: damages a valid file at random, again and again,
and has each read in a child of this process, which itself only imports. Prints as JSON how many ended in which way, and
each distinct failure with its smallest damage; what was read lies in FOLDER.

A child ends well if it succeeds, or raises a UserError of one line. All else is a failure: another exception, a signal,
SECONDS without an end, more than MEMORY."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SECONDS = 15.0
MEMORY = 400 << 20  # bytes, beyond those of this process
MORE = 3 << 30  # bytes of address space, beyond those of this process
LONGEST = 2000  # characters of a sentence


Damage = tuple[str, list[Any]]  # of which kind, and its changes


class Subject(NamedTuple):
    """What is damaged.

    Attributes:
        damages: what can be done to it; each can be printed.
        make: writes it, damaged, into an empty folder; returns the changes in words.
        read: reads it. What it raises is judged.
    """

    damages: st.SearchStrategy[Damage]
    make: Callable[[Path, Damage], list[str]]
    read: Callable[[Path], object]


class Outcome(NamedTuple):
    """How a child ended: `kind` is success, sentence, unmade (the damage itself failed), or else a failure, with the
    error and the place in our code."""

    kind: str
    error: str = ""
    place: str = ""
    message: str = ""
    changes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return self.kind in ("success", "sentence", "unmade")


def outcome(subject: Subject, folder: Path, damage: Damage) -> Outcome:
    """How reading this damage ends in a child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _child(subject, folder, damage, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        told: dict[str, Any] = dict(json.loads(line) for line in file)
    _, status, used = os.wait4(pid, 0)
    changes = tuple(told.get("changes", (damage[0], *map(str, damage[1]))))
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome("hang" if number == signal.SIGALRM else "signal", signal.Signals(number).name, changes=changes)
    if "end" not in told:
        return Outcome("vanished", changes=changes)
    found = Outcome(*told["end"], changes)
    more = used.ru_maxrss * 1024 - OWN
    return found if more <= MEMORY else found._replace(kind="memory", error=f"{found.kind}, {more >> 20} MiB", place="")


def _child(subject: Subject, folder: Path, damage: Damage, told: int) -> NoReturn:
    """Limits itself, makes and reads; writes what was changed as a line, and how it ended as another."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE,) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            changes = subject.make(folder, damage)
        except Exception:  # what cannot be written cannot be read
            found = ["unmade", *_described(*sys.exc_info()[:2])]
        else:
            os.write(told, json.dumps(["changes", changes]).encode() + b"\n")
            found = _read(subject, folder)
        os.write(told, json.dumps(["end", found]).encode() + b"\n")
    finally:
        os._exit(0)


def _read(subject: Subject, folder: Path) -> list[str]:
    try:
        subject.read(folder)
    except UserError as error:
        sentence = str(error)
        good = 0 < len(sentence) <= LONGEST and "\n" not in sentence
        return ["sentence" if good else "no sentence", *_described(type(error), error)]
    except BaseException as error:
        return ["traceback", *_described(type(error), error)]
    return ["success", "", "", ""]


def _described(kind: Any, error: Any) -> list[str]:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _ours(frame.filename)]
    place = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return [kind.__name__, place, str(error).encode(errors="backslashreplace").decode()[:300]]


def _ours(file: str) -> bool:
    return file.startswith(str(ROOT)) and "/tests/" not in file and "site-packages" not in file


def tried(subject: Subject, folder: Path, examples: int) -> tuple[Counter[str], dict[str, Outcome]]:
    """Tries so many damages, the same each time. Returns how many ended in which way, and each distinct failure with
    its smallest damage; what was read then is kept in `folder`."""
    ends, failures, number = Counter[str](), dict[str, Outcome](), 0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(subject.damages)
    def try_one(damage: Damage) -> None:
        nonlocal number
        number += 1
        place = folder / "example"
        place.mkdir()
        found = outcome(subject, place, damage)
        ends[found.kind] += 1
        name = " ".join((found.kind, found.error.split(",")[0], found.place)).strip()
        before = failures.get(name)
        if not found.good and (before is None or len(str(found.changes)) < len(str(before.changes))):
            failures[name] = found
            kept = folder / f"failure-{list(failures).index(name)}"
            shutil.rmtree(kept, ignore_errors=True)
            place.rename(kept)
        else:
            shutil.rmtree(place)

    try_one()
    return ends, failures


OWN = 0  # bytes of this process


def begin() -> None:
    """Remembers what this process takes, which its children take too. Nothing of it is collected in them."""
    global OWN
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    gc.collect()
    gc.freeze()
    OWN = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    module, name, base, folder, examples = sys.argv[1:]
    subject = import_module(f"tests.helpers.{module}").SUBJECTS[name](Path(base))
    begin()
    ends, failures = tried(subject, Path(folder), int(examples))
    print(json.dumps({"ends": ends, "failures": failures}))


if __name__ == "__main__":
    main()
