"""The net of section 3 of Krizhevsky, Sutskever, Hinton: ImageNet classification with deep convolutional
neural networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train import numbers
from dist_train.config import ConfigError, ModelConfig
from dist_train.models.dropout import Dropout
from dist_train.models.lrn import local_response_norm

TOWERS = 2  # the paper's two GPUs: the kernels of conv 2, 4 and 5 see one tower's maps
KERNELS = {"conv1": (96, 11, 4, 0), "conv2": (256, 5, 1, 2), "conv3": (384, 3, 1, 1)}  # number, side, stride, padding
KERNELS |= {"conv4": (384, 3, 1, 1), "conv5": (256, 3, 1, 1)}
PAPER = ModelConfig()
ONES = ("conv2", "conv4", "conv5", "fc6", "fc7")  # layers whose biases begin with 1 (section 5)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh}


class Layers(nn.Module):
    """Activation, normalisation, pooling, dropout and initialisation, shared by all AlexNet variants.

    `self.log("fc7_max", x, "max")` in `forward` records a number; see `dist_train.numbers`.
    """

    draws_numbers = False  # dropout's masks are hashed
    log = staticmethod(numbers.log)

    def __init__(self, options: ModelConfig) -> None:
        super().__init__()
        self.options = options
        self.activation = ACTIVATIONS[options.activation]

    def normalise(self, x: Tensor, layer: str, groups: int) -> Tensor:
        """Section 3.3, after "the ReLU nonlinearity in certain layers": the first and the second (3.5)."""
        where = {"paper": ("conv1", "conv2"), "every": tuple(KERNELS), "none": ()}[self.options.lrn]
        return local_response_norm(x, groups, alpha=self.options.lrn_alpha) if layer in where else x

    def pool(self, x: Tensor) -> Tensor:
        """Overlapping pooling, section 3.4: s = 2, z = 3; or plain, z = 2, which gives maps of the same size."""
        return F.max_pool2d(x, 3 if self.options.pooling == "overlapping" else 2, 2)

    def dropout(self, layer: int) -> Dropout:
        """Dropout for the outputs "in the first two fully-connected layers" (section 4.2)."""
        return Dropout(self.options.dropout, layer, self.options.dropout_scaling)

    def reset(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        """Initialises a layer as in section 5: weights from "a zero-mean Gaussian distribution with standard deviation
        0.01"; "the neuron biases in the second, fourth, and fifth convolutional layers, as well as in the
        fully-connected hidden layers, with the constant 1"; the remaining ones 0."""
        nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            ones = {"paper": ONES, "ones": (name,), "zeros": ()}[self.options.biases]
            nn.init.constant_(layer.bias, float(name in ones))


class AlexNet(Layers):
    """Five convolutional and three dense layers, figure 2, with the towers as groups.

    Input [n, 3, crop, crop], pixels in levels minus the mean. Output: logits [n, outputs]. 60,965,224 parameters at
    1000 outputs, crop 227 and 4096 hidden units; 62,378,344 with one tower.

    Args:
        outputs: units of the last layer.
        crop: side of the input in pixels, such that the windows of every layer fit exactly (227, 67, ...).
        options: hidden units, dropout, and the variants that the paper compares.
        towers: 2 as in the paper, or 1.
    """

    def __init__(self, outputs: int, crop: int = 227, options: ModelConfig = PAPER, towers: int = TOWERS) -> None:
        super().__init__(options)
        self.towers = towers
        side, hidden = feature_side(crop), options.hidden
        self.convolutions = [name for name in KERNELS if name != options.left_out]
        maps = 3
        for name in self.convolutions:
            number, size, stride, padding = KERNELS[name]
            groups = towers if name in ("conv2", "conv4", "conv5") else 1
            number = round(number * options.width)
            self.add_module(name, nn.Conv2d(maps, number, size, stride, padding, groups=groups))
            maps = number
        self.fc6 = nn.Linear(maps * side * side, hidden)
        self.drop6 = self.dropout(6)
        self.fc7 = nn.Linear(hidden, hidden)
        self.drop7 = self.dropout(7)
        self.fc8 = nn.Linear(hidden, outputs)
        for name in (*self.convolutions, "fc6", "fc7", "fc8"):
            self.reset(name, self.get_submodule(name))  # type: ignore[arg-type]

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits [n, outputs]. keys: from `mask_keys`, int64 [n]; needed in training."""
        for name in self.convolutions:
            x = self.activation(self.get_submodule(name)(x))
            x = self.normalise(x, name, self.towers)
            if name in ("conv1", "conv2", self.convolutions[-1]):
                x = self.pool(x)
        x = self.drop6(self.activation(self.fc6(torch.flatten(x, 1))), keys)
        x = self.drop7(self.activation(self.fc7(x)), keys)
        logits: Tensor = self.fc8(x)
        return logits


def one_tower(outputs: int, crop: int, options: ModelConfig) -> AlexNet:
    """The net without groups: 62,378,344 parameters."""
    return AlexNet(outputs, crop, options, towers=1)


def feature_side(crop: int) -> int:
    """Side of the maps after the last pooling. Raises ConfigError if the windows of a layer do not fit exactly."""
    side = crop
    for kernel, stride in _strides():
        if side < kernel or (side - kernel) % stride:
            fitting = range(67, 1200, 32)  # 67 is the smallest; the strides multiply to 4 x 2 x 2 x 2 = 32
            nearest = min(fitting, key=lambda c: abs(c - crop))
            raise ConfigError(
                f"data.crop {crop} does not fit the layers of alexnet: the nearest that does is {nearest}"
            )
        side = (side - kernel) // stride + 1
    return side


def _strides() -> Iterator[tuple[int, int]]:
    """Kernel and stride of every layer that shrinks the maps, in order."""
    yield 11, 4  # conv1; the other convolutions keep their size
    for _ in range(3):
        yield 3, 2  # pooling; windows of 2 give the same sizes at the crops that fit
