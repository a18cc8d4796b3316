"""The sessions that docs/cluster.md and docs/imagenet.md show, typed on the cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import docs
from tests.slurm.conftest import REPOSITORY, User
from tests.slurm.private_cluster import wait_for

FASHION = Path("/usr/share/datasets/fashion-mnist")
# Of each page the name of its run, and, in the order of its commands, a regular expression for what `status` says by
# the time that a reader would type the next one.
SESSIONS = {
    "cluster.md": ("fashion", ("", "", r" 1(\.\d)?/3", "", "BeginTime", "", "COMPLETED")),
    "imagenet.md": (
        "imagenet",
        ("", "", r" [3-5](\.\d)?/12", "BeginTime", r" ([7-9]|10)(\.\d)?/12", "BeginTime", "COMPLETED"),
    ),
}

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_session_of_the_docs(user: User) -> None:
    """Some minutes on two cores: three epochs of Fashion-MNIST. README shows its beginning and its end."""
    session = type_session(user, "cluster.md")
    (short,) = [
        block for block in docs.read((REPOSITORY / "README.md").read_text(encoding="utf-8")).bash if block.output
    ]
    assert short.text.startswith(session[1].text)
    assert short.output == session[-1].output


def test_from_the_files_of_imagenet_to_a_net(user: User) -> None:
    """Synthetic files in the official layout: packed, trained, preempted twice."""
    type_session(user, "imagenet.md")


def type_session(user: User, name: str) -> list[docs.Block]:
    """Types the commands of a page whose output it shows, and compares."""
    page = docs.read((REPOSITORY / "docs" / name).read_text(encoding="utf-8"))
    session = [block for block in page.bash if block.needs and block.output]
    run, moments = SESSIONS[name]
    shutil.copytree(REPOSITORY / "configs", user.home / "configs")
    path = f"{Path(user.python).parent}:{user.environment['PATH']}"
    user.cluster.preempt_with(user_signal=False)
    for block, moment in zip(session, moments, strict=True):
        if moment:
            wait_for(lambda moment=moment: re.search(moment, user.slurm("status", run)), 900, f"{run} to say {moment}")
        words = ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{block.text}"]
        environment = {**user.environment, "PATH": path}
        done = subprocess.run(words, cwd=user.home, env=environment, capture_output=True, text=True, check=False)
        printed = done.stdout.replace(str(user.home), "/home/me")
        print(f"{block.text}\n{printed}")
        assert done.returncode == 0
        assert not docs.difference(block.output, printed)
    return session
