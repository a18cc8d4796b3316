"""Events of a run: the lines each start appends to events.jsonl, which is never cut."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import dist_train
from dist_train import code
from dist_train.config import Config, OptimConfig
from dist_train.flat import as_dict
from dist_train.ranks import launcher
from dist_train.rundir import environment, events, restarts, status, story
from dist_train.rundir.directory import RunDirectory
from tests.helpers.drills import EVERY
from tests.helpers.launch import at, launch

ROOT = Path(__file__).parents[1]
CODE = {"version": "1", "sources": "a"}


def kinds(told: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in told]


class Story:
    """A run's, as it grows."""

    def __init__(self, run: Path) -> None:
        self.run, self.before = run, b""

    def news(self) -> list[dict[str, Any]]:
        """The events since the last call. What was there is there still."""
        text = (self.run / events.FILE).read_bytes()
        assert text.startswith(self.before)
        new, self.before = text[len(self.before) :], text
        return [json.loads(line) for line in new.splitlines()]


def claimed(path: Path, config: Config | None = None) -> RunDirectory:
    """A run that a start has claimed, in this process."""
    run = RunDirectory(path, print, keep=2, writes=True)
    run.claim(config or Config(), [], 0, "")
    return run


def begun(path: Path, before: dict[str, Any], config: Config | None = None, **about: Any) -> RunDirectory:
    """A run whose start has told so."""
    run = claimed(path, config)
    story.tell_start(run, before, config or Config(), **{"step": 0, "nodes": ["a", "b"], "code": CODE, **about})
    run.close()
    return run


