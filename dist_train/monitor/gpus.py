"""GPU statistics during training, from NVIDIA's NVML (extra `gpu-stats`), sampled beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from threading import Event, Thread
from typing import Any, NamedTuple

import torch

HANGS = 10.0  # seconds after which a driver that has not answered is reported, and its last answer dropped
# Why the clock is throttled: nvmlClocksEventReasons without that of an idle GPU.
REASONS = {
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}


class GpuSample(NamedTuple):
    """Statistics of one GPU at one moment; all zero if they are unknown.

    Attributes:
        use: share of the last second, or of a part of it, in which a kernel ran.
        memory_mb: memory in use, by all processes.
        watts: power draw; 0 if unknown.
        celsius: temperature; 0 if unknown.
        reasons: why it is throttled, the sum of bits of REASONS.
    """

    use: float = 0.0
    memory_mb: float = 0.0
    watts: float = 0.0
    celsius: float = 0.0
    reasons: float = 0.0


class GpuSampler:
    """Samples one GPU in its own thread. A driver that fails or hangs is reported once and costs nothing else.

    Args:
        nvml: the module `pynvml`.
        uuid: of the GPU, as torch has it. NVML counts in another order, and knows no CUDA_VISIBLE_DEVICES.
        say: prints a line for the user.
    """

    def __init__(self, nvml: Any, uuid: str, say: Callable[[str], None]) -> None:
        self._nvml, self._uuid, self._say = nvml, uuid, say
        self._asked, self._told = Event(), False
        self._since = 0.0  # when the current sample was asked for
        self._latest: GpuSample | None = None
        Thread(target=self._run, name="gpu sampler", daemon=True).start()

    @classmethod
    def of(cls, device: torch.device, say: Callable[[str], None]) -> GpuSampler | None:
        """Sampler of a rank's device; None on the CPU, or without nvidia-ml-py."""
        if device.type != "cuda":
            return None
        try:
            import pynvml  # torch has tried it too
        except ImportError:
            return None
        return cls(pynvml, str(torch.cuda.get_device_properties(device).uuid), say)

    def sample(self) -> None:
        """Asks for a sample, unless one is under way. Never waits."""
        if not self._asked.is_set():
            self._since = time.monotonic()
            self._asked.set()
        elif time.monotonic() - self._since > HANGS:
            self._fail(f"NVIDIA's driver has not answered for {HANGS:.0f} s")

    def latest(self) -> GpuSample | None:
        """The last finished sample."""
        return self._latest

    def _run(self) -> None:
        try:
            self._nvml.nvmlInit()
            handle = _handle(self._nvml, self._uuid)
            while self._asked.wait():
                self._latest = _read(self._nvml, handle)
                self._asked.clear()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        self._latest = None
        if not self._told:
            self._told = True
            self._say(f"GPU statistics are not recorded ({why}): training goes on")


def by_node(rows: Sequence[GpuSample], nodes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """GPU statistics per node, as recorded; nodes without any are left out.

    Args:
        rows: one sample per rank.
        nodes: the node of each rank.
    """
    known: dict[str, list[GpuSample]] = {}
    for row, node in zip(rows, nodes, strict=True):
        if any(row):
            known.setdefault(node, []).append(row)
    found = {}
    for node, its in known.items():
        use, memory, watts, celsius, reasons = zip(*its, strict=True)
        bits = reduce(or_, map(int, reasons))
        found[node] = {
            "gpu_use": sum(use) / len(its),
            "gpu_memory_mb": max(memory),
            "watts": sum(watts),
            "celsius": max(celsius),
            "throttled": [name for bit, name in REASONS.items() if bits & bit],
        }
    return found


def _handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the GPU, or of a slice of one (MIG), which reports little."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _read(nvml: Any, handle: Any) -> GpuSample:
    """A sample. Raises NVMLError if the GPU does not report its use."""

    def known(what: Callable[..., Any], *about: Any) -> float:
        try:
            return float(what(handle, *about))
        except nvml.NVMLError:  # consumer cards do not report everything
            return 0.0

    return GpuSample(
        use=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        memory_mb=nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6,
        watts=known(nvml.nvmlDeviceGetPowerUsage) / 1000,
        celsius=known(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        reasons=known(nvml.nvmlDeviceGetCurrentClocksThrottleReasons),
    )
