"""Models by name: add a model of your own to OURS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dist_train.config import TORCHVISION, ConfigError, ModelConfig
from dist_train.models.alexnet import AlexNet
from dist_train.models.two_tower import TwoTowers
from pipelines.words import nearest


class TorchvisionModel(nn.Module):
    """A torchvision classifier with our calling convention. It brings its own randomness, so it is exact only at one
    world size: torch's generators are seeded from (seed, step, rank) at each step."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        from torchvision import models  # takes seconds, and most runs do not need it

        self.net = models.get_model(name, weights=None, num_classes=classes)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits [n, outputs] of x [n, 3, crop, crop]; keys are not used."""
        logits = self.net(x)
        main: Tensor = getattr(logits, "logits", logits)  # GoogLeNet and Inception add auxiliary ones in training
        return main


def draws_numbers(model: nn.Module) -> bool:
    """Whether a model may draw from torch's own generators: assumed unless it declares `draws_numbers = False`."""
    return bool(getattr(model, "draws_numbers", True))


OURS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "alexnet_one_tower": partial(AlexNet, towers=1),
    "alexnet_two_tower": TwoTowers,
}


def build(options: ModelConfig, *, classes: int, crop: int) -> nn.Module:
    """The model called `options.name`, with `options.outputs` outputs or one per class. Raises ConfigError, with the
    nearest name if that one is unknown."""
    outputs = options.outputs or classes
    if outputs < classes:
        raise ConfigError(f"model.outputs is {outputs}, fewer than the {classes} classes: raise it, or leave it 0")
    if options.name in OURS:
        return OURS[options.name](outputs, crop, options)
    from torchvision import models

    known = [TORCHVISION + model for model in models.list_models(module=models)]
    if options.name in known:
        return TorchvisionModel(options.name.removeprefix(TORCHVISION), outputs)
    names = {name.removeprefix(TORCHVISION): name for name in known}
    if not options.name.startswith(TORCHVISION):
        names |= {name: name for name in OURS}
    meant = names.get(nearest(options.name.removeprefix(TORCHVISION), names))
    remedy = f"did you mean {meant!r}?" if meant else f"choose {', '.join(OURS)} or torchvision:<name>"
    raise ConfigError(f"model.name {options.name!r} is unknown: {remedy}")
