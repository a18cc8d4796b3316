"""Which program this is, and what it runs with. Imports no torch, and nothing by name."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from dist_train import __version__
from pipelines.resolve import is_code, places

ROOT = Path(__file__).parents[1]
PACKAGES = ("dist_train", "pipelines", "slurm")
PATIENCE = 5  # seconds for git: a file system may be slow
LIMIT = 1 << 20  # bytes of a diff
# In a copy of the code, made by `slurm.snapshot`: what it was copied from, and its changes since the commit.
COPIED, CHANGES = "copied.json", "changes.diff"


def version(names: Iterable[str] = ()) -> dict[str, Any]:
    """Version of the package, hash of its sources on the disk, and, of a git checkout that git can read, the commit and
    whether these sources have changed since (yes or no). Of a copy: of what it was copied from, and which modules were
    not.

    Args:
        names: settings, of which each `module:name` adds hashes of `modules`: `own`.
    """
    found: dict[str, Any] = {"version": __version__, "sources": sources(ROOT)}
    if own := {module: _hash_of(found) for module, found in modules(names).items()}:
        found["own"] = own
    if (ROOT / COPIED).exists():
        with suppress(OSError, ValueError):
            copied = json.loads((ROOT / COPIED).read_bytes())
            found |= {key: copied[key] for key in ("commit", "changed", "not_copied") if copied.get(key)}
    elif (ROOT / ".git").exists():
        try:
            found["commit"] = _git("rev-parse", "HEAD").strip()
            found["changed"] = "yes" if _status() else "no"
        except (OSError, subprocess.SubprocessError):  # there is no git, or the checkout is another user's
            pass
    return found


def sources(root: Path) -> str:
    """Hash of the names and texts of all modules: the first 16 hex digits of their SHA-256."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return _hash((path, path.relative_to(root)) for path in paths)


def modules(names: Iterable[str]) -> dict[str, list[Path]]:
    """Top-level modules of the user's own that these settings name (`module:name`), and those that they import in turn,
    with where each lies; see `resolve.places`. No libraries."""
    own, seen = dict[str, list[Path]](), {*PACKAGES, *sys.stdlib_module_names}
    waiting = _named(names)
    while waiting:
        module = waiting.pop()
        seen.add(module)
        if (found := places(module)) and not library(found):
            own[module] = found
            imported = {name for place in found for path in files_in(place) for name in _imports(path)}
            waiting |= imported - seen
    return dict(sorted(own.items()))


def libraries(names: Iterable[str]) -> list[str]:
    """The libraries that these settings name."""
    return sorted(module for module in _named(names) - {*PACKAGES} if library(places(module)))


def library(files: Iterable[Path]) -> bool:
    """Whether a module is Python's own, or was installed: not somebody's present work."""
    standard = sysconfig.get_paths()["stdlib"]
    return any({"site-packages", "dist-packages"} & {*file.parts} or file.is_relative_to(standard) for file in files)


def files_in(place: Path) -> Iterator[Path]:
    """The files of a module or package, in order; no hidden ones, none that Python has compiled, none by a linked
    folder."""
    if place.is_file():
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file() and path.suffix != ".pyc")


def changes() -> str:
    """What `git status` and `git diff HEAD` say of the packages, or said of what this is a copy of: a patch, after the
    names of the changed and new files. The first MiB of it. Empty without git, or without a change."""
    with suppress(OSError, subprocess.SubprocessError):
        if (ROOT / COPIED).exists():
            return (ROOT / CHANGES).read_text(encoding="utf-8", errors="replace")
        if (ROOT / ".git").exists() and (named := _status()):
            text = f"{named}\n{_git('diff', '--no-ext-diff', '--no-color', 'HEAD', '--', *PACKAGES)}"
            return text if len(text) <= LIMIT else f"{text[:LIMIT]}\n(cut: {len(text) - LIMIT} more characters)\n"
    return ""


def installed() -> str:
    """Lines `name==version`, of all installed distributions."""
    found = set[str]()
    for distribution in distributions():
        with suppress(Exception):  # a damaged one
            found.add(f"{distribution.metadata['Name']}=={distribution.version}\n")
    return "".join(sorted(found, key=str.lower))


def _named(names: Iterable[str]) -> set[str]:
    return {name.partition(":")[0].partition(".")[0] for name in names if is_code(name)}


def _imports(path: Path) -> set[str]:
    """Top-level modules that a module imports, wherever in it."""
    found = set[str]()
    if path.suffix == ".py":
        with suppress(OSError, ValueError, SyntaxError, RecursionError):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found


def _hash_of(places: Iterable[Path]) -> str:
    """The same wherever they lie."""
    paths = ((path, path.relative_to(place.parent)) for place in places for path in files_in(place))
    return _hash((path, name) for path, name in paths if path.suffix == ".py")


def _hash(files: Iterable[tuple[Path, Path]]) -> str:
    """Of files, each with the name that it has in the hash."""
    digest = hashlib.sha256()
    for path, name in files:
        try:
            text = path.read_bytes()
        except OSError:  # an editor's lock, or gone by now
            continue
        digest.update(f"{name} {len(text)}\n".encode(errors="surrogateescape"))
        digest.update(text)
    return digest.hexdigest()[:16]


def _status() -> str:
    return _git("--no-optional-locks", "status", "--porcelain", "--", *PACKAGES)


def _git(*words: str) -> str:
    """Output of a git command on this checkout. Raises OSError and SubprocessError."""
    command = ["git", "-C", str(ROOT), *words]
    quiet = subprocess.DEVNULL
    done = subprocess.run(command, check=True, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, timeout=PATIENCE)
    return done.stdout.decode(errors="replace")
