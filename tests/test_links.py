"""Links that a stranger has left in a data set or a run directory: nothing is written, or removed, through them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from subprocess import run as execute

import pytest

from pipelines.__main__ import main as pipelines
from pipelines.files import appended, folder, new_file, replacing, write_atomically
from tests.helpers import adding
from tests.helpers.compare import status
from tests.helpers.launch import SMALL, launch
from tests.helpers.strange import MINE

ROOT = Path(__file__).parent.parent


def test_a_file_is_replaced_and_a_link_is_not_followed(tmp_path: Path, victim: Path) -> None:
    target = tmp_path / "status.json"
    for name in ("status.json", ".status.json.tmp", ".status.json.0.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()
    assert victim.read_bytes() == MINE
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".status.json.0.tmp", ".status.json.tmp"]


def test_names_that_are_written_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(5):
        with replacing(tmp_path / "a", durable=False):
            names |= set(os.listdir(tmp_path)) - {"a"}
    assert len(names) == 5
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a"):
        _ = 1 / 0
    assert os.listdir(tmp_path) == ["a"], "and nothing stays of what fails"


def test_what_would_be_written_through_a_link_is_refused(tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim)
    with pytest.raises(FileExistsError):
        new_file(link)
    with pytest.raises(OSError, match="is a link, which is not followed: remove it"):
        appended(link)
    (tmp_path / "sub").symlink_to(victim.parent)
    with pytest.raises(OSError, match="is a link, which is not followed: put the folder itself there"):
        folder(tmp_path / "sub")
    assert victim.read_bytes() == MINE


GROWS = ("metrics.jsonl", "events.jsonl")


@pytest.mark.integration
def test_a_run_directory_of_a_stranger(shard_sets: Path, tmp_path: Path, victim: Path) -> None:
    """Each file that a start writes, and each that its predecessor had beside it while it wrote, is a link to a file of
    the user's; so is each that an end writes."""
    run = tmp_path / "run"
    page = "--monitor.page=true"
    assert launch(shard_sets, run, "--train.epochs=1", page, ranks=0).returncode == 0
    names = [path.name for path in run.iterdir() if path.is_file() and path.name not in GROWS]
    names += [f".{name}.tmp" for name in (*names, *GROWS)] + [".status.json.0.tmp", "diverged.json", "starts.json"]
    shutil.rmtree(run / "pictures", ignore_errors=True)
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
    assert "report.html" in names
    assert launch(shard_sets, run, "--train.epochs=2", page, ranks=0).returncode == 0
    assert victim.read_bytes() == MINE
    assert status(run)["state"] == "done"


