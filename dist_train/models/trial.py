"""Tries a net of somebody's own before a run begins: what it cannot do would end the run later, and less plainly."""

from __future__ import annotations

import copy
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.choices import PAPER_NETS, TORCHVISION
from dist_train.config import ModelConfig
from pipelines import resolve
from pipelines.errors import UserError


def try_out(net: nn.Module, options: ModelConfig, classes: int, crop: int, device: torch.device) -> None:
    """Shows a net two grey images on this device, in evaluation and in training mode, and leaves its state as it was.
    Raises UserError if it does not give their logits, if not all of it would be trained, or if no checkpoint could hold
    it."""
    if options.name in PAPER_NETS or options.name.startswith(TORCHVISION):
        return
    key, training = ("model.name", options.name), net.training
    images = torch.full((2, 3, crop, crop), 0.5, device=device)
    before: dict[str, Any] | None = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with torch.no_grad():
                _check(net.eval()(images), options, classes)
            if not any(p.requires_grad for p in net.parameters()):
                raise resolve.NameProblem(f"{' '.join(key)} has no parameter to train: assign its layers to attributes")
            before = copy.deepcopy(net.state_dict())
            _check_state(before)
            keys = torch.zeros(2, dtype=torch.int64, device=device)
            logits = net.train()(images, keys)
            _check(logits, options, classes)
            F.cross_entropy(logits.float(), keys).backward()  # type: ignore[no-untyped-call]
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise resolve.failed(*key, error, f"failed on two images of {crop} pixels a side") from error
    finally:
        net.train(training)
        if before is not None:
            net.load_state_dict(before)
    trained = {name: p.grad is not None for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    if idle := [name for name, has_gradient in trained.items() if not has_gradient]:
        raise resolve.NameProblem(
            f"{' '.join(key)}: the logits do not depend on its parameter {idle[0].removeprefix('net.')}, for whose "
            f"gradient ranks would wait: remove it, or set its requires_grad to False"
        )


def _check(logits: Any, options: ModelConfig, classes: int) -> None:
    """Raises NameProblem for what are no logits of two images."""
    shape = (2, options.outputs or classes)
    if not isinstance(logits, Tensor) or logits.shape != shape:
        told = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise resolve.NameProblem(
            f"model.name {options.name} gives logits of {told} for two images: they must have the shape {list(shape)}"
        )


def _check_state(state: dict[str, Any]) -> None:
    """Raises what torch raises for a state beside tensors (`get_extra_state`) that no checkpoint can hold."""
    file = BytesIO()
    torch.save({name: value for name, value in state.items() if not isinstance(value, Tensor)}, file)
    file.seek(0)
    torch.load(file, weights_only=True)
