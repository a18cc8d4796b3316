"""The net as the paper ran it: two towers, one per GPU, that "communicate only in certain layers" (3.2)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dist_train.config import ConfigError, ModelConfig
from dist_train.models.alexnet import KERNELS, PAPER, TOWERS, Layers, feature_side

StateDict = dict[str, Tensor]


class Exchange(Protocol):
    """The crossing lines of figure 2. Methods take the tensors of the towers in this process: both halves, or one."""

    def join(self, halves: list[Tensor], /) -> Tensor:
        """The maps [n, maps, ...] of both towers, from halves [n, maps / 2, ...]."""

    def add(self, logits: list[Tensor], /) -> Tensor:
        """The sum [n, outputs] of both towers' logits."""


class InOneProcess:
    """Exchange between two towers in one process."""

    def join(self, halves: list[Tensor], /) -> Tensor:
        return torch.cat(halves, 1)

    def add(self, logits: list[Tensor], /) -> Tensor:
        return logits[0] + logits[1]


class Tower(nn.Module):
    """Half of the net: 48-128-192-192-128 maps and half of the hidden units. The third convolution and the dense layers
    see both halves' maps, all others their own."""

    def __init__(self, layers: Layers, outputs: int, side: int) -> None:
        super().__init__()
        options = layers.options
        whole, own, hidden = 3, 3, options.hidden // TOWERS
        for name in (name for name in KERNELS if name != options.left_out):
            number, size, stride, padding = KERNELS[name]
            number = round(number * options.width) // TOWERS
            self.add_module(name, nn.Conv2d(whole if name == "conv3" else own, number, size, stride, padding))
            whole, own = TOWERS * number, number
        self.fc6 = nn.Linear(whole * side * side, hidden)
        self.fc7 = nn.Linear(options.hidden, hidden)
        self.fc8 = nn.Linear(hidden, outputs, bias=False)  # both towers' logits are added, and the bias once
        for name, layer in self.named_children():
            layers.reset(name, layer)  # type: ignore[arg-type]


class TwoTowers(Layers):
    """Two explicit towers that exchange their maps before conv 3, fc 6, fc 7 and the classifier, as in figure 2.

    The same function as `AlexNet` with the same weights (`grouped_state`): 60,965,224 parameters at 1000 outputs.
    `keep` leaves the other tower to another process, where its parameters have the same names.

    Args: as for `AlexNet`. Raises ConfigError if hidden units or kernels cannot be halved.
    """

    def __init__(self, outputs: int, crop: int = 227, options: ModelConfig = PAPER) -> None:
        super().__init__(options)
        side = feature_side(crop)
        if options.hidden % TOWERS or any(round(k[0] * options.width) % TOWERS for k in KERNELS.values()):
            raise ConfigError(
                f"two towers need an even model.hidden and even numbers of kernels: not {options.hidden} hidden units "
                f"at model.width {options.width}"
            )
        self.exchange: Exchange = InOneProcess()
        self.towers = nn.ModuleDict({str(t): Tower(self, outputs, side) for t in range(TOWERS)})
        self.bias = nn.Parameter(torch.full((outputs,), float(options.biases == "ones")))
        self.drop6, self.drop7 = self.dropout(6), self.dropout(7)

    def own(self) -> list[Tower]:
        """The towers of this process."""
        return list(self.towers.values())  # type: ignore[arg-type]

    def keep(self, tower: int, exchange: Exchange) -> None:
        """Drops the other tower, which is in another process; `exchange` reaches it."""
        del self.towers[str(1 - tower)]
        self.exchange = exchange

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """As for `AlexNet.forward`."""
        towers, join = self.own(), self.exchange.join
        convolutions = [name for name in KERNELS if name != self.options.left_out]
        xs = [x for _ in towers]  # figure 2: both towers see the whole image
        for name in convolutions:
            if name == "conv3":
                xs = [join(xs)] * len(xs)
            xs = [self.activation(tower.get_submodule(name)(x)) for tower, x in zip(towers, xs, strict=True)]
            xs = [self.normalise(x, name, 1) for x in xs]
            if name in ("conv1", "conv2", convolutions[-1]):
                xs = [self.pool(x) for x in xs]
        x = torch.flatten(join(xs), 1)
        x = self.drop6(join([self.activation(tower.fc6(x)) for tower in towers]), keys)
        half = self.options.hidden // TOWERS
        firsts = [int(name) * half for name in self.towers]  # each tower masks its own hidden units
        xs = [
            self.drop7(self.activation(tower.fc7(x)), keys, first) for tower, first in zip(towers, firsts, strict=True)
        ]
        return self.exchange.add([tower.fc8(x) for tower, x in zip(towers, xs, strict=True)]) + self.bias


def grouped_state(state: StateDict) -> StateDict:
    """Weights with which `AlexNet` is the same function as the two towers with the weights `state`."""
    grouped = {"fc8.bias": state["bias"]}
    for name in (key.removeprefix("towers.0.") for key in state if key.startswith("towers.0.")):
        halves = [state[f"towers.{t}.{name}"] for t in range(TOWERS)]
        grouped[name] = torch.cat(halves, 1 if name == "fc8.weight" else 0)
    return grouped
