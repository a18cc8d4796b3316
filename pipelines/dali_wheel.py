"""Sentences on a DALI that is missing, or for another CUDA. pip has a package of it per major version of CUDA; they
share a folder, so that of two the last one installed counts, and removing either breaks the other."""

from __future__ import annotations

from pipelines.errors import first_line

PACKAGES = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}
BOUNDS = ">=2.4,<3"  # as in pyproject.toml


def not_importable(error: ImportError, cuda: str | None) -> str:
    """The sentence on an `import nvidia.dali` that failed, with torch's version of CUDA; None: built without."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.dali"):
        return f"NVIDIA DALI is not installed: {_install(cuda)}"
    return f"NVIDIA DALI cannot be imported ({first_line(error)}): {_reinstall(cuda)}"


def for_another(dali: int, cuda: str | None) -> str:
    """The sentence on a DALI that shall use a GPU and is built for another major version of CUDA than torch; "" if it
    is not. On CPUs it does not matter.

    Args:
        dali: `nvidia.dali.__cuda_version__`, whose first two digits are the major version.
        cuda: `torch.version.cuda`, such as 13.0.
    """
    theirs, ours = str(dali)[:2], (cuda or "").partition(".")[0]
    if ours in ("", theirs):
        return ""
    return f"NVIDIA DALI is built for CUDA {theirs}, and torch for CUDA {cuda}: {_reinstall(cuda)}"


def _install(cuda: str | None) -> str:
    return f"type `pip install '{PACKAGES.get((cuda or '').partition('.')[0], PACKAGES['13'])}{BOUNDS}'`"


def _reinstall(cuda: str | None) -> str:
    return f"type `pip uninstall -y {' '.join(PACKAGES.values())}`, then {_install(cuda).removeprefix('type ')}"
