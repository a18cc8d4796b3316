"""What lies in the directory of a run: no secrets of its user, and nothing that he has not allowed others to read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.launch import at, finish, start

SECRET = "hush4711"  # in the value of each
NAMES = ("MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "SOME_API_KEY", "DB_PASSWORD", "HF_TOKEN", "GITHUB_TOKEN")
ENVIRONMENT = {name: f"{SECRET}-{name}" for name in NAMES} | {
    "WANDB_API_KEY": (SECRET * 5)[:40],
    "WANDB_MODE": "offline",
    "https_proxy": f"http://user:{SECRET}@127.0.0.1:9/",
    "DIST_TRAIN_NOTIFY": f"https://127.0.0.1:9/{SECRET}",
}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.usefixtures("wandb_alone")
@pytest.mark.parametrize(("fails", "mask"), [(False, 0o077), (False, 0o002), (True, 0o027)])
def test_files_of_a_run(fails: bool, mask: int, shard_sets: Path, tmp_path: Path) -> None:
    """Of one that ends well, and of one that ends by an exception, with wandb, a webhook and a proxy. Their modes are
    those that the umask leaves of 666, and of 777 for folders."""
    run = tmp_path / "run"
    before = os.umask(mask)
    try:
        result = finish(
            start(
                shard_sets,
                run,
                "--train.max_steps=3",
                "--monitor.wandb_notes=about",
                ranks=0,
                env=ENVIRONMENT,
                how="exec",
                fault=at("step", 2, "raise") if fails else None,
            )
        )
    finally:
        os.umask(before)
    assert (result.returncode == 0) is not fails, result.stderr[-3000:]
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"config.yaml", "status.json", "events.jsonl"} <= {path.name for path in files}
    assert any("wandb" in path.parts for path in files)
    if fails:
        assert any("errors" in path.parts for path in files)
    told = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not told, "secrets of the environment"
    assert SECRET not in result.stdout + result.stderr
    for path in (run, *run.rglob("*")):
        if not path.is_symlink() and "wandb" not in path.parts:  # which leaves fewer to others, if anything
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
        assert path.is_symlink() or not path.stat().st_mode & mask, path
