"""`--profile.steps`: a trace of some steps, where their time went, and a run that stays the same."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.config import Config, ConfigError, ProfileConfig
from dist_train.profiling import Profile, Recorder, profile_as
from dist_train.ranks.world import World
from dist_train.rundir import events
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import Progress
from dist_train.rundir.trace import breakdown, own_times, shares
from tests.helpers.compare import assert_same_run, status
from tests.helpers.launch import at, finish, launch, start

TRACE = Path(__file__).parent / "fixtures" / "kineto.json"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def made() -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(TRACE.read_text())
    return trace


def test_shares_of_a_trace_of_a_gpu() -> None:
    """The window is 1000 to 2000 us. Compute: 1000-1050, of a kernel begun before; 1200-1450, by two streams;
    1700-1800; 1960-2000, of a kernel that goes on. NCCL: 1450-1500 and 1800-1850, the rest of it behind compute. Data:
    1100-1150 and 1850-1860 copied, 1150-1180 decoded; 1050-1100 and 1500-1600 only waited for. What is left is idle,
    1870-1900 among it, in which results are copied to the host."""
    found = breakdown(made())
    assert found
    assert (found.first, found.last, found.seconds) == (5, 6, pytest.approx(1e-3))
    assert found.gpu == pytest.approx(
        {
            "compute": (50 + 250 + 100 + 40) / 1000,
            "communication": (50 + 50) / 1000,
            "data": (50 + 10 + 30 + 50 + 100) / 1000,
            "idle": (20 + 100 + 100) / 1000,
        }
    )
    assert found.host == pytest.approx({"data": 0.2, "step": 0.5, "save": 0.1, "other": 0.2})
    assert len(found.most) == 10
    names = [(c.name.split("<")[0].split("(")[0], c.ms, c.share, c.calls) for c in found.most[:3]]
    assert names[0] == ("void cutlass::Kernel2", pytest.approx(0.28), pytest.approx(0.28), 2)
    assert names[1] == ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", pytest.approx(0.15), pytest.approx(0.15), 2)
    assert names[2] == ("void at::native::vectorized_elementwise_kernel", pytest.approx(0.1), pytest.approx(0.1), 1)
    assert found.text()[1] == "GPU: compute 44.0%, communication 10.0%, data 24.0%, idle 22.0%"
    assert all(len(line) < 120 for line in found.text())


def test_shares_of_a_trace_without_a_gpu() -> None:
    """The same without what the GPU did. Of an operator counts what it does itself."""
    trace = made()
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("cat") not in ON_GPU]
    found = breakdown(trace)
    assert found
    assert found.gpu is None
    assert found.host == pytest.approx({"data": 0.2, "step": 0.5, "save": 0.1, "other": 0.2})
    assert {c.name: (round(1000 * c.ms), c.calls) for c in found.most} == {
        "aten::convolution_backward": (200, 1),
        "aten::cudnn_convolution": (160, 1),
        "aten::convolution": (20 + 25, 2),
        "aten::conv2d": (20 + 5, 2),
    }
    assert breakdown({"traceEvents": []}) is None


def test_shares_of_random_spans() -> None:
    """Against moments that are counted one by one."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        classes = [[(int(a), int(a + d)) for a, d in rng.integers(0, 30, (n, 2))] for n in rng.integers(0, 6, 3)]
        low, high = 10, 40
        kinds = np.full(high - low, 3)
        for kind, spans in reversed(list(enumerate(classes))):
            for a, b in spans:
                kinds[max(0, a - low) : max(0, b - low)] = kind
        assert shares((low, high), *classes) == pytest.approx([(kinds == kind).mean() for kind in range(4)])


