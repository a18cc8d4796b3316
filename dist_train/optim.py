"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from dist_train.config import DEFAULT, Config, OptimConfig, ScheduleConfig


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
    """Fills missing velocities with zeros. Fused, torch would use uninitialised memory at the first step, and skipping
    that step would leave it there."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


class Updated(NamedTuple):
    """Outcome of a step, as scalars on the device.

    Attributes:
        refused: 1.0 if a gradient was not finite, so that nothing was changed, else 0.0; float32. Always 0 with a
            scaler, for which overflows are ordinary: it skips the step and lowers its scale.
        square: squared norm of the unscaled gradient; float64. Not finite after an overflow.
    """

    refused: Tensor
    square: Tensor


def update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    agree: Callable[[Tensor], None] = lambda _: None,
    told_of: Sequence[nn.Parameter] | None = None,
) -> Updated:
    """Steps the optimizer unless a gradient is not finite: then weights and state stay, decided on the device.

    Args:
        agree: makes `refused` the same on ranks that hold different parts of a net (`World.agree`).
        told_of: the parameters whose gradients count in `square`, if not all.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    own = norm if told_of is None else nn.utils.get_total_norm([p.grad for p in told_of if p.grad is not None])
    if scaler.is_enabled():
        own = own / scaler.scale(torch.ones((), device=norm.device))  # this step's: `update` may change it
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
    """Loads the moments but not the options: learning rate, momentum and decay are the configuration's."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    _fill_momentum(optimizer)  # it may have been trained without


def remedy(config: Config, steps: int) -> str:
    """What to do if the learning rate was divided before the net has begun to learn, and where the epochs of the
    division came from."""
    schedule = config.schedule
    if schedule.name == "plateau":
        waited = max(schedule.patience * steps, schedule.patience_steps)
        return f"raise schedule.patience_steps above {waited}, the steps that it has waited for"
    milestones = list(schedule.milestones)
    if not config.data.source and milestones == _milestones_of(DEFAULT):
        return (
            f"schedule.milestones {milestones} is the default of configs/{DEFAULT.name}, made for Fashion-MNIST; for "
            f"images of your own begin a run with --config configs/own.yaml"
        )
    return f"move schedule.milestones {milestones} to later epochs"


def _milestones_of(file: Path) -> list[int]:
    """The milestones in a YAML file; none if it cannot be read, which must not end a run."""
    try:
        return list(yaml.safe_load(file.read_text(encoding="utf-8"))["schedule"]["milestones"])
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return []


@dataclass
class Schedule:
    """The learning rate as a function of the configuration and of this small state.

    Attributes:
        best: lowest validation error so far.
        bad_epochs: epochs since then at the current learning rate.
        divisions: number of divisions so far.
        exhausted: the error stopped improving after the last division.
    """

    config: ScheduleConfig
    base: float
    best: float = float("inf")
    bad_epochs: int = 0
    divisions: int = 0
    exhausted: bool = False

    def lr(self, epoch: int, step: int, steps: int) -> float:
        """Learning rate at step `step` of an epoch of `steps`. Warm-up rises linearly from lr / warm-up steps."""
        divisions = self.divisions
        if self.config.name == "milestones":
            divisions = sum(epoch >= milestone for milestone in self.config.milestones)
        warmup = self.config.warmup_epochs * steps
        share = min(1.0, (epoch * steps + step + 1) / warmup) if warmup >= 1 else 1.0
        return self.base * share / self.config.factor**divisions

    def step(self, error: float, epoch: int, steps: int) -> bool:
        """Takes the validation error (0..1) of a finished epoch of `steps` steps. Returns whether the learning rate is
        now divided."""
        if self.config.name == "milestones":
            return epoch + 1 in self.config.milestones
        if epoch + 1 <= self.config.warmup_epochs:
            return False
        if error < self.best - self.config.min_improvement:
            self.best, self.bad_epochs = error, 0
            return False
        self.bad_epochs += 1
        if self.bad_epochs < self.config.patience or self.bad_epochs * steps < self.config.patience_steps:
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
