"""Why a net does or does not learn: activations, gradients and curvature, layer by layer, on one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ITERATIONS = 30  # of the power method


def measure(model: nn.Module, inputs: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Any]:
    """Statistics of a training step that is not taken: neither weights nor their gradients change.

    Args:
        inputs: [n, 3, crop, crop]; labels: int64 [n]; keys: of `mask_keys`, int64 [n].

    Returns:
        `loss`, the mean cross-entropy in nats; `curvature` of the last layer (of a tower-parallel net: of this rank's
        half); and `layers`, by name of convolution or dense layer: `weight`, the standard deviation of its weights;
        `output`, that of its outputs before the nonlinearity; `signal`, how much the outputs differ from image to
        image: the root mean square over units of the standard deviation over images; `gradient`, the root mean square
        of the mean loss's gradient with respect to its weights; `dead`, the fraction of units that are not above zero
        anywhere in the batch (not for the last layer). Outputs are without dropout, whose noise would pass for signal.
    """
    layers: Weighted = {k: m for k, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    model.eval()
    with torch.no_grad():
        outputs, _, _ = _run(model, layers, inputs, keys)
    model.train()
    _, entering, logits = _run(model, layers, inputs, keys)
    loss = F.cross_entropy(logits.float(), labels)
    used = {name: layer for name, layer in layers.items() if name in outputs}
    gradients = torch.autograd.grad(loss, [layer.weight for layer in used.values()])
    heads = [name for name in used if outputs[name].shape == logits.shape]
    table = {}
    for (name, layer), gradient in zip(used.items(), gradients, strict=True):
        z = outputs[name].float()
        table[name] = {
            "weight": float(layer.weight.detach().std()),
            "output": float(z.std()),
            "signal": float(z.var(0, correction=0).mean().sqrt()),
            "gradient": float(gradient.square().mean().sqrt()),
        }
        if name not in heads:
            table[name]["dead"] = float((z.movedim(1, 0).flatten(1) <= 0).all(1).float().mean())
    features = torch.cat([entering[name].float() for name in heads], 1)
    return {"loss": loss.item(), "curvature": curvature(features, logits.detach().float()), "layers": table}


Weighted = dict[str, nn.Conv2d | nn.Linear]  # the layers with weights, by name
Seen = dict[str, Tensor]


def _run(model: nn.Module, layers: Weighted, inputs: Tensor, keys: Tensor) -> tuple[Seen, Seen, Tensor]:
    """Output of each layer, input of each layer, and the logits."""
    out: Seen = {}
    entering: Seen = {}

    def keep(name: str, x: Tensor, z: Tensor) -> None:
        entering[name], out[name] = x.detach(), z.detach()

    hooks = [
        layer.register_forward_hook(lambda _, args, z, name=name: keep(name, args[0], z))
        for name, layer in layers.items()
    ]
    try:
        return out, entering, model.forward(inputs, keys)  # not `model(...)`: the compiled one runs no hooks
    finally:
        for hook in hooks:
            hook.remove()


def curvature(features: Tensor, logits: Tensor) -> float:
    """Largest eigenvalue of the Hessian of the mean cross-entropy with respect to the weights of the last layer.

    For logits W h the Hessian is the mean over samples of (diag(p) - p p') x (h h'), with p the softmax (x: Kronecker);
    the power method finds its eigenvalue. Gradient descent with momentum m on a quadratic is stable only if lr times
    the curvature is below 2 (1 + m) (Polyak 1964; `stable_lr`).

    Args:
        features: h, float [n, units]; logits: float [n, outputs].
    """
    p = logits.softmax(1)
    vector = torch.ones(p.shape[1], features.shape[1], device=p.device) * features.mean(0)
    vector[1::2] *= -1  # shifting all logits alike changes nothing: start with a vector that does
    vector /= vector.norm()
    value = 0.0
    for _ in range(ITERATIONS):
        moved = features @ vector.T  # how the logits change along the vector, [n, outputs]
        moved = p * (moved - (p * moved).sum(1, keepdim=True))
        vector = moved.T @ features / len(p)
        value = float(vector.norm())
        if value == 0:
            break
        vector = vector / value
    return value


def stable_lr(curvature: float, momentum: float) -> float:
    """Learning rate above which gradient descent with this momentum diverges on a quadratic of this curvature."""
    return 2 * (1 + momentum) / curvature if curvature > 0 else float("inf")
