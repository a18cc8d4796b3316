"""`python -m dist_train gpu-report`: no part stops another, none is forgotten, and no process is left.

What its parts find is tested where no GPU is needed for it; on a machine with GPUs the report itself is the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, JpegImagePlugin

from dist_train import __version__, driver, machine
from dist_train.__main__ import main
from dist_train.analysis import commands, gpu_parts, gpu_report, gpu_speed, gpu_tables, gpu_tests
from dist_train.analysis.findings import Findings
from dist_train.analysis.gpu_report import Part, Report, code, prefix_of
from dist_train.analysis.gpu_site import Site, halves_chroma
from dist_train.analysis.gpu_speed import Places, Timing, all_reduce_rate, costs_of_determinism, timings
from dist_train.cli import parse
from pipelines.augment import Augment
from pipelines.dali import Decode
from pipelines.shards import ShardSet
from tests.helpers.launch import alive, children, finish, python, spawn


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for temporary files: pytest's have names too long for the sockets that lie in them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


CODE = {"version": "0.1.0", "commit": "", "changed": None}
PARTS = ["machine", "decoder", "pooling", "tests", "resume", "drills", "speed"]
# What a part is to the report: a command that writes into the file after --result=.
FOUND = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
file = Path(sys.argv[1].removeprefix("--result="))

def found(state, reason="", **result):
    file.write_text(json.dumps({"state": state, "reason": reason, "result": result}))
"""
# A process in a session of its own, whose parent is gone: torchrun's worker after torchrun's end.
ORPHAN = """
child = [sys.executable, "-c", "import time; time.sleep(600)"]
program = f"import subprocess; print(subprocess.Popen({child}, stdout=-3, start_new_session=True).pid)"
pid = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout)
"""


def part(name: str, body: str, seconds: float = 60) -> Part:
    return Part(name, seconds, [sys.executable, "-c", FOUND + body])


def report(tmp_path: Path, *parts: Part, minutes: float = 10) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and text of a report of these parts."""
    files = [tmp_path / "r.json", tmp_path / "r.txt"]
    made = Report(files, minutes, {"command": "python -m dist_train gpu-report", "code": CODE, "gpus": 0})
    code = made.run(parts)
    return code, json.loads(files[0].read_text()), files[1].read_text()


def launched(report: int) -> list[int]:
    """The workers of the launcher that a part of this report has started, which are in sessions of their own."""
    with suppress(OSError):  # of one that has just gone
        launchers = [pid for child in children(report) for pid in children(child)]
        said = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in launchers}
        return [worker for pid in launchers if b"torch.distributed.run" in said[pid] for worker in children(pid)]
    return []


def kept(tmp_path: Path) -> dict[str, Any]:
    """What a part has left in the file f."""
    found: dict[str, Any] = json.loads((tmp_path / "f").read_text())
    return found


@pytest.mark.integration
def test_no_part_stops_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of each kind; of the one that is cut off, what it had found is kept, and none of its processes."""
    code, found, text = report(
        tmp_path,
        part("fine", "print('half way', flush=True); found('ok', answer=42); time.sleep(0.5)"),
        part("broken", "found('ok', half=1)\nprint('some words', file=sys.stderr)\nraise ValueError('no such luck')"),
        part("crashed", "os.kill(os.getpid(), signal.SIGSEGV)"),
        part("slow", f"{ORPHAN}\nfound('warn', 'odd', pid=pid)\ntime.sleep(600)", seconds=6),
        part("absent", "found('left out', 'there is no GPU')"),
        part("odd", f"{ORPHAN}\nfound('warn', 'a word', pid=pid)"),
        part("wrong", "print('why it is', file=sys.stderr)\nfound('failed', 'it is')"),
        Part("hopeless", 60, ["/nowhere"], "torch cannot"),
    )
    assert code == 1
    parts = found["parts"]
    assert [(name, p["state"], p["reason"]) for name, p in parts.items()] == [
        ("fine", "ok", ""),
        ("broken", "failed", "ValueError: no such luck"),
        ("crashed", "failed", "killed by SIGSEGV"),
        ("slow", "cut off", "it took more than 6 s: raise --minutes; odd"),
        ("absent", "left out", "there is no GPU"),
        ("odd", "warn", "a word"),
        ("wrong", "failed", "it is"),
        ("hopeless", "failed", "torch cannot"),
    ]
    assert (parts["fine"]["result"], parts["broken"]["result"]) == ({"answer": 42}, {"half": 1})
    assert parts["broken"]["output"][0] == "some words"
    assert parts["wrong"]["output"] == ["why it is"]
    assert "output" not in parts["fine"]
    for name in ("slow", "odd"):
        assert not alive(parts[name]["result"]["pid"]), f"a process of {name} is left"
    assert 6 <= parts["slow"]["seconds"] < 30
    assert (found["format"], found["gpus"]) == (1, 0)

    lines = text.splitlines()
    for name, p in parts.items():
        assert any(line.split()[0] == name and p["reason"] in line for line in lines if line), name
    assert "| some words" in text
    assert "may quote paths of this machine" in text
    said = capsys.readouterr().err
    assert "1/8 fine: half way\n" in said
    assert "2/8 broken: failed, " in said


