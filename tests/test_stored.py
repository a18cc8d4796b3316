"""A state.pt of a stranger: what its file claims takes no memory, runs nothing, and ends in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import Config
from dist_train.optim import build, load_moments
from dist_train.rundir.checkpoint import CheckpointError, best_of, verified
from dist_train.rundir.fitting import check_weights
from dist_train.rundir.state import Progress, Scale, Window
from dist_train.rundir.stored import load_state
from dist_train.schedules import Plateau
from pipelines.valid import Invalid, made_of

MB = 1 << 20
CPU = torch.device("cpu")
STATE = {"model": {"w": torch.ones(3, 4)}, "record": 5}


def written(folder: Path, value: Any, **options: Any) -> Path:
    torch.save(value, folder / "state.pt", **options)
    return folder / "state.pt"


def rezipped(path: Path, changed: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Writes the archive anew, as another program would."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, changed(name, data))


def test_what_torch_writes_is_loaded(tmp_path: Path) -> None:
    kinds = [torch.uint16, torch.float8_e5m2, torch.bfloat16, torch.float64, torch.bool, torch.cfloat]
    tensors = {str(kind): torch.ones(2, 3).to(kind) for kind in kinds}
    tensors["last"] = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors |= {"none": torch.ones(0, 3), "scalar": torch.ones(()), "one": torch.ones(1, 3)[:, ::1]}
    more = {"n": [1, 1 << 70, 2.5, None, True], "b": b"x", "a": bytearray(b"x"), "s": {1}, "c": 1j, "d": torch.float32}
    written(tmp_path, {"tensors": tensors, "more": more, "net": torch.nn.Linear(2, 2).state_dict()})
    found = load_state(tmp_path, CPU, MB)
    assert found["more"] == more
    assert all(torch.equal(found["tensors"][name], value) for name, value in tensors.items() if "float8" not in name)


ODD = {
    "sparse": lambda: torch.ones(2).to_sparse(),
    "meta": lambda: torch.ones(10**9, device="meta"),
    "expanded": lambda: torch.ones(1).expand(10**6),
    "overlapping": lambda: torch.ones(6).as_strided((3, 3), (1, 1)),
    "a gradient": lambda: torch.ones(2, requires_grad=True),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", ODD)
def test_other_tensors(name: str, tmp_path: Path) -> None:
    written(tmp_path, {"model": {"w": ODD[name]()}})
    with pytest.raises(CheckpointError, match=r"state\.pt is not loaded \(.*\): put the right one back"):
        load_state(tmp_path, CPU, MB)


def pickled(path: Path, data: bytes) -> None:
    """Puts another pickle into a state, in an archive that torch has written."""
    with open(path, "wb") as file:
        writer = torch._C.PyTorchFileWriter(file)
        writer.write_record("data.pkl", data, len(data))
        writer.write_record("byteorder", b"little", 6)
        writer.write_end_of_file()


PICKLES = {
    "code": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R.",  # of 10**10
    "a storage that is made": b"\x80\x02ctorch\nFloatStorage\n\x8a\x05\x00\xe4\x0bT\x02\x85R.",
    "a tensor that is made": b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\xe4\x0bT\x02\x85\x81.",
    "a memo without end": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00}.",
    "an array": b"\x80\x05\x96\x00\xe4\x0bT\x02\x00\x00\x00.",
    "text that is cut off": b"\x80\x02X\xff\xff\xff\x7fab.",
    "nothing": b"",
    "a number": b"\x80\x02K\x01.",
    "repeats": b"\x80\x02]q\x00"
    + b"".join(b"]q" + bytes([n]) + (b"h" + bytes([n - 1]) + b"a") * 9 for n in range(1, 40))
    + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_other_pickles(name: str, tmp_path: Path) -> None:
    pickled(tmp_path / "state.pt", PICKLES[name])
    with pytest.raises(CheckpointError, match=r"state\.pt is not loaded \(.*\): put the right one back"):
        load_state(tmp_path, CPU, MB)


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    whole = written(tmp_path, STATE).read_bytes()

    def refused(why: str) -> None:
        with pytest.raises(CheckpointError, match=rf"state\.pt is not loaded \(.*{why}"):
            load_state(tmp_path, CPU, MB)

    for cut in (0, 3, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("no file of torch.save, or only part of one")
    path.write_bytes(b"PK\x03\x04 before it" + whole)
    refused("its table of entries is not where it says")
    written(tmp_path, STATE, _use_new_zipfile_serialization=False)
    refused("no file of torch.save")
    path.write_bytes(whole)
    rezipped(path, lambda _, data: data)
    refused("no file of torch.save")  # another program's archive has another end
    written(tmp_path, {"model": {"w": torch.ones(MB)}})
    refused("it holds 4 MB, and the net and its moments take 1 at most")
    written(tmp_path, {"x": ["y" * 100 for _ in range(10)], "z": "q" * (5 * MB)})
    with pytest.raises(CheckpointError, match="its names, numbers and shapes take more than 4 MiB"):
        load_state(tmp_path, CPU, 100 * MB)
    written(tmp_path, STATE)
    path.write_bytes(path.read_bytes().replace(b"K\x03K\x04\x86", b"K\x03K\x7f\x86"))
    refused("")  # a tensor that is larger than its bytes
    written(tmp_path, [1])
    with pytest.raises(CheckpointError, match="it holds a list"):
        load_state(tmp_path, CPU, MB)


PEAK = """
import resource, sys, torch
from pathlib import Path
from dist_train.rundir.checkpoint import CheckpointError
from dist_train.rundir.stored import load_state
said = "loaded"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_state(Path(sys.argv[1]), torch.device("cpu"), 1 << 28)
except CheckpointError as error:
    said = str(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, said)
