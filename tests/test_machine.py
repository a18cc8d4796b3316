"""Machine checks against recorded output of NVIDIA's programs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from dist_train import driver, machine
from dist_train.driver import Card, cards

CLOSED = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22-I3-B17-02-5)  \
Tue Sep 23 09:55:41 UTC 2025
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04.2)
"""
EIGHT = "".join(f"{i}, GPU-0000000{i}, NVIDIA H100 80GB HBM3, 81559, 9.0, Disabled, 580.95.05\n" for i in range(8))
MIXED = """\
0, GPU-aaaa, NVIDIA A100-SXM4-40GB, 40960, 8.0, Enabled, 535.129.03
1, GPU-bbbb, Tesla T4, 15360, 7.5, [N/A], 535.129.03
"""
APPS = """\
4242, GPU-aaaa, 1532
4243, GPU-bbbb, 612
[Not Found], GPU-aaaa, [N/A]
"""
NVSWITCH = "\n".join(
    ["\t" + "\t".join(f"GPU{i}" for i in range(8)) + "\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID"]
    + [
        f"GPU{i}\t" + "\t".join(" X " if i == j else "NV18" for j in range(8)) + "\tPXB\t0-55,112-167\t0\t\tN/A"
        for i in range(8)
    ]
    + ["NIC0\t" + "\t".join(["PXB"] * 8) + "\t X ", "", "Legend:", "", "  X    = Self", "  NV#  = NVLinks"]
)
PCIE = """\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tSYS\t0-15\t0\t\tN/A
GPU1\tSYS\t X \t16-31\t1\t\tN/A
"""
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040)."


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a program of the name of nvidia-smi, the only one there is."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def write(program: Path, body: str) -> None:
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.129.03"), (OPEN, "580.95.05"), ("NVRM version: ?", "")])
def test_the_version_of_the_kernel_module(text: str, version: str) -> None:
    assert driver.kernel_module(text) == version


def test_cards() -> None:
    assert len(cards(EIGHT)) == 8
    assert cards(EIGHT)[7] == Card(7, "GPU-00000007", "NVIDIA H100 80GB HBM3", "81559", "9.0", "Disabled", "580.95.05")
    assert [card.mig for card in cards(MIXED)] == ["Enabled", "[N/A]"]
    assert cards("No devices were found\n") == []


def test_who_holds_memory() -> None:
    """What another user's container hides has no number."""
    assert driver.holders(APPS) == [(4242, "GPU-aaaa", "1532"), (4243, "GPU-bbbb", "612")]


def test_nvidia_smi_answers(smi: Path) -> None:
    write(smi, 'echo "$@"')
    assert driver.nvidia_smi("topo", "-m") == driver.Answer("topo -m\n")


def test_nvidia_smi_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert driver.nvidia_smi("topo", "-m") == driver.Answer(
        "", "nvidia-smi cannot be started (No such file or directory)"
    )


