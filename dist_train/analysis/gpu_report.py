"""`python -m dist_train gpu-report`: findings that need a machine with GPUs, in two files to attach to an issue.

Each part runs in its own process (`--inside`), which writes its findings into a file as it makes them. No part can stop
another one.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dist_train import __version__
from dist_train.analysis import commands, gpu_tables
from dist_train.analysis.options import GPU_MINUTES, GPU_PARTS, check_place
from pipelines.cli import INTERRUPTED, interrupted
from pipelines.errors import UsageError
from pipelines.files import read_json, write_atomically
from pipelines.shards import ShardSet
from pipelines.speech import say, show
from pipelines.words import nearest

ROOT = Path(__file__).resolve().parents[2]  # a clone, or the folder that packages are installed in
FORMAT = 1
BAD = ("failed", "cut off")
ANSWER = 60.0  # seconds in which the driver says how many GPUs there are
REFUSED = 2.0  # seconds; with less than that left, a part is not begun


class Part(NamedTuple):
    """A part to run: its time limit, and its command, to which `--result=FILE --seconds=S` is added; or why it cannot
    run."""

    name: str
    seconds: float
    command: Sequence[str]
    hopeless: str = ""


def start(args: Namespace) -> int:
    """Make the report, or run one part of it. Returns the exit code: 1 if a part has failed or was cut off."""
    if args.inside:
        from dist_train.analysis import gpu_parts

        return gpu_parts.start(args.inside, args.result, args.data, args.seconds)
    names = chosen(args.parts)
    prefix = prefix_of(args.out, names)
    files = [Path(f"{prefix}.{kind}") for kind in ("json", "txt")]
    if args.data:
        ShardSet(args.data)
    from dist_train import driver

    for file in files:
        check_place(file, "--out")
    count, why = usable(ANSWER)
    broken = bool(driver.device_files()) and not count and not driver.hidden()
    hopeless = f"torch cannot use the GPUs of this machine: {why}" if broken else ""
    words = [sys.executable, "-m", "dist_train", "gpu-report"]
    words += [f"--data={args.data.absolute()}"] if args.data else []
    longer = max(1, args.minutes / GPU_MINUTES)
    parts = [
        Part(name, longer * GPU_PARTS[name], [*words, f"--inside={name}"], hopeless if name != "machine" else "")
        for name in names
    ]
    report = Report(files, args.minutes, {"code": code(), "command": _typed(args), "gpus": count})
    with _signals_as_ctrl_c():
        ended = report.run(parts)
    show(files[1].read_text(encoding="utf-8"), end="")
    say(f"{files[0]} and {files[1].name} are written: attach both to an issue")
    return interrupted() if ended == INTERRUPTED else ended


def usable(seconds: float, program: str = "print(json.dumps(machine.usable()))") -> tuple[int, str]:
    """Result of `machine.usable`, called in a process of its own since drivers may hang."""
    with tempfile.TemporaryDirectory() as folder:
        output, said = Path(folder, "output"), Path(folder, "said")
        command = [sys.executable, "-c", f"import json; from dist_train import machine; {program}"]
        ended = commands.run(command, seconds, output, said=said)
        if ended is None:
            return 0, f"CUDA has not answered in {seconds:.0f} s"
        if ended:
            return 0, commands.what_failed(commands.last_lines(output))
        count, why = json.loads(said.read_text(encoding="utf-8"))
        return count, why


def chosen(names: Sequence[str]) -> list[str]:
    """The named parts, or all, in their order. Raises UsageError."""
    for name in names:
        if name not in GPU_PARTS:
            near = nearest(name, GPU_PARTS)
            remedy = f"did you mean {near}?" if near else f"the parts are {', '.join(GPU_PARTS)}"
            raise UsageError(f"unknown part {name}: {remedy}")
    return [name for name in GPU_PARTS if name in names or not names]


def prefix_of(out: Path | None, names: Sequence[str]) -> Path:
    """Prefix of both files. Without `out`, a report of some parts has their names in it."""
    if out:
        return out.with_suffix("") if out.suffix in (".json", ".txt") else out
    return Path("-".join(["gpu-report", *(names if len(names) < len(GPU_PARTS) else ())]))


def code(root: Path = ROOT) -> dict[str, Any]:
    """Version of the package and, in a clone, its commit and whether its files were changed since ("changed" is None if
    git does not say). Without git the commit is ""."""
    commit = _git(root, "rev-parse", "HEAD") or ""
    changes = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"version": __version__, "commit": commit, "changed": None if changes is None else changes != ""}


def _git(root: Path, *words: str) -> str | None:
    """Output of git; None if it fails, or if `root` is no clone of ours."""
    if not (root / ".git").exists():  # git would take a repository that the folder lies in
        return None
    with suppress(OSError, subprocess.SubprocessError):
        variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(root), *words]
        return subprocess.run(
            command, env=variables, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()
    return None


def _typed(args: Namespace) -> str:
    options = [f"--minutes={args.minutes:g}", *(f"--{k}={v}" for k in ("out", "data") if (v := getattr(args, k)))]
    return shlex.join(["python", "-m", "dist_train", "gpu-report", *args.parts, *options])


@contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Treats the end of the job or of the terminal as Ctrl-C: no process is left, and the findings are kept."""
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Report:
    """The findings so far, written into both files after each part.

    Args:
        files: of the JSON and of the text.
        minutes: limit of all parts together.
        facts: about the whole report.

    Attributes:
        parts: findings by the name of the part.
    """

    def __init__(self, files: Sequence[Path], minutes: float, facts: dict[str, Any]) -> None:
        self._files, self._minutes = files, minutes
        self._began = time.monotonic()
        date = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._facts = {"format": FORMAT, "date": date, **facts}
        self.parts: dict[str, dict[str, Any]] = {}

    def run(self, parts: Sequence[Part]) -> int:
        """Run the parts one after the other. Returns the exit code."""
        # A short name: paths of sockets below it have 107 bytes at most.
        with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
            for i, planned in enumerate(parts, 1):
                head = f"{i}/{len(parts)} {planned.name}"
                file, began = Path(scratch, f"{planned.name}.json"), time.monotonic()
                try:
                    found = self._one(planned, file, head)
                except KeyboardInterrupt:
                    self._add(planned.name, _read(file, "cut off", "interrupted"), began)
                    for later in parts[i:]:
                        self._add(later.name, _found("cut off", "interrupted before its turn"), time.monotonic())
                    return INTERRUPTED
                self._add(planned.name, found, began)
                took, why = found["seconds"], found["reason"] and f": {found['reason']}"
                self._say(f"{head}: {found['state']}, {took:.0f} s{why}")
        return int(any(found["state"] in BAD for found in self.parts.values()))

    def text(self) -> str:
        """The report as text."""
        return gpu_tables.describe(self._whole())

    def _one(self, planned: Part, file: Path, head: str) -> dict[str, Any]:
        if planned.hopeless:
            return _found("failed", planned.hopeless)
        left = 60 * self._minutes - (time.monotonic() - self._began)
        if left < REFUSED:
            return _found("cut off", f"the {self._minutes:g} minutes were over before its turn: raise --minutes")
        self._say(head)
        seconds = min(planned.seconds, left)
        output, said = file.with_suffix(".output"), file.with_suffix(".said")
        code = commands.run(
            [*planned.command, f"--result={file}", f"--seconds={seconds:.1f}"],
            seconds,
            output,
            said=said,
            variables={"TMPDIR": str(file.parent)},
            meanwhile=_new_lines(said, lambda line: self._say(f"{head}: {line}")),
        )
        lines = commands.last_lines(output)
        if code is None:
            over = (
                f"it took more than {seconds:.0f} s" if seconds < left else f"the {self._minutes:g} minutes were over"
            )
            found = _read(file, "cut off", f"{over}: raise --minutes")
        elif code < 0:
            found = _read(file, "failed", f"killed by {signal.Signals(-code).name}")
        elif code:
            found = _read(file, "failed", commands.what_failed(lines))
        else:
            found = _read(file)
        return found | ({"output": lines} if found["state"] in BAD and lines != [found["reason"]] else {})

    def _add(self, name: str, found: dict[str, Any], began: float) -> None:
        self.parts[name] = found | {"seconds": round(time.monotonic() - began, 1)}
        found["seconds"] = self.parts[name]["seconds"]
        data, text = self._files
        write_atomically(data, (json.dumps(self._whole(), indent=1) + "\n").encode())
        write_atomically(text, (self.text() + "\n").encode())

    def _whole(self) -> dict[str, Any]:
        minutes = round((time.monotonic() - self._began) / 60, 1)
        return {**self._facts, "minutes": minutes, "parts": rounded(self.parts)}

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        say(f"{minutes:2}:{seconds:02}  {text}")


def rounded(value: Any) -> Any:
    """The same value with all floats in it rounded to 6 significant digits."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _found(state: str, reason: str) -> dict[str, Any]:
    return {"state": state, "reason": reason, "result": {}}


def _read(file: Path, state: str = "", reason: str = "") -> dict[str, Any]:
    """Findings in a part's file; `state`, if given, is how the part ended."""
    found: dict[str, Any] = read_json(file) if file.exists() else _found("failed", "")
    if not state:
        return found
    return found | {"state": state, "reason": "; ".join(filter(None, [reason, found["reason"]]))}


def _new_lines(file: Path, show: Callable[[str], None]) -> Callable[[], None]:
    """A function that shows the lines added to a file since its last call."""
    place = 0

    def look() -> None:
        nonlocal place
        with suppress(OSError), open(file, "rb") as said:
            said.seek(place)
            whole = said.read().rpartition(b"\n")[0]
            if whole:
                place += len(whole) + 1
                for line in whole.decode(errors="replace").splitlines():
                    show(line)

    return look
