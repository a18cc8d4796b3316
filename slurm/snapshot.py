"""The code of a run: a copy of the packages, and of the modules that its configuration names, which its jobs import.

<top>/code/          of a run or of a sweep: dist_train, pipelines, slurm, configs, and modules of the user's own
<top>/code/copied.json   where each was copied from, what was not copied, the commit
<top>/code/changes.diff  the changes since that commit

Only a job imports from it, by `entry.py`: to all other commands it is data, like everything in a run directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from secrets import token_hex

from dist_train import code
from dist_train.config import Config
from pipelines.files import new_file, read_file, read_json, write_atomically
from pipelines.resolve import places
from pipelines.speech import say

FOLDER, ASIDE, CONFIGS = "code", ".code-", "configs"
FILES, BYTES = 10_000, 100 << 20  # at most, of one module: there are packages in which somebody keeps data


def beside(folder: Path) -> Path:
    """The copy for the jobs whose Slurm files lie in this folder, `<top>/slurm`."""
    return folder.parent / FOLDER


def take(top: Path, configs: Iterable[Config]) -> Path:
    """Copies the code that runs with these configurations need, in place of an earlier copy, all at once: whoever is
    killed here leaves no half copy. Raises OSError."""
    names = {n for c in configs for n in (c.model.name, c.optim.name, c.schedule.name, c.data.source)}
    own, left = code.modules(names), code.libraries(names)
    for module in [module for module in own if _too_large(own[module])]:
        say(f"{module} is too large to be copied: a job imports what lies in {own.pop(module)[0]} when it starts")
        left.append(module)
    new = top / f"{ASIDE}{token_hex(8)}"
    new.mkdir()
    try:
        copied = {package: [code.ROOT / package] for package in code.PACKAGES} | own
        for place in [code.ROOT / CONFIGS, *(place for found in copied.values() for place in found)]:
            if place.name != CONFIGS or not code.library([place]):  # which are inside dist_train where it is installed
                _copy(place, new)
        about: dict[str, object] = {"from": {module: list(map(str, found)) for module, found in copied.items()}}
        about["not_copied"] = sorted(left)
        if changes := code.changes():
            write_atomically(new / code.CHANGES, changes.encode(errors="backslashreplace"))
        about |= {key: value for key, value in code.version().items() if key in ("commit", "changed")}
        write_atomically(new / code.COPIED, json.dumps(about, indent=1).encode())
        _replace(top, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return top / FOLDER


def drop(top: Path) -> None:
    """Removes the copy: the jobs to come import the live code."""
    _replace(top, None)


def digest(copy: Path) -> str:
    """Hash of all names and bytes in a copy; empty if there is none. Raises OSError."""
    if not copy.is_dir():
        return ""
    found = hashlib.sha256()
    for path in sorted(path for path in copy.rglob("*") if path.is_symlink() or not path.is_dir()):
        data = os.fsencode(os.readlink(path)) if path.is_symlink() else read_file(path)
        found.update(b"%b %d %d\n" % (os.fsencode(path.relative_to(copy)), path.is_symlink(), len(data)))
        found.update(data)
    return found.hexdigest()


def stranger(copy: Path) -> str:
    """A sentence if this process imports something from elsewhere that the copy holds; else empty."""
    try:
        modules = read_json(copy / code.COPIED)["from"]
    except (OSError, ValueError, KeyError) as error:
        return f"the copy of the code in {copy} is damaged ({error}): submit the run again"
    for module in modules:
        found = places(module)  # of a namespace package the first folder is looked into first
        if not found or not found[0].resolve().is_relative_to(copy.resolve()):
            where = f"{module} is imported from {found[0] if found else 'nowhere'} and not from the copy in {copy}"
            return f"{where}: see what puts it there, or submit with --live-code"
    return ""


def _too_large(found: Iterable[Path]) -> bool:
    total = 0
    for count, path in enumerate((path for place in found for path in code.files_in(place)), 1):
        total += path.stat().st_size
        if count > FILES or total > BYTES:
            return True
    return False


def _copy(place: Path, target: Path) -> None:
    """Copies a module or package into `target`."""
    for path in code.files_in(place):
        copy = target / path.relative_to(place.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():  # it may be in several folders of a namespace package, of which the first one counts
            with new_file(copy) as file:
                file.write(read_file(path))


def _replace(top: Path, new: Path | None) -> None:
    """Puts a copy, or none, in the place of the present one."""
    old = Path(tempfile.mkdtemp(prefix=ASIDE, dir=top))
    present, kept = top / FOLDER, old / FOLDER
    if os.path.lexists(present):
        present.rename(kept)
    try:
        if new:
            new.rename(present)
    except BaseException:
        if os.path.lexists(kept):
            kept.rename(present)
        raise
    finally:
        for stale in top.glob(f"{ASIDE}*"):  # and what a killed submission has left
            if stale != new:
                shutil.rmtree(stale, ignore_errors=True)
