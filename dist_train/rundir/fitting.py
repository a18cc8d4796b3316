"""Whether the weights in a state are those of a net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def check_weights(model: nn.Module, weights: Any) -> None:
    """Raises ValueError for what are not the weights and buffers of this net, by name, shape and type, or if a weight
    is not finite, which a run does not recover from. Buffers may hold infinities, as masks do."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"model is a {type(weights).__name__}, and no weights by their names")
    own, learned = model.state_dict(), {name for name, _ in model.named_parameters()}
    if missing := [name for name in own if name not in weights]:
        raise ValueError(f"{missing[0]} is missing")
    if foreign := [name for name in weights if name not in own]:
        raise ValueError(f"{str(foreign[0])[:60]} is not in the net")
    for name, value in own.items():
        if not isinstance(value, Tensor):  # the state of a net that keeps more
            continue
        if not alike(weights[name], value):
            raise ValueError(f"{name} is {described(weights[name])}, for {described(value)}")
        if name in learned and not torch.isfinite(weights[name]).all():
            raise ValueError(f"{name} is not finite")


def alike(theirs: Any, own: Tensor) -> bool:
    """Whether a value is a tensor of the same shape and type."""
    return isinstance(theirs, Tensor) and theirs.shape == own.shape and theirs.dtype == own.dtype


def described(value: Any) -> str:
    """Shape and type of a tensor, or the type of what is none, for messages."""
    return f"{list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
