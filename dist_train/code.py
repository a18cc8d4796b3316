"""Which program this is. Imports no torch."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

VERSION = "0.1.0"  # of pyproject.toml
ROOT = Path(__file__).parents[1]
PACKAGES = ("dist_train", "pipelines", "slurm")
PATIENCE = 5  # seconds for git, on a file system that may be slow


def version() -> dict[str, str]:
    """The version of the package; the hash of its sources as they lie on the disk; and of a git checkout that git can
    read the commit, and whether these sources have changed since (yes or no)."""
    found = {"version": VERSION, "sources": sources(ROOT)}
    if (ROOT / ".git").exists():
        try:
            found["commit"] = _git("rev-parse", "HEAD").strip()
            found["changed"] = "yes" if _git("--no-optional-locks", "status", "--porcelain", "--", *PACKAGES) else "no"
        except (OSError, subprocess.SubprocessError):  # there is no git, or the checkout is another user's
            pass
    return found


def sources(root: Path) -> str:
    """The SHA-256 of the names and texts of all modules, in hex, as far as it tells programs apart."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        try:
            text = path.read_bytes()
        except OSError:  # an editor's lock, or gone by now
            continue
        digest.update(f"{path.relative_to(root)} {len(text)}\n".encode(errors="surrogateescape"))
        digest.update(text)
    return digest.hexdigest()[:16]


def _git(*words: str) -> str:
    """What git says of this checkout. Raises OSError and SubprocessError."""
    command = ["git", "-C", str(ROOT), *words]
    quiet = subprocess.DEVNULL
    done = subprocess.run(command, check=True, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, timeout=PATIENCE)
    return done.stdout.decode(errors="replace")
