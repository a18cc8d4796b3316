"""What pip makes of the repository starts, with its configurations: a wheel, an editable install, and a copied tree.

Each is installed without a download into an environment that sees the packages that are present.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.launch import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "dist_train", "pipelines", "slurm", "configs")
NET = """
from torch import nn
def make(classes, crop, width):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LazyLinear(width), nn.LazyLinear(classes))
"""


def copied(to: Path) -> Path:
    """A copy of what is installed: building writes beside the sources."""
    to.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to)
    return to


def started(words: list[str], cwd: Path, code: int = 0, path: str = "") -> tuple[str, str]:
    """Output and error output of a command, without this test's PYTHONPATH."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONPATH": path} if path else {}
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def pip(python: Path | str, *words: str, cwd: Path) -> None:
    """Runs pip for an environment."""
    started([sys.executable, "-m", "pip", "--python", str(python), *words], cwd)


def environment(folder: Path) -> Path:
    """A new environment, of which the folder of programs is returned. A path file names the present packages, of which
    no path file is read, so that an editable install there is not seen."""
    started([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "present.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin"


def check(trainer: list[str], data: list[str], slurm: list[str], cwd: Path, configs: Path, path: str = "") -> None:
    """What a user types first, in a folder without configurations."""
    assert "crop: 67" in started([*trainer, "--print_config"], cwd, path=path)[0], "that of configs/quickstart.yaml"
    for words in (["--config", "configs/own.yaml"], ["--config=configs/own.yaml"]):
        printed, said = started([*trainer, *words, "--print_config"], cwd, path=path)
        assert "train: data/own/train" in printed
        assert said == f"--config configs/own.yaml is not in {cwd}: {configs / 'own.yaml'} is taken\n"
    (cwd / "configs").mkdir()
    (cwd / "configs" / "own.yaml").write_text("train: {epochs: 7}")
    printed, said = started([*trainer, "--config=configs/own.yaml", "--print_config"], cwd, path=path)
    assert ("epochs: 7" in printed, said) == (True, ""), "the user's own comes first"
    shutil.rmtree(cwd / "configs")
    said = started([*trainer, "--config=own"], cwd, code=2, path=path)[1]
    assert said.endswith("did you mean configs/own.yaml?\n")
    assert "activation" in started([*trainer, "experiments", "activatoin"], cwd, code=2, path=path)[1]
    for program, name in ((data, "pipelines"), (slurm, "slurm")):
        assert started([*program, "--help"], cwd, path=path)[0].startswith(f"usage: python -m {name} VERB ...")


def test_a_wheel(shard_sets: Path, tmp_path: Path) -> None:
    tree, cwd = copied(tmp_path / "tree"), tmp_path / "cwd"
    cwd.mkdir()
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    started([sys.executable, "-m", "pip", "wheel", *offline, "-w", str(tmp_path), str(tree)], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(tree)
    programs = environment(tmp_path / "environment")
    pip(programs / "python", "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    (package,) = tmp_path.glob("environment/lib/python*/site-packages/dist_train")
    trainer, data, slurm = ([str(programs / f"dist-train{name}")] for name in ("", "-data", "-slurm"))
    check(trainer, data, slurm, cwd, package / "configs")
    module = [str(programs / "python"), "-m"]
    check([*module, "dist_train"], [*module, "pipelines"], [*module, "slurm"], cwd, package / "configs")
    for words in (["--hlep"], ["hlep"], ["evaluate", "nothing"], ["--config=configs/own.yaml"]):
        assert started([*trainer, *words], cwd, code=2) == started([*module, "dist_train", *words], cwd, code=2)
    (cwd / "my_nets.py").write_text(NET)  # found in the current directory, as with -m
    sets = [f"--data.train={shard_sets / 'train'}", f"--data.val={shard_sets / 'val'}"]
    small = [word for word in SMALL if not word.startswith(("--model.", "--train.epochs"))]
    net = ["--model.name=my_nets:make", "--model.options.width=32"]
    _, said = started([*trainer, *small, *sets, *net, "--train.max_steps=2", "--run.name=mine"], cwd)
    assert "Traceback" not in said
    assert (cwd / "runs" / "mine" / "status.json").exists()
    started([*trainer, "evaluate", "mine", "--device=cpu", "--trust"], cwd)
    started([*trainer, "report", "mine", "--out", "page.html"], cwd)
    assert b"uPlot" in (cwd / "page.html").read_bytes(), "it came with the wheel"
    assert (package / "page" / "vendor" / "uPlot.LICENSE").exists()


def test_an_editable_install(tmp_path: Path) -> None:
    tree, cwd = copied(tmp_path / "tree"), tmp_path / "cwd"
    cwd.mkdir()
    programs = environment(tmp_path / "environment")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    pip(programs / "python", "install", *offline, "-e", str(tree), cwd=tmp_path)
    trainer, data, slurm = ([str(programs / f"dist-train{name}")] for name in ("", "-data", "-slurm"))
    check(trainer, data, slurm, cwd, tree / "configs")
    printed, said = started([*trainer, "--config=configs/own.yaml", "--print_config"], tree)
    assert ("data/own/train" in printed, said) == (True, "")


def test_a_copied_tree(tmp_path: Path) -> None:
    """Not installed: started from itself, and from elsewhere with PYTHONPATH."""
    tree, cwd = copied(tmp_path / "tree"), tmp_path / "cwd"
    cwd.mkdir()
    module = [str(environment(tmp_path / "environment") / "python"), "-m"]
    check([*module, "dist_train"], [*module, "pipelines"], [*module, "slurm"], cwd, tree / "configs", str(tree))
    assert "crop: 67" in started([*module, "dist_train", "--print_config"], tree)[0]
    printed, said = started([*module, "dist_train", "--config=configs/own.yaml", "--print_config"], tree)
    assert ("data/own/train" in printed, said) == (True, "")