def test_what_is_left_out_is_no_failure(tmp_path: Path) -> None:
    body = "found('warn', 'hm', a=1 / 3, b=[2000000 / 3], c={'d': 10**9 + 1})"
    code, found, text = report(tmp_path, part("a", "found('left out', 'no GPU')"), part("b", body))
    assert code == 0, found
    assert found["parts"]["b"]["result"] == {"a": 0.333333, "b": [666667], "c": {"d": 1000000001}}
    assert "may quote paths" not in text


@pytest.mark.integration
def test_time_that_is_over(tmp_path: Path) -> None:
    """The limit of a part ends with the report's; what has no turn then is said to have had none."""
    code, found, _ = report(
        tmp_path, part("a", "found('ok'); time.sleep(600)"), part("b", "found('ok')"), minutes=2.5 / 60
    )
    assert code == 1
    a, b = found["parts"].values()
    assert (a["state"], b["state"]) == ("cut off", "cut off")
    assert a["reason"].startswith("the 0.04")
    assert "before its turn" in b["reason"]
    assert b["result"] == {}


def test_what_comes_after_ctrl_c_has_no_turn(tmp_path: Path) -> None:
    interrupting = "found('ok', half=1); os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    code, found, text = report(tmp_path, part("a", interrupting), part("b", "found('ok')"))
    assert code == 130
    assert found["parts"]["a"]["result"] == {"half": 1}
    assert [p["reason"] for p in found["parts"].values()] == ["interrupted", "interrupted before its turn"]
    assert "interrupted before its turn" in text


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_known(number: int, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose disk is nearly full, too, which the first part warns of."""
    monkeypatch.chdir(tmp_path)
    words = python("dist_train", "gpu-report", "machine", "speed", "--out=r")
    run = spawn(words, env={"TMPDIR": str(short)}, how="exec")
    deadline = time.monotonic() + 120
    while not (workers := launched(run.pid)):
        assert alive(run.pid)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)  # a terminal interrupts its whole group
    result = finish(run, timeout=30)
    assert result.returncode == 130, result.stderr
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert not any(map(alive, workers))
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["command"] == "python -m dist_train gpu-report machine speed --minutes=10 --out=r"
    assert list(found["parts"]) == ["machine", "speed"]
    assert found["parts"]["machine"]["state"] in ("ok", "warn")
    speed = found["parts"]["speed"]
    assert (speed["state"], speed["reason"].partition(";")[0]) == ("cut off", "interrupted")
    assert "interrupted" in (tmp_path / "r.txt").read_text()
    assert sorted(os.listdir(tmp_path)) == ["r.json", "r.txt"]
    assert os.listdir(short) == []


def test_errors_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.json").mkdir()
    for words, message in [
        (["sped"], "unknown part sped: did you mean speed?"),
        (["zzz"], f"unknown part zzz: the parts are {', '.join(PARTS)}"),
        (["--minutes=0"], "argument --minutes: 0 is below 1"),
        (["--out=no/r"], "no/r.json cannot be written (there is no folder no): choose another place with --out"),
        (["--out=d"], "d.json cannot be written (it is no file): choose another place with --out"),
        (["--data=none"], "none"),
        (["--part"], "unknown option --part: see `python -m dist_train gpu-report --help`"),
    ]:
        assert main(["gpu-report", *words]) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["d.json"]


def test_gpus_that_torch_cannot_use_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not measured as if it were a machine without any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_report, "usable", lambda _: (0, "the driver is too old"))
    monkeypatch.setattr(driver, "device_files", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(driver, "hidden", lambda: False)
    assert main(["gpu-report", "speed"]) == 1
    assert "torch cannot use the GPUs of this machine: the driver is too old" in capsys.readouterr().out


@pytest.mark.integration
def test_a_driver_that_hangs_is_named() -> None:
    """Nobody waits for it, and what a program that fails says is not lost."""
    assert gpu_report.usable(3, "import time; time.sleep(600)") == (0, "CUDA has not answered in 3 s")
    assert gpu_report.usable(60, "raise RuntimeError('no such library')") == (0, "RuntimeError: no such library")
    assert gpu_report.usable(60, "print(json.dumps([2, 'why']))") == (2, "why")


@pytest.mark.integration
@pytest.mark.slow
def test_what_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """For real: three parts on this machine, on its CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["gpu-report", "pooling", "machine", "decoder"]) == 0
    text = capsys.readouterr().out
    name = "gpu-report-machine-decoder-pooling"
    assert sorted(os.listdir(tmp_path)) == [f"{name}.json", f"{name}.txt"], "a report of all parts is not overwritten"
    assert text == (tmp_path / f"{name}.txt").read_text()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(found["parts"]) == ["machine", "decoder", "pooling"], "in their order"
    assert found["command"] == "python -m dist_train gpu-report pooling machine decoder --minutes=10"
    results = [p["result"] for p in found["parts"].values()]
    assert results[0]["versions"]["torch"] == torch.__version__
    disk = next(check["found"] for check in results[0]["checks"] if check["name"] == "disk")
    assert disk.endswith(f" GB free in {tempfile.gettempdir()}"), "not in a folder that is gone"
    assert results[1]["same_bits_in_batches_of"] == {"CPU": {"1": True, "17": True, "64 only 4:2:0": True}}
    assert "levels_from_the_cpu" not in results[1]
    assert [row["gradients"] for row in results[2].values()] == [1, 1]
    assert "its decoder was left out" in text
    assert "all 20 the same" in text
    assert max(map(len, text.splitlines())) <= gpu_tables.WIDTH
    assert found["code"] == code()


