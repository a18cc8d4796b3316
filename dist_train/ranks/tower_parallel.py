"""The two towers on two ranks, as the paper ran them on two GPUs (section 3.2, figure 2).

Both ranks of a pair see the same samples. Each computes its own tower, and sends its half of the maps to the other
where the lines of figure 2 cross: before conv 3, fc 6, fc 7 and the classifier. Krizhevsky, "One weird trick for
parallelizing convolutional neural networks" (2014), calls this model parallelism, and sets it beside data parallelism,
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
    """The `Exchange` between this rank and the one that has the other tower; each call is a collective of the two.

    Args:
        world: in pairs (`World.in_pairs`).
        names: of the parameters of the whole net, in their order.
    """

    def __init__(self, world: World, names: list[str]) -> None:
        self.group, self.tower, self.dp_rank, self.names = world.group("tower"), world.tower, world.dp_rank, names

    def join(self, halves: list[Tensor]) -> Tensor:
        """This tower's half [n, maps / 2, ...] as both towers' [n, maps, ...], of its dtype and memory format.

        The gradient of the other tower's half goes back to it, where the two towers' gradients are added.
        """
        joined: Tensor = _Join.apply(*halves, self)
        return joined

    def add(self, summands: list[Tensor]) -> Tensor:
        """The sum [n, outputs] of both towers' summands, the same bits on both.

        Both ranks compute the same loss from it, so each has the whole gradient of its own summand already, and nothing
        goes back.
        """
        total: Tensor = _Add.apply(*summands, self)
        return total

    def swap(self, x: Tensor) -> Tensor:
        """The other tower's tensor of the shape of `x` [n, maps, ...]. Only these bytes move."""
        mine = x.movedim(1, -1).contiguous()  # no copy where it is channels_last
        theirs = torch.empty_like(mine)
        rows = [0] * TOWERS
        rows[1 - self.tower] = len(mine)
        dist.all_to_all_single(theirs, mine, rows, rows, group=self.group)
        return theirs.movedim(-1, 1)

    def merge(self, model: dict[str, Any], optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state of the whole net and of its optimizer from those of the towers, with the names, numbers and shapes
        that they have where one process holds both.

        For rank 0 alone, whose pair alone communicates; all ranks call it at the same point.
        """
        if self.dp_rank:  # every pair holds the same; the first one is enough
            return model, optimizer
        # An optimizer numbers the parameters that it was given, so a tower counts its own only: the moments take the
        # names of their parameters, are put together like the weights, and get the numbers of the whole net's.
        own = [name for name in self.names if name in model]
        moments = {own[i]: value for i, value in optimizer["state"].items()}
        model, moments = model | self._others(model), moments | self._others(moments)
        state = {i: moments[name] for i, name in enumerate(self.names) if name in moments}
        (group,) = optimizer["param_groups"]
        return model, {"state": state, "param_groups": [group | {"params": list(range(len(self.names)))}]}

    def split(self, model: dict[str, Any], optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """This tower's share of what `merge` gave."""
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
        """Tower 1's value, of the same structure and shapes, at tower 0."""
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
    """Leave this rank's tower of the net; the weights stay those of the whole net."""
    assert isinstance(model, TwoTowers), "the configuration refuses others"
    model.keep(world.tower, Pair(world, [name for name, _ in model.named_parameters()]))


def pair_of(model: nn.Module) -> Pair | None:
    """What connects the towers of the model, where they are on two ranks."""
    exchange = getattr(model, "exchange", None)
    return exchange if isinstance(exchange, Pair) else None


def told_of(model: nn.Module) -> list[nn.Parameter] | None:
    """The parameters whose gradients this rank tells of, so that both ranks of a pair together tell of each once; None
    for all. What both hold, tower 0 tells of."""
    pair = pair_of(model)
    if pair is None or pair.tower == 0:
        return None
    return [parameter for name, parameter in model.named_parameters() if name.startswith(_prefix(pair.tower))]


def _prefix(tower: int) -> str:
    return f"towers.{tower}."
