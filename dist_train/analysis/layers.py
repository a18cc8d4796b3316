"""The layers of a net with all their constants, read from what it computes: enough to build it anew elsewhere."""

from __future__ import annotations

import inspect
import operator
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import normalize_function

from dist_train.models import alexnet, blog, lrn
from dist_train.models.dropout import Dropout

IMAGES = "images"  # the first layer
OPERATORS = {getattr(operator, name): name for name in ("add", "sub", "mul", "truediv", "getitem")}


class _Tracer(fx.Tracer):
    """Keeps response normalisation and our dropout as one layer each."""

    def __init__(self) -> None:
        where: Any = (lrn, alexnet, blog)  # it stands there under its name
        super().__init__(autowrap_modules=where)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Dropout) or super().is_leaf_module(m, module_qualified_name)


def layers_of(net: nn.Module) -> list[dict[str, Any]] | None:
    """The layers in the order in which they are computed, the last of which gives the logits; None for a net whose code
    looks at what it computes. The keys of each:

        name: unique; the first is "images", which has this alone.
        kind: class of torch.nn or of this program (`Conv2d`, `Dropout`), or name of a function (`relu`, `cat`).
        inputs: names of the layers whose outputs it takes, in order.
        arguments: all others, by their names: `kernel_size`, `stride`, `alpha`, ...
        weights: if it has any, the beginning of their names; of a `Parameter`, its name.
    """
    takes = inspect.signature(net.forward).parameters
    try:
        graph = _Tracer().trace(net, {"keys": None} if "keys" in takes else None)
    except Exception:  # what fx cannot follow, it says in as many ways
        return None
    (output,) = (node for node in graph.nodes if node.op == "output")
    needed, waiting = set[fx.Node](), list(output.all_input_nodes)
    while waiting:
        node = waiting.pop()
        waiting += [] if node in needed else node.all_input_nodes
        needed.add(node)
    return [_layer(node, net) for node in graph.nodes if node in needed]


def _layer(node: fx.Node, net: nn.Module) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"name": IMAGES}
    inputs = list[str]()
    fx.map_arg((node.args, node.kwargs), lambda n: inputs.append(IMAGES if n.op == "placeholder" else n.name))
    layer: dict[str, Any] = {"name": node.name, "kind": _kind(node, net), "inputs": inputs}
    if node.op == "get_attr":
        return layer | {"weights": node.target}
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        layer["arguments"] = _constants(module)
        return layer | ({"weights": node.target} if module.state_dict() else {})
    return layer | {"arguments": _arguments(node)}


def _kind(node: fx.Node, net: nn.Module) -> str:
    if node.op == "get_attr":
        return "Parameter"
    if node.op == "call_module":
        return type(net.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else OPERATORS.get(node.target, node.target.__name__)


def _constants(module: nn.Module) -> dict[str, Any]:
    """The arguments that its class takes and keeps."""
    names = [name for name in inspect.signature(type(module)).parameters if hasattr(module, name)]
    found = {name: getattr(module, name) for name in names}
    return {k: _as_text(v is not None if k == "bias" else v) for k, v in found.items()}


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names, with their defaults, apart from the outputs of other layers; by their
    numbers where torch knows no names."""
    method = isinstance(node.target, str)
    function: Any = getattr(torch, str(node.target), None) if method else node.target
    given: dict[str, Any] = {str(i): value for i, value in enumerate(node.args)} | node.kwargs
    if function is not None and function not in OPERATORS:
        types = tuple(map(_type, node.args)), {key: _type(value) for key, value in node.kwargs.items()}
        with suppress(RuntimeError):  # several forms fit
            found = normalize_function(function, node.args, node.kwargs, *types, normalize_to_only_use_kwargs=True)
            given = found.kwargs if found else given
    return {k: _as_text(v) for k, v in given.items() if not _nodes(v)}


def _type(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return torch.Tensor
    return list[torch.Tensor] if _nodes(value) else type(value)


def _nodes(value: Any) -> bool:
    """Whether a value is the output of a layer, or several."""
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(map(_nodes, value)))


def _as_text(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, list | tuple):
        return [_as_text(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
