"""A site file on a cluster: its lines reach the job, and one that fails ends it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from slurm.submissions import SubmittedRun
from tests.helpers.compare import assert_same_run
from tests.helpers.elsewhere import served
from tests.slurm.conftest import SIZE, User, job_of
from tests.slurm.private_cluster import wait_for

pytestmark = pytest.mark.slurm

# As a container does, it hides Slurm's commands from the ranks.
PYTHON = """\
#!/bin/sh
echo "$FROM_SETUP|$FROM_ENV|$PWD" > "shown-$SLURM_PROCID"
PATH=/nowhere exec {python} "$@"
"""
SITE = """\
submit: {time: 30, nodes: 2}
sbatch:
  gres: gpu:2
  nice: 7
env: {FROM_ENV: "$HOME'"}
setup:
  - export FROM_SETUP=one
  - |
    for word in two three; do
      FROM_SETUP="$FROM_SETUP $word"
    done
  - cd /
python: ./own-python
srun: [--mpi=none, '--comment="$FROM_SETUP"']
"""


@pytest.mark.slow
def test_lines_of_a_site_reach_the_job(user: User, uninterrupted: Path, shard_sets: Path) -> None:
    """Another Python, too, which sees no Slurm: then the batch script brings the job back after a stop."""
    (user.home / "slurm.yaml").write_text(SITE)
    (user.home / "slurm.yaml").chmod(0o600)
    (user.home / "own-python").write_text(PYTHON.format(python=user.python))
    (user.home / "own-python").chmod(0o755)
    (user.home / "sets").symlink_to(shard_sets)
    relative = [*user.training, "--data.train=sets/train", "--data.val=sets/val"]
    job = job_of(user.slurm("submit", "--gpus-per-node=2", "--run.name=sited", *relative))
    process = user.freeze("sited", job, rank=3)
    asked = user.cluster.run("scontrol", "show", "job", job)
    assert " Nice=7 " in asked
    assert re.search(r"TresPerNode=gres:gpu:2\n", asked), asked
    user.cluster.run("scancel", "--signal=USR2", job)  # as at the time limit
    user.thaw(process, signal.SIGUSR2)
    last = user.stopped("sited")
    user.wait("sited", job, "done")
    assert user.starts("sited") == ["", last]
    home = user.environment["HOME"]
    for rank in range(4):
        assert (user.home / f"shown-{rank}").read_text() == f"one two three|{home}'|{user.home}\n"
    assert_same_run(user.run("sited"), uninterrupted)


@pytest.mark.slow
def test_a_variable_of_the_job_says_where_shards_are_kept(user: User, uninterrupted: Path, shard_sets: Path) -> None:
    """Where the run is submitted there is neither the variable nor, as far as that knows, the server."""
    (user.home / "disk.yaml").write_text(f"setup:\n  - export NODE_DISK='{user.home}'/disk-$SLURM_JOB_ID\n")
    with served(shard_sets) as web:
        sets = [f"--data.train={web.url}/train", f"--data.val={web.url}/val", "--data.cache=$NODE_DISK/shards"]
        words = ["submit", *SIZE, "--time=30", "--site=disk.yaml", *user.training, *sets, "--run.name=fetched"]
        said = user.slurm(*words)
        job = job_of(said)
        user.wait("fetched", job, "done")
    assert "cache: $NODE_DISK/shards" in (user.run("fetched") / "config.yaml").read_text()
    assert len(list((user.home / f"disk-{job}" / "shards").glob("*.tar"))) == len(list(shard_sets.glob("*/*.tar")))
    assert f"once, then it is in the cache {user.home}/disk-{job}/shards" in user.log("fetched")
    assert_same_run(user.run("fetched"), uninterrupted)


def test_a_line_that_fails_ends_the_job_and_status_tells(user: User) -> None:
    """A new job of the run does what the receipt says, whatever has become of the run directory."""
    site = user.home / "own.yaml"
    site.write_text("setup:\n  - echo well\n  - ls /no/such/place\n")
    job = user.submit("doomed", "--site=own.yaml")
    told = "failed: exit code 2: line 2 of setup in own.yaml, ls /no/such/place: ls: cannot access '/no/such/place'"
    user.told("doomed", told)
    wait_for(lambda: user.cluster.job(job) == "FAILED", 30, "the end of the job")
    assert "Restarts=0 " in user.cluster.run("scontrol", "show", "job", job)
    assert "error: line 2 of setup in own.yaml, ls /no/such/place: exit code 2" in user.log("doomed")
    assert user.starts("doomed") == [], "no rank was started"

    record = SubmittedRun(user.run("doomed")).folder / "job.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"parameters": {"setup": ["touch stranger"]}}))
    site.unlink()
    again = job_of(user.slurm("requeue", "doomed"))
    wait_for(lambda: user.cluster.job(again) == "FAILED", 60, "the end of the new job")
    user.told("doomed", told)
    assert not (user.home / "stranger").exists()


def test_options_as_slurm_reads_them(user: User) -> None:
    """What is printed is a script, too, its remarks aside."""
    odd = 'it\'s a # "b" $x'
    words = [*SIZE, "--time=30", *user.training, "--run.name=held"]
    words += ["--sbatch=hold", "--sbatch=mail-type=END", f"--sbatch=mail-user={odd}"]
    (user.home / "script").write_text(user.slurm("submit", "--dry-run", *words))
    assert user.cluster.run("sbatch", str(user.home / "script")).startswith("Submitted batch job")
    job = job_of(user.slurm("submit", *words))
    for number in (job, str(int(job) - 1)):
        shown = user.cluster.run("scontrol", "show", "job", number)
        assert f"MailUser={odd} MailType=END\n" in shown
        assert "Reason=JobHeldUser" in shown
    said = user.slurm("submit", *words[:-4], "--run.name=none", "--sbatch=reservation=nowhere", code=2)
    assert "error: sbatch refused the job: sbatch: error: Batch job submission failed: Requested reservation" in said
