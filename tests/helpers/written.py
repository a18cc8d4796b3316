"""`python -m tests.helpers.written FOLDER COMMANDS`: runs the command lines of a JSON file one after the other in this
process, and prints as JSON what it and all Python that it starts did to files below FOLDER: [event, module, function],
each once; and new files that no event tells of, since code in C has opened them. Python imports `sitecustomize` at its
start, and finds the one that this module writes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FOLDER, FOUND = "WRITTEN_BELOW", "WRITTEN_FOUND"  # variables
# os.rename is os.replace too, os.remove is os.unlink, and os.open is "open".
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.remove", "os.truncate", "os.utime")
EVENTS += ("os.chmod", "os.chown", "os.setxattr", "shutil.rmtree", "shutil.move", "shutil.copyfile", "sqlite3.connect")


def below(folder: str, path: Any) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(f"{folder}/")


def place(frame: FrameType | None) -> tuple[str, str]:
    """Module and function of ours that are at work; the name of a library that is on its own."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "site-packages" in file.parts and file.parent.name not in ("shutil", "tempfile"):
            return file.relative_to(next(p for p in file.parents if p.name == "site-packages")).parts[0], ""
        copies = (path for path in file.parents if path.name == "code")  # of a run, or of a test
        root = next((path for path in (ROOT, *copies) if file.is_relative_to(path)), None)
        if root and file != Path(__file__):
            return str(file.relative_to(root)), frame.f_code.co_name
        frame = frame.f_back
    return "", ""


def files(folder: str) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()}


def told_of(events: list[list[str]]) -> set[str]:
    """Files that were made by these events, by their names at the end."""
    made = set[str]()
    for event, _, _, *paths in events:
        if event == "os.rename" and len(paths) == 2:
            old, new = paths
            made |= {new + path.removeprefix(old) for path in made if path == old or path.startswith(f"{old}/")}
        made |= set(paths[-1:])
    return made


def begin() -> None:
    """From now on each event of this process is a line in the file that the environment names."""
    folder, found = os.environ[FOLDER], os.open(os.environ[FOUND], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not any(below(folder, arg) for arg in args[:2]):
            return
        if event == "open" and not (args[2] & WRITING):
            return
        paths = [os.path.abspath(os.fsdecode(arg)) for arg in args[:2] if below(folder, arg)]
        os.write(found, (json.dumps([event, *place(sys._getframe(1)), *paths]) + "\n").encode())

    sys.addaudithook(hook)


def main() -> None:
    from dist_train.__main__ import main as train
    from pipelines.__main__ import main as pipelines
    from slurm.__main__ import main as slurm

    folder, commands = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "sitecustomize.py").write_text("from tests.helpers import written\n\nwritten.begin()\n")
        os.environ[FOLDER], os.environ[FOUND] = folder, f"{scratch}/found"
        os.environ["PYTHONPATH"] = f"{scratch}:{ROOT}"
        begin()
        before = files(folder)
        for module, *words in commands:
            sys.argv = [module, *words]
            code = {"dist_train": train, "pipelines": pipelines, "slurm": partial(slurm, words)}[module]()
            if code:
                sys.exit(f"{module} {words}: {code}")
        events = [json.loads(line) for line in Path(os.environ[FOUND]).read_text().splitlines()]
    untold = sorted(files(folder) - before - told_of(events))
    print(json.dumps({"events": sorted({tuple(event[:3]) for event in events}), "untold": untold}))


if __name__ == "__main__":
    main()
