"""Run directories of strangers, in the table of `status`: each is a row of its own, whatever lies in it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.rundir.listing import WIDEST
from pipelines.speech import UNPRINTED
from slurm.__main__ import main
from slurm.cluster import Entry
from slurm.submissions import SubmittedRun
from slurm.table import row
from slurm.watch import Silences

NOW = time.time() + 3600  # however long the tests take
BODY = {"state": "running", "reason": "", "step": 17, "epoch": 3, "heartbeat": NOW, "seconds": {"training": 5.0}}
SUBMISSION = {"job": "12", "tasks": 1, "local": False}
LINES = [{"kind": "step", "step": 17, "loss": 1.5, "machine": {"images_per_s": 812.3}}]
LINES += [{"kind": "validation", "step": 17, "top1_error": 0.4071}]
RIGHT = {
    "status.json": json.dumps(BODY),
    "metrics.jsonl": "".join(f"{json.dumps(line)}\n" for line in LINES),
    "slurm/starts.jsonl": '{"time": 1.0, "submitted": "12"}\n{"time": 2.0, "start": "12", "nodes": ["a"]}\n',
    "slurm/config.yaml": "train: {epochs: 90}\n",
}


def made(run: Path) -> Path:
    """A run directory as a job leaves it."""
    (run / "slurm").mkdir(parents=True)
    for name, text in RIGHT.items():
        (run / name).write_text(text)
    (run / "slurm" / "job.json").write_text(json.dumps(SUBMISSION | {"folder": str(run / "slurm")}))
    return run


def body(**more: object) -> str:
    return json.dumps(BODY | more)


def job(**more: object) -> str:
    return json.dumps(SUBMISSION | {"folder": "/srv"} | more)


LINE = "a line at its end: "
DEEP = "[" * 100_000
# File, its text, and what the table says of it.
TEXTS: list[tuple[str, str | bytes, str]] = [
    ("status.json", "[1]", "it should be an object"),
    ("status.json", "7", "it should be an object"),
    ("status.json", "null", "it should be an object"),
    ("status.json", "", "it is no JSON: EOF"),
    ("status.json", body()[:30], "it is no JSON: EOF"),
    ("status.json", DEEP, "it is no JSON: recursion limit"),
    ("status.json", '{"a": ' * 5000 + "1" + "}" * 5000, "it is no JSON: recursion limit"),
    ("status.json", b'{"state": "done\xff"}', "it is no JSON: invalid unicode"),
    ("status.json", "{}", "state is missing"),
    ("status.json", body(state=["done"]), "state should be 'starting'"),
    ("status.json", body(state="\033[2Jgone"), "state should be 'starting'"),
    ("status.json", body(heartbeat=float("nan")), "heartbeat should be a finite number"),
    ("status.json", body(heartbeat=float("inf")), "heartbeat should be a finite number"),
    ("status.json", body(heartbeat=1e300), "heartbeat should be less than"),
    ("status.json", body(heartbeat="now"), "heartbeat should be a valid number"),
    ("status.json", body(seconds={"training": -5}), "seconds.training should be greater than or equal to 0"),
    ("status.json", body(seconds=[1]), "seconds should be an object"),
    ("status.json", body(step="17"), "step should be a valid integer"),
    ("status.json", body(step=-1), "step should be greater than or equal to 0"),
    ("status.json", body(epoch=10**30), "epoch should be less than"),
    ("status.json", body(reason=["no", "GPU"]), "reason should be a valid string"),
    ("status.json", body(crash="yes"), "crash should be a valid boolean"),
    ("status.json", body(reason="x" * (1 << 20)), "has more than 1048576 bytes"),
    ("metrics.jsonl", "[1]\n", f"{LINE}it should be an object"),
    ("metrics.jsonl", "\0\0\0\n", f"{LINE}it is no JSON"),
    ("metrics.jsonl", "[" * 60_000 + "\n", f"{LINE}it is no JSON: "),
    ("metrics.jsonl", '{"step": 1}\n', f"{LINE}kind is missing"),
    ("metrics.jsonl", '{"kind": ["step"]}\n', f"{LINE}kind should be a valid string"),
    ("metrics.jsonl", '{"kind": "step", "images_per_s": Infinity}\n', f"{LINE}images_per_s should be a finite number"),
    (
        "metrics.jsonl",
        '{"kind": "step", "machine": {"images_per_s": "8"}}\n',
        f"{LINE}machine.images_per_s should be a valid",
    ),
    ("metrics.jsonl", '{"kind": "step", "machine": 5}\n', f"{LINE}machine should be an object"),
    ("metrics.jsonl", '{"kind": "validation", "top1_error": NaN}\n', f"{LINE}top1_error should be a finite number"),
    ("slurm/starts.jsonl", "[1]\n", "line 1: it should be an object"),
    ("slurm/starts.jsonl", '{"start": "12"}\n{"start": 12}\n', "line 2: start should be a valid string"),
    ("slurm/starts.jsonl", '{"start": "12", "nodes": "a"}\n', "line 1: nodes should be a valid array"),
    ("slurm/starts.jsonl", '{"time": "never", "submitted": "12"}\n', "line 1: time should be a valid number"),
    ("slurm/config.yaml", "", "train is missing"),
    ("slurm/config.yaml", "- 1\n", "holds no groups of settings"),
    ("slurm/config.yaml", "train: 3\n", "has no group of settings at train"),
    ("slurm/config.yaml", "train: {}\n", "train.epochs is missing"),
    ("slurm/config.yaml", "train: {epochs: many}\n", "train.epochs should be a valid integer"),
    ("slurm/config.yaml", "a: &a [1]\ntrain: {epochs: 3, b: *a}\n", "has no group of settings at a"),
    ("slurm/config.yaml", "a: &a [*a]\n", "repeats *a where it is not known yet"),
    ("slurm/config.yaml", "train: {\n", "is no YAML"),
    ("slurm/config.yaml", DEEP[:60_000], "is more than 50 levels deep"),
    ("slurm/config.yaml", "at: !!timestamp x\n", "is no YAML"),
    ("slurm/config.yaml", "at: 2026-99-99\n", "has no group of settings at at"),
    ("slurm/config.yaml", "[1]: 2\n", "is no YAML"),
    ("slurm/config.yaml", "!!python/object/apply:os.system [id]\n", "is no YAML (could not determine a constructor"),
    ("slurm/config.yaml", b"\xff\xfe\xff", "is not a text file in UTF-8"),
    ("slurm/job.json", "[]", "it should be an object"),
    ("slurm/job.json", "{}", "job is missing"),
    ("slurm/job.json", DEEP, "it is no JSON: recursion limit"),
    ("slurm/job.json", job(job=12), "job should be a valid string"),
    ("slurm/job.json", job(job="12,1"), "job should match pattern"),
    ("slurm/job.json", job(job="12\033[2J"), "job should match pattern"),
    ("slurm/job.json", job(folder="a\0b"), "folder should match pattern"),
    ("slurm/job.json", job(chain=["12"] * 1001), "chain should have at most 1000 items"),
    ("slurm/job.json", job(job="1" * 11), "job should match pattern"),
    ("slurm/job.json", job(tasks=-1), "tasks should be greater"),
    ("slurm/job.json", job(chain=["12", {}]), "chain.1 should be a valid string"),
]
VERB = re.compile("(has|holds|is|repeats) ")  # of a sentence on the file itself


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs of somebody who has one that is right, on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    made(tmp_path / "runs" / "right")
    return tmp_path / "runs"


def table(capsys: pytest.CaptureFixture[str], *runs: str) -> list[str]:
    """The lines of `status`, without the head; the run that is right is among them, if all are shown."""
    assert main(["status", *runs]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not UNPRINTED.search(out)
    lines = out.splitlines()[1:]
    if not runs:
        (right,) = (line for line in lines if line.startswith("right "))
        assert [cell.strip() for cell in right.split("  ") if cell.strip()][:7] == [
            *("right", "12", "not in the queue", "running, but not in the queue", "3/90", "812", "40.7%"),
        ]
    return lines


@pytest.mark.parametrize(("file", "text", "why"), TEXTS, ids=range(len(TEXTS)))
def test_a_damaged_file(here: Path, capsys: pytest.CaptureFixture[str], file: str, text: str | bytes, why: str) -> None:
    (made(here / "strange") / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    (strange,) = (line for line in table(capsys) if line.startswith("strange "))
    said = f"damaged: {file} {why}" if VERB.match(why) else f"damaged: {file} ({why}"
    assert said[:WIDEST].removesuffix(")")[: WIDEST - 3] in strange
    assert len(strange) < 200
    _, *whole = table(capsys, "strange")
    assert said in "".join([strange, *whole])


def no_file(path: Path) -> None:
    path.mkdir()


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_hole(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


FILES = ("status.json", "metrics.jsonl", "slurm/starts.jsonl", "slurm/config.yaml", "slurm/job.json")
PLACES: list[tuple[Callable[[Path], None], str]] = [
    (no_file, " is a folder: put the right file there"),
    (os.mkfifo, " is no file but a pipe"),
    (lambda path: path.symlink_to("/dev/zero"), " is no file but a pipe"),
    (a_link_to_itself, " (Too many levels of symbolic links)"),
    (a_hole, " "),
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("place", "why"), PLACES, ids=range(len(PLACES)))
def test_something_else_in_the_place_of_a_file(
    here: Path, capsys: pytest.CaptureFixture[str], file: str, place: Callable[[Path], None], why: str
) -> None:
    path = made(here / "strange") / file
    path.unlink()
    place(path)
    rows = [line for line in table(capsys) if line.startswith("strange ")]
    if file == "slurm/job.json" and place is a_link_to_itself:
        assert not rows, "it was never submitted"
    elif file == "metrics.jsonl" and place is a_hole:
        assert "running, but not in the queue" in rows[0], "of which the end is read, where no line is"
    else:
        assert f"damaged: {file}{why}" in rows[0]


@pytest.mark.parametrize("name", ["over", "crash"])
def test_marks_of_a_terabyte_are_not_read(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    a_hole(made(here / "strange") / "slurm" / f"12.{name}")
    assert [line for line in table(capsys) if line.startswith("strange ") and "running" in line]


def test_runs_that_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").write_text("")
    (here / "link").symlink_to("link")
    os.mkfifo(here / "pipe")
    (here / "a").mkdir()
    (here / "a" / "slurm").write_text("")
    (here / "b").mkdir()
    (here / "b" / "slurm").symlink_to("slurm")
    (here / "c" / "slurm" / "job.json").mkdir(parents=True)
    assert [line.split()[0] for line in table(capsys)] in (["right", "c"], ["c", "right"])


def test_names_and_reasons_are_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in its line, with what would control the terminal escaped; a long one does not widen the table."""
    made(here / "two\nlines\033[2J\u202e")
    made(Path(os.fsdecode(os.fsencode(here) + b"/\xff\xfe")))
    reason = "first\nsecond\033]0;title\a\tthird" + 10_000 * "x"
    (made(here / "failed") / "status.json").write_text(body(state="failed", reason=reason))
    lines = table(capsys)
    assert len(lines) == 4
    assert any(line.startswith("two\\nlines\\x1b[2J\\u202e ") for line in lines)
    assert any(line.startswith("\\xff\\xfe ") for line in lines)
    (failed,) = (line for line in lines if line.startswith("failed "))
    assert "failed: first\\nsecond\\x1b]0;title\\x07\\tthirdxxx" in failed
    assert len(failed) < 250
    cut, whole = table(capsys, "failed")
    assert "xxx...  3/90" in cut
    assert whole.endswith("third" + 10_000 * "x")