"""


@pytest.mark.integration
@pytest.mark.slow
def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """2 GB of zeros in 2 MB, with the end that torch's own archives have."""
    path = written(tmp_path, {"model": {"w": torch.zeros(16)}})
    size = 2 << 30
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(size >> 24):
                entry.write(bytes(1 << 24))
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    data = path.read_bytes()
    length, start = (int.from_bytes(data[at:][:4], "little") for at in (-10, -6))
    where = len(data) - 22
    end = b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\x00\x2d\x00" + bytes(8) + 2 * (2).to_bytes(8, "little")
    end += length.to_bytes(8, "little") + start.to_bytes(8, "little")
    end += b"PK\x06\x07" + bytes(4) + where.to_bytes(8, "little") + (1).to_bytes(4, "little")
    path.write_bytes(data[:where] + end + data[where:])
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    peak, said = result.stdout.split(maxsplit=1)
    assert "archive/data/0 is compressed, which torch does not do" in said
    assert int(peak) < 100_000, "kilobytes"
    written(tmp_path, {"model": {"w": torch.zeros(16)}})
    assert "loaded" in subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout


def test_weights() -> None:
    net = torch.nn.BatchNorm1d(3)
    good = {name: value.clone() for name, value in net.state_dict().items()}
    check_weights(net, good | {"running_var": torch.full((3,), torch.inf)})  # a buffer may be
    for changed, why in (
        ({"weight": torch.ones(4)}, r"weight is \[4\], torch.float32, for \[3\], torch.float32"),
        ({"weight": torch.ones(3).double()}, "weight is .*float64"),
        ({"weight": torch.tensor([1, torch.nan, 1])}, "weight is not finite"),
        ({"num_batches_tracked": torch.zeros(1, dtype=torch.int64)}, "num_batches_tracked is"),
        ({"num_batches_tracked": torch.zeros(())}, "num_batches_tracked is .*float32"),
        ({"running_var": "x"}, "running_var is str"),
        ({"other": torch.ones(1)}, "other is not in the net"),
    ):
        with pytest.raises(ValueError, match=why):
            check_weights(net, good | changed)
    with pytest.raises(ValueError, match="running_var is missing"):
        check_weights(net, {name: value for name, value in good.items() if name != "running_var"})
    with pytest.raises(ValueError, match="model is a list"):
        check_weights(net, [1])


