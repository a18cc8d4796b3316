"""Local response normalisation, section 3.3 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIECE = 1 << 18  # numbers that are computed together


def local_response_norm(
    x: Tensor, groups: int = 1, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> Tensor:
    """b_i = a_i / (k + alpha * sum of a_j^2 over the n neighbouring channels j of i)^beta, section 3.3.

    The sum is not divided by n (`torch.nn.LocalResponseNorm` divides alpha by n). With `groups` the window stays inside
    each group of channels, as it did on each of the paper's two GPUs. Half precision is computed in float32: squares of
    activations in levels overflow float16.

    Args:
        x: [batch, channels, height, width], any floating dtype; the result has its shape, dtype and layout.
        n: odd.
    """
    a = x.float() if x.dtype.itemsize < 4 else x
    # Compilers make one kernel of the traceable form, and exporters know its operators. Where it is not compiled, its
    # gradient costs as much as the convolutions do: on the CPU, that is.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    learning = torch.is_grad_enabled() and x.requires_grad
    form = _InPlace.apply if learning and x.device.type == "cpu" and not traced else traceable
    return form(a, groups, n, k, alpha, beta).to(x.dtype)


def traceable(a: Tensor, groups: int, n: int, k: float, alpha: float, beta: float) -> Tensor:
    """The formula in operators that autograd, compilers and exporters know; arguments as `local_response_norm`."""
    squares = torch.unflatten(a * a, 1, (groups, -1))
    channels = squares.shape[2]
    padded = F.pad(squares, (0, 0, 0, 0, n // 2, n // 2))
    total = sum((padded[:, :, i : i + channels] for i in range(1, n)), padded[:, :, :channels])
    return a * _power(k + alpha * total.flatten(1, 2), beta)


class _InPlace(torch.autograd.Function):
    """The same with the gradient written out: with s_i = k + alpha * sum of a_j^2, and g the gradient of b,

    da_i = g_i s_i^-beta - 2 alpha beta a_i * sum over the window of g_j a_j s_j^(-beta - 1)
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, groups: int, n: int, k: float, alpha: float, beta: float) -> Tensor:
        b, scale = torch.empty_like(a), torch.empty_like(a)
        for a_, b_, scale_ in _pieces(a, b, scale):
            torch.mul(_window_sum(a_ * a_, groups, n), alpha, out=scale_).add_(k)
            torch.mul(_power(scale_, beta), a_, out=b_)
        ctx.save_for_backward(a, scale)
        ctx.constants = groups, n, alpha, beta
        return b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, scale = ctx.saved_tensors
        groups, n, alpha, beta = ctx.constants
        result = torch.empty_like(a)
        for a_, scale_, gradient_, result_ in _pieces(a, scale, gradient, result):
            first = _power(scale_, beta).mul_(gradient_)
            second = _window_sum((first * a_).div_(scale_), groups, n).mul_(a_)
            torch.sub(first, second, alpha=2 * alpha * beta, out=result_)
        return result, None, None, None, None, None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """These, of equal shapes, a few samples at a time: what is computed of a piece stays in the cache, which makes it
    a quarter faster."""
    samples = max(1, PIECE * len(tensors[0]) // max(1, tensors[0].numel()))
    return zip(*(torch.split(tensor, samples) for tensor in tensors), strict=True)


def _window_sum(x: Tensor, groups: int, n: int) -> Tensor:
    """The sum over the n channels around each one, within its group."""
    total = x.clone()
    own, sums = (torch.unflatten(t, 1, (groups, -1)) for t in (x, total))
    for d in range(1, n // 2 + 1):
        sums[:, :, d:] += own[:, :, :-d]
        sums[:, :, :-d] += own[:, :, d:]
    return total


def _power(scale: Tensor, beta: float) -> Tensor:
    """scale^-beta, a new tensor."""
    if beta != 0.75:
        return scale**-beta
    root = torch.rsqrt(scale)  # a third of the time of pow
    return root * torch.sqrt(root)