@pytest.mark.parametrize(
    ("out", "parts", "prefix"),
    [
        (None, PARTS, "gpu-report"),
        (None, ["speed"], "gpu-report-speed"),
        (None, ["machine", "speed"], "gpu-report-machine-speed"),
        ("a/b.txt", PARTS, "a/b"),
        ("b.json", ["speed"], "b"),
        ("v1.2", PARTS, "v1.2"),
    ],
)
def test_names_of_the_files(out: str | None, parts: list[str], prefix: str) -> None:
    assert prefix_of(Path(out) if out else None, parts) == Path(prefix)


def test_which_code_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, a clone that is as it was committed, one that is not, and one without git."""
    installed = {"version": __version__, "commit": "", "changed": None}
    assert code(tmp_path) == installed
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    (tmp_path / "gpu-report.json").touch()  # git does not know it
    found = code(tmp_path)
    assert (found["version"], len(found["commit"]), found["changed"]) == (__version__, 40, False)
    with open(tmp_path / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert code(tmp_path) == found | {"changed": True}
    monkeypatch.setenv("PATH", "/nowhere")
    assert code(tmp_path) == installed


def test_a_report_as_text() -> None:
    """Of one GPU, in lines that fit; long reasons go on in their column."""
    apart = {"hw_decoder_load 1": {"max": 2, "mean": 0.1}, "hw_decoder_load 0.65": {"max": 3, "mean": 0.2}}
    same = {"hw_decoder_load 1": {"1": True, "17": True}, "hw_decoder_load 0.65": {"1": True, "17": False}}
    remedy = {"level": "fail", "name": "driver", "found": "old " * 60, "remedy": machine.REMEDY}
    tests = {"passed": ["a"], "failed": {}, "skipped": {f"test_{i}": "needs 4 GPUs, and there is 1" for i in range(30)}}
    results = {
        "machine": {"checks": [remedy]},
        "decoder": {"images": 512, "levels_from_the_cpu": apart, "same_bits_in_batches_of": same},
        "pooling": {"a": {"times": 20, "gradients": 3, "torch_warns": False}},
        "tests": tests,
        "speed": {"all_reduce_gb_per_s": {"algorithm": 122.0, "bus": 213.5}},
    }
    parts = {
        name: {"state": "ok", "reason": "a long reason " * 20, "seconds": 1, "result": result}
        for name, result in results.items()
    }
    told = {"code": CODE | {"commit": "e" * 40, "changed": True}, "command": "it", "date": "today"}
    text = gpu_tables.describe({**told, "gpus": 1, "minutes": 1.0, "parts": parts})
    lines = text.splitlines()
    assert lines[:3] == [
        f"GPU report of dist_train 0.1.0, commit {'e' * 40} and changes",
        "today, 1 GPU, 1 minute",
        "it",
    ]
    assert max(map(len, lines)) <= gpu_tables.WIDTH
    assert f"{11 * ' '}{machine.REMEDY.splitlines()[1]}" in lines, "a command is one line"
    assert "  skipped (needs 4 GPUs, and there is 1): test_0, test_1" in text
    assert "3 different results in 20" in text
    assert "algbw 122 GB/s, busbw 214 GB/s" in text
    row = next(line for line in lines if "hw_decoder_load 0.65" in line)
    assert row.split()[2:] == ["3.0", "0.200", "1", "17"], "17 is under other bits"


def test_pixels_that_depend_on_the_batch_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(gpu_parts.Loader):
        def epoch(self, *args: Any, **options: Any) -> Any:
            for batch in super().epoch(*args, **options):
                yield batch._replace(inputs=batch.inputs + (1 if self.batch == 17 else 0))

    site = Site(tmp_path, None, 0)
    gpu_parts.decoder(Findings(tmp_path / "f"), site)
    assert kept(tmp_path)["state"] == "ok"
    monkeypatch.setattr(gpu_parts, "Loader", Odd)
    gpu_parts.decoder(Findings(tmp_path / "f"), site)
    assert kept(tmp_path)["state"] == "failed"
    assert "depend on which batch it is in" in kept(tmp_path)["reason"]
    same = kept(tmp_path)["result"]["same_bits_in_batches_of"]
    assert same == {"CPU": {"1": True, "17": False, "64 only 4:2:0": True}}


def test_pixels_that_depend_on_their_neighbours_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a batch of one subsampling were decoded in another way than a mixed one."""

    class Odd(gpu_parts.Loader):
        def epoch(self, *args: Any, **options: Any) -> Any:
            alike = len(self.plan) == 64
            for batch in super().epoch(*args, **options):
                yield batch._replace(inputs=batch.inputs + alike)

    monkeypatch.setattr(gpu_parts, "Loader", Odd)
    gpu_parts.decoder(Findings(tmp_path / "f"), Site(tmp_path, None, 0))
    found = kept(tmp_path)
    assert found["state"] == "failed"
    same = found["result"]["same_bits_in_batches_of"]
    assert same == {"CPU": {"1": True, "17": True, "64 only 4:2:0": False}}


