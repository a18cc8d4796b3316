"""Exported nets: a file with the net or its weights, and beside it FILE.json, which says all else that is needed.

    net.pt2            the net, for torch.export.load
    net.safetensors    its weights, by their names
    net.onnx           the net, for ONNX
    net.pt2.json       the format `AboutExport`, key by key in docs/nets.md; likewise of the others

A stranger's file: torch.export.load unpickles parts of a .pt2, and evaluates expressions in it, so that is code, and is
loaded with --trust only. A .safetensors holds numbers, of which memory is taken for those of the net alone.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from dist_train import models
from dist_train.analysis.options import NET, WEIGHTS
from dist_train.choices import TORCHVISION
from dist_train.config import ModelConfig
from dist_train.rundir.fitting import check_weights
from pipelines import resolve
from pipelines.augment import Augment, Inputs
from pipelines.bounds import broken
from pipelines.errors import UserError, first_line
from pipelines.files import read_file, sha256
from pipelines.manifest import CLASSES, Colour, Hash
from pipelines.valid import Count, Finite, Invalid, made_of, parsed

FORMAT = 1
LARGEST = 1 << 32  # bytes of an exported file; torchvision's largest net has 2.6 * 10^9
LARGEST_ABOUT = 32 << 20  # bytes of FILE.json: a million classes, and the layers
AGAIN = "export it again, or put the right one there"

Pixels = Annotated[int, Field(ge=1, le=65535)]
Levels = Annotated[list[Finite], Field(min_length=3, max_length=3)]
Divisors = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)]
Rate = Annotated[float, Field(ge=0, le=1)]


class ExportError(UserError):
    """A net that cannot be exported, or an exported one that cannot be loaded; the message names the remedy."""


@dataclass(frozen=True)
class Architecture:
    """The net. `settings` are those of `model` in the configuration, all that this net has: this program makes it of
    them. Any other can make it of the `layers`, see `layers_of`; None if they cannot be listed."""

    name: str
    settings: dict[str, Any]
    outputs: Annotated[Count, Field(ge=1)]
    parameters: Count
    layers: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Resize:
    """Of an image, unless its shorter side has this length: the longer one is truncated to an integer."""

    shorter_side: Pixels
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: Literal[True] = True


@dataclass(frozen=True)
class Prepared:
    """How an image becomes an input of the net, float32 [N, 3, crop, crop]: resized, cut (first to the central square
    of side shorter_side, with `center_square`), then (levels - mean) / std in each channel.

    Attributes:
        scale: the name of this scale, `data.inputs`.
        mean, std: in levels of 0..255, red, green and blue.
    """

    scale: Inputs
    mean: Levels
    std: Divisors
    resize: Resize
    crop: Pixels
    center_square: bool
    channels: Literal["RGB"] = "RGB"
    range: tuple[Literal[0], Literal[255]] = (0, 255)


@dataclass(frozen=True)
class Validated:
    """Errors of the validation after an epoch, counted from 1; fractions of 1."""

    epoch: Count
    step: Count
    top1_error: Rate
    top5_error: Rate


@dataclass(frozen=True)
class SetUsed:
    """A shard set: how many samples, and how they were stored; mean and std of its pixels in [0, 1]. Not where it was,
    which is nobody else's business."""

    samples: Count
    fingerprint: Hash
    mean: Colour
    std: Colour
    stored: dict[str, bool | int | Finite | str] = field(default_factory=dict)


