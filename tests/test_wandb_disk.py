"""wandb with a bad disk, bad variables, or bad files of an earlier start."""

from __future__ import annotations

import logging
import os
import resource
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dist_train.config import Config
from dist_train.monitor import drawings, wandb_files, wandb_process, wandb_variables
from dist_train.monitor.reader import Shown
from dist_train.monitor.wandb_files import Kept
from dist_train.rundir import record
from tests.helpers.drills import until
from tests.helpers.wandb_file import files, logged
from tests.helpers.wandb_server import WandbServer, cores
from tests.test_wandb import Drawn, Showing, line

pytestmark = [pytest.mark.usefixtures("wandb_alone")]

ROOM = 40_000  # bytes of a file, where a disk is full


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "Drawing", Drawn)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def said_by(showing: Showing, what: str) -> list[str]:
    return [text for text in showing.said if what in text]


def kept(run: Path) -> Kept:
    path = run / record.FILE
    return Kept(Shown(run, Config(), print, path.stat().st_size if path.exists() else 0))


def core() -> int:
    """wandb's own process, once it has begun."""
    until(lambda: cores(os.getpid()))
    return cores(os.getpid())[0]


@pytest.mark.integration
def test_a_full_disk_under_its_files(tmp_path: Path) -> None:
    """wandb tells nobody. It is told, and the next start sends all that had no room."""
    run = tmp_path / "run"
    machine = {"nodes": {f"gpu-{i}": {"watts": 1.0 * i} for i in range(20)}}
    first = Showing(run, wandb="offline")
    resource.prlimit(core(), resource.RLIMIT_FSIZE, (ROOM, ROOM))
    first.write(*(line(step, machine=machine) for step in range(1, 61)))
    first.end("stopped", 75)
    (path,) = files(run)
    assert path.stat().st_size <= ROOM
    assert len(said_by(first, "is the disk full?")) == len(said_by(first, "sends what is missing")) == 1, first.said
    assert len([text for text in first.said if not text.startswith("waiting for wandb")]) == 4, first.said
    second = Showing(run, wandb="offline")
    second.end("stopped", 75)
    assert list(logged(files(run)[-1]).rows) == list(range(1, 61))
    assert said_by(second, "disk full") == []


def test_its_log_has_no_room(capsys: pytest.CaptureFixture[str]) -> None:
    """The one that wandb writes in Python: no traceback for each of its lines."""
    log = logging.getLogger("wandb")
    with open("/dev/full", "w") as full:
        handler = logging.StreamHandler(full)
        try:
            with wandb_process.mute():
                log.addHandler(handler)
                log.error("as it begins")
            log.error("later")
        finally:
            log.removeHandler(handler)
        with suppress(OSError):
            full.close()
    assert logging.raiseExceptions
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.integration
def test_a_start_that_was_killed_early_is_not_in_the_line_to_type(tmp_path: Path) -> None:
    """`wandb sync` gives up at its file, and sends none of the others."""
    run = tmp_path / "run"
    first = Showing(run, wandb="offline")
    first.write(line(1))
    first.end("stopped", 75)
    (path,) = files(run)
    early = run / "wandb" / f"offline-run-20200101_000000-{kept(run).id()}"
    early.mkdir()
    (early / path.name).write_bytes(path.read_bytes()[:7])
    second = Showing(run, wandb="offline")
    second.write(line(2))
    second.end("stopped", 75)
    (text,) = said_by(second, "wandb sync")
    with WandbServer() as server:
        command = [sys.executable, "-m", *shlex.split(text)]
        env = os.environ | server.environment
        subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=True, timeout=100)
        assert server.run.steps == [1, 2]


@pytest.mark.integration
def test_an_offline_file_is_read_back(tmp_path: Path) -> None:
    """One that ends early, or has a hole."""
    import wandb

    run = wandb.init(dir=str(tmp_path), mode="offline", settings=wandb.Settings(console="off", silent=True))
    for step in range(400):
        run.log({"text": "x" * 300}, step=step)
    run.finish()
    wandb.teardown()
    path = Path(run.settings.sync_file)
    data = path.read_bytes()
    assert wandb_files.is_whole(path)
    path.write_bytes(data[:-1])
    assert not wandb_files.is_whole(path)
    path.write_bytes(data[:40_000] + bytes(500) + data[40_500:])
    assert not wandb_files.is_whole(path)
    assert not wandb_files.is_whole(tmp_path / "none")