def test_own_times_are_those_of_torch(tmp_path: Path) -> None:
    """Of a real trace, of forward and backward on two threads, as torch's own table has them."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            net(torch.ones(2, 3, 8, 8)).sum().backward()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    found = defaultdict[str, float](float)
    trace = json.loads((tmp_path / "trace.json").read_text())
    for name, time in own_times(event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"):
        found[name] += time
    theirs = {row.key: row.self_cpu_time_total for row in recorded.key_averages()}
    assert len(found) > 20
    assert dict(found) == pytest.approx({name: theirs[name] for name in found}, abs=5)


def test_off_nothing_stands_between_the_loop_and_its_batches() -> None:
    off = profile_as(Config().profile, world=None, run=None)  # type: ignore[arg-type]
    assert type(off) is Profile
    epoch = iter(())
    assert off.batches(epoch, None, 10) is epoch  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "resumed", "ends", "expected"),
    [
        (ProfileConfig(3), 0, 100, range(21, 24)),  # after the warm-up
        (ProfileConfig(3), 33, 100, range(54, 57)),  # of this start
        (ProfileConfig(3, at=4), 0, 100, range(4, 7)),
        (ProfileConfig(3, at=1), 0, 100, range(1, 4)),
        (ProfileConfig(3, at=8), 0, 100, range(8, 11)),  # to the last step of an epoch
        (ProfileConfig(3, at=9), 0, 100, range(11, 14)),  # not across a validation
        (ProfileConfig(3, at=4), 33, 100, range(54, 57)),  # passed: counted from the step resumed from
        (ProfileConfig(3, at=40), 33, 100, range(41, 44)),
        (ProfileConfig(3, at=34), 33, 100, range(34, 37)),
        (ProfileConfig(99, at=4), 0, 100, range(11, 21)),  # longer than an epoch: all of one
        (ProfileConfig(5, at=4), 0, 5, range(4, 6)),  # the run ends within it
        (ProfileConfig(5, at=200), 0, 100, range(0)),
        (ProfileConfig(5), 0, 20, range(0)),  # a run no longer than the warm-up
        (ProfileConfig(5, at=9), 0, 10, range(0)),  # there is no next epoch
    ],
)
def test_which_steps_are_recorded(
    config: ProfileConfig, resumed: int, ends: int, expected: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In epochs of ten steps. The loop gets every batch, whatever is recorded."""
    said = list[str]()
    recorder = Recorder(config, None, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    recorded, names = list[str](), list[str]()
    monkeypatch.setattr(recorder, "_begin", lambda: (names.append("begin"), setattr(recorder, "_over", True)))
    monkeypatch.setattr(recorder, "_range", lambda name: _Noted(name, recorded))
    seen = list[int]()
    step = resumed
    while step < ends:
        progress: Any = type("Progress", (), {"step": step, "step_in_epoch": step % 10})
        for batch in recorder.batches(iter(range(step, step // 10 * 10 + 10)), progress, 10):
            seen.append(batch)  # type: ignore[arg-type]
            step += 1
            if step == ends:
                break
        recorder.end()
    assert seen == list(range(resumed, ends))
    assert [int(name.removeprefix("ProfilerStep#")) for name in recorded if "#" in name] == list(expected)
    assert names == ["begin"] * bool(expected)
    recorder.close(step)
    first = (config.at if config.at > ends else 21) if ends > 10 else 11
    due = f"the run ended at step {ends}, and step {first} was to be the first"
    expected_line = f"profile: nothing is recorded: {due}: name an earlier one by --profile.at"
    assert said == ([] if expected else [expected_line])


class _Noted:
    def __init__(self, name: str, into: list[str]) -> None:
        self.name, self.into = name, into

    def __enter__(self) -> None:
        self.into.append(self.name)

    def __exit__(self, *_: object) -> None: ...


def test_a_trace_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Of a stranger's run directory. One sentence says so, and the loop goes on."""
    run, elsewhere, said = tmp_path / "run", tmp_path / "elsewhere", list[str]()
    for folder in (run, elsewhere):
        folder.mkdir()
    (run / "profile").symlink_to(elsewhere)
    directory = RunDirectory(run, said.append, keep=2, writes=True)
    directory.lease.acquire()
    recorder = Recorder(ProfileConfig(1, at=1), World(0, 1, 0, 1, torch.device("cpu")), directory)
    assert list(recorder.batches(iter(range(3)), Progress(), 3)) == [0, 1, 2]  # type: ignore[arg-type, comparison-overlap]
    assert os.listdir(elsewhere) == []
    (line,) = said
    assert line.startswith("profile: the trace is lost (")
    assert "is a link, which is not followed" in line


@pytest.mark.parametrize("word", ["--profile.steps=101", "--profile.steps=-1", "--profile.at=-1"])
def test_bounds(word: str) -> None:
    key, value = word[2:].split("=")
    with pytest.raises(ConfigError, match=f"{key} is {value}: it must"):
        Config(profile=ProfileConfig(**{key.split(".")[1]: int(value)}))


def steps_of(path: Path) -> list[int]:
    """Those that a trace has, from its file as a viewer reads it."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    return sorted(int(name.removeprefix("ProfilerStep#")) for name in names if name.startswith("ProfilerStep#"))


RUN = ("--checkpoint.steps=5", "--train.accumulate=2")


@pytest.fixture(scope="module")
def plain(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without the profiler."""
    run = tmp_path_factory.mktemp("plain") / "run"
    assert launch(shard_sets, run, *RUN).returncode == 0
    return run


@pytest.mark.integration
def test_a_run_with_the_profiler_is_the_same(plain: Path, shard_sets: Path, tmp_path: Path) -> None:
    """Bit for bit, on two ranks: state and record. Each rank leaves a trace, rank 0 where the time went."""
    result = launch(shard_sets, tmp_path / "run", *RUN, "--profile.steps=4", "--profile.at=3")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", plain)
    folder = tmp_path / "run" / "profile"
    assert sorted(os.listdir(folder)) == ["rank-0.json.gz", "rank-1.json.gz", "summary.json"]
    assert [steps_of(folder / f"rank-{rank}.json.gz") for rank in (0, 1)] == [[3, 4, 5, 6]] * 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["first"], summary["last"], summary["trace"]) == (3, 6, "rank-0.json.gz")
    assert summary["gpu"] is None
    assert sum(summary["host"].values()) == pytest.approx(1)
    assert summary["host"]["step"] > 0.3
    assert summary["host"]["save"] > 0, "after step 5"
    assert len(summary["most"]) == 10
    (event,) = [event for event in events.read(tmp_path / "run") if event["event"] == "profile"]
    assert (event["step"], event["first"], event["host"]) == (6, 3, summary["host"])
    assert "profile of steps 3 to 6: " in result.stderr
    assert f"open {folder}/rank-0.json.gz in https://ui.perfetto.dev" in result.stderr
    assert "gpuGetDeviceCount" not in result.stderr, "what the library says of itself is nobody's business"


@pytest.mark.integration
@pytest.mark.parametrize("by", ["stop", "kill"])
def test_a_run_that_ends_within_the_window(shard_sets: Path, plain: Path, tmp_path: Path, by: str) -> None:
    """It leaves no half of a trace. It goes on with another window, which it may: the setting decides no number."""
    run = tmp_path / "run"
    number = signal.SIGTERM if by == "stop" else signal.SIGKILL
    first = start(
        shard_sets, run, *RUN, "--profile.steps=9", "--profile.at=2", ranks=0, fault=at("step", 7, number.name)
    )
    assert finish(first).returncode != 0
    assert not (run / "profile").exists()
    result = launch(shard_sets, run, *RUN, "--profile.steps=2", "--profile.at=13", ranks=0)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert steps_of(run / "profile" / "rank-0.json.gz") == [13, 14]
    assert status(run)["state"] == "done"