@pytest.mark.integration
@pytest.mark.parametrize("name", GROWS)
def test_a_file_that_grows_is_a_link(shard_sets: Path, tmp_path: Path, victim: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    result = launch(shard_sets, run, "--train.max_steps=1", ranks=0)
    assert victim.read_bytes() == MINE
    if result.returncode:
        assert "Traceback" not in result.stderr
        assert "is a link, which is not followed" in result.stderr


@pytest.mark.integration
def test_checkpoints_elsewhere_are_not_cleaned(shard_sets: Path, tmp_path: Path) -> None:
    """The folder is a link: what lies behind it may be another's. One sentence says so."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for name in (".keep.tmp", "best.new"):
        (elsewhere / name).mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    result = launch(shard_sets, run, "--train.max_steps=1", ranks=0)
    assert result.returncode == 2, result.stderr
    assert "is a link, which is not followed: put the folder itself there" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in elsewhere.iterdir()) == [".keep.tmp", "best.new"]


@pytest.mark.integration
@pytest.mark.parametrize("name", ["figures", "pictures"])
@pytest.mark.slow
def test_pictures_elsewhere_are_not_replaced(shard_sets: Path, tmp_path: Path, name: str) -> None:
    """The folders that `figures` writes into a run, by itself and for wandb, as links to one of the user's."""
    run, photos = tmp_path / "run", tmp_path / "photos"
    assert launch(shard_sets, run, "--train.max_steps=1", ranks=0).returncode == 0
    photos.mkdir()
    for file in ("kernels.png", "top5.png"):
        (photos / file).write_bytes(MINE)
    (run / name).symlink_to(photos)
    words = [sys.executable, "-m", "dist_train", "figures", str(run), "--only", "kernels", "--device", "cpu"]
    words += ["--out", f"{run}/pictures"] if name == "pictures" else []
    result = execute(words, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "is a link, which is not followed: put the folder itself there" in result.stderr
    assert {path.read_bytes() for path in photos.iterdir()} == {MINE}


@pytest.mark.integration
def test_a_checkpoint_of_links_is_pruned(shard_sets: Path, tmp_path: Path) -> None:
    """A start continues from the newest; the older one goes, which removes its links, but no files."""
    run, home = tmp_path / "run", tmp_path / "home"
    assert launch(shard_sets, run, "--train.max_steps=2", ranks=0).returncode == 0
    (newest,) = (run / "checkpoints").glob("step-*")
    newest.rename(home)
    kept = {path: path.read_bytes() for path in home.iterdir()}
    older = newest.with_name("step-00000001")
    for step in (older, newest):
        step.mkdir()
        for path in (*kept, home):
            (step / path.name).symlink_to(path)
    result = launch(shard_sets, run, "--train.epochs=3", "--checkpoint.keep=2", ranks=0)
    assert result.returncode == 0, result.stderr
    assert f"continuing from {newest.name}" in result.stderr
    assert newest.exists(), "it is the best"
    assert not older.exists()
    assert {path: path.read_bytes() for path in home.iterdir()} == kept


@pytest.mark.integration
def test_a_run_root_that_the_user_has_linked(shard_sets: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "real").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "scratch" / "real")
    for name in ("plain", "linked"):
        assert launch(shard_sets, tmp_path / "runs" / name, "--train.max_steps=1", ranks=0).returncode == 0
        assert status(tmp_path / "scratch" / ("real" if name == "linked" else name))["state"] == "done"


def test_a_data_set_of_a_stranger(
    shard_sets: Path, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`index` and `verify` with links in the place of all that they write."""
    copy = tmp_path / "set"
    shutil.copytree(shard_sets / "val", copy)
    beside = [path.name for path in copy.iterdir() if path.suffix != ".tar"] + ["quarantine.jsonl", "rejected.jsonl"]
    for name in dict.fromkeys(beside):
        (copy / f".{name}.tmp").symlink_to(victim)
    monkeypatch.setattr("sys.argv", ["pipelines", "verify", str(copy)])
    assert pipelines() == 0
    for name in dict.fromkeys(beside):
        if not (copy / name).is_dir():
            (copy / name).unlink(missing_ok=True)
            (copy / name).symlink_to(victim)
    for verb in ("index", "verify"):
        monkeypatch.setattr("sys.argv", ["pipelines", verb, str(copy)])
        pipelines()
        assert victim.read_bytes() == MINE, verb


def written(folder: Path, commands: list[list[str]], root: Path = ROOT) -> tuple[set[tuple[str, ...]], list[str]]:
    """What the commands of the code in `root` did to files in a folder, and new files that no event tells of."""
    (folder / "commands.json").write_text(json.dumps(commands))
    words = [sys.executable, "-m", "tests.helpers.written", str(folder), str(folder / "commands.json")]
    env = os.environ | {"PYTHONPATH": str(root)}
    result = execute(words, capture_output=True, text=True, check=False, cwd=root, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout.splitlines()[-1])
    return {tuple(event) for event in told["events"]}, told["untold"]


def test_what_a_killed_process_was_writing_is_removed(
    shard_sets: Path, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next `index`, since an index may have gigabytes; but nothing that may be another's."""
    copy, hexes = tmp_path / "set", "0123456789abcdef"
    shutil.copytree(shard_sets / "val", copy)
    others = (f".new.{hexes}.tmp", f".{hexes}.tmp", ".index.npy.tmp", f"index.npy.{hexes}.tmp", f".index.npy.{hexes}")
    for name in (f".index.npy.{hexes}.tmp", *others):
        (copy / name).write_bytes(MINE)
        os.utime(copy / name, (0, 0))
    os.utime(copy / others[0])
    (copy / f".linked.{hexes}.tmp").symlink_to(victim)
    os.utime(victim, (0, 0))
    monkeypatch.setattr("sys.argv", ["pipelines", "index", str(copy)])
    assert pipelines() == 0
    assert {path.name for path in copy.iterdir() if hexes in path.name or path.name in others} == {
        *others,
        f".linked.{hexes}.tmp",
    }
    assert victim.read_bytes() == MINE


@pytest.mark.integration
@pytest.mark.slow
def test_whatever_is_written_is_written_in_one_place(shard_sets: Path, image_folder: Path, tmp_path: Path) -> None:
    """Python's audit events of a packing, a run that is continued, and the verbs on both: files are opened for writing
    in pipelines/files.py alone, and what is moved, linked or removed elsewhere stands here."""
    data = [f"--data.train={tmp_path}/set", f"--data.val={shard_sets}/val", f"--run.dir={tmp_path}/run", *SMALL]
    small = [word for word in data if "epochs" not in word]
    commands = [
        ["pipelines", "pack", "imagefolder", f"{image_folder}/train", f"{tmp_path}/set", "--shorter-side=72"],
        ["pipelines", "index", f"{tmp_path}/set"],
        ["pipelines", "index", f"{tmp_path}/set", "--to", f"{tmp_path}/linked"],
        ["pipelines", "verify", f"{tmp_path}/set"],
        ["pipelines", "preview", f"{tmp_path}/set", f"{tmp_path}/preview.png"],
        ["dist_train", *small, "--train.epochs=1", "--monitor.tensorboard=true", "--monitor.page=true"],
        ["dist_train", *small, "--train.epochs=2"],
        ["dist_train", "evaluate", f"{tmp_path}/run"],
        ["dist_train", "figures", f"{tmp_path}/run"],
        ["dist_train", "report", f"{tmp_path}/run"],
    ]
    found, untold = written(tmp_path, commands)
    assert untold == []
    ours = {place for place in found if place[1] not in ("pipelines/files.py", "tensorboard")}
    assert ours == {
        ("os.mkdir", "dist_train/rundir/announcement.py", "_begin"),  # the run itself, which the user may have linked
        ("os.mkdir", "dist_train/rundir/directory.py", "claim"),
        ("os.remove", "dist_train/rundir/directory.py", "claim"),  # the mark of a start that has failed
        ("os.mkdir", "dist_train/rundir/store.py", "_fill"),  # a new one
        ("os.rename", "dist_train/rundir/store.py", "_place"),  # a whole checkpoint
        ("os.symlink", "dist_train/rundir/store.py", "_link"),  # `best`
        ("os.rename", "dist_train/rundir/store.py", "_link"),
        ("os.remove", "dist_train/rundir/store.py", "_link"),  # a link, not its target
        ("os.remove", "dist_train/rundir/restarts.py", "forget"),  # so here and below
        ("os.rename", "pipelines/pack.py", "_pack_shard"),
        ("os.remove", "pipelines/indexing.py", "_link"),  # its mark in the working folder
        ("os.remove", "pipelines/scan.py", "_write_manifest"),
        ("os.rmdir", "pipelines/unfinished.py", "working_folder"),
        ("shutil.rmtree", "pipelines/unfinished.py", "working_folder"),  # does not follow a link
    }
    assert ("open", "pipelines/files.py", "new_file") in found


WAYS_AROUND = """
    import os, shutil, torch
    from PIL import Image
    (directory / "text").write_text("")
    os.close(os.open(directory / "number", os.O_RDONLY | os.O_CREAT))
    os.chmod(directory / "text", 0o600)
    os.utime(directory / "text")
    os.unlink(directory / "number")
    shutil.move(directory / "text", directory / "moved")
    np.save(directory / "array", np.zeros(1))
    Image.new("RGB", (1, 1)).save(directory / "image.png")
    torch.save({}, str(directory / "in-c.pt"))
"""


@pytest.mark.integration
@pytest.mark.slow
def test_a_way_around_it_is_found(shard_sets: Path, tmp_path: Path) -> None:
    """Planted in a copy of the code. What C++ writes raises no event, but the file is there."""
    root, folder = tmp_path / "code", tmp_path / "data"
    adding.copied(root)
    shutil.copytree(shard_sets / "val", folder / "set")
    code = root / "pipelines" / "indexing.py"
    start = "    origin.refuse_foreign(directory)\n    sources"
    text = code.read_text()
    assert text.count(start) == 1
    code.write_text(text.replace(start, WAYS_AROUND + start))
    found, untold = written(folder, [["pipelines", "index", f"{folder}/set"]], root)
    events = {event for event, *place in found if place == ["pipelines/indexing.py", "index"]}
    assert events >= {"open", "os.chmod", "os.utime", "os.remove", "shutil.move", "os.rename"}
    assert untold == [f"{folder}/set/in-c.pt"]