@pytest.mark.parametrize("file", ["slurm/starts.jsonl", "metrics.jsonl"])
def test_a_torn_line_is_left_out(here: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    with open(here / "right" / file, "a") as lines:
        lines.write('{"time": 3.0, "kind": "st')
    table(capsys)
    if file == "slurm/starts.jsonl":
        run = SubmittedRun(here / "right")
        run.append(start="12")
        run.append(submitted="12")
        assert [sorted(line)[-1] for line in run.history()] == ["time", "time", "time", "time"]
        assert [line.get("start") for line in run.history()] == [None, "12", "12", None]


def test_a_run_that_is_submitted_again_has_no_reason_yet(here: Path) -> None:
    run = SubmittedRun(here / "right")
    (run.directory / "status.json").write_text(body(state="failed", reason="no GPU", heartbeat=time.time() - 5))
    assert row(run, Entry("PENDING"), NOW)["STATE"] == "failed: no GPU"
    run.append(submitted="12")
    assert row(run, Entry("PENDING"), NOW)["STATE"] == "failed, then submitted again"
    assert row(run, None, NOW)["STATE"] == "failed: no GPU"
    run.append(start="12")
    assert row(run, Entry("RUNNING"), NOW)["STATE"] == "failed: no GPU"


LOG = b"\033[31mred\033[0m \xc3\xa9\r\n 10%|#  |\r 20%|## |\r\n\033]0;title\a\xff\0end\n"


def test_a_log_is_text(here: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Without colours, with a line for each state of a bar; or the very bytes."""
    (here / "right" / "slurm" / "12_0_log.out").write_bytes(LOG)
    assert main(["logs", "right"]) == 0
    assert capsysbinary.readouterr().out.decode() == (
        "red \u00e9\n 10%|#  |\n 20%|## |\n\\x1b]0;title\\x07\ufffd\\x00end\n"
    )
    assert main(["logs", "right", "--raw"]) == 0
    assert capsysbinary.readouterr().out == LOG


def test_a_watch_goes_on_beside_a_damaged_run(here: Path) -> None:
    runs = [SubmittedRun(made(here / name)) for name in ("text", "pipe", "folder", "link", "silent")]
    for run in runs:
        (run.directory / "status.json").unlink()
    (runs[0].directory / "status.json").write_text(DEEP)
    os.mkfifo(runs[1].directory / "status.json")
    (runs[2].directory / "status.json").mkdir()
    a_link_to_itself(runs[3].directory / "status.json")
    (runs[4].directory / "status.json").write_text(body(heartbeat=time.time() - 720))
    queue = {run.name: Entry("RUNNING") for run in runs}
    (message,) = Silences().found(runs, queue, time.time())
    assert message.run == "silent"
