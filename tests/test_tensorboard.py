"""TensorBoard's view of a run, read back with TensorBoard's own reader."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch.utils.tensorboard import FileWriter

from dist_train.config import Config, MonitorConfig
from dist_train.monitor.names import named
from dist_train.monitor.reader import Shown
from dist_train.monitor.readers import READERS, Readers
from dist_train.monitor.tensorboard import TensorBoardRun
from dist_train.rundir import record
from tests.helpers.compare import status
from tests.helpers.drills import until
from tests.helpers.launch import STEPS, at, finish, launch, start

STEP = {"kind": "step", "step": 40, "epoch": 0, "progress": 0.5, "images": 960, "loss": 1.5, "train_error": 0.5}
NODE = {"gpu_use": 0.93, "gpu_memory_mb": 812.0, "watts": 600.5, "celsius": 61, "throttled": ["sw_power_cap"]}
MACHINE = {"images_per_s": 500.0, "data_wait": 0.1, "data_wait_worst": 0.3, "worst_rank": 3, "worst_node": "gpu-07"}


def test_names_of_a_step() -> None:
    line = STEP | {"lr": 0.01, "grad_norm": 2.5, "skipped": 1, "bad_samples": 2}
    line |= {"machine": MACHINE | {"memory_mb": 800.0, "nodes": {"gpu-07": NODE, "gpu-08": {"throttled": []}}}}
    assert named(line) == {
        "loss/training": 1.5,
        "error/training": 0.5,
        "lr": 0.01,
        "grad_norm": 2.5,
        "machine/skipped": 1,
        "machine/bad_samples": 2,
        "machine/images_per_s": 500,
        "machine/data_wait": 0.1,
        "machine/data_wait_worst": 0.3,
        "machine/memory_mb": 800,
        "machine/gpu-07/gpu_use": 0.93,
        "machine/gpu-07/gpu_memory_mb": 812,
        "machine/gpu-07/watts": 600.5,
        "machine/gpu-07/celsius": 61,
        "machine/gpu-07/throttled": 1,
        "machine/gpu-08/throttled": 0,
    }


def test_names_of_an_earlier_program() -> None:
    old = STEP | {"images_per_s": 500.0, "data_wait": 0.1}
    assert {key: value for key, value in named(old).items() if key.startswith("machine")} == {
        "machine/images_per_s": 500,
        "machine/data_wait": 0.1,
    }


def test_names_of_other_lines() -> None:
    line = {"kind": "validation", "step": 10, "epoch": 0, "images": 240, "lr": 0.01, "samples": 63, "loss": 1.0}
    line |= {"top1_error": 0.5, "top5_error": 0.0, "train_loss": 1.25, "train_error": 0.75, "machine": {"seconds": 3}}
    assert named(line) == {
        "loss/validation": 1,
        "error/validation_top1": 0.5,
        "error/validation_top5": 0,
        "loss/training_epoch": 1.25,
        "error/training_epoch": 0.75,
        "machine/validation_seconds": 3,
    }
    layers = {"conv1": {"weight": 0.01, "dead": 0.5}, "fc8": {"weight": 0.02}}
    probe = {"kind": "probe", "step": 0, "images": 0, "loss": 1.5, "curvature": 9.0, "layers": layers}
    assert named(probe) == {
        "probe/loss": 1.5,
        "probe/curvature": 9,
        "probe/conv1/weight": 0.01,
        "probe/conv1/dead": 0.5,
        "probe/fc8/weight": 0.02,
    }
    assert named({"kind": "begun", "step": 0, "precision": "off"}) == {}
    assert named({"event": "end", "time": 1.0, "code": 0}) == {}
    assert named({"kind": "changed", "step": 5, "machine": {"seconds": 3}}) == {}


Curves = dict[str, list[tuple[int, float]]]  # (step, value) of each


def reader(run: Path) -> EventAccumulator:
    """TensorBoard's own, which keeps all points."""
    return EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0})


def shown(events: EventAccumulator) -> Curves:
    """What it has found by now."""
    tags = events.Reload().Tags()[SCALARS]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def recorded(run: Path) -> Curves:
    """What it should find. TensorBoard's numbers have 32 bits."""
    curves = defaultdict(list)
    for line in record.read(run):
        for name, value in named(line).items():
            curves[name].append((line["step"], float(np.float32(value))))
    return dict(curves)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # TensorBoard leaves it to Python to close them