@dataclass(frozen=True)
class AboutExport:
    """The format of FILE.json. Classes are in the order of their outputs; the net may have more outputs than classes.
    `size` is in bytes; `last` and `best` are the newest validation until this step, and the one with the lowest top-1
    error."""

    file: str
    size: Count
    sha256: Hash
    architecture: Architecture
    inputs: Prepared
    classes: Annotated[list[str], Field(min_length=1, max_length=CLASSES)]
    last: Validated | None
    best: Validated | None
    run: str
    checkpoint: str
    step: Count
    epoch: Count
    training_set: SetUsed
    validation_set: SetUsed
    versions: dict[str, Any]
    format: int = FORMAT

    def text(self) -> bytes:
        """FILE.json."""
        return (json.dumps({"format": self.format} | asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Exported:
    """An exported net, loaded.

    Attributes:
        model: called as model(images), in evaluation mode, on the device; float32.
    """

    path: Path
    about: AboutExport
    model: nn.Module

    @property
    def augment(self) -> Augment:
        """How images are resized and cut, without chance."""
        inputs = self.about.inputs
        return Augment(inputs.resize.shorter_side, inputs.crop, inputs.center_square, mirror=False, lighting=0.0)


def description_of(path: Path) -> Path:
    """FILE.json."""
    return path.with_name(f"{path.name}.json")


def read_about(path: Path) -> AboutExport:
    """What stands beside an exported file, checked against it. Raises ExportError, OSError."""
    place = description_of(path)
    if not path.exists():
        raise ExportError(f"there is no {path}: look at its spelling")
    if not place.exists():
        raise ExportError(f"{place} is not there, which belongs to {path.name}: put it beside it")
    try:
        text = read_file(place, LARGEST_ABOUT)
        version = parsed(dict[str, Any], text).get("format")
        if version != FORMAT:
            raise ExportError(f"{place} has format {version!r:.40}, this program reads {FORMAT}: export it again")
        about = parsed(AboutExport, text)
        if about.inputs.crop > about.inputs.resize.shorter_side:
            raise Invalid("inputs.crop is larger than the shorter side that it is cut from")
    except Invalid as error:
        raise ExportError(f"{place} is damaged ({error}): {AGAIN}") from error
    size = path.stat().st_size
    if size > LARGEST:
        raise ExportError(f"{path} has more than {LARGEST} bytes: put the right file there")
    if size != about.size or sha256(path) != about.sha256:
        raise ExportError(f"{path} and {place.name} do not belong together (sha256): {AGAIN}")
    return about


def load_export(path: Path, device: torch.device, *, trusting: bool = False) -> Exported:
    """An exported net. Raises ExportError or another UserError, with the remedy, or OSError.

    Args:
        path: a .safetensors, or a .pt2.
        trusting: a .pt2 may be loaded, and code that FILE.json names as `module:name` imported.
    """
    if path.suffix not in (NET, WEIGHTS):
        raise ExportError(f"{path} is neither a {WEIGHTS} nor a {NET}: name one that `export` wrote, or a run")
    about = read_about(path)
    if path.suffix == WEIGHTS:
        model: nn.Module = _rebuilt(path, about, trusting=trusting).to(device)
    elif trusting:
        model = _loaded(path, device)
    else:
        raise ExportError(
            f"{path} is code, which torch runs as it loads it: if you trust its author, add {resolve.FLAG}; a "
            f"{WEIGHTS} needs none"
        )
    return Exported(path, about, model)


def _loaded(path: Path, device: torch.device) -> nn.Module:
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it prints what it raises
    try:
        program = torch.export.load(path)
        return move_to_device_pass(program, device).module()
    except Exception as error:  # whatever torch finds in it
        raise ExportError(f"{path} is not loaded ({first_line(error)}): {AGAIN}") from error


def _rebuilt(path: Path, about: AboutExport, *, trusting: bool) -> nn.Module:
    """The net that FILE.json describes, with the weights of the file."""
    place, architecture = description_of(path), about.architecture
    try:
        settings = architecture.settings | {"name": architecture.name, "outputs": architecture.outputs}
        options = made_of(ModelConfig, settings)
        if found := broken(options):
            raise Invalid(f"architecture.settings.{' '.join(found)}")
    except Invalid as error:
        raise ExportError(f"{place} is damaged ({error}): {AGAIN}") from error
    if trusting and resolve.is_code(options.name):
        resolve.trust(options.name)
    sizes = {"classes": len(about.classes), "crop": about.inputs.crop}
    try:
        with safe_open(path, framework="pt") as file:
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not resolve.is_code(options.name) or options.name.startswith(TORCHVISION):
            with torch.device("meta"):  # a net of other sizes would take memory that the file does not
                check_weights(bare(models.build(options, **sizes)), weights)
        with torch.random.fork_rng(devices=[]):  # the weights are drawn, and then replaced
            model = models.build(options, **sizes)
        check_weights(bare(model), weights)
        bare(model).load_state_dict(weights)
    except (SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise ExportError(f"{path} does not fit the net of {place.name} ({first_line(error)}): {AGAIN}") from error
    return model.to(memory_format=torch.channels_last).eval()


def bare(model: nn.Module) -> nn.Module:
    """The net as its author knows it, with its own names of the weights."""
    return model.net if isinstance(model, models.CalledByImages) else model
