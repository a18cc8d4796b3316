"""The session that docs/cluster.md shows, typed on the cluster."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import docs
from tests.slurm.conftest import REPOSITORY, User

FASHION = Path("/usr/share/datasets/fashion-mnist")
NAME = "fashion"
# What `status` says by the time that a reader would type the next command, in the order of the commands.
MOMENTS = ("", "", "1/3", "", "BeginTime", "", "COMPLETED")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist"),
]


def test_the_session_of_the_docs(user: User) -> None:
    """Some minutes on two cores: three epochs of Fashion-MNIST. README shows its beginning and its end."""
    page = docs.read((REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8"))
    session = [block for block in page.bash if block.needs and block.output]
    (short,) = [
        block for block in docs.read((REPOSITORY / "README.md").read_text(encoding="utf-8")).bash if block.output
    ]
    assert short.text.startswith(session[1].text)
    assert short.output == session[-1].output
    shutil.copytree(REPOSITORY / "configs", user.home / "configs")
    path = f"{Path(user.python).parent}:{user.environment['PATH']}"
    user.cluster.preempt_with(user_signal=False)
    for block, moment in zip(session, MOMENTS, strict=True):
        if moment:
            user.told(NAME, moment, 900)
        words = ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{block.text}"]
        environment = {**user.environment, "PATH": path}
        done = subprocess.run(words, cwd=user.home, env=environment, capture_output=True, text=True, check=False)
        printed = done.stdout.replace(str(user.home), "/home/me")
        print(f"{block.text}\n{printed}")
        assert done.returncode == 0
        assert not docs.difference(block.output, printed)