def test_the_decoders_of_a_gpu(shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played by the CPU's: only for the load of deterministic runs must pixels not depend on the batch, and what is far
    from the CPU's is said."""

    threads = set[int]()

    class Played(gpu_parts.Loader):
        def __init__(self, *args: Any, decode: Decode, **options: Any) -> None:
            super().__init__(*args, decode=Decode("cpu"), **options)
            self.played = decode
            threads.add(decode.threads)

        def epoch(self, *args: Any, **options: Any) -> Any:
            far = 9.0 if self.played.hw_decoder_load == 0 and self.played.device == "gpu" else 0.0
            depends = 1.0 if self.played.hw_decoder_load == 0.65 and self.batch == 17 else 0.0
            for batch in super().epoch(*args, **options):
                yield batch._replace(inputs=batch.inputs + far + depends)

    monkeypatch.setattr(gpu_parts, "Loader", Played)
    monkeypatch.setattr(gpu_parts, "cpus", lambda: 224)
    monkeypatch.setattr(Site, "augment", Augment(72, 67))
    gpu_parts.decoder(Findings(tmp_path / "f"), Site(tmp_path, shard_sets / "val", 1))
    found = kept(tmp_path)
    assert found["state"] == "warn"
    assert found["reason"].endswith("hw_decoder_load 0 is up to 9 levels from the CPU's, 9.00 on average")
    assert threads == {16}
    loads = ["hw_decoder_load 1", "hw_decoder_load 0", "hw_decoder_load 0.65", "hw_decoder_load 0.9"]
    assert list(found["result"]["levels_from_the_cpu"]) == loads
    same = found["result"]["same_bits_in_batches_of"]
    assert [all(same[load].values()) for load in loads] == [True, True, False, True]


def test_a_gradient_that_is_not_the_same_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one bit, in one of the layouts."""
    original, calls = torch.autograd.grad, [0]

    def odd(*args: Any) -> tuple[torch.Tensor, ...]:
        (gradient,) = original(*args)
        calls[0] += 1
        if calls[0] == gpu_parts.TIMES:  # the last one of the first layout
            gradient.view(torch.int32)[0, 0, 0, 0] ^= 1
        return (gradient,)

    monkeypatch.setattr(torch.autograd, "grad", odd)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        gpu_parts.pooling(Findings(tmp_path / "f"), Site(tmp_path, None, 0))
    finally:
        torch.use_deterministic_algorithms(before)
    found = kept(tmp_path)
    assert found["state"] == "warn"
    assert found["reason"].startswith("2 different gradients of 20 in channels_last float32")
    assert found["result"]["contiguous_format float32"]["gradients"] == 1


def test_the_generated_images(tmp_path: Path) -> None:
    """All different, enough for the largest batch of two GPUs, and of the size that nothing has to be resized."""
    shards = ShardSet(Site(tmp_path, None, 0).images())
    assert shards.sides == (72, 72)
    data = {shards.read(i).tobytes() for i in range(len(shards))}
    assert len(data) == len(shards) == 256
    assert all(map(halves_chroma, data)), "as in nearly all sets that were packed"


def test_the_generated_images_of_different_kinds(tmp_path: Path) -> None:
    """Grey ones and full colour have come through; none has to be resized, and the set is made once."""
    shards = ShardSet(Site(tmp_path, None, 0).mixed())
    assert shards.sides == (72, 72)
    images = [Image.open(BytesIO(shards.read(i).tobytes())) for i in range(len(shards))]
    kinds = Counter((image.mode, JpegImagePlugin.get_sampling(image)) for image in images)
    assert kinds == {("RGB", 2): 64, ("RGB", 0): 32, ("L", -1): 32}
    assert [halves_chroma(shards.read(i).tobytes()) for i in range(4)] == [True, True, False, False]
    assert Site(tmp_path, None, 0).mixed() == shards.directory
    assert Site(tmp_path, tmp_path / "x", 0).mixed() == tmp_path / "x"


TESTS = """
import pytest
def test_fine(): pass
def test_wrong(): assert 1 == 2, "of no use"
@pytest.mark.skip(reason="needs 8 GPUs")
def test_eight(): pass
@pytest.fixture
def broken(): raise OSError("gone")
def test_broken(broken): pass
"""


@pytest.mark.integration
def test_what_pytest_found(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--junitxml=r.xml", "-p", "no:cacheprovider"]
    subprocess.run([*words, "test_it.py"], cwd=tmp_path, stdout=subprocess.DEVNULL, check=False, timeout=60)
    findings = Findings(tmp_path / "f")
    findings.keep("test_fine", "passed", under="tests")  # as it was told
    gpu_tests.judge((tmp_path / "r.xml").read_text(), findings)
    found = kept(tmp_path)
    assert found["state"] == "failed"
    assert found["reason"] == "1 skipped; 2 of 3 failed: test_wrong, test_broken"
    assert found["result"]["passed"] == ["test_fine"]
    assert "tests" not in found["result"], "each stands there once"
    assert "of no use" in found["result"]["failed"]["test_wrong"]
    assert "OSError: gone" in found["result"]["failed"]["test_broken"]
    assert found["result"]["skipped"] == {"test_eight": "needs 8 GPUs"}


def test_tests_that_are_all_skipped_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xml = '<testsuites><testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    gpu_tests.judge(xml, Findings(tmp_path / "f"))
    assert (kept(tmp_path)["state"], kept(tmp_path)["reason"]) == ("left out", "1 skipped")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    gpu_tests.drills(Findings(tmp_path / "f"), Site(tmp_path, None, 0))
    assert kept(tmp_path)["state"] == "left out"
    assert "from a clone" in kept(tmp_path)["reason"]


@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.integration
def test_every_speed_is_a_command_line_of_the_trainer(gpus: int) -> None:
    for timing in timings(gpus):
        config, _ = parse(timing.words)
        assert config.train.global_batch >= timing.ranks
        assert config.train.deterministic == ("deterministic" in timing.name or "decoded on" in timing.name)
    names = [timing.name for timing in timings(gpus)]
    assert len(set(names)) == len(names)
    if gpus:
        assert names[0] == "128 images a rank, compiled, deterministic"
        for batch in (16, 128, 512):
            for how in ("compiled", "eager"):
                assert {f"{batch} images a rank, {how}", f"{batch} images a rank, {how}, deterministic"} <= set(names)


@pytest.mark.slow
@pytest.mark.integration
def test_a_speed_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer refuses, and what a rank dies of."""
    small = [*gpu_speed.SMALL, "--train.compile=off"]
    monkeypatch.setattr(
        gpu_speed,
        "timings",
        lambda gpus: [
            Timing("refused", 2, [*small, "--train.global_batch=1"]),
            Timing("misspelt", 1, ["--train.compil=off"]),
            Timing("good", 2, [*small, "--train.global_batch=24"]),
        ],
    )
    gpu_speed.speed(Findings(tmp_path / "f"), Site(tmp_path, None, 0))
    found = kept(tmp_path)
    runs = found["result"]["runs"]
    assert found["state"] == "failed"
    assert "refused: train.global_batch 1 is smaller than ranks (2)" in found["reason"]
    assert runs["misspelt"]["failed"].startswith("unknown configuration key train.compil")
    assert runs["good"]["step"]["images_per_s"] > 0
    assert runs["good"]["loader"]["images_per_s"] > 0
    assert found["result"]["all_reduce_gb_per_s"]["algorithm"] > 0


def test_speeds_for_which_there_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are named; the part is not cut off for them. Each takes 50 s by this clock, and there are 140."""
    now = 1000.0

    def measured(*args: Any) -> dict[str, Any]:
        nonlocal now
        now += 50
        return {"all_reduce": None, "world_size": 1, "step": {"step_ms": 1}}

    monkeypatch.setattr(gpu_speed, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(gpu_speed, "_measured", measured)
    gpu_speed.speed(Findings(tmp_path / "f"), Site(tmp_path, tmp_path, 0, now + 140))
    found = kept(tmp_path)
    assert (found["state"], len(found["result"]["runs"])) == ("warn", 2)
    assert found["result"]["late"] == ["12 images a rank, decoded on the CPU"]
    assert "not to be compared" in found["reason"]
    gpu_speed.speed(Findings(tmp_path / "f"), Site(tmp_path, tmp_path, 0, now + 20))
    assert (kept(tmp_path)["state"], len(kept(tmp_path)["result"]["late"])) == ("warn", 3), "not even the first one"


def test_what_follows_from_the_profiles() -> None:
    """By hand: 244 MB in 2 ms on 8 ranks, and steps of 11 and 10 ms."""

    def profile(ms: float) -> dict[str, Any]:
        return {"step": {"step_ms": ms}, "all_reduce": {"mb": 244, "ms": 2}, "world_size": 8}

    profiles = {"a, deterministic": profile(11), "a": profile(10), "b, deterministic": profile(3)}
    assert all_reduce_rate(profiles) == pytest.approx({"algorithm": 122, "bus": 122 * 1.75})
    assert costs_of_determinism(profiles) == pytest.approx({"a, deterministic": 10})
    assert all_reduce_rate({"a": profile(1) | {"all_reduce": None}}) == {}


def test_a_rank_on_the_gpu_of_another_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which the second has opened GPU 0 as well; somebody else was there before."""
    seen = {(7, 0), (7, 1)}
    monkeypatch.setattr(driver, "gpu_processes", lambda among: set(seen))
    monkeypatch.setattr(gpu_speed, "LOOK", 0)
    cards = driver.cards("0, GPU-a, T4, 1, 7.5, [N/A], 580.1\n1, GPU-b, T4, 1, 7.5, [N/A], 580.1")
    places = Places(cards)
    seen |= {(100, 0), (101, 1)}
    places.look()
    assert places.astray() == []
    seen.add((101, 0))
    places.look()
    assert places.astray() == [101]
    assert places.by_gpu() == {"0": [100, 101], "1": [101]}


def test_the_worst_state_is_kept_with_all_reasons(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "f")
    for state, reason in [("ok", "a"), ("warn", "b"), ("failed", "c"), ("left out", "d")]:
        findings.say(state, reason)
        findings.keep(reason, 1, under="group")
    assert kept(tmp_path) == {"state": "failed", "reason": "a; b; c; d", "result": {"group": dict.fromkeys("abcd", 1)}}


def test_the_line_that_says_what_failed() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "x"',
        "[rank1]: RuntimeError: rank 1: gone",
        "",
        "=====",
        "x",
    ]
    assert commands.what_failed(lines) == "RuntimeError: rank 1: gone"
    lines = ["error: train.global_batch 1 is too small", "torch...ChildFailedError: ", "bye"]
    assert commands.what_failed(lines) == "error: train.global_batch 1 is too small"
    lines = [
        "torch...ChildFailedError: ",
        "  traceback : Signal 15 (SIGTERM)",
        "---",
        "  traceback : batch is too small",
    ]
    assert commands.what_failed(lines) == "batch is too small"
    assert commands.what_failed(["a", " last words "]) == "last words"
    assert commands.what_failed([]) == "it wrote nothing"


@pytest.mark.slow
def test_the_whole_command(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user types it: every part has its say, and nothing has failed."""
    monkeypatch.chdir(tmp_path)
    run = spawn(python("dist_train", "gpu-report"), env={"TMPDIR": str(short)}, how="exec")
    result = finish(run, timeout=900)
    found = json.loads((tmp_path / "gpu-report.json").read_text())
    bad = {name: p for name, p in found["parts"].items() if p["state"] in ("failed", "cut off")}
    assert not bad, json.dumps(bad, indent=1)
    assert result.returncode == 0, result.stderr
    assert list(found["parts"]) == PARTS
    assert sorted(os.listdir(tmp_path)) == ["gpu-report.json", "gpu-report.txt"]
    assert os.listdir(short) == []