@pytest.mark.integration
def test_the_mark_of_a_record_that_is_cut_back(tmp_path: Path) -> None:
    """What is written anew may have another length: no line is lost, and none is taken for a damaged one."""
    run = tmp_path / "run"
    first = Showing(run, wandb="offline")
    first.write(*(line(step) for step in range(1, 18)))
    first.end("failed", 1)
    whole = (run / record.FILE).read_bytes().splitlines(keepends=True)
    (run / record.FILE).write_bytes(b"".join(whole[:15]))
    assert kept(run).mark() == len(b"".join(whole[:15])), "a start that is killed behind it"
    with open(run / record.FILE, "ab") as file:
        file.writelines(text.replace(b'"lr": 0.01', b'"lr": 0.010000000001') for text in whole[15:])
    last = Showing(run, wandb="offline")
    last.write(line(18))
    last.end("stopped", 75)
    assert list(logged(files(run)[-1]).rows) == [16, 17, 18]


@pytest.mark.parametrize(("sent", "mark"), [("16", 16), ("17", 16), ("7", 0), ("99", 32), ("-5", 0), ("?", 0)])
def test_a_mark_is_at_the_end_of_a_line(tmp_path: Path, sent: str, mark: int) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / record.FILE).write_bytes(b'{"kind": "a"}  \n' * 2)
    (tmp_path / "wandb" / "sent").write_text(sent)
    assert [kept(tmp_path).mark() for _ in range(2)] == [mark, mark]


def test_an_id_that_wandb_would_not_take(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    own, sent = tmp_path / "wandb" / "id", tmp_path / "wandb" / "sent"
    sent.write_text("0")
    own.write_text(" abc123\n")
    assert (kept(tmp_path).id(), sent.exists()) == ("abc123", True)
    own.write_bytes(b"a/b\xff")
    new = kept(tmp_path).id()
    assert (len(new), own.read_text(), sent.exists()) == (8, new, False), "it has not been sent anything"


@pytest.mark.integration
def test_odd_variables_do_not_turn_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"MODE": "bogus", "SILENT": "maybe", "PROJECT": "a/b", "BASE_URL": "nonsense", "API_KEY": " "}
    for name, value in ({"TAGS": f"a,,{'b' * 70}", "RESUME": "must", "RUN_ID": "theirs"} | odd).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    first = Showing(tmp_path / "run", wandb="offline")
    first.write(line(1))
    first.end("stopped", 75)
    (path,) = files(tmp_path / "run")
    found = logged(path)
    assert (found.run.project, list(found.rows), found.id != "theirs") == ("dist_train", [1], True)
    assert {"a", "b" * 64} <= set(found.run.tags)
    named = [text.split()[1] for text in said_by(first, "is left out")]
    assert named == sorted(f"WANDB_{name}" for name in odd)
    assert len([text for text in first.said if not text.startswith("waiting for wandb")]) == len(odd) + 2, first.said
    assert os.environ["WANDB_MODE"] == "bogus"


@pytest.mark.parametrize("error", [ImportError("no\nsuch thing"), SystemExit(3)])
def test_wandb_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(wandb_variables, "odd", broken)
    first = Showing(tmp_path / "run", wandb="online")
    first.end()
    (text,) = first.said
    assert "wandb does not work" in text
    assert "\n" not in text


@pytest.mark.integration
def test_its_process_is_stopped_offline(tmp_path: Path) -> None:
    """Nobody waits for it any longer; what to type is told all the same, once."""
    first = Showing(tmp_path / "run", wandb="offline")
    first.write(line(1))
    (follower,) = [follower for follower in first.readers._followers if follower.name == "wandb"]
    until(lambda: follower._sources)  # it has begun
    pid = core()
    os.kill(pid, signal.SIGSTOP)
    first.write({"event": "end", "state": "stopped", "reason": "", "code": 75})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_process, "kill", lambda: None)  # so the reader's thread can tell nothing
        first.readers.close(4)
        told = list(first.said)
    os.kill(pid, signal.SIGCONT)
    until(lambda: not first.readers._slow())
    assert first.said == told
    assert len(said_by(first, "sends what is missing")) == len(said_by(first, "wandb leet")) == 1, first.said
