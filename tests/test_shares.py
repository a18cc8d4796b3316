"""Each rank uses its share of the CPUs of its node, whether the launcher gave it its own or all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from dist_train import process
from dist_train.ranks.share import by_host, in_words
from dist_train.ranks.world import World
from pipelines import misc
from pipelines.misc import CpuShare, cpu_shares
from slurm.script import too_few_cpus

DISJOINT = [frozenset(range(16 * rank, 16 * rank + 16)) for rank in range(8)]
SHARED = [frozenset(range(128))] * 8
NUMA = [frozenset(range(64 * (rank // 4), 64 * (rank // 4) + 64)) for rank in range(8)]
# each has 12 of its own, and four that its neighbour may use, too
OVERLAPPING = [frozenset(cpu % 112 for cpu in range(14 * rank - 1, 14 * rank + 15)) for rank in range(8)]


@pytest.mark.parametrize(
    ("masks", "each", "own"),
    [
        (DISJOINT, 16, True),
        (SHARED, 16, False),
        (NUMA, 16, False),
        (OVERLAPPING, 14, False),
        ([frozenset(range(16))] * 8, 2, False),
        ([frozenset({0, 1})] * 8, Fraction(1, 4), False),
    ],
)
def test_eight_ranks_of_sixteen_cpus(masks: list[frozenset[int]], each: Fraction, own: bool) -> None:
    assert all(len(mask) in (16, 64, 128, 2) for mask in masks)
    shares = cpu_shares(masks)
    assert shares == [(each, own)] * 8
    assert {share.threads for share in shares} == {max(1, int(each))}


def test_ranks_of_one_host_count_together() -> None:
    """However their numbers alternate; equal CPUs of two hosts are not the same."""
    masks = [frozenset({0, 1}), frozenset({0, 1}), frozenset({2, 3}), frozenset({0, 1})]
    assert [share.cpus for share in by_host(["a", "b", "a", "b"], masks)] == [2, 1, 2, 1]
    assert [share.own for share in by_host(["a", "b", "a", "b"], masks)] == [True, False, True, False]


def shares(*cpus: float, own: bool) -> list[CpuShare]:
    return [CpuShare(Fraction(number), own) for number in cpus]


def test_the_words_of_the_first_line() -> None:
    assert in_words(shares(1, 1, 1, 1, own=True)) == "1 CPU per rank (its own)"
    assert in_words(shares(16, 16, own=True)) == "16 CPUs per rank (its own)"
    assert in_words(shares(1, 1, own=False)) == "1 CPU per rank (shared)"
    assert in_words(shares(*[0.25] * 8, own=False)) == "0.25 CPUs per rank (shared)"
    assert in_words(shares(2, 3, own=False)) == "2 to 3 CPUs per rank (shared)"
    assert in_words(shares(2, own=True)) == "2 CPUs"


def test_few_cpus_are_told() -> None:
    on_gpu = World(0, 2, 0, 2, torch.device("cuda", 0), shares=shares(4, 3.5, own=False))
    said = process.cpu_warning(on_gpu)
    assert said == (
        "3.5 to 4 CPUs per rank (shared) may be too few to feed a GPU: ask for 4 or more per GPU (under Slurm with "
        "--cpus-per-task)"
    )
    assert not process.cpu_warning(replace(on_gpu, shares=shares(4, 4, own=True)))
    assert not process.cpu_warning(World.single(torch.device("cpu")))


def test_few_cpus_are_told_before_they_are_asked_for() -> None:
    asked: dict[str, Any] = {"gpus_per_node": 2, "additional_parameters": {"requeue": True}}
    assert too_few_cpus(asked) == (
        "each GPU gets one CPU, unless your site gives more, which may be too few to feed it: ask for 4 or more per "
        "GPU (under Slurm with --cpus-per-gpu)"
    )
    assert too_few_cpus(asked | {"cpus_per_task": 3}).startswith("each GPU gets 3 CPUs, which")
    assert not too_few_cpus(asked | {"cpus_per_task": 4})
    assert not too_few_cpus({"additional_parameters": {}})
    assert not too_few_cpus(asked | {"additional_parameters": {"cpus-per-task": 8}})


SIBLINGS = """
import os, subprocess, sys
show = "import sys; from pipelines.misc import *; next(sys.stdin); print(cpu_share(), flush=True); next(sys.stdin, 0)"
start = lambda: subprocess.Popen([sys.executable, "-c", show], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
ranks = []
for cpus in eval(sys.argv[1]):
    os.sched_setaffinity(0, cpus)
    ranks.append(start())
for rank in ranks:
    rank.stdin.write("\\n")
    rank.stdin.flush()
    print(rank.stdout.readline())
for rank in ranks:
    rank.stdin.close()
    rank.wait()
"""


@pytest.mark.skipif(misc.cpus() < 2, reason="needs two CPUs")
def test_a_loader_of_a_script_finds_its_share() -> None:
    """`ImageLoader`, which cannot ask the other ranks, looks at them."""
    a, b, *_ = sorted(os.sched_getaffinity(0))

    def told(masks: list[set[int]], size: int = 2) -> list[str]:
        env = {**os.environ, "LOCAL_WORLD_SIZE": str(size)}
        words = [sys.executable, "-c", SIBLINGS, str(masks)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=True)
        return [line.partition("CpuShare")[2].strip() for line in done.stdout.splitlines() if "CpuShare" in line]

    assert told([{a}, {b}]) == ["(cpus=Fraction(1, 1), own=True)"] * 2
    assert told([{a, b}, {a, b}]) == ["(cpus=Fraction(1, 1), own=False)"] * 2
    assert told([{a}, {b}], size=3) == ["(cpus=Fraction(1, 3), own=False)"] * 2  # one is hidden