@pytest.mark.slow
def test_a_run_that_is_killed(shard_sets: Path, tmp_path: Path) -> None:
    """Each start writes all of the record, also what the one before had no time for, or was not asked for. Whoever has
    looked on all the time sees each step once, too."""
    run, watching = tmp_path / "run", reader(tmp_path / "run")
    save, wanted = ("--checkpoint.steps=3", "--monitor.probes=[0]"), "--monitor.tensorboard=true"
    finish(start(shard_sets, run, *save, fault=at("step", 6, "kill all")))
    assert not (run / "tensorboard").exists()
    killed = start(shard_sets, run, *save, wanted, fault={}, env={"STEP_SECONDS": "0.3"})
    until(lambda: (run / "tensorboard").exists() and len(shown(watching).get("loss/training", [])) > 7)
    for pid in killed.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    finish(killed)
    assert status(run)["state"] == "running"
    result = launch(shard_sets, run, *save, wanted)
    assert status(run)["state"] == "done", result.stderr
    curves = recorded(run)
    assert [step for step, _ in curves["loss/training"]] == list(range(1, 2 * STEPS + 1))
    assert [step for step, _ in curves["error/validation_top1"]] == [STEPS, 2 * STEPS]
    assert {"probe/loss", "grad_norm", "machine/images_per_s", "machine/data_wait"} < curves.keys()
    assert shown(reader(run)) == curves
    assert shown(watching) == curves
    launch(shard_sets, run, *save, wanted)  # which has nothing to train
    assert shown(reader(run)) == shown(watching) == curves
    assert len([path for path in (run / "tensorboard").iterdir() if path.stat().st_size]) == 1, "of one start only"
    gc.collect()


@pytest.mark.integration
def test_a_run_without_the_package(shard_sets: Path, tmp_path: Path) -> None:
    (tmp_path / "tensorboard.py").write_text("raise ImportError('there is no tensorboard')")
    run = tmp_path / "run"
    here = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    extra = ("--monitor.tensorboard=true", "--train.epochs=1")
    result = launch(shard_sets, run, *extra, ranks=0, env=here, how="exec")
    assert status(run)["state"] == "done"
    assert result.returncode == 0
    (told,) = (line for line in result.stderr.splitlines() if "tensorboard" in line)
    assert "there is no tensorboard: pip install tensorboard; training goes on without" in told
    assert not (run / "tensorboard").exists()


def test_what_lies_elsewhere(tmp_path: Path) -> None:
    """In a run directory that a stranger has made: what is there is not written to, nor cleared away."""
    folder, other, name = tmp_path / "tensorboard", tmp_path / "other", "events.out.tfevents.1.host.1.0"
    other.mkdir()
    (other / name).write_text("theirs")
    folder.symlink_to(other)
    with pytest.raises(OSError, match="is a link, which is not written through"):
        TensorBoardRun(folder).begin()
    assert [path.read_text() for path in other.iterdir()] == ["theirs"]
    folder.unlink()
    folder.mkdir()
    (folder / name).symlink_to(other / name)
    tensorboard = TensorBoardRun(folder)
    assert tensorboard.begin() == 0
    tensorboard.close()
    assert (other / name).read_text() == "theirs"
    assert not (folder / name).exists()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is written later, and nothing twice."""
    lines = [{"kind": "step", "step": number, "loss": 1 / number} for number in range(1, 6)]
    (tmp_path / record.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in set(READERS) - {"tensorboard"}:
        monkeypatch.delitem(READERS, name)
    flush, failures = FileWriter.flush, iter((False, False, True))

    def full(writer: FileWriter) -> None:
        flush(writer)
        if next(failures, False):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileWriter, "flush", full)
    said: list[str] = []
    readers = Readers(Shown(tmp_path, Config(monitor=MonitorConfig(tensorboard=True)), said.append))
    readers.open()
    readers.close(60)
    assert shown(reader(tmp_path)) == {"loss/training": [(i, float(np.float32(1 / i))) for i in range(1, 6)]}
    assert next(failures, None) is None
    assert not said
