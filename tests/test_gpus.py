"""GPU statistics of a run, with the tests' own library in place of NVIDIA's: it simulates what a driver may do."""

from __future__ import annotations

import sys
from threading import Event
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from dist_train.monitor import gpus
from dist_train.monitor.gpus import REASONS, GpuSample, GpuSampler, by_node
from tests.helpers.drills import until

UUID = "11111111-2222-3333-4444-555555555555"


class Driver:
    """In the place of `pynvml`. It knows GPU 1 only, which torch may call cuda:0, and MIG slices by their own names."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self) -> None:
        self.known = {f"GPU-{UUID}": "handle 1"}
        self.lacks: set[str] = set()
        self.asked: list[str] = []
        self.broken: Exception | None = None
        self.answers = Event()  # which it waits for
        self.answers.set()

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.broken

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked.append(name)
        if name not in self.known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.known[name]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self.answers.wait(60)
        return SimpleNamespace(gpu=self._said(93, "use"), memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80_000_000_000, used=812_000_000)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._said(600_500, "power")

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self._said(61, "temperature")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._said(pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle, "reasons")

    def _said(self, value: int, what: str) -> int:
        if what in self.lacks:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value


@pytest.fixture
def nvidia() -> Driver:
    return Driver()


def test_a_sample(nvidia: Driver) -> None:
    said: list[str] = []
    sampler = GpuSampler(nvidia, UUID, said.append)
    assert sampler.latest() is None, "it was not asked"
    sampler.sample()
    until(sampler.latest)
    assert sampler.latest() == GpuSample(0.93, 812.0, 600.5, 61.0, 5.0)
    assert nvidia.asked == [f"GPU-{UUID}"], "NVML's numbers of GPUs are not torch's"
    assert not said


def test_a_card_that_does_not_say_all(nvidia: Driver) -> None:
    nvidia.lacks = {"power", "temperature", "reasons"}
    said: list[str] = []
    sampler = GpuSampler(nvidia, UUID, said.append)
    sampler.sample()
    until(sampler.latest)
    assert sampler.latest() == GpuSample(0.93, 812.0)
    assert not said


def test_a_slice_of_a_gpu(nvidia: Driver) -> None:
    """How much a slice is used is not known."""
    nvidia.known = {f"MIG-{UUID}": "handle of a slice"}
    nvidia.lacks = {"use", "power", "temperature", "reasons"}
    said: list[str] = []
    sampler = GpuSampler(nvidia, UUID, said.append)
    sampler.sample()
    until(lambda: said)
    assert said == ["GPU statistics are not recorded (NVMLError_NotSupported: Not Supported): training goes on"]
    assert nvidia.asked == [f"GPU-{UUID}", f"MIG-{UUID}"]
    assert sampler.latest() is None


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), "NVMLError_LibraryNotFound: NVML Shared Library Not"),
        (OSError("of no use"), "OSError: of no use"),
    ],
)
def test_a_driver_that_fails(nvidia: Driver, broken: Exception, why: str) -> None:
    nvidia.broken = broken
    said: list[str] = []
    sampler = GpuSampler(nvidia, UUID, said.append)
    until(lambda: said)
    for _ in range(3):
        sampler.sample()
    assert sampler.latest() is None
    assert len(said) == 1
    assert why in said[0]


def test_a_driver_that_hangs(nvidia: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it; what it said before counts no more, until it answers again."""
    said: list[str] = []
    sampler = GpuSampler(nvidia, UUID, said.append)
    sampler.sample()
    until(sampler.latest)
    nvidia.answers.clear()
    until(lambda: sampler.sample() or sampler._asked.is_set())
    sampler.sample()
    assert sampler.latest() == GpuSample(0.93, 812.0, 600.5, 61.0, 5.0), "it is not late yet"
    monkeypatch.setattr(gpus, "HANGS", -1.0)
    for _ in range(3):
        sampler.sample()
    assert sampler.latest() is None
    assert said == ["GPU statistics are not recorded (NVIDIA's driver has not answered for -1 s): training goes on"]
    monkeypatch.setattr(gpus, "HANGS", 60.0)
    nvidia.answers.set()
    until(sampler.latest)


def test_nobody_samples_without_a_gpu_or_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(text: str) -> None:
        raise AssertionError(text)

    assert GpuSampler.of(torch.device("cpu"), say) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuSampler.of(torch.device("cuda:0"), say) is None


def test_by_node() -> None:
    """Of each node the mean use, the largest memory, all watts, the highest temperature, and every reason."""
    rows = [GpuSample(0.5, 800, 300, 60, 0x4), GpuSample(), GpuSample(1.0, 900, 350, 70, 0x44 | 1), GpuSample()]
    assert by_node(rows, ["a", "a", "a", "b"]) == {
        "a": {
            "gpu_use": 0.75,
            "gpu_memory_mb": 900,
            "watts": 650,
            "celsius": 70,
            "throttled": ["sw_power_cap", "hw_thermal"],
        }
    }
    assert by_node([GpuSample(0, 10, 0, 0, 0)] * 2, ["b", "a"])["a"]["throttled"] == []
    assert by_node([], []) == {}


def test_the_reasons_are_nvidias() -> None:
    bits = {
        "applications_clocks": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
        "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
        "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        "hw_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        "display_clocks": pynvml.nvmlClocksEventReasonDisplayClockSetting,
        "board_limit": pynvml.nvmlClocksThrottleReasonBoardLimit,
        "reliability": pynvml.nvmlClocksThrottleReasonReliability,
    }
    assert {name: bit for bit, name in REASONS.items()} == bits
    assert pynvml.nvmlClocksEventReasonGpuIdle not in REASONS
