"""What only a GPU can show: `make test-gpu`. The loader's part is in test_dali.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_train import models, optim
from dist_train.config import ModelConfig, OptimConfig
from dist_train.models.dropout import mask_keys
from tests.helpers.compare import equal, newest, records, status
from tests.helpers.launch import STEPS, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ON_GPU = ("--train.device=cuda", "--data.device=gpu")


def test_a_run_on_the_gpu_learns_what_the_cpu_learns(shard_sets: Path, tmp_path: Path) -> None:
    """NCCL, DALI on the GPU, full precision: the first losses agree with the CPU's up to rounding."""
    cpu, gpu = tmp_path / "cpu", tmp_path / "gpu"
    assert launch(shard_sets, cpu, "--train.epochs=1").returncode == 0
    result = launch(shard_sets, gpu, *ON_GPU, "--train.precision=off", "--train.epochs=1", ranks=1, how="exec")
    assert result.returncode == 0, result.stderr
    for a, b in zip(records(cpu, "step")[:5], records(gpu, "step")[:5], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_mixed_precision_resumes(shard_sets: Path, tmp_path: Path, precision: str, compiled: str) -> None:
    """Stopped after an epoch and continued: the same records, weights and scaler as in one piece."""
    extra = (*ON_GPU, f"--train.precision={precision}", f"--train.compile={compiled}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(shard_sets, whole, *extra, ranks=1, how="exec", timeout=600).returncode == 0
    assert launch(shard_sets, run, *extra, "--train.epochs=1", ranks=1, how="exec", timeout=600).returncode == 0
    assert launch(shard_sets, run, *extra, ranks=1, how="exec", timeout=600).returncode == 0
    assert status(run)["step"] == 2 * STEPS
    assert records(run, "step") == records(whole, "step")
    assert equal(newest(run)["model"], newest(whole)["model"])


def test_compiling_falls_back_where_there_is_no_compiler(shard_sets: Path, tmp_path: Path) -> None:
    env = dict.fromkeys(("CC", "CXX"), "/no/such")
    env |= dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), str(tmp_path / "cache"))
    extra = (*ON_GPU, "--train.compile=auto", "--train.max_steps=2")
    result = launch(shard_sets, tmp_path / "r", *extra, ranks=1, how="exec", env=env, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("torch.compile is off, it does not work here") == 1


def test_the_same_dropout_masks_as_on_the_cpu() -> None:
    net = models.build(ModelConfig(hidden=64), classes=10, crop=67)
    x, keys = torch.randn(8, 3, 67, 67) * 60, mask_keys(0, 3, np.arange(8))
    on_cpu = net(x, keys)
    on_gpu = net.cuda()(x.cuda(), keys.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-2, atol=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    layer = torch.nn.Linear(4, 3).cuda()
    optimizer = optim.build(OptimConfig(), layer)
    before = [p.detach().clone() for p in layer.parameters()]
    F.mse_loss(layer(torch.full((2, 4), torch.inf, device="cuda")), torch.zeros(2, 3, device="cuda")).backward()
    assert optim.update(optimizer, torch.amp.GradScaler("cuda", enabled=False)) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