def test_nvidia_smi_fails(smi: Path) -> None:
    write(smi, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    why = "nvidia-smi has failed: Failed to initialize NVML: Driver/library version mismatch"
    assert driver.nvidia_smi() == driver.Answer("", why)
    write(smi, "exit 9")
    assert driver.nvidia_smi().why == "nvidia-smi has failed: exit code 9"


def test_nvidia_smi_hangs(smi: Path) -> None:
    write(smi, "echo half; exec sleep 60")
    began = time.monotonic()
    assert driver.nvidia_smi(seconds=0.2) == driver.Answer("", "nvidia-smi has not answered within 0.2 s")
    assert time.monotonic() - began < 50, "it was waited for"


@pytest.mark.parametrize(
    ("version", "cuda", "works", "level"),
    [
        ("580.65.06", "13.0", True, "ok"),
        ("580.65.06", "13.0", False, "ok"),  # something else is wrong then
        ("550.54.15", "13.0", False, "fail"),
        ("550.54.15", "13.0", True, "ok"),  # by NVIDIA's compatibility package
        ("550.54.15", "12.8", False, "ok"),
        ("470.256.02", "12.8", False, "fail"),
        ("550.54.15", "", False, "ok"),
        ("", "13.0", True, "warn"),
    ],
)
def test_drivers(version: str, cuda: str, works: bool, level: str) -> None:
    check = machine.enough(version, cuda, works=works)
    assert check.level == level
    if level == "fail":
        assert "too old for torch's CUDA" in check.found
        assert check.remedy == machine.REMEDY


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would train on the CPUs of such a node."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    files = [f"/dev/nvidia{i}" for i in range(8)]
    for known, silence in ((cards(EIGHT), ""), ([], "nvidia-smi cannot be started (No such file or directory)")):
        check = machine.gpus(files, 0, TOO_OLD, known, silence)
        said = f"{TOO_OLD}; {silence}" if silence else TOO_OLD
        assert (check.level, check.found) == ("fail", f"torch cannot use the 8 of this machine: {said}")
        assert "a newer driver" in check.remedy
        assert "make .venv/ready EXTRA=cuda12" in check.remedy, "which is what installs"
    check = machine.gpus(files, 0, "it is built without CUDA", cards(EIGHT), "")
    assert check.remedy == "Install a torch that is built with CUDA."
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.gpus(files, 0, "", cards(EIGHT), "").level == "ok", "the user has wanted it"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.gpus(files, 0, "", cards(EIGHT), "").level == "fail"


def test_gpus_that_torch_can_use() -> None:
    files = [f"/dev/nvidia{i}" for i in range(8)]
    found = "8 x NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0"
    assert machine.gpus(files, 8, "", cards(EIGHT), "") == ("GPUs", "ok", found, "")
    assert machine.gpus(files, 2, "", cards(EIGHT), "").found == f"{found}; torch can use 2 of them"
    two = machine.gpus(files[:2], 2, "", cards(MIXED), "")
    assert two.found.startswith("1 x NVIDIA A100-SXM4-40GB, 40960 MiB, compute capability 8.0; 1 x Tesla T4")
    assert machine.gpus(files, 8, "", [], "nvidia-smi has failed: no").level == "warn"


def test_none_is_no_fault() -> None:
    check = machine.gpus([], 0, "", [], "nvidia-smi cannot be started (No such file or directory)")
    assert (check.level, check.remedy) == ("ok", "")


def test_jpeg_decoders() -> None:
    """By card: A100 and H100 have one, T4 and RTX 3090 have none."""
    assert machine.jpeg_decoder(cards(EIGHT)).found.startswith("in hardware")
    assert machine.jpeg_decoder(cards(MIXED)).found == "none in hardware on Tesla T4"
    (rtx,) = cards("0, GPU-cccc, NVIDIA GeForce RTX 3090, 24576, 8.6, [N/A], 580.95.05")
    assert machine.jpeg_decoder([rtx]).found == "none in hardware on NVIDIA GeForce RTX 3090"


def test_mig() -> None:
    assert machine.mig(cards(EIGHT)).level == "ok"
    check = machine.mig(cards(MIXED))
    assert check.level == "warn"
    assert "on GPU 0:" in check.found


def test_topology() -> None:
    assert machine.links(NVSWITCH).found == "8 GPUs, connected by NV18"
    assert machine.links(PCIE).found == "2 GPUs, connected by SYS"
    assert machine.links("GPU0\t X \t0-15\t0\t\tN/A\n").found == "one GPU"
    assert machine.links("").found == "unknown to nvidia-smi"


def test_who_uses_the_first_gpu() -> None:
    assert machine.occupied("", cards(MIXED)).level == "ok"
    check = machine.occupied(APPS, cards(MIXED))
    assert (check.level, check.found) == ("warn", "used by process 4242 (1532 MiB)")


def test_the_rest(tmp_path: Path) -> None:
    assert machine.cpus_of_a_gpu(128, 8) == ("CPUs", "ok", "128, 16 per GPU", "")
    assert machine.cpus_of_a_gpu(8, 8).level == "warn"
    assert machine.compiler("/usr/bin/gcc", header=True).level == "ok"
    assert machine.compiler("", header=False).found == "torch.compile lacks a C compiler and Python.h"
    assert machine.compiler("/usr/bin/gcc", header=False).found == "torch.compile lacks Python.h"
    assert machine.space("disk", tmp_path, 0, "TMPDIR").level == "ok"
    assert machine.space("disk", tmp_path, 1e9, "TMPDIR").remedy == "Give it 1e+09 GB or more (TMPDIR)."


def test_all_of_them_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever machine this is; one that breaks is said and stops no other."""

    def broken() -> machine.Check:
        raise OSError("of no use")

    monkeypatch.setattr(machine, "software", broken)
    found = {check.name: check for check in machine.checks()}
    assert found["software"].level == "warn"
    assert found["software"].found == "cannot be determined (of no use)"
    assert {"system", "GPUs", "compiler", "shared memory", "disk"} <= set(found)
    for check in found.values():
        assert (check.level == "ok") == (check.remedy == ""), check
        assert "\n" not in check.found


def test_the_system(tmp_path: Path) -> None:
    """Without any GPU, too; and the folder whose disk is looked at can be chosen."""
    found = {check.name: check.found for check in machine.checks(tmp_path)}
    assert os.uname().release in found["system"]
    assert f"{len(os.sched_getaffinity(0))} CPU" in found["system"]
    assert found["system"].endswith(" GB of memory")
    assert found["disk"].endswith(f" GB free in {tmp_path}")
    assert machine.processor("processor\t: 0\nmodel\t: 2\nmodel name\t: AMD EPYC 9554\n") == "AMD EPYC 9554"
    assert machine.processor("processor\t: 0\nCPU implementer\t: 0x41\n") == ""


def test_versions_are_those_that_are_installed() -> None:
    found = machine.versions()
    assert found["torch"] == torch.__version__
    assert found.get("CUDA") == torch.version.cuda


def test_a_broken_gpu_breaks_no_check(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cards, as their programs show them, on a machine whose torch sees none."""
    write(smi, f"case $1 in topo) echo nonsense;; *apps*) exit 3;; *) cat <<'END'\n{EIGHT}END\n;; esac")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "usable", lambda: (0, TOO_OLD))
    monkeypatch.setattr(driver, "device_files", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(driver, "version", lambda: "")
    levels = {check.name: check.level for check in machine.checks()}
    assert list(levels)[2:9] == ["GPUs", "driver", "JPEG decoder", "MIG", "topology", "GPU 0", "CPUs"]
    assert levels["GPUs"] == "fail"
    assert levels["driver"] == "warn"


def test_processes_of_all_gpus(smi: Path) -> None:
    write(smi, f"case $1 in *apps*) cat <<'END'\n{APPS}END\n;; *) cat <<'END'\n{MIXED}END\n;; esac")
    assert driver.gpu_processes(driver.known_cards()) == {(4242, 0), (4243, 1)}


def test_an_accelerator_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.accelerator(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "version", lambda: "580.65.06")
    for number, version in ((91002, "9.10.2"), (8907, "8.9.7")):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda number=number: number)
        assert machine.accelerator(torch.device("cuda:1")) == (
            f"NVIDIA H100 80GB HBM3, driver 580.65.06, CUDA 13.0, NCCL 2.27.5, cuDNN {version}"
        )
