"""Which program this is. Imports no torch."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from dist_train import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = ("dist_train", "pipelines", "slurm")
PATIENCE = 5  # seconds for git: a file system may be slow


def version() -> dict[str, str]:
    """Version of the package, hash of its sources on the disk, and, of a git checkout that git can read, the commit and
    whether these sources have changed since (yes or no)."""
    found = {"version": __version__, "sources": sources(ROOT)}
    if (ROOT / ".git").exists():
        try:
            found["commit"] = _git("rev-parse", "HEAD").strip()
            found["changed"] = "yes" if _git("--no-optional-locks", "status", "--porcelain", "--", *PACKAGES) else "no"
        except (OSError, subprocess.SubprocessError):  # there is no git, or the checkout is another user's
            pass
    return found


def sources(root: Path) -> str:
    """Hash of the names and texts of all modules: the first 16 hex digits of their SHA-256."""
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
    """Output of a git command on this checkout. Raises OSError and SubprocessError."""
    command = ["git", "-C", str(ROOT), *words]
    quiet = subprocess.DEVNULL
    done = subprocess.run(command, check=True, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, timeout=PATIENCE)
    return done.stdout.decode(errors="replace")
