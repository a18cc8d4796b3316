"""`make demo` as a person at a terminal sees it: every step announced, one live line, and the last lines are ours."""

from __future__ import annotations

import os
import pty
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import SMALL, python, spawn

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.integration, pytest.mark.slow]


def demo(cwd: Path, *, interrupt: bool = False, **variables: object) -> tuple[int, str]:
    """Exit code of `make demo` in a terminal, and what it shows. `interrupt`: Ctrl-C after the first step."""
    venv = Path(sys.executable).parent.parent
    words = ["make", "-f", str(ROOT / "Makefile"), f"VENV={venv}", f"--old-file={venv}/ready"]
    words += [f"{name}={value}" for name, value in variables.items()]
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # `make test` may have started this
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe(words[0], [*words, "demo"], {**env, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"})
    text = ""
    for piece in pieces(terminal):
        text += piece
        if interrupt and re.search(r"[1-9]\d* of \d+ steps", text):
            interrupt = False
            os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), text


def pieces(terminal: int) -> Iterator[str]:
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # nobody has it open any more
            return
        yield piece.decode(errors="replace")


def test_make_demo(shard_sets: Path, tmp_path: Path) -> None:
    """Stopped by Ctrl-C, then continued to its end, then for two epochs more."""
    shutil.copytree(shard_sets, tmp_path / "data" / "fashion-mnist")
    small = " ".join(word for word in SMALL if "epochs" not in word) + " --train.global_batch=4"
    code, shown = demo(tmp_path, interrupt=True, ARGS=small)
    assert code != 0, shown[-3000:]
    assert shown.startswith("training demo to epoch 1 with 2 processes")
    assert "outcome  stopped: a stop signal; the same command continues" in shown
    assert shown.split()[-2:] == ["run", "runs/demo"], "the last line is ours"
    for epochs, last in ((1, "make demo EPOCHS=3"), (3, "figures demo")):
        code, shown = demo(tmp_path, EPOCHS=epochs, ARGS=small)
        assert code == 0, shown
        assert f"of epoch {epochs}/{epochs} |" in shown
        assert f"batches of validation {epochs}/{epochs} |" in shown
        assert "OMP_NUM_THREADS" not in shown
        assert (tmp_path / "runs" / "demo" / "figures" / "top5.png").exists()
        lines = shown.split("\r\n")
        assert lines[-2] == "the page of the run, for a browser: runs/demo/report.html"
        assert lines[-3] == "Your own photographs: docs/first-run.md"
        assert last in lines[-4]
        assert "top5" in (tmp_path / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert "learning rate divided by 10, to 0.001" in shown


def test_a_refusal_is_the_last_line() -> None:
    """The exit code is that of the rank."""
    words = ("--standalone", "--nproc_per_node=2", "-m", "dist_train", "--optim.lrr=1")
    run = spawn(python("dist_train.ranks.torchrun", *words), how="exec")
    assert run.process.wait(60) == 2
    assert run.said("stderr").splitlines() == ["error: unknown configuration key optim.lrr: did you mean optim.lr?"]
