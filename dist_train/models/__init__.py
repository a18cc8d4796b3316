"""Models by name."""

from __future__ import annotations

import difflib

from torch import Tensor, nn
from torchvision import models as torchvision_models

from dist_train.models.alexnet import AlexNet

TORCHVISION = "torchvision:"


class TorchvisionModel(nn.Module):
    """A torchvision classifier under our calling convention. It brings its own randomness: see DESIGN, dropout."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        self.net = torchvision_models.get_model(name, weights=None, num_classes=classes)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        main: Tensor = getattr(logits, "logits", logits)  # GoogLeNet and Inception add auxiliary ones in training
        return main


def build(name: str, *, classes: int, crop: int, hidden: int, dropout: float) -> nn.Module:
    """The model `alexnet` or `torchvision:<name>`. Raises ValueError with the nearest name."""
    if name == "alexnet":
        return AlexNet(classes, crop, hidden, dropout)
    known = [TORCHVISION + model for model in torchvision_models.list_models(module=torchvision_models)]
    if name in known:
        return TorchvisionModel(name.removeprefix(TORCHVISION), classes)
    nearest = difflib.get_close_matches(name, ["alexnet", *known], 1, cutoff=0)
    raise ValueError(f"model.name {name!r} is unknown: did you mean {nearest[0]!r}?")
