"""Tasks that Slurm binds to CPUs of their own use all of them. On a cluster that does so, unlike that of the other
tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.misc import cpus
from tests.slurm.conftest import User, job_of
from tests.slurm.private_cluster import ROOT, Cluster, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not ROOT, reason="without namespaces all nodes have one host name, and so share its CPUs"),
    pytest.mark.skipif(cpus() < 2, reason="needs two CPUs"),
]


@pytest.fixture
def bound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(lacking)
    cluster = Cluster(tmp_path_factory.mktemp("bound"), nodes=2, cpus=2, bound=True)
    yield cluster
    cluster.close()


@pytest.mark.slow
def test_each_task_uses_its_own_cpus(bound: Cluster, tmp_path: Path, shard_sets: Path) -> None:
    user = User(tmp_path, bound, shard_sets)
    done = user.start(
        *("submit", "--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1", "--time=30"),
        *(*user.training, "--run.name=bound", "--train.epochs=9000"),
    )
    said, warned = done.communicate(timeout=200)
    assert done.returncode == 0, warned
    assert "each GPU gets 1 CPU, which may be too few to feed it: ask for 4 or more per GPU" in warned
    job = job_of(said)
    user.freeze("bound", job, rank=3)  # the ranks exist, and the first line has been said
    masks = [os.sched_getaffinity(process) for process in user.processes(job, range(4))]
    assert [len(mask) for mask in masks] == [1] * 4
    assert masks[0].isdisjoint(masks[1])
    assert masks[2].isdisjoint(masks[3])
    assert "4 x cpu, 1 CPU per rank (its own), 240 images" in user.log("bound")
