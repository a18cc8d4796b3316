"""`python -m dist_train export RUN FILE`: a trained net, or its weights, for programs that are not this one.

See `exported.py` for the files.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train import __version__
from dist_train.analysis.exported import (
    AboutExport,
    Architecture,
    ExportError,
    Prepared,
    Resize,
    SetUsed,
    Validated,
    bare,
    description_of,
)
from dist_train.analysis.layers import layers_of
from dist_train.analysis.options import NET, ONNX, WEIGHTS, check_place
from dist_train.analysis.trained import Trained, open_run
from dist_train.config import idle_fields
from dist_train.rundir import record
from pipelines.augment import scale
from pipelines.errors import first_line
from pipelines.files import replacing
from pipelines.shards import ShardSet
from pipelines.speech import in_line, show


def start(args: Namespace) -> int:
    """Write the file and what stands beside it. Returns 0. Raises ExportError, RunError, OSError."""
    path: Path = args.file
    check_place(path, "FILE")
    if path.suffix == ONNX:
        _need_onnx()
    run = open_run(args.run, torch.device("cpu"), args.checkpoint, trusting=args.trust)
    about = write_export(run, path)
    error = f", top-1 error {about.last.top1_error:.2%}" if about.last else ""
    show(f"{in_line(str(path))}  {about.size / 1e6:.1f} MB, {run.checkpoint} of {in_line(str(run.directory))}{error}")
    show(in_line(str(description_of(path))))
    return 0


def write_export(run: Trained, path: Path) -> AboutExport:
    """Write the file, in the form that its name ends with, and what stands beside it, which is returned. The net of
    `run` is on the CPU, and in another order of memory afterwards. Raises ExportError."""
    data = FORMS[path.suffix](_plain_net(run), run)
    about = described_run(run, path.name, data)
    # A kill between the two renames leaves a pair whose sha256 differ, which `load_export` refuses.
    try:
        with replacing(description_of(path)) as text, replacing(path) as file:
            text.write(about.text())
            text.flush()  # a full disk is met here, before anything is replaced
            file.write(data)
    except OSError as error:
        raise ExportError(f"{path} cannot be written ({error.strerror}): choose another place, or make room") from error
    return about


def described_run(run: Trained, name: str, data: bytes) -> AboutExport:
    """What stands beside the export of a run: a file of this name with these bytes."""
    options, config = asdict(run.config.model), run.config.data
    unused = {"name", "outputs", "init_from", *idle_fields(run.config.model.name)}
    net = bare(run.model)
    architecture = Architecture(
        name=run.config.model.name,
        settings={key: value for key, value in options.items() if key not in unused},
        outputs=run.config.model.outputs or len(run.classes),
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        layers=layers_of(net),
    )
    mean, std = (values.tolist() for values in scale(config.inputs, run.train.manifest))
    validations = _validations(run)
    return AboutExport(
        file=name,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        architecture=architecture,
        inputs=Prepared(config.inputs, mean, std, Resize(config.resize), config.crop, config.center_square),
        classes=run.classes,
        last=validations[-1] if validations else None,
        best=min(validations, key=lambda found: found.top1_error, default=None),
        run=run.directory.resolve().name,
        checkpoint=run.checkpoint,
        step=run.step,
        epoch=run.epoch,
        training_set=_set_used(run.train),
        validation_set=_set_used(run.val),
        versions={"dist_train": __version__, "torch": str(torch.__version__)},
    )


def _set_used(shards: ShardSet) -> SetUsed:
    manifest = shards.manifest
    return SetUsed(manifest.samples, shards.fingerprint, manifest.mean, manifest.std, manifest.stored)


def _validations(run: Trained) -> list[Validated]:
    """Those until the checkpoint, in order; what is damaged in the record is left out."""
    lines, _ = record.readable(run.directory)
    found = [line for line in lines if line["kind"] == "validation" and line.get("step", 0) <= run.step]
    return [
        Validated(line.get("epoch", 0) + 1, line["step"], line["top1_error"], line["top5_error"])
        for line in found
        if {"step", "top1_error", "top5_error"} <= line.keys()
    ]


def _plain_net(run: Trained) -> nn.Module:
    """The net of a run, in float32, in the order of memory that all programs expect."""
    net = bare(run.model).float().requires_grad_(False)
    for value in [*net.parameters(), *net.buffers()]:
        value.data = value.data.contiguous()
    return net


def _program(net: nn.Module, run: Trained) -> ExportedProgram:
    """The net as torch.export knows it, with a free batch size. Raises ExportError."""
    name, crop = run.config.model.name, run.config.data.crop
    try:
        return torch.export.export(net, (torch.zeros(2, 3, crop, crop),), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # of the net, or of torch, which says it in as many ways
        raise ExportError(
            f"model.name {name} cannot be exported with a free batch size ({first_line(error)}): export its weights, "
            f"as {WEIGHTS}"
        ) from error


def _as_pt2(net: nn.Module, run: Trained) -> bytes:
    file = BytesIO()
    torch.export.save(_program(net, run), file)
    return file.getvalue()


def _as_safetensors(net: nn.Module, run: Trained) -> bytes:
    state = net.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"{odd[0]} of model.name {run.config.model.name} is no tensor: export the net, as {NET}")
    saved: bytes = save({name: value.clone() for name, value in state.items()})  # what has two names stands there twice
    return saved


def _as_onnx(net: nn.Module, run: Trained) -> bytes:
    program = _program(net, run)
    try:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        made = torch.onnx.export(program, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False, **names)
        assert made is not None
        whole: bytes = made.model_proto.SerializeToString()
    except Exception as error:  # an operator that ONNX lacks, more than 2 GB
        raise ExportError(
            f"model.name {run.config.model.name} cannot be exported to ONNX ({first_line(error)}): export it as {NET}"
        ) from error
    return whole


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"{ONNX} is written by onnx and onnxscript ({error}): pip install onnx onnxscript") from error


FORMS: dict[str, Callable[[nn.Module, Trained], bytes]] = {NET: _as_pt2, WEIGHTS: _as_safetensors, ONNX: _as_onnx}
