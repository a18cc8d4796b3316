"""Nets by name: see `choices.NETS`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dist_train.choices import NETS, PAPER_NETS, TORCHVISION, unknown_net
from dist_train.config import ConfigError, ModelConfig
from dist_train.models.trial import try_out
from pipelines import resolve

TAKES = "it takes (classes, crop, **options) and returns an nn.Module"


class CalledByImages(nn.Module):
    """A net that is called as net(images), with our calling convention. It may bring its own randomness, so it is exact
    only at one world size: torch's generators are seeded from (seed, step, rank) at each step, unless it declares
    `draws_numbers = False`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.draws_numbers = draws_numbers(net)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits [n, outputs] of x [n, 3, crop, crop]; keys are not used."""
        logits = self.net(x)
        main: Tensor = getattr(logits, "logits", logits)  # GoogLeNet and Inception add auxiliary ones in training
        return main


def draws_numbers(model: nn.Module) -> bool:
    """Whether a model may draw from torch's own generators: assumed unless it declares `draws_numbers = False`."""
    return bool(getattr(model, "draws_numbers", True))


def build(options: ModelConfig, *, classes: int, crop: int) -> nn.Module:
    """The model called `options.name`, with `options.outputs` outputs or one per class. Raises UserError, with the
    nearest name if that one is unknown, and for a net of somebody's own that cannot be called as it should.

    A net whose `forward` has an argument `keys` is given one number per sample, for `dropout.Dropout`.
    """
    outputs = options.outputs or classes
    if outputs < classes:
        raise ConfigError(f"model.outputs is {outputs}, fewer than the {classes} classes: raise it, or leave it 0")
    key = ("model.name", options.name)
    if options.name.startswith(TORCHVISION):
        return CalledByImages(_of_torchvision(options, outputs))
    if options.name in PAPER_NETS:
        return resolve.make(*key, resolve.resolve(*key, NETS), (outputs, crop, options), kind=nn.Module, remedy=TAKES)
    if options.name not in NETS and not resolve.is_code(options.name):
        raise ConfigError(unknown_net(options.name))
    found = resolve.resolve(*key, NETS)
    net = resolve.make(*key, found, (outputs, crop), options.options, kind=nn.Module, remedy=TAKES)
    if "keys" not in inspect.signature(net.forward).parameters:
        net = CalledByImages(net)
    if any(map(is_lazy, net.parameters())):  # they take their shapes from a first batch
        try_out(net, options, classes, crop, torch.device("cpu"))
    return net


def _of_torchvision(options: ModelConfig, outputs: int) -> nn.Module:
    """A classifier of torchvision, with `options.options` for its builder."""
    from torchvision import models  # takes seconds, and most runs do not need it

    name = options.name.removeprefix(TORCHVISION)
    if name not in models.list_models(module=models):
        raise ConfigError(unknown_net(options.name))
    given: dict[str, Any] = {"weights": None, "num_classes": outputs} | options.options
    try:
        net: nn.Module = models.get_model(name, **given)
    except (TypeError, ValueError) as error:
        raise resolve.failed("model.name", options.name, error, "does not take model.options") from error
    return net
