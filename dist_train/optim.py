"""Optimizers, and the update that a gradient which is not finite does not cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.choices import OPTIMIZERS
from dist_train.config import ConfigError, OptimConfig
from pipelines import resolve

Parameters = Iterable[nn.Parameter]
Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
RATIO = "lr_ratio"  # in a group of parameters: its learning rate as a multiple of `optim.lr`, if not 1
MOMENTS = (
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
)  # of torch's optimizers that have fused kernels
KEPT = "_kept"  # attribute of an optimizer: what it keeps of each parameter, as it was after one step, by name
FIELDS = ("momentum", "weight_decay")  # given to an optimizer that has arguments of these names


def sgd(parameters: Parameters, lr: float, *, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum as in section 5.

    torch keeps the velocity free of the learning rate, the paper multiplies it in: the two are equal while the learning
    rate stays, and differ for the few steps after it is divided.
    """
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=True)


def adam(parameters: Parameters, lr: float, *, weight_decay: float) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba, 2014), with the weight decay added to the gradient."""
    return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=True)


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer called `optim.name`: its callable is given (parameters, lr), those of FIELDS that it has arguments
    for, and `optim.options`. Raises UserError if there is none, or if a run could not be continued with it.

    What it does when told to skip a step is tried, not believed: `update` asks the device first unless it does skip.
    """
    key = ("optim.name", config.name)
    make = resolve.resolve(*key, OPTIMIZERS)
    taken = resolve.argument_names(make)
    for name in FIELDS if resolve.is_code(config.name) else ():
        if name not in taken and (value := getattr(config, name)) != getattr(OptimConfig, name):
            raise ConfigError(f"optim.{name} is {value}, but {config.name} does not have it: leave it out")
    options = {name: getattr(config, name) for name in FIELDS if name in taken} | config.options

    def made(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = resolve.make(
            *key,
            make,
            (parameters, config.lr),
            options,
            kind=torch.optim.Optimizer,
            remedy="it takes (parameters, lr, **options)",
        )
        _fill_momentum(optimizer)
        return optimizer

    parameters = list(model.parameters())
    optimizer = made(parameters)
    for group in optimizer.param_groups:
        if group["lr"] != config.lr:
            group[RATIO] = group["lr"] / config.lr
    like = next(p for p in parameters if p.requires_grad)
    # torch's own mark of optimizers that skip on the device; GradScaler goes by it, too.
    optimizer._step_supports_amp_scaling, kept = _tried(config.name, made, like)  # type: ignore[attr-defined]
    setattr(optimizer, KEPT, kept)
    return optimizer


def _tried(name: str, made: Make, like: nn.Parameter) -> tuple[bool, dict[str, Any]]:
    """Whether an optimizer skips a step on the device, and what it keeps of each parameter (see KEPT). Raises
    NameProblem if a run could not be continued with it."""
    device = torch.device("cpu") if like.is_meta else like.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        numbers = [torch.ones(shape, dtype=like.dtype, device=device) for shape in ((2, 2), (2,))]
        try:
            resumes, skips, kept = _resumes(made, numbers), _skips(made, numbers), _kept(made, numbers)
        except resolve.NameProblem:
            raise
        except Exception as error:
            how = "failed when it was tried on a matrix and a vector of ones"
            raise resolve.failed("optim.name", name, error, how) from error
    if not resumes:
        raise resolve.NameProblem(
            f"optim.name {name} steps otherwise once its state was saved and loaded: keep what changes in "
            f"self.state[parameter]"
        )
    return skips, kept


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step. A group that began with another one than `optim.lr` keeps its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(RATIO, 1)


class _Trial:
    """An optimizer of a matrix [2, 2] and a vector [2], which some optimizers treat differently."""

    def __init__(self, made: Make, *values: Tensor) -> None:
        self.parameters = [nn.Parameter(value.clone()) for value in values]
        self.optimizer = made(self.parameters)

    def step(self, gradient: float, *, refused: float | None = None, scale: float = 1.0) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        torch.manual_seed(0)
        if refused is not None:
            _tell(self.optimizer, *torch.tensor([refused, scale], device=self.parameters[0].device))
        self.optimizer.step()

    def copies(self) -> list[Tensor]:
        """The numbers, and all tensors of the state."""
        states = self.optimizer.state.values()
        tensors = [*self.parameters, *(v for state in states for v in state.values() if torch.is_tensor(v))]
        return [tensor.detach().clone() for tensor in tensors]


def _resumes(made: Make, numbers: Sequence[Tensor]) -> bool:
    """Whether a step after saving and loading is the one that would have followed. Raises what torch raises for a state
    that no checkpoint can hold."""
    undisturbed, file = _Trial(made, *numbers), BytesIO()
    undisturbed.step(0.5)
    torch.save(undisturbed.optimizer.state_dict(), file)
    file.seek(0)
    resumed = _Trial(made, *(p.detach() for p in undisturbed.parameters))
    load_moments(resumed.optimizer, torch.load(file, weights_only=True))
    for trial in (undisturbed, resumed):
        trial.step(0.25)
    return _same(undisturbed.parameters, resumed.parameters)


def _kept(made: Make, numbers: Sequence[Tensor]) -> dict[str, Any]:
    """What an optimizer keeps of a matrix and of a vector alike, after a step."""
    trial = _Trial(made, *numbers)
    trial.step(0.5)
    matrix, vector = (trial.optimizer.state.get(parameter, {}) for parameter in trial.parameters)
    return {name: value for name, value in vector.items() if name in matrix}


def _skips(made: Make, numbers: Sequence[Tensor]) -> bool:
    """Whether an optimizer that is told to skip a step, as GradScaler tells it, leaves weights and state alone, in its
    first step and later, and divides gradients by the scale if it is given one."""
    first, later, scaled = (_Trial(made, *numbers) for _ in range(3))
    later.step(0.5)
    try:
        first.step(math.nan, refused=1.0)
        scaled.step(1.0, refused=0.0, scale=2.0)
        before = later.copies()
        later.step(math.nan, refused=1.0)
    except Exception:  # torch's own ones say no
        return False
    fresh = _same(first.parameters, numbers) and all(bool(torch.isfinite(t).all()) for t in first.copies())
    return fresh and _same(before, later.copies()) and _same(before, scaled.copies())


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _tell(optimizer: torch.optim.Optimizer, refused: Tensor, scale: Tensor | None = None) -> None:
    """Tells the optimizer whether to skip its next step, and by what to divide gradients, as GradScaler does."""
    optimizer.found_inf, optimizer.grad_scale = refused, scale  # type: ignore[attr-defined]


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Fills missing velocities with zeros. Fused, torch would use uninitialised memory at the first step, and skipping
    that step would leave it there."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if group["momentum"] and (group["fused"] or not group["dampening"]):  # else the first velocity is the gradient
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
    """Steps the optimizer unless a gradient is not finite: then weights and state stay, decided on the device
    if the optimizer can skip there.

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
    if optimizer._step_supports_amp_scaling:  # type: ignore[attr-defined]
        _tell(optimizer, refused)
        optimizer.step()
    elif not refused:  # waits for the device
        optimizer.step()
    return Updated(refused, own.double().square())


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the moments but not the options: learning rate, momentum and decay are the configuration's. Raises
    ValueError for one that does not fit its parameter, that the optimizer would miss, or that is not finite."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept: dict[str, Any] = getattr(optimizer, KEPT, {})
    for number, values in state["state"].items():
        if not (isinstance(number, int) and 0 <= number < len(parameters)):
            raise ValueError(f"there is no parameter {number!r:.20}, which has moments")
        if values and (missing := kept.keys() - values.keys() - {MOMENTS[0]}):
            raise ValueError(f"{min(missing)} of parameter {number} is missing")
        for name, value in values.items():
            if not (_fits(name, value, parameters[number]) and _like(value, kept.get(name))):
                is_ = f"{list(value.shape)}, {value.dtype}" if torch.is_tensor(value) else type(value).__name__
                raise ValueError(f"{name} of parameter {number} is {is_}, for {list(parameters[number].shape)}")
            single = isinstance(value, float | int) or (torch.is_tensor(value) and not value.dim())
            if (single or name in MOMENTS) and not torch.isfinite(torch.as_tensor(value)).all():
                raise ValueError(f"{name} of parameter {number} is not finite")
            if name == "step" and value < 0:
                raise ValueError(f"{name} of parameter {number} is negative")
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    _fill_momentum(optimizer)  # it may have been trained without


def _like(value: Any, example: Any) -> bool:
    """Whether a value of a state has the type of the one that the optimizer has under this name, if it has one."""
    if torch.is_tensor(example):
        return torch.is_tensor(value) and value.dtype == example.dtype and bool(value.dim()) == bool(example.dim())
    if isinstance(example, float | int):
        return isinstance(value, float | int)
    return True


def _fits(name: str, value: Any, parameter: nn.Parameter) -> bool:
    """Whether a value of an optimizer's state can be one of this parameter: fused kernels read beyond the end of one
    that is too small. Some optimizers keep means along an axis, which then has length 1."""
    if not torch.is_tensor(value):
        return name not in MOMENTS
    if name in MOMENTS:  # expanded values share memory: kernels read beyond its end too
        same = value.shape == parameter.shape and value.dtype == parameter.dtype
        return same and bool(torch.ops.aten.is_non_overlapping_and_dense(value))
    same = value.dim() == parameter.dim()
    return not value.dim() or (same and all(n in (1, m) for n, m in zip(value.shape, parameter.shape, strict=True)))
