"""Reference runs shared by the gpu tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.helpers.compare import newest
from tests.helpers.gpu import run_on_gpus
from tests.test_evaluate import untrained

STANDARDIZED = "--data.inputs=standardized"


@pytest.fixture(scope="session")
def net(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to begin with the weights of. The paper's are so small that a net of this size computes next to nothing
    from its pixels; with these it learns in twenty steps, and shows it if pixels or masks are not the same."""
    return untrained(tmp_path_factory.mktemp("net") / "run", shard_sets, STANDARDIZED, seed=2)


@pytest.fixture(scope="session")
def weights(net: Path) -> dict[str, Tensor]:
    """Those of `net`."""
    saved: dict[str, Tensor] = newest(net)["model"]
    return saved


@pytest.fixture(scope="session")
def learning(net: Path) -> tuple[str, ...]:
    """Settings with which a small net learns; see `net`."""
    return (f"--model.init_from={net}", STANDARDIZED)


@pytest.fixture(scope="session")
def trained(
    shard_sets: Path, learning: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """A run of two epochs in full precision on so many GPUs, which is made when it is first asked for."""
    runs: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in runs:
            directory = tmp_path_factory.mktemp("trained") / str(ranks)
            result = run_on_gpus(shard_sets, directory, *learning, "--train.precision=off", ranks=ranks)
            assert result.returncode == 0, result.stderr
            runs[ranks] = directory
        return runs[ranks]

    return run
