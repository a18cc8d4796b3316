"""Local response normalisation, section 3.3 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 1 << 18  # numbers per thread and piece


def local_response_norm(
    x: Tensor, groups: int = 1, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> Tensor:
    """b_i = a_i / (k + alpha * sum of a_j^2 over the n neighbouring channels j of i)^beta, section 3.3.

    The sum is not divided by n (`torch.nn.LocalResponseNorm` divides alpha by n). With `groups` the window stays within
    a group of channels, as it did on each of the paper's two GPUs. Half precision is computed in float32: squares of
    activations in levels overflow float16.

    Args:
        x: [batch, channels, height, width], any floating dtype; the result has its shape, dtype and layout.
        n: odd.
    """
    assert n % 2, "the window has a middle"
    a = x.float() if x.dtype.itemsize < 4 else x
    # Compilers make one kernel of the traceable form, and exporters know its operators. On the CPU, where nothing is
    # compiled, its gradient would cost as much as the convolutions do.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    learning = torch.is_grad_enabled() and x.requires_grad
    form = _Analytic.apply if learning and x.device.type == "cpu" and not traced else traceable
    return form(a, groups, n, k, alpha, beta).to(x.dtype)


def traceable(a: Tensor, groups: int, n: int, k: float, alpha: float, beta: float) -> Tensor:
    """The formula in operators that autograd, compilers and exporters know; arguments as for `local_response_norm`."""
    squares = torch.unflatten(a * a, 1, (groups, -1))
    channels = squares.shape[2]
    padded = F.pad(squares, (0, 0, 0, 0, n // 2, n // 2))
    total = sum((padded[:, :, i : i + channels] for i in range(1, n)), padded[:, :, :channels])
    return a * _power(k + alpha * total.flatten(1, 2), beta)


class _Analytic(torch.autograd.Function):
    """The same with the gradient written out: with s_i = k + alpha * sum of a_j^2, and g the gradient of b,

    da_i = g_i s_i^-beta - 2 alpha beta a_i * sum over the window of g_j a_j s_j^(-beta - 1)
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, groups: int, n: int, k: float, alpha: float, beta: float) -> Tensor:
        b, scale, power = (torch.empty_like(a) for _ in range(3))
        base = torch.tensor(k, dtype=a.dtype)
        for window, (a_, b_, scale_, power_) in _pieces(groups, n, a, b, scale, power):
            torch.mul(a_, a_, out=window.values)
            torch.add(base, window.sums(), alpha=alpha, out=scale_)
            torch.mul(_power(scale_, beta, out=power_), a_, out=b_)
        ctx.save_for_backward(a, scale, power)
        ctx.constants = groups, n, k, alpha, beta
        return b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        groups, n, k, alpha, beta = ctx.constants
        if torch.is_grad_enabled():  # somebody wants the gradient of this gradient
            a = ctx.saved_tensors[0]
            b = traceable(a, groups, n, k, alpha, beta)
            return *torch.autograd.grad(b, a, gradient, create_graph=True), None, None, None, None, None
        result = torch.empty_like(ctx.saved_tensors[0])
        for window, (a_, scale_, power_, gradient_, result_) in _pieces(
            groups, n, *ctx.saved_tensors, gradient, result
        ):
            first = gradient_ * power_
            torch.div(first * a_, scale_, out=window.values)
            torch.addcmul(first, window.sums(), a_, value=-2 * alpha * beta, out=result_)
        return result, None, None, None, None, None


class _Window:
    """Sums over the n channels around each one, within its group.

    Attributes:
        values: to write to, [samples, height, width, groups, channels of a group], with zeros between the groups.
    """

    def __init__(self, values: Tensor, n: int) -> None:
        self.n, (*self.shape, self.channels) = n, values.shape
        self.padded = values.new_zeros(*self.shape, self.channels + n - 1)
        self.values = self.padded[..., n // 2 : n // 2 + self.channels]

    def sums(self) -> Tensor:
        """Window sums of `values`, in its shape. Everything is added as one row of numbers, and sums across groups are
        dropped: many short rows take longer."""
        row = self.padded.view(-1)
        sums = torch.empty_like(row)
        total = sums[: len(row) - self.n + 1]
        total.copy_(row[: len(total)])
        for i in range(1, self.n):
            total += row[i : i + len(total)]
        return sums.view(self.padded.shape)[..., : self.channels]


def _pieces(groups: int, n: int, *tensors: Tensor) -> Iterator[tuple[_Window, tuple[Tensor, ...]]]:
    """Pieces of `tensors`, all of one shape, a few samples at a time, channels last and in groups, with the window for
    them: a piece stays in the cache while it is computed."""
    samples = max(1, PIECE * torch.get_num_threads() * len(tensors[0]) // max(1, tensors[0].numel()))
    views = [torch.unflatten(tensor.permute(0, 2, 3, 1), 3, (groups, -1)) for tensor in tensors]
    window = None
    for piece in zip(*(torch.split(view, samples) for view in views), strict=True):
        if window is None or len(window.values) != len(piece[0]):  # the last piece may be a smaller one
            window = _Window(piece[0], n)
        yield window, piece


def _power(scale: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """scale^-beta, in `out` or in a new tensor."""
    if beta != 0.75:
        return torch.pow(scale, -beta, out=out)
    root = torch.rsqrt(scale)  # a third of the time of pow
    return torch.mul(root, torch.sqrt(root), out=out)
