"""Pieces of the step on the device: masks, and gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train import optim
from dist_train.config import OptimConfig
from dist_train.models.dropout import Dropout, mask_keys
from dist_train.monitor.gpus import GpuSampler
from pipelines import ImageLoader, resolve
from tests.helpers.drills import until
from tests.helpers.gpu import DEVICE, MARKS, needs_cuda

pytestmark = MARKS


def test_the_masks_of_dropout_are_the_cpus() -> None:
    keys, dropout = mask_keys(0, 3, np.arange(64)), Dropout(0.5, layer=6)
    on_cpu = dropout(torch.ones(64, 4096), keys)
    assert on_cpu.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(dropout(torch.ones(64, 4096, device=DEVICE), keys.to(DEVICE)).cpu(), on_cpu)


class Descent:
    """A layer, the product's optimizer for it, and what the paper's formula makes of the same gradients (section 5)."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3).to(DEVICE)
        self.config = OptimConfig()
        self.optimizer, self.scaler = optim.build(self.config, self.layer), scaler
        self.expected = [(p.detach().cpu().double(), torch.zeros(p.shape).double()) for p in self.layer.parameters()]

    def step(self, poison: float | None = None) -> Tensor:
        """One step on the squared outputs for some inputs, or on a gradient of which one number is not finite, which
        is to change nothing. Returns what `update` does."""
        self.optimizer.zero_grad()
        inputs = torch.randn(5, 4).to(DEVICE)
        self.scaler.scale(self.layer(inputs).square().mean()).backward()
        if poison is None:
            self.expected = [self.descend(*pair) for pair in zip(self.layer.parameters(), self.expected, strict=True)]
        else:
            self.layer.weight.grad[1, 2] = poison
        with memory_of_nans():
            return optim.update(self.optimizer, self.scaler).refused

    def descend(self, parameter: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weight, velocity = state
        gradient = parameter.grad.cpu().double() / self.scaler.get_scale()
        velocity = self.config.momentum * velocity + gradient + self.config.weight_decay * weight
        return weight - self.config.lr * velocity, velocity

    def check(self) -> None:
        for parameter, (weight, _) in zip(self.layer.parameters(), self.expected, strict=True):
            torch.testing.assert_close(parameter.detach().cpu().double(), weight, rtol=1e-5, atol=1e-7)


@contextmanager
def memory_of_nans() -> Iterator[None]:
    """Memory that is taken, and not written to, holds NaN, not what happens to be there."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def filling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `memory_of_nans` needs; a trainer in this process may have switched it off."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    """At the second step: neither the weights nor, as the third one shows, the momentum."""
    descent = Descent(torch.amp.GradScaler(DEVICE, enabled=False))
    for value, refused in ((None, 0), (poison, 1), (None, 0)):
        assert descent.step(value) == refused
        descent.check()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_overflow_under_a_scaler_changes_nothing_but_the_scale(first: int) -> None:
    """fp16, whose scale of 65536 may overflow at once: the momentum, of which there is none then, begins with zero."""
    descent = Descent(torch.amp.GradScaler(DEVICE))
    for i in range(5):
        scale = descent.scaler.get_scale()
        descent.step(torch.inf if i == first else None)
        assert descent.scaler.get_scale() == (scale / 2 if i == first else scale)
        descent.check()


@pytest.mark.parametrize(
    ("name", "options", "skips"),
    [
        ("sgd", {}, True),
        ("adam", {}, True),
        ("torch.optim:AdamW", {"fused": True}, True),
        ("torch.optim:AdamW", {}, False),
        ("torch.optim:RMSprop", {}, False),
    ],
)
def test_whether_an_optimizer_skips_on_the_device(name: str, options: dict[str, Any], skips: bool) -> None:
    """It is tried when it is built; in either case a gradient that is not finite changes nothing."""
    resolve.trust(name)
    layer = torch.nn.Linear(4, 3).to(DEVICE)
    optimizer = optim.build(OptimConfig(name, options=options), layer)
    assert optimizer._step_supports_amp_scaling == skips  # type: ignore[attr-defined]
    off = torch.amp.GradScaler(DEVICE, enabled=False)
    for poison, refused in ((0.5, 0), (torch.nan, 1), (0.5, 0)):
        before = [p.detach().clone() for p in layer.parameters()]
        for p in layer.parameters():
            p.grad = torch.full_like(p, poison)
        assert optim.update(optimizer, off).refused == refused
        assert all(map(torch.equal, before, layer.parameters())) == bool(refused)


@needs_cuda("it is NVIDIA's driver that is asked")
def test_what_the_gpu_does() -> None:
    said: list[str] = []
    held = torch.ones(64 << 20, device=DEVICE)
    sampler = GpuSampler.of(torch.device(DEVICE, 0), said.append)
    assert sampler
    sampler.sample()
    until(lambda: sampler.latest() or said)
    sample = sampler.latest()
    assert not said
    assert sample
    assert 0 <= sample.use <= 1
    assert held.nbytes / 1e6 < sample.memory_mb < torch.cuda.get_device_properties(0).total_memory / 1e6
    assert 0 <= sample.watts < 2000
    assert 0 <= sample.celsius < 120


def test_the_loader_of_a_script_of_ones_own(shard_sets: Path) -> None:
    """Decoded on the device of the net: the CPU's labels and, but for the rounding of the decoder, its images."""
    options: dict[str, Any] = {"batch": 24, "crop": 67, "resize": 72, "inputs": "mean_subtracted"}
    here, there = (ImageLoader(shard_sets / "train", device=device, **options) for device in (DEVICE, "cpu"))
    for (images, labels), (expected, their_labels) in zip(here, there, strict=True):
        assert images.device.type == labels.device.type == DEVICE
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels.cpu(), their_labels)
        assert (images.cpu() - expected).abs().mean() < 2  # levels of 255
