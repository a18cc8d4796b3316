"""A DALI that is missing, broken, or for another CUDA is one sentence with the line for pip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import dali, dali_wheel
from pipelines.dali import Decode
from pipelines.errors import UserError

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
BOTH = "`pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130`, then `pip install 'nvidia-dali-cuda1"
# In front of the real `nvidia`: without DALI; and with what is left of it after one of two packages was removed.
MISSING = "raise ModuleNotFoundError(\"No module named 'nvidia.dali'\", name='nvidia.dali')"
LEFT = "raise ImportError(\"cannot import name 'Pipeline' from 'nvidia.dali' (unknown location)\", name='nvidia.dali')"


def test_the_packages_are_those_of_the_project() -> None:
    for major, package in dali_wheel.PACKAGES.items():
        assert f'cuda{major} = ["{package}{dali_wheel.BOUNDS}"]' in PROJECT


def test_one_that_is_missing() -> None:
    error = ModuleNotFoundError("No module named 'nvidia.dali'", name="nvidia.dali")
    said = "NVIDIA DALI is not installed: type `pip install 'nvidia-dali-cuda1{}0>=2.4,<3'`"
    assert dali_wheel.not_importable(error, "13.0") == said.format(3)
    assert dali_wheel.not_importable(error, "12.6") == said.format(2)
    assert dali_wheel.not_importable(error, None) == said.format(3)


def test_what_is_left_of_two() -> None:
    """Seen after `pip uninstall nvidia-dali-cuda120` beside the other one, whose files it removes, too."""
    error = ImportError("cannot import name 'Pipeline' from 'nvidia.dali' (unknown location)", name="nvidia.dali")
    assert f"(unknown location)): type {BOTH}30>=2.4,<3'`" in dali_wheel.not_importable(error, "13.0")


@pytest.mark.parametrize(
    ("version", "cuda", "wrong"),
    [(13492, "13.0", ""), (12992, "12.6", ""), (12992, None, ""), (12992, "13.0", "30"), (13492, "12.6", "20")],
)
def test_one_for_another_cuda(version: int, cuda: str | None, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "__cuda_version__", version)
    monkeypatch.setattr("torch.version.cuda", cuda)
    Decode("cpu")  # there it does not matter
    if not wrong:
        Decode("gpu", 0)
        return
    with pytest.raises(UserError, match=r"NVIDIA DALI is built for CUDA 1\d, and torch for CUDA 1\d") as caught:
        Decode("gpu", 0)
    assert f"{BOTH}{wrong}>=2.4,<3'`" in str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "how"), [(["dist_train", "--train.device=cpu"], MISSING), (["dist_train", "evaluate", "mine"], LEFT)]
)
def test_a_command_without_it(words: list[str], how: str, tmp_path: Path) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    (tmp_path / "nvidia" / "dali.py").write_text(how)
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: NVIDIA DALI ")
    assert "pip install 'nvidia-dali-cuda1" in done.stderr
