"""The session that docs/cluster.md shows, typed on the cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dist_train.cli import parse
from dist_train.flat import dump
from tests.helpers import docs
from tests.slurm.conftest import REPOSITORY, User

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# What `status` says by the time that a reader would type the next command, in the order of the commands.
MOMENTS = ("", "66.7%", "", "BeginTime", "", "COMPLETED")


def test_the_session_of_the_docs(user: User) -> None:
    page = docs.read((REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8"))
    session = [block for block in page.bash if block.needs and block.output]
    config, _ = parse([*user.training, "--train.epochs=60"])
    (user.home / "tiny.yaml").write_text(dump(config), encoding="utf-8")
    path = f"{Path(user.python).parent}:{user.environment['PATH']}"
    user.cluster.preempt_with(user_signal=False)
    for block, moment in zip(session, MOMENTS, strict=True):
        if moment:
            user.told("demo", moment, 180)
        words = ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{block.text}"]
        environment = {**user.environment, "PATH": path}
        done = subprocess.run(words, cwd=user.home, env=environment, capture_output=True, text=True, check=False)
        printed = done.stdout.replace(str(user.home), "/home/me")
        print(f"{block.text}\n{printed}")
        assert done.returncode == 0
        assert not docs.difference(block.output, printed)