@pytest.mark.integration
def test_a_run_that_is_stopped_killed_changed_and_diverges(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = Story(run)

    assert launch(shard_sets, run, EVERY, fault=at("step", 6, "SIGTERM")).returncode == 0
    first, end = told.news()
    assert (first["event"], first["step"], first["checkpoint"], first["world_size"]) == ("start", 0, "", 2)
    assert (first["device"], first["job"], first["restart"]) == ("cpu", "", 0)
    assert first["nodes"] == [os.uname().nodename]
    assert {"torch", "DALI", "Python"} <= set(first["versions"])
    assert first["code"]["sources"] == code.sources(ROOT)
    assert first["start"] == end["start"] == status.read(run)["start"]
    assert (end["event"], end["state"], end["code"]) == ("end", "stopped", 75)
    stopped = end["step"]
    assert stopped in (7, 8), "the sixth step or the next one has seen the signal"
    assert end["requeued"] is False
    assert first["time"] < end["time"]

    (run / "fault-0").unlink()
    assert launch(shard_sets, run, EVERY, fault=at("step", 3, "kill all")).returncode != 0
    (second,) = told.news()
    assert (second["event"], second["step"], second["checkpoint"]) == ("start", stopped, f"step-{stopped:08d}")
    assert second["start"] != first["start"]
    left = status.read(run)
    with open(run / events.FILE, "ab") as file:
        file.write(b'{"event": "al')  # as a kill in the midst of a write leaves it
    told.before += b'{"event": "al\n'

    (run / "fault-0").unlink()
    lr = "--optim.lr=0.02"
    assert launch(shard_sets, run, EVERY, lr, fault=at("step", 3, "nan"), ranks=0).returncode == 70
    killed, third, changed, end = told.news()
    assert (killed["event"], killed["of"], killed["node"]) == ("killed", second["start"], os.uname().nodename)
    assert (killed["step"], killed["heartbeat"]) == (left["step"], left["until"])
    assert "reason" not in killed
    assert (third["event"], third["world_size"]) == ("start", 1)
    assert third["step"] >= stopped, "a save may have been made since"
    assert third["checkpoint"] == f"step-{third['step']:08d}"
    assert (changed["event"], changed["settings"]["optim.lr"]) == ("changed", [0.01, 0.02])
    assert "code" not in changed
    assert (end["state"], end["code"]) == ("diverged", 70)
    assert "not finite" in end["reason"]

    assert launch(shard_sets, run, EVERY, lr, ranks=0).returncode == 0
    last, end = told.news()
    assert (last["event"], end["state"], end["step"], end["code"]) == ("start", "done", 20, 0)
    assert end["seconds"]["training"] > 0
    assert kinds(events.read(run)) == ["start", "end", "start", "killed", "start", "changed", "end", "start", "end"]


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_failure_is_told_once(ranks: int, shard_sets: Path, tmp_path: Path) -> None:
    """By the rank that was first; and the next start does not find it killed."""
    run = tmp_path / "run"
    rank = max(0, ranks - 1)
    assert launch(shard_sets, run, EVERY, fault=at("step", 6, "error", rank), ranks=ranks).returncode == 1
    start, end = events.read(run)
    assert (end["event"], end["start"], end["state"], end["code"]) == ("end", start["start"], "failed", 1)
    assert (end["rank"], end["error"], end["reason"]) == (rank, "RuntimeError", "RuntimeError: a fault of the drill")
    assert end["seconds"]["startup"] > 0
    assert launch(shard_sets, run, EVERY, ranks=ranks).returncode == 0
    assert kinds(events.read(run)) == ["start", "end", "start", "end"]


@pytest.mark.integration
def test_an_old_run_begins_a_story(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert launch(shard_sets, run, EVERY, fault=at("step", 6, "SIGTERM"), ranks=0).returncode == 75
    (run / events.FILE).unlink()
    assert launch(shard_sets, run, EVERY, ranks=0).returncode == 0
    assert kinds(events.read(run)) == ["start", "end"]


def test_what_became_of_the_start_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what status.json has left of it."""
    before = begun(tmp_path, {}).lease.token
    # Slurm's batch script has found why, and its heartbeat is that of who wrote it.
    crash = {"state": "failed", "reason": "exit code 137: see the log", "until": 5.0, "heartbeat": 9.0, "step": 3}
    crash |= {"start": before, status.CRASH: True}
    second = begun(tmp_path, crash).lease.token
    killed = events.read(tmp_path)[1]
    about = {"event": "killed", "of": before, "heartbeat": 5.0, "step": 3, "node": "a", "reason": crash["reason"]}
    assert {key: killed[key] for key in about} == about
    # It had ended; only its event is not there.
    third = begun(tmp_path, {"state": "stopped", "reason": "a signal", "start": second, "step": 4}).lease.token
    end = events.read(tmp_path)[3]
    assert [end[key] for key in ("event", "start", "state", "reason", "step")] == [
        "end",
        second,
        "stopped",
        "a signal",
        4,
    ]
    # It never came to claim the run: both are told of, it and the one before it.
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    begun(tmp_path, {"state": "starting", "reason": "torch is imported", "heartbeat": 7.0})
    told = events.read(tmp_path)[5:]
    assert kinds(told) == ["killed", "killed", "requeued", "start"]
    assert [(event["of"], event.get("heartbeat")) for event in told[:2]] == [("", 7.0), (third, 7.0)]
    assert (told[2]["job"], told[2]["restart"], told[3]["restart"]) == ("12", 2, 2)


@pytest.mark.parametrize("later", [{"node": "b", "rank": 0, "error": "NotHere"}, {status.CRASH: True}])
def test_why_a_later_start_failed_is_not_why_the_run_was_killed(later: dict[str, Any], tmp_path: Path) -> None:
    """It found no GPU, or crashed, before it could claim the run; what status.json says of the place is older."""
    first = begun(tmp_path, {}).lease.token
    begun(tmp_path, {"state": "failed", "reason": "no GPU", "heartbeat": 9.0, "until": 5.0, "step": 3, **later})
    killed = events.read(tmp_path)[1]
    assert (killed["event"], killed["of"], killed["node"]) == ("killed", first, "a")
    assert (killed["heartbeat"], killed["step"]) == (5.0, 3)
    assert "reason" not in killed


def test_another_program_and_other_settings(tmp_path: Path) -> None:
    """A key that the start before did not know counts as its default; where the run lies is no setting."""
    begun(tmp_path, {})
    text = (tmp_path / "config.yaml").read_text().replace("  momentum: 0.9\n", "")
    (tmp_path / "config.yaml").write_text(text)
    now = Config(optim=OptimConfig(lr=0.5))
    begun(tmp_path, {}, now, step=7, code={"version": "1", "sources": "b"})
    changed = events.read(tmp_path)[-1]
    assert (changed["event"], changed["step"], changed["settings"]) == ("changed", 7, {"optim.lr": [0.01, 0.5]})
    assert changed["code"] == [CODE, {"version": "1", "sources": "b"}]
    assert changed["exact_until"] == 7
    assert story.differences(as_dict(now) | {"run.name": "another"}, now) == {}
    (tmp_path / "config.yaml").write_text("optim: {lr: 2026-01-01}")
    begun(tmp_path, {}, now, code={"version": "1", "sources": "b"})
    assert events.read(tmp_path)[-1]["settings"]["optim.lr"] == ["2026-01-01", 0.5]
    (tmp_path / "config.yaml").write_text("[")
    assert kinds(events.read(tmp_path))[-1] == "changed"
    begun(tmp_path, {}, now, code={"version": "1", "sources": "b"})
    assert kinds(events.read(tmp_path))[-1] == "start"


def test_a_run_that_goes_on_with_other_code_says_from_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A module of the user's own is code, too; the commit is not, nor is anything said of a run that has no step."""
    sentence = "the code has changed since the last start: after step 7 the bits may differ"
    begun(tmp_path, {})
    for about, step, changes in (
        ({"sources": "b"}, 0, True),
        ({"sources": "b", "commit": "c"}, 7, False),
        ({"sources": "b", "own": {"my_nets": "d"}}, 7, True),
        ({"sources": "b", "own": {"my_nets": "d"}}, 9, False),
    ):
        begun(tmp_path, {}, step=step, code={"version": "1", **about})
        last = events.read(tmp_path)[-1]
        assert (last["event"] == "changed") == changes
        assert last.get("exact_until") == (step if changes and step else None)
        assert (sentence in capfd.readouterr().out) == (changes and step == 7)


def test_what_a_start_ran_with(tmp_path: Path) -> None:
    """Each state is one file."""
    texts = {"changes.diff": "+1\n", "packages.txt": code.installed(), "nothing.txt": ""}
    found = environment.keep(tmp_path, texts)
    assert sorted(found) == sorted(os.listdir(tmp_path / "environment"))
    assert [name[:8] for name in found] == ["changes-", "packages"]
    packages = (tmp_path / "environment" / found[1]).read_text()
    assert f"\ntorch=={importlib.metadata.version('torch')}\n" in packages
    assert environment.keep(tmp_path, texts) == found
    assert len(environment.keep(tmp_path, {**texts, "changes.diff": "+2\n"})) == 2
    assert len(os.listdir(tmp_path / "environment")) == 3
    (tmp_path / "file").touch()
    assert environment.keep(tmp_path / "file", texts) == [], "no start is lost for it"


def test_the_hash_of_a_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what it imports, wherever they lie; a library has none."""
    found = []
    for place, text in (("a", "1\n"), ("b", "1\n"), ("c", "2\n")):
        (tmp_path / place / "own_nets").mkdir(parents=True)
        (tmp_path / place / "own_nets" / "small.py").write_text("def make():\n    import numpy, own_layers\n")
        (tmp_path / place / "own_layers.py").write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / place))
            found.append(code.version(["own_nets.small:make", "torch.optim:NAdam", "sgd"])["own"])
    assert [list(own) for own in found] == [["own_layers", "own_nets"]] * 3
    assert found[0] == found[1] != found[2]


def test_a_large_diff_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_git", lambda *words: " M x.py\n" if "status" in words else "+" * (code.LIMIT + 1000))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    (tmp_path / ".git").mkdir()
    assert len(code.changes()) < code.LIMIT + 100
    assert code.changes().endswith("\n(cut: 1009 more characters)\n")


def test_a_stale_process_neither_adds_nor_cuts(tmp_path: Path) -> None:
    stale, living = claimed(tmp_path), claimed(tmp_path)
    living.events.append("alert", sentence="mine")
    living.close()
    text = (tmp_path / events.FILE).read_bytes()
    stale.events.append("alert", sentence="late")
    stale.events.tell("end", state="failed")
    stale.events.settle()
    assert (tmp_path / events.FILE).read_bytes() == text


def test_a_full_disk_delays_the_story(tmp_path: Path) -> None:
    """What half a line is, is not cut off, since another rank may have written behind it."""
    run, said = claimed(tmp_path), list[str]()
    run.events._say = said.append
    file = run.events._file
    assert file is not None

    class Full:
        """Has room for ten bytes more."""

        def write(self, data: bytes) -> int:
            return file.write(data[:10])

    run.events._file = Full()  # type: ignore[assignment]
    run.events.append("alert", sentence="one")
    with pytest.raises(OSError, match="No space") as caught:
        run.events.settle()
    assert caught.value.errno == errno.ENOSPC
    run.events.tell("end", state="failed")
    run.events._file = file
    run.events.settle()
    assert [(event["event"], event.get("sentence")) for event in events.read(tmp_path)] == [
        ("end", None),
        ("alert", "one"),
    ]
    assert len(said) == 1


def test_restarts_without_progress_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for _ in range(restarts.LIMIT - 1):
        restarts.count(tmp_path)
    with pytest.raises(restarts.NoProgress, match="without progress"):
        restarts.count(tmp_path)
    (given_up,) = events.read(tmp_path)
    assert given_up["event"] == "given_up"
    assert "without progress" in given_up["reason"]


def test_what_cannot_be_told_is_given_up_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / events.FILE).mkdir()  # no event can be written
    for _ in range(restarts.LIMIT - 1):
        restarts.count(tmp_path)
    with pytest.raises(restarts.NoProgress):
        restarts.count(tmp_path)


def test_whether_a_job_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher.comes_back()
    monkeypatch.setenv(launcher.OVER, str(tmp_path / "over"))
    assert not launcher.comes_back(), "it is not Slurm's"
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert launcher.comes_back()
    (tmp_path / "over").touch()
    assert not launcher.comes_back()


def test_the_version_of_the_program(tmp_path: Path) -> None:
    found = code.version()
    assert found["version"] == importlib.metadata.version("dist_train") == dist_train.__version__
    for package in code.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert code.sources(tmp_path) == found["sources"]
    with open(tmp_path / "dist_train" / "optim.py", "a") as file:
        file.write("\n")
    assert code.sources(tmp_path) != found["sources"]
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", found["commit"])
        assert found["changed"] in ("yes", "no")


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    """An editor's lock is a link to nothing."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "a.py").write_text("1\n")
    found = code.sources(tmp_path)
    (tmp_path / "slurm" / ".#a.py").symlink_to("me@here.1234")
    assert code.sources(tmp_path) == found


def test_a_story_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / events.FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link, which is not followed: remove it"):
        events.tell(tmp_path, "alert")
    assert not (tmp_path / "elsewhere").exists()
