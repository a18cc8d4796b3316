"""Ranks that see one GPU each: two that see the same are refused, two that see different ones train."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.helpers.compare import status
from tests.helpers.gpu import MARKS, ON_DEVICE, needs_cuda, needs_gpus
from tests.helpers.launch import SMALL, python

pytestmark = [*MARKS, needs_cuda("it is about which GPU is seen")]


def train_on(visible: list[str], data: Path, run: Path) -> list[tuple[int, str]]:
    """Exit code and errors of each of the ranks of a node, which see these GPUs, as under `--gpu-bind=single`."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    size = str(len(visible))
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    sets = (f"--data.train={data / 'train'}", f"--data.val={data / 'val'}", f"--run.dir={run}")
    words = python("dist_train", *SMALL, *ON_DEVICE, *sets, "--train.max_steps=2", "--train.compile=off")
    ranks = []
    for rank, gpu in enumerate(visible):
        env = {**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": gpu}
        ranks.append(subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True))
    return [(rank.returncode, said) for rank in ranks for said in [rank.communicate(timeout=300)[1]]]


def test_two_ranks_on_one_gpu_are_refused(shard_sets: Path, tmp_path: Path) -> None:
    ended = train_on(["0", "0"], shard_sets, tmp_path / "run")
    assert [code for code, _ in ended] == [2, 2]
    assert re.search(r"ranks 0 and 1 would both train on GPU \S{36,} of ", ended[0][1])


@needs_gpus(2)
@pytest.mark.slow
def test_a_rank_takes_the_only_gpu_that_it_sees(shard_sets: Path, tmp_path: Path) -> None:
    ended = train_on(["0", "1"], shard_sets, tmp_path / "run")
    assert [code for code, _ in ended] == [0, 0], ended
    assert status(tmp_path / "run")["state"] == "done"
