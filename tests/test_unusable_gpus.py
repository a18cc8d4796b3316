"""A node whose GPUs torch cannot use is refused, instead of a run that trains on its CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_train import driver, machine
from dist_train.ranks.world import pick_device
from pipelines.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = ["/dev/nvidia0", "/dev/nvidia1"]
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040)."
JOB = {"SLURM_JOB_ID": "7"}
LOCAL = {"SUBMITIT_EXECUTOR": "local"}

CASES = {
    "a workstation": (FILES, {}, "/dev/nvidia0, /dev/nvidia1"),
    "a laptop without a GPU": ([], {}, ""),
    "one of two is chosen": (FILES, {"CUDA_VISIBLE_DEVICES": "1"}, "/dev/nvidia0, /dev/nvidia1"),
    "chosen, but there are none: a container without --gpus": (
        [],
        {"CUDA_VISIBLE_DEVICES": "0"},
        "CUDA_VISIBLE_DEVICES=0",
    ),
    "hidden, empty": (FILES, {"CUDA_VISIBLE_DEVICES": ""}, ""),
    "hidden, -1": (FILES, {"CUDA_VISIBLE_DEVICES": "-1"}, ""),
    "hidden, as by an old Slurm": (FILES, {**JOB, "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
    "hidden in a job that has some": (FILES, {**JOB, "CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "2"}, ""),
    "a job with GPUs": (FILES, {**JOB, "CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
    "in a container that does not see them": ([], {**JOB, "CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
    "where Slurm sets no CUDA_VISIBLE_DEVICES": ([], {**JOB, "SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
    "a job without GPUs on a node that has some": (FILES, JOB, ""),
    "the variable is there, and says nothing": ([], {**JOB, "SLURM_GPUS_ON_NODE": ""}, ""),
    "the same, and Slurm says so": (FILES, {**JOB, "SLURM_GPUS_ON_NODE": "0"}, ""),
    "the same, begun from a job with GPUs": (FILES, {**JOB, "SLURM_JOB_GPUS": "3", "SLURM_STEP_GPUS": "3"}, ""),
    "--local on a laptop: submitit made the number up": ([], {**LOCAL, "CUDA_VISIBLE_DEVICES": "0"}, ""),
    "--local on a workstation": (FILES, {**LOCAL, "CUDA_VISIBLE_DEVICES": "0"}, "/dev/nvidia0, /dev/nvidia1"),
    "--local --gpus-per-node 0 on a workstation": (FILES, {**LOCAL, "CUDA_VISIBLE_DEVICES": ""}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_whether_a_process_was_given_gpus(case: str) -> None:
    files, variables, shown = CASES[case]
    assert driver.given(files, variables) == shown


@pytest.mark.parametrize(
    ("why", "cuda", "version", "reason", "remedy"),
    [
        (TOO_OLD, "13.0", "550.54.15", "the driver 550.54.15 is too old for torch's CUDA 13.0", machine.CUDA_12),
        (TOO_OLD, "12.6", "470.256.02", "too old for torch's CUDA 12.6", "install a newer driver, or do without"),
        ("it is built without CUDA", "", "580.65.06", "built without CUDA", "torch that is built with CUDA"),
        ("no driver found", "13.0", "", "no driver found", "gpu-report machine"),
        ("", "13.0", "580.65.06", "does not say why", "gpu-report machine"),
    ],
)
def test_the_sentence(why: str, cuda: str, version: str, reason: str, remedy: str) -> None:
    said = machine.unusable("/dev/nvidia0", why, machine.enough(version, cuda, works=False))
    before, _, after = said.partition(": ") if why != TOO_OLD else said.partition("newer: ")
    assert "(/dev/nvidia0)" in before
    assert reason in before
    assert remedy in after
    assert "--train.device cpu" in after
    assert "\n" not in said


def test_a_device_is_picked_on_such_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(driver, "device_files", lambda: FILES)
    monkeypatch.setattr(machine, "usable", lambda: (0, TOO_OLD))
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match="torch cannot use the GPUs of this node"):
            pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose torch sees no GPU")
def test_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """As in a container that was started without the GPUs of its node."""
    words = ["-m", "dist_train", "--run.name=mine", "--data.train=none", "--data.val=none"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"}
    variables.pop("SLURM_JOB_ID", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: torch cannot use the GPUs of this node (CUDA_VISIBLE_DEVICES=0)")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "mine" / "status.json").exists()
