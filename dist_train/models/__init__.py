"""Models by name."""

from __future__ import annotations

import difflib

from torch import Tensor, nn

from dist_train.models.alexnet import AlexNet

TORCHVISION = "torchvision:"


class TorchvisionModel(nn.Module):
    """A torchvision classifier under our calling convention. It brings its own randomness, so it is exact at one world
    size only: torch's generators are seeded from (seed, step, rank) at each step."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        from torchvision import models  # takes seconds, and most runs do without

        self.net = models.get_model(name, weights=None, num_classes=classes)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """keys: not used."""
        logits = self.net(x)
        main: Tensor = getattr(logits, "logits", logits)  # GoogLeNet and Inception add auxiliary ones in training
        return main


def build(name: str, *, classes: int, crop: int, hidden: int, dropout: float) -> nn.Module:
    """The model `alexnet` or `torchvision:<name>`. Raises ValueError with the nearest name."""
    if name == "alexnet":
        return AlexNet(classes, crop, hidden, dropout)
    from torchvision import models

    known = [TORCHVISION + model for model in models.list_models(module=models)]
    if name in known:
        return TorchvisionModel(name.removeprefix(TORCHVISION), classes)
    nearest = difflib.get_close_matches(name, ["alexnet", *known], 1, cutoff=0)
    raise ValueError(f"model.name {name!r} is unknown: did you mean {nearest[0]!r}?")
