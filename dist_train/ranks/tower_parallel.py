"""The two towers on two ranks, as the paper ran them on two GPUs (section 3.2, figure 2).

Both ranks of a pair see the same samples. Each computes its own tower, and sends its half of the maps to the other
where the lines of figure 2 cross: before conv 3, fc 6, fc 7 and the classifier. Krizhevsky, "One weird trick for
parallelizing convolutional neural networks" (2014), calls this model parallelism and compares it with data parallelism,
which sends the gradients of all weights instead. Here the two are combined: pairs share a global batch as single ranks
would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.models.alexnet import TOWERS
from dist_train.models.two_tower import TwoTowers
from dist_train.ranks.world import World


class Pair:
    """The `Exchange` between this rank and the one with the other tower; each call is a collective of the two.

    Args:
        world: in pairs (`World.in_pairs`).
        names: parameter names of the whole net, in order.
    """

    def __init__(self, world: World, names: list[str]) -> None:
        self.group, self.tower, self.dp_rank, self.names = world.group("tower"), world.tower, world.dp_rank, names

    def join(self, halves: list[Tensor]) -> Tensor:
        """Joins this tower's half [n, maps / 2, ...] with the other's: [n, maps, ...], same dtype and memory format.

        The gradient of the other tower's half is sent back to it, and the two towers' gradients are added there.
        """
        joined: Tensor = _Join.apply(*halves, self)
        return joined

    def add(self, summands: list[Tensor]) -> Tensor:
        """Sum [n, outputs] of both towers' summands, the same bits on both.

        Both ranks compute the same loss from it, so each already has the whole gradient of its own summand, and nothing
        is sent back.
        """
        total: Tensor = _Add.apply(*summands, self)
        return total

    def swap(self, x: Tensor) -> Tensor:
        """The other tower's tensor, shaped like `x` [n, maps, ...]. Nothing else is sent."""
        mine = x.movedim(1, -1).contiguous()  # no copy if it is channels_last
        theirs = torch.empty_like(mine)
        rows = [0] * TOWERS
        rows[1 - self.tower] = len(mine)
        dist.all_to_all_single(theirs, mine, rows, rows, group=self.group)
        return theirs.movedim(-1, 1)

    def merge(self, model: dict[str, Any], optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Merges the towers' model and optimizer states into those of the whole net, with the names, numbers and shapes
        that they have if one process holds both towers.

        Valid on rank 0 only, whose pair alone communicates; all ranks call it at the same point.
        """
        if self.dp_rank:  # all pairs hold the same: the first is enough
            return model, optimizer
        # An optimizer numbers the parameters it was given, so a tower numbers only its own: the moments are keyed by
        # parameter name, merged like the weights, and renumbered as in the whole net.
        own = [name for name in self.names if name in model]
        moments = {own[i]: value for i, value in optimizer["state"].items()}
        model, moments = model | self._others(model), moments | self._others(moments)
        state = {i: moments[name] for i, name in enumerate(self.names) if name in moments}
        (group,) = optimizer["param_groups"]
        return model, {"state": state, "param_groups": [group | {"params": list(range(len(self.names)))}]}

    def split(self, model: dict[str, Any], optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """This tower's share of the states that `merge` returned."""
        model = {name: value for name, value in model.items() if not name.startswith(_prefix(1 - self.tower))}
        moments = [optimizer["state"].get(i) for i, name in enumerate(self.names) if name in model]
        state = {i: value for i, value in enumerate(moments) if value is not None}  # none before the first step
        return model, optimizer | {"state": state}

    def _others(self, values: dict[str, Any]) -> dict[str, Any]:
        """Copies tower 1's entries of `values` to tower 0, under the names that they have in the whole net."""
        mine, theirs = _prefix(self.tower), _prefix(1 - self.tower)
        own = {name: value for name, value in values.items() if name.startswith(mine)}
        return {theirs + name.removeprefix(mine): self._hand_over(value) for name, value in own.items()}

    def _hand_over(self, value: Any) -> Any:
        """Copies tower 1's value to tower 0, which has one of the same structure and shapes."""
        if isinstance(value, dict):
            return {k: self._hand_over(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        buffer = value.contiguous()
        if self.tower:
            dist.send(buffer, group=self.group, group_dst=0)
            return value
        buffer = torch.empty_like(buffer)
        dist.recv(buffer, group=self.group, group_src=1)
        return torch.empty_like(value).copy_(buffer)  # in its memory format


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, pair: Pair) -> Tensor:
        ctx.pair = pair
        halves = [own, pair.swap(own)]
        return torch.cat(halves[::-1] if pair.tower else halves, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        halves = gradient.chunk(TOWERS, 1)
        return halves[ctx.pair.tower] + ctx.pair.swap(halves[1 - ctx.pair.tower]), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, pair: Pair) -> Tensor:
        return own + pair.swap(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def place(model: nn.Module, world: World) -> None:
    """Reduce the net to this rank's tower; its weights remain those of the whole net."""
    assert isinstance(model, TwoTowers), "the configuration refuses others"
    model.keep(world.tower, Pair(world, [name for name, _ in model.named_parameters()]))


def pair_of(model: nn.Module) -> Pair | None:
    """The exchange between the towers of the model if they are on two ranks, else None."""
    exchange = getattr(model, "exchange", None)
    return exchange if isinstance(exchange, Pair) else None


def told_of(model: nn.Module) -> list[nn.Parameter] | None:
    """Parameters whose gradients this rank reports, so that a pair of ranks reports each once; None for all. Tower 0
    reports those that both hold."""
    pair = pair_of(model)
    if pair is None or pair.tower == 0:
        return None
    return [parameter for name, parameter in model.named_parameters() if name.startswith(_prefix(pair.tower))]


def _prefix(tower: int) -> str:
    return f"towers.{tower}."
