"""The net of section 3 of Krizhevsky, Sutskever, Hinton: ImageNet classification with deep convolutional networks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.dropout import Dropout
from dist_train.models.lrn import local_response_norm

TOWERS = 2  # the paper's two GPUs: "the kernels of the second, fourth, and fifth layers" see one tower's maps


class AlexNet(nn.Module):
    """Five convolutional and three dense layers, figure 2, with the towers as groups.

    Input [n, 3, crop, crop], pixels in levels minus the mean. Output: logits [n, classes]. 60,965,224 parameters at
    1000 classes, crop 227 and 4096 hidden units.

    Args:
        classes: number of classes.
        crop: side of the input in pixels; one for which every layer's stride divides its way (227, 67, ...).
        hidden: units of each hidden dense layer.
        dropout: probability that a unit is set to zero in the first two dense layers.
    """

    def __init__(self, classes: int, crop: int = 227, hidden: int = 4096, dropout: float = 0.5) -> None:
        super().__init__()
        side = feature_side(crop)
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=TOWERS)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=TOWERS)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=TOWERS)
        self.fc6 = nn.Linear(256 * side * side, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)
        self.drop6 = Dropout(self.fc6.in_features, dropout, layer=6)
        self.drop7 = Dropout(hidden, dropout, layer=7)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Section 5: weights from "a zero-mean Gaussian distribution with standard deviation 0.01"; "the neuron biases
        in the second, fourth, and fifth convolutional layers, as well as in the fully-connected hidden layers, with the
        constant 1"; the remaining ones 0."""
        ones = (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7)
        for layer in (self.conv1, *ones[:1], self.conv3, *ones[1:], self.fc8):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, float(layer in ones))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """keys: of `mask_keys`, int64 [n]; needed in training."""
        x = _pool(local_response_norm(F.relu(self.conv1(x)), TOWERS))
        x = _pool(local_response_norm(F.relu(self.conv2(x)), TOWERS))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = _pool(F.relu(self.conv5(x)))
        x = F.relu(self.fc6(self.drop6(torch.flatten(x, 1), keys)))
        x = F.relu(self.fc7(self.drop7(x, keys)))
        logits: Tensor = self.fc8(x)
        return logits


def _pool(x: Tensor) -> Tensor:
    """Overlapping pooling, section 3.4: s = 2, z = 3."""
    return F.max_pool2d(x, 3, 2)


def feature_side(crop: int) -> int:
    """Side of the maps after the last pooling. Raises ValueError where a stride does not divide its way."""
    side = crop
    for kernel, stride in _strides():
        if side < kernel or (side - kernel) % stride:
            nearest = min(range(67, 1200, 32), key=lambda c: abs(c - crop))
            raise ValueError(f"data.crop {crop} does not fit the layers of alexnet: the nearest that does is {nearest}")
        side = (side - kernel) // stride + 1
    return side


def _strides() -> Iterator[tuple[int, int]]:
    yield 11, 4  # conv1; the other convolutions keep their size
    for _ in range(3):
        yield 3, 2
