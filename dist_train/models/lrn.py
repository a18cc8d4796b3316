"""Local response normalisation, section 3.3 of the paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def local_response_norm(
    x: Tensor, groups: int = 1, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> Tensor:
    """b_i = a_i / (k + alpha * sum of a_j^2 over the n neighbouring channels j of i)^beta, section 3.3.

    The sum is not divided by n (`torch.nn.LocalResponseNorm` divides alpha by n). With `groups` the window stays inside
    each group of channels, as it did on each of the paper's two GPUs. Computed in float32: squares of activations
    in levels overflow float16.

    Args:
        x: [batch, channels, height, width], any floating dtype; the result has its shape, dtype and layout.
    """
    a = x.float()
    squares = torch.unflatten(a * a, 1, (groups, -1))
    channels = squares.shape[2]
    padded = F.pad(squares, (0, 0, 0, 0, n // 2, n // 2))
    total = sum((padded[:, :, i : i + channels] for i in range(1, n)), padded[:, :, :channels])
    scale = k + alpha * total.flatten(1, 2)
    if beta == 0.75:  # a third of the time of pow
        root = torch.rsqrt(scale)
        return (a * (root * torch.sqrt(root))).to(x.dtype)
    return (a * scale**-beta).to(x.dtype)
