"""The worked diffs of docs/architecture.md, "To add", applied to a copy of this tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.helpers import docs

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def copied(to: Path) -> None:
    """Copy the files of this tree that git tracks or would add, whether or not the tree is a repository."""
    alone = {**os.environ, "GIT_DIR": f"{to}.git", "GIT_WORK_TREE": str(ROOT)}  # a repository in which all is new
    subprocess.run(["git", "init", "-q"], cwd=ROOT, env=alone, check=True)
    command = ["git", "ls-files", "-oz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, check=True)
    shutil.rmtree(f"{to}.git")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def headings() -> list[str]:
    """What can be added: the headings below "To add", in their order."""
    return re.findall(r"(?m)^### (.+)$", _recipes())


def diffs(heading: str) -> str:
    """The diff blocks below a heading of `headings`, as one patch; "" if there are none."""
    assert heading in headings()
    below = _recipes().partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    return "".join(f"{block.text}\n" for block in docs.read(below).blocks if block.language == "diff")


def apply(patch: str, tree: Path, *options: str) -> None:
    """Run `git apply` in a tree, as if it were no part of a repository. Raises AssertionError with git's words."""
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    command = ["git", "apply", *options, "-"]
    done = subprocess.run(command, input=patch, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def applied(heading: str, tmp_path: Path) -> Path:
    """A copy of this tree, in tmp_path, with the diffs below a heading; run it with its path as PYTHONPATH."""
    tree, patch = tmp_path / "dist_train", diffs(heading)
    assert patch, f"there is no diff below {heading}"
    copied(tree)
    apply(patch, tree)
    return tree


def _recipes() -> str:
    return PAGE.read_text(encoding="utf-8").partition("\n## To add\n")[2].partition("\n## ")[0]
