"""Pictures of a run, drawn by a process beside it that cannot harm the run and ends with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.__main__ import main
from dist_train.analysis.trained import VanishedError, open_run
from dist_train.monitor.portraits import Drawing, What
from dist_train.ranks import beside
from dist_train.rundir import checkpoint, stored
from dist_train.rundir.checkpoint import CheckpointError
from dist_train.rundir.confusion import MOST, Confusion, ConfusionError, ConfusionFile, classes
from dist_train.rundir.lease import Lease
from dist_train.rundir.writer import Writer
from tests.helpers.drills import until
from tests.helpers.launch import alive, children, launch

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
LONG = 120.0  # seconds, far more than a drawing takes
PARENT = """
import sys
from pathlib import Path
from dist_train.monitor.portraits import Drawing
drawing = Drawing(Path(sys.argv[1]), "wrong")
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def finished(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "a run"
    result = launch(shard_sets, run, "--train.epochs=2", "--optim.lr=0.001", ranks=0)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def begin(run: Path, what: What, limit: float = LONG) -> tuple[Drawing, int]:
    """A drawing, and its process."""
    before = children(os.getpid())
    drawing = Drawing(run, what, limit)
    (pid,) = set(children(os.getpid())) - set(before)
    return drawing, pid


def niceness(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """All files but the pictures, with when they were written."""
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "pictures"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
def test_pictures_are_drawn_beside_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that takes no CPU that another wants, knows neither GPU nor launcher nor secret, and changes nothing
    but the pictures."""
    foreign = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    foreign |= {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "1", "SUBMITIT_EXECUTOR": "slurm"}
    foreign |= {"DIST_TRAIN_NOTIFY": "https://secret", "WANDB_API_KEY": "secret", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    before = contents(run)
    for what in ("inputs", "wrong", "kernels"):
        drawing, pid = begin(run, what)
        until(lambda pid=pid: niceness(pid) == 19)
        assert os.getpgid(pid) == pid
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        assert not {f"{name}={value}" for name, value in foreign.items()} & set(environment)
        assert {"CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1"} < set(environment)
        assert drawing.wait(LONG) == drawing.poll() == run / "pictures" / f"{what}.png", drawing.failed
        assert drawing.failed == ""
        assert not alive(pid)
        with Image.open(run / "pictures" / f"{what}.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 250
        drawing.end()
        assert (drawing.poll(), drawing.failed) == (run / "pictures" / f"{what}.png", "")
    written = sorted(path.name for path in (run / "pictures").iterdir())
    assert written == ["inputs.png", "kernels.json", "kernels.png", "wrong.png"]
    assert contents(run) == before


@pytest.mark.parametrize("how", ["killed", "hangs", "given up"])
def test_a_drawing_that_comes_to_nothing(run: Path, how: str) -> None:
    """The picture of an earlier one stays where it is, and is not taken for it."""
    earlier = run / "pictures" / "kernels.png"
    earlier.parent.mkdir()
    earlier.write_bytes(b"an earlier one")
    drawing, pid = begin(run, "kernels", 1 if how == "hangs" else LONG)
    os.kill(pid, signal.SIGSTOP)
    assert drawing.poll() is None
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    elif how == "given up":
        drawing.end()
    assert drawing.wait(LONG) is None
    why = {"killed": "ended by SIGKILL", "hangs": "not done within 1 s", "given up": "given up"}[how]
    assert drawing.failed == f"it was {why}"
    assert not alive(pid)
    assert earlier.read_bytes() == b"an earlier one"


@pytest.mark.parametrize("when", ["settled", "at once"])
def test_a_drawing_ends_with_its_run(run: Path, when: str) -> None:
    """Even if that is killed, and even before the drawing could bind itself to it."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert parent.stdout
        assert parent.stdout.readline() == b"begun\n"
        (pid,) = children(parent.pid)
        if when == "settled":
            until(lambda: niceness(pid) == 19)
        os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.communicate()
    if when == "at once":
        os.kill(pid, signal.SIGCONT)
    until(lambda: not alive(pid))
    assert not (run / "pictures").exists()


@pytest.mark.slow
def test_why_there_is_no_picture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence: without a checkpoint; of a net that has no such kernels; if no process can be started."""
    (run / "checkpoints").rename(run / "elsewhere")
    drawing = Drawing(run, "wrong")
    assert drawing.wait(LONG) is None
    assert drawing.failed.startswith(f"{run} has no checkpoint yet: train on")
    inputs = Drawing(run, "inputs")
    assert inputs.wait(LONG), inputs.failed

    def left_out(module: str, words: Any, output: IO[bytes]) -> subprocess.Popen[bytes]:
        say = "import sys; sys.stderr.write('kernels.png is left out: it has none\\n')"
        return subprocess.Popen([sys.executable, "-c", say], stderr=output)

    monkeypatch.setattr(beside, "start", left_out)
    drawing = Drawing(run, "kernels")
    assert drawing.wait(LONG) is None
    assert drawing.failed == "kernels.png is left out: it has none"

    def refused(module: str, words: Any, output: IO[bytes]) -> subprocess.Popen[bytes]:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(beside, "start", refused)
    drawing = Drawing(run, "kernels")
    assert (drawing.poll(), drawing.wait(1)) == (None, None)
    assert drawing.failed == "nothing can be started ([Errno 11] Resource temporarily unavailable)"
    drawing.end()


def test_a_checkpoint_that_vanishes_while_it_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one takes its place; if all vanish, that is one sentence."""
    older, newer = sorted((run / "checkpoints").glob("step-*"))
    load, gone = stored.load_state, [newer]

    def vanishing(path: Path, device: torch.device, most: int) -> Any:
        if path in gone:
            shutil.rmtree(path)
        return load(path, device, most)

    monkeypatch.setattr(stored, "load_state", vanishing)
    assert open_run(run, torch.device("cpu")).checkpoint == older.name
    assert not newer.exists()
    gone.append(older)
    with pytest.raises(VanishedError, match=f"{older.name} vanished while it was read, the run goes on: try again"):
        open_run(run, torch.device("cpu"))

    def pruned(path: Path) -> Any:
        shutil.rmtree(path, ignore_errors=True)
        raise CheckpointError("meta.json is missing")

    older.mkdir()
    monkeypatch.setattr(checkpoint, "verified", pruned)
    assert main(["figures", str(run), "--only", "kernels", "--device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {run} has lost its checkpoints while it was read, as it goes on: try again"
    assert not (run / "figures").exists()


def test_classes_and_what_they_are_taken_for(finished: Path, tmp_path: Path) -> None:
    found = classes(finished)
    assert found.names == ["amber", "blue", "green"]
    matrix = found.matrix()
    np.testing.assert_array_equal(found.samples, [21, 21, 21])
    np.testing.assert_array_equal(matrix.sum(1), found.samples)
    np.testing.assert_array_equal(matrix.diagonal(), found.top1)
    assert sum(count for *_, count in found.pairs) == 63 - found.top1.sum() > 0

    taken = np.array([[5, 0, 2, 1], [7, 0, 2, 0], [0, 0, 9, 3]])  # the last is none of them
    label, predicted = np.nonzero(taken)
    top5 = taken.sum(1)
    lease, writer = Lease(tmp_path), Writer()
    lease.acquire()
    file = ConfusionFile(lease, print, writer, writes=True)
    file.put(Confusion(top5, taken.diagonal(), top5, label, predicted, taken[taken > 0]), ["a", "b", "c"], 1, 0)
    writer.wait()
    found = classes(tmp_path)
    assert found.pairs == [(1, 0, 7), (0, 2, 2), (1, 2, 2)]
    np.testing.assert_array_equal(found.matrix(), taken[:, :3])
    assert found.matrix().dtype == np.int64

    many, none = np.full(MOST + 1, 3), np.zeros(0, np.int64)
    file.put(Confusion(many, many - 1, many, none, none, none), list(map(str, many)), 1, 0)
    writer.wait()
    found = classes(tmp_path)
    assert found.pairs == []
    assert found.matrix().sum() == found.top1.sum() == 2 * len(found.names)
    with pytest.raises(ConfusionError, match="it is written when the net is validated"):
        classes(tmp_path / "nowhere")
