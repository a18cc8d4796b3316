"""A net of four layers, for figure 1 of the paper, which does not describe its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.config import ConfigError
from dist_train.models.alexnet import ACTIVATIONS

FILTERS = (32, 32, 64)


class FourLayers(nn.Module):
    """Three convolutions of 5 x 5, each with pooling of 3 x 3 at stride 2, and one dense layer: the net for CIFAR-10 of
    example-layers/layers-18pct.cfg in cuda-convnet, the library of the paper's first author, without its response
    normalisation. Weights are N(0, 0.01), in the first layer N(0, 0.0001), and biases 0, as there; `data.inputs`
    `mean_subtracted` are its inputs, too.

    Input [n, 3, crop, crop]. Output: logits [n, outputs]. Raises ConfigError for another `activation`.

    Args:
        outputs: units of the last layer.
        crop: side of the images; CIFAR-10's is 32.
        activation: after each convolution: relu or tanh.
    """

    draws_numbers = False

    def __init__(self, outputs: int, crop: int, *, activation: Literal["relu", "tanh"] = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"model.options.activation is {activation}: choose {' or '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(maps, filters, 5, padding=2) for maps, filters in pairwise((3, *FILTERS))
        )
        self.fc4 = nn.Linear(FILTERS[-1] * (crop // 8) ** 2, outputs)
        for layer in (self.conv1, self.conv2, self.conv3, self.fc4):
            nn.init.normal_(layer.weight, std=0.0001 if layer is self.conv1 else 0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # each has one

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True))
        for conv in (self.conv2, self.conv3):
            x = F.avg_pool2d(self.activation(conv(x)), 3, 2, ceil_mode=True)
        logits: Tensor = self.fc4(torch.flatten(x, 1))
        return logits