def test_moments_of_adam() -> None:
    """Without `step`, or with text in its place, the first step would fail; a negative one divides by zero."""
    config = Config().optim
    net = torch.nn.Linear(2, 3)
    optimizer = build(type(config)(name="adam"), net)
    net(torch.ones(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    load_moments(optimizer, optimizer.state_dict())
    for change, why in (
        ({"step": "x"}, "step of parameter 0 is str"),
        ({"step": 3}, "step of parameter 0 is int"),
        ({"step": torch.tensor(-1.0)}, "step of parameter 0 is negative"),
        ({"step": torch.tensor(torch.nan)}, "step of parameter 0 is not finite"),
        ({"exp_avg": torch.full((3, 2), torch.nan)}, "exp_avg of parameter 0 is not finite"),
        ({"step": None}, "step of parameter 0 is missing"),
    ):
        state = optimizer.state_dict()
        values = {**state["state"][0], **change}
        state["state"] = {**state["state"], 0: {name: value for name, value in values.items() if value is not None}}
        with pytest.raises(ValueError, match=why):
            load_moments(optimizer, state)


def test_numbers_of_a_state() -> None:
    for kind, values, why in (
        (Progress, {"epoch": -1}, "epoch should be greater than or equal to 0"),
        (Progress, {"step": 1.5}, "step should be a valid integer"),
        (Progress, {"step": 1 << 70}, "step should be less than"),
        (Progress, {"best_error": 1.5}, "best_error should be less than or equal to 1"),
        (Progress, {"best_error": float("nan")}, "best_error should be"),
        (Progress, {"validated": 1}, "validated should be a valid boolean"),
        (Window, {"loss": float("inf")}, "loss should be a finite number"),
        (Window, {"steps": "1"}, "steps should be a valid integer"),
        (Scale, {"scale": 0.0}, "scale should be greater than 0"),
        (Progress, [1], "it should be"),
    ):
        with pytest.raises(Invalid, match=why):
            made_of(kind, values)
    schedule = Plateau()
    for name, value in (("best", float("nan")), ("divisions", -1), ("bad_epochs", "x"), ("exhausted", 1)):
        with pytest.raises(ValueError, match=f"{name} of the schedule"):
            schedule.load_state_dict({name: value})


META = {
    "a list": "[1]",
    "depth": "[" * 100_000,
    "no JSON": "{",
    "bytes below zero": {"bytes": -1},
    "bytes as text": {"bytes": "5"},
    "a sha256 that is none": {"sha256": "../../x"},
    "an epoch that is text": {"epoch": "3"},
    "a step that is none": {"step": None},
    "validated by a number": {"validated": 1},
    "a best epoch in a list": {"best_epoch": [1]},
    "a configuration in a list": {"config": [1]},
    "a set that is a number": {"training set": 7},
    "many digits": '{"bytes": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", META)
def test_meta(name: str, tmp_path: Path) -> None:
    """Neither good, nor the best."""
    folder = tmp_path / "checkpoints" / "step-00000001-validated"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"12345")
    good = {"bytes": 5, "sha256": sha256(b"12345").hexdigest(), "step": 1, "epoch": 1, "validated": True}
    good |= {"best_epoch": 0, "config": {}}
    (folder / "meta.json").write_text(json.dumps(good))
    assert verified(folder).meta == good
    assert best_of(folder.parent) == (folder.name, True)
    change = META[name]
    (folder / "meta.json").write_text(change if isinstance(change, str) else json.dumps(good | change))
    with pytest.raises(CheckpointError, match=r"^meta\.json is damaged \(") as error:
        verified(folder)
    assert len(str(error.value)) < 300
    assert best_of(folder.parent) == ("", True)
    for key in ("step", "epoch"):
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            verified(folder)
