"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.config import OptimConfig, ScheduleConfig


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum as in section 5, or Adam (Kingma and Ba, 2014). Fused, so that `update` can skip on the device.

    torch keeps the velocity free of the learning rate, the paper multiplies it in: the two are equal while the learning
    rate stays, and differ for the few steps after it is divided.
    """
    if config.name == "adam":
        return torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    _fill_momentum(optimizer)
    return optimizer


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where there is no velocity yet. Fused, torch would take uninitialised memory for it at the first step, and
    a first step that is skipped would leave that there."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


class Updated(NamedTuple):
    """What became of a step, as scalars on the device.

    Attributes:
        refused: 1.0 if a gradient was not finite, and so nothing was changed, else 0.0; float32. With a scaler always
            0: there an overflow is ordinary, skipped by the scaler, which lowers its scale.
        square: of the gradient's norm, without the scale; float64. Not finite after an overflow.
    """

    refused: Tensor
    square: Tensor


def update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    agree: Callable[[Tensor], None] = lambda _: None,
    told_of: Sequence[nn.Parameter] | None = None,
) -> Updated:
    """Step, except where a gradient is not finite: then weights and state stay as they are, decided on the device.

    Args:
        agree: makes `refused` one of several ranks that hold different parts of a net (`World.agree`).
        told_of: the parameters whose gradients are in `square`, if not all.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    own = norm if told_of is None else nn.utils.get_total_norm([p.grad for p in told_of if p.grad is not None])
    if scaler.is_enabled():
        own = own / scaler.scale(torch.ones((), device=norm.device))  # of this step: `update` may change it
        scaler.step(optimizer)
        scaler.update()
        return Updated(torch.zeros_like(norm), own.double().square())
    refused = (~torch.isfinite(norm)).float()
    agree(refused)
    optimizer.found_inf = refused  # type: ignore[attr-defined]  # how GradScaler tells a fused optimizer to skip
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return Updated(refused, own.double().square())


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over moments, not options: learning rate, momentum and decay are the configuration's."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    _fill_momentum(optimizer)  # it may have been trained without


@dataclass
class Schedule:
    """The learning rate as a function of the configuration and of this small state.

    Attributes:
        best: lowest validation error so far.
        bad_epochs: epochs since, at the current learning rate.
        divisions: how often the learning rate was divided.
        exhausted: the error stopped improving after the last division.
    """

    config: ScheduleConfig
    base: float
    best: float = float("inf")
    bad_epochs: int = 0
    divisions: int = 0
    exhausted: bool = False

    def lr(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps` of an epoch. Warm-up rises linearly from lr / warm-up steps."""
        divisions = self.divisions
        if self.config.name == "milestones":
            divisions = sum(epoch >= milestone for milestone in self.config.milestones)
        warmup = self.config.warmup_epochs * steps
        share = min(1.0, (epoch * steps + step + 1) / warmup) if warmup >= 1 else 1.0
        return self.base * share / self.config.factor**divisions

    def step(self, error: float, epoch: int) -> bool:
        """Take the validation error (0..1) of a finished epoch. Returns whether the learning rate is now divided."""
        if self.config.name == "milestones":
            return epoch + 1 in self.config.milestones
        if epoch + 1 <= self.config.warmup_epochs:
            return False
        if error < self.best - self.config.min_improvement:
            self.best, self.bad_epochs = error, 0
            return False
        self.bad_epochs += 1
        if self.bad_epochs < self.config.patience:
            return False
        self.bad_epochs = 0
        if self.divisions == self.config.max_divisions:
            self.exhausted = True
            return False
        self.divisions += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("config", "base")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
