"""The two nets of a blog whose author asked his readers why they did not converge: docs/blog.md.

개발자 소신, "[AlexNet] 논문 리뷰 & 구현 (Pytorch)", 16 December 2020. Written anew from what he describes; where his
two towers differ from figure 2 of the paper there is an option that takes the paper's way.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.config import ConfigError
from dist_train.models.alexnet import KERNELS, TOWERS, feature_side
from dist_train.models.lrn import local_response_norm

POOLED = ("conv1", "conv2", "conv5")
DENSE = ("fc6", "fc7", "fc8")
# Layers that see both towers: his, and those of figure 2, where the sum of both classifiers is one that sees both.
CROSSINGS = {"blog": ("conv4", "fc7", "fc8"), "paper": ("conv3", "fc6", "fc7")}
HEADS, MASKS = ("mean", "sum"), (1, TOWERS)


class BlogAlexNet(nn.Module):
    """One tower: ReLU and response normalisation after each of five convolutions, over all of their maps; nn.Dropout;
    weights N(0, 0.01), and 1 in every bias. 62,378,344 parameters at 1000 outputs and crop 227.

    Input [n, 3, crop, crop], in his recipe pixels in [-1, 1]. Output: logits [n, outputs].

    Args:
        outputs: units of the last layer; his has 1000.
        crop: as for `AlexNet`.
    """

    def __init__(self, outputs: int, crop: int = 227) -> None:
        super().__init__()
        maps = 3
        for name, (number, size, stride, padding) in KERNELS.items():
            self.add_module(name, nn.Conv2d(maps, number, size, stride, padding))
            maps = number
        self.fc6 = nn.Linear(maps * feature_side(crop) ** 2, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, outputs)
        self.drop = nn.Dropout(0.5)
        self.apply(_reset)

    def forward(self, x: Tensor) -> Tensor:
        for name in KERNELS:
            x = _convolved(self, name, x)
        x = self.drop(F.relu(self.fc6(torch.flatten(x, 1))))
        x = self.drop(F.relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits


class BlogTwoTowers(nn.Module):
    """Two towers of 48-128-96-192-128 maps and 1024 hidden units per layer, which see each other's outputs in conv 4,
    fc 7 and the classifiers, whose mean is taken. 19,403,920 parameters at 1000 outputs and crop 227. Layers as in
    `BlogAlexNet`; he shows for that one alone how it begins, and this one begins likewise.

    He calls the layers before each crossing once for each half, on the same inputs. Called once they give both halves
    the same numbers; what differs in training is that each half has its own dropout mask of them (`masks`).

    Raises ConfigError for an option that it does not know.

    Args:
        outputs: units of each classifier.
        crop: as for `AlexNet`.
        crossings: where the towers cross: `CROSSINGS`.
        conv3: maps of the third convolution, both towers together; the paper has 384.
        hidden: units of a hidden layer, both towers together; the paper has 4096.
        heads: what becomes of the two classifiers' logits. The gradient of each is half as large with their mean.
        masks: dropout masks of a layer that both towers see: 2, or 1 as in the paper.
    """

    def __init__(
        self,
        outputs: int,
        crop: int = 227,
        *,
        crossings: Literal["blog", "paper"] = "blog",
        conv3: int = 192,
        hidden: int = 2048,
        heads: Literal["mean", "sum"] = "mean",
        masks: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        given = {"crossings": (crossings, tuple(CROSSINGS)), "heads": (heads, HEADS), "masks": (masks, MASKS)}
        for name, (value, known) in given.items():
            if value not in known:
                raise ConfigError(f"model.options.{name} is {value}: choose {' or '.join(map(str, known))}")
        self.crossed, self.heads, self.masks = CROSSINGS[crossings], heads, masks
        self.towers = nn.ModuleDict({str(t): nn.Module() for t in range(TOWERS)})
        self.drop = nn.Dropout(0.5)
        for tower in self.towers.values():
            own = 3
            for name, (number, size, stride, padding) in KERNELS.items():
                maps = own * TOWERS if name in self.crossed else own
                own = (conv3 if name == "conv3" else number) // TOWERS
                tower.add_module(name, nn.Conv2d(maps, own, size, stride, padding))
            own *= feature_side(crop) ** 2
            for name, units in zip(DENSE, (hidden // TOWERS, hidden // TOWERS, outputs), strict=True):
                tower.add_module(name, nn.Linear(own * TOWERS if name in self.crossed else own, units))
                own = units
        self.apply(_reset)

    def forward(self, x: Tensor) -> Tensor:
        xs = [x] * TOWERS
        for name in KERNELS:
            if name in self.crossed:
                xs = [torch.cat(xs, 1)] * TOWERS
            xs = [_convolved(tower, name, x) for tower, x in zip(self.towers.values(), xs, strict=True)]
        xs = [torch.flatten(x, 1) for x in xs]
        xs = [torch.cat(xs, 1)] * TOWERS if "fc6" in self.crossed else xs
        for name, after in (("fc6", "fc7"), ("fc7", "fc8")):
            xs = [F.relu(layer(x)) for layer, x in zip(self._layers(name), xs, strict=True)]
            xs = self._dropped(xs, crossed=after in self.crossed)
        logits = torch.stack([layer(x) for layer, x in zip(self._layers("fc8"), xs, strict=True)])
        return logits.mean(0) if self.heads == "mean" else logits.sum(0)

    def _layers(self, name: str) -> list[nn.Module]:
        return [tower.get_submodule(name) for tower in self.towers.values()]

    def _dropped(self, xs: list[Tensor], *, crossed: bool) -> list[Tensor]:
        """What each tower sees of both towers' hidden units, or of its own."""
        if not crossed:
            return [self.drop(x) for x in xs]
        whole = torch.cat(xs, 1)
        return [self.drop(whole) for _ in xs] if self.masks == TOWERS else [self.drop(whole)] * TOWERS


def _convolved(layers: nn.Module, name: str, x: Tensor) -> Tensor:
    """A convolution, ReLU, response normalisation with torch's alpha, which is divided by its 5 maps, and pooling."""
    x = local_response_norm(F.relu(layers.get_submodule(name)(x)), alpha=1e-4 / 5)
    return F.max_pool2d(x, 3, 2) if name in POOLED else x


def _reset(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        for name, parameter in layer.named_parameters():
            nn.init.ones_(parameter) if name == "bias" else nn.init.normal_(parameter, std=0.01)
