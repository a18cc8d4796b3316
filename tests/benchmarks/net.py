"""Layers and whole nets on the CPU: LRN, dropout, forward and backward, eager and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from dist_train import models
from dist_train.config import ModelConfig
from dist_train.models.dropout import Dropout, mask_keys
from dist_train.models.lrn import local_response_norm

Work = Callable[[], object]


def clock(work: Work, repeat: int = 5) -> float:
    """CPU milliseconds of one call, the least of a few."""
    work()
    times = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        times.append(1000 * (time.process_time() - began))
    return min(times)


def rows(title: str, entries: dict[str, float], unit: str) -> None:
    """A small table; ratios are to the first row."""
    first = next(iter(entries.values()))
    print(f"\n{title}")
    for name, value in entries.items():
        print(f"  {name:<58} {value:9.1f} {unit}  {value / first:6.2f} x")


def _lrn(channels: int, side: int, layer: str) -> None:
    x = (torch.randn(32, channels, side, side) * 60).to(memory_format=torch.channels_last).requires_grad_()

    def both_ways(function: Callable[[torch.Tensor], torch.Tensor]) -> Work:
        return lambda: function(x).sum().backward()

    compiled = torch.compile(lambda t: local_response_norm(t, 2))
    forms = {
        "F.local_response_norm (one window over both towers)": lambda t: F.local_response_norm(t, 5, 5e-4, 0.75, 2),
        "ours, eager": lambda t: local_response_norm(t, 2),
        "ours, compiled": compiled,
    }
    title = f"LRN of {layer}'s output, forward and backward, batch 32"
    rows(title, {name: clock(both_ways(form)) for name, form in forms.items()}, "ms")


def _dropout() -> None:
    units = torch.randn(128, 4096, requires_grad=True)
    layer, keys = Dropout(0.5, 7), mask_keys(0, 0, np.arange(128))
    hashed = torch.compile(lambda t: layer(t, keys))
    entries = {
        "F.dropout": clock(lambda: F.dropout(units, 0.5).sum().backward()),
        "hashed, eager": clock(lambda: layer(units, keys).sum().backward()),
        "hashed, compiled": clock(lambda: hashed(units).sum().backward()),
    }
    rows("dropout of 4096 units, batch 128", entries, "ms")


def _step(model: torch.nn.Module, images: torch.Tensor, keys: torch.Tensor) -> None:
    model(images, keys).logsumexp(1).sum().backward()


def table() -> None:
    """Measure and print; freed memory goes back to the kernel here, as in a program that does not keep it."""
    _lrn(96, 55, "conv 1")
    _lrn(256, 27, "conv 2")
    _dropout()
    for crop, hidden, batch in ((67, 512, 128), (227, 4096, 32)):
        images = (torch.randn(batch, 3, crop, crop) * 60).to(memory_format=torch.channels_last)
        keys = mask_keys(0, 0, np.arange(batch))
        entries = {}
        for mode in ("eager", "compiled"):
            model = models.build(ModelConfig(hidden=hidden), classes=10, crop=crop)
            model.to(memory_format=torch.channels_last)
            if mode == "compiled":
                model.compile(dynamic=False)
            entries[mode] = clock(partial(_step, model, images, keys), 3) / batch
        rows(f"forward and backward, crop {crop}, hidden {hidden}, CPU per image", entries, "ms")
