"""Checks of this machine for training: a list of findings, in which no failure stops the rest.

Each check takes the facts it judges as arguments; `checks` gathers them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from dist_train import driver
from dist_train.driver import Card
from pipelines.errors import UserError, first_line
from pipelines.misc import cpus

if TYPE_CHECKING:
    import torch

OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version (release notes of the CUDA toolkit)
# Compute capabilities of the cards that decode JPEGs in hardware: A100 and A30, Ada, Hopper, Blackwell, Thor (section
# 1.5 of nvJPEG's documentation).
JPEG_ENGINES = ("8.0", "8.9", "9.", "10.", "11.", "12.")
FEW_CPUS = 4  # per GPU
WITHOUT_CUDA = "it is built without CUDA"  # "it" is torch
# PyTorch's own index has builds for CUDA 12.6, of torch 2.9 to 2.14; pip prefers 2.14.1+cu126 to 2.14.1.
CUDA_12 = "rm -rf .venv && PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 make .venv/ready EXTRA=cuda12"
REMEDY = f"Install a newer driver, or reinstall with the builds for CUDA 12:\n{CUDA_12}"


class Check(NamedTuple):
    """Result of one check.

    Attributes:
        found: finding, one line.
        remedy: one sentence, plus a command on a line of its own if there is one; "" if the check is ok.
    """

    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def checks(temporary: Path | None = None) -> list[Check]:
    """Runs all checks. Takes seconds: imports torch, and calls nvidia-smi.

    Args:
        temporary: folder whose disk is checked; None: that of temporary files.
    """
    disk = temporary or Path(tempfile.gettempdir())
    files, (seen, why), listed = driver.device_files(), usable(), driver.nvidia_smi(driver.CARDS, driver.CSV)
    known = driver.cards(listed.text)
    found = [_safely("system", system), _safely("software", software)]
    found += [_safely("GPUs", lambda: gpus(files, seen, why, known, listed.why))]
    if files or seen or known:
        found += [
            _safely("driver", lambda: enough(driver.version(), _of_torch().get("CUDA", ""), works=seen > 0)),
            _safely("JPEG decoder", lambda: jpeg_decoder(known)),
            _safely("MIG", lambda: mig(known)),
            _safely("topology", lambda: links(driver.topology())),
            _safely("GPU 0", lambda: occupied(driver.nvidia_smi(driver.APPS, driver.CSV).text, known)),
            _safely("CPUs", lambda: cpus_of_a_gpu(cpus(), seen or len(known) or len(files))),
        ]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return [
        *found,
        _safely("compiler", lambda: compiler(_c_compiler(), header=header.exists())),
        _safely("shared memory", lambda: space("shared memory", Path("/dev/shm"), 1, "--shm-size for a container")),
        _safely("disk", lambda: space("disk", disk, 5, "TMPDIR")),
    ]


def _safely(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "warn", f"cannot be determined ({first_line(error)})", "Report this as a bug of dist_train.")


def accelerator(device: torch.device) -> str:
    """Card and versions that determine the exact bits of a run: driver, CUDA, NCCL and cuDNN. "" for the CPU."""
    if device.type != "cuda":
        return ""
    from torch import cuda

    facts = [cuda.get_device_name(device), f"driver {driver.version() or 'unknown'}"]
    return ", ".join([*facts, *(f"{name} {number}" for name, number in _of_torch().items())])


def usable() -> tuple[int, str]:
    """Number of GPUs that torch can use, and its explanation if there are none."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # device_count alone asks the driver's library, which also counts GPUs that this CUDA cannot use.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count or not said:
        return count, "" if torch.version.cuda else WITHOUT_CUDA
    return count, str(said[-1].message).splitlines()[0]


def use_gpu() -> bool:
    """Whether torch can use a GPU. Raises UserError if it cannot, but this process was given one: a run would train on
    the CPUs of a node with GPUs."""
    count, why = usable()
    if shown := "" if count else driver.given(driver.device_files(), os.environ):
        raise UserError(unusable(shown, why, enough(driver.version(), _of_torch().get("CUDA", ""), works=False)))
    return count > 0


def unusable(shown: str, why: str, version: Check) -> str:
    """The sentence on GPUs that torch cannot use: `shown` by what, `why` as `usable` says, and the driver's version."""
    remedy = "`python -m dist_train gpu-report machine`, typed on that node, may tell"
    if why == WITHOUT_CUDA:
        remedy = "install a torch that is built with CUDA"
    elif version.level == "fail":
        why = f"the driver {version.found}"
        older = "" if "CUDA 12" in version.found else f", or the builds for CUDA 12 (in a clone by `{CUDA_12}`)"
        remedy = f"install a newer driver{older}"
    return (
        f"torch cannot use the GPUs of this node ({shown}), {why or 'and does not say why'}: {remedy}, or do "
        f"without them by --train.device cpu"
    )


def versions_of_training() -> dict[str, str]:
    """Versions by name, of packages that a trainer imports anyway."""
    import nvidia.dali
    import torch

    found = {"Python": platform.python_version(), "torch": torch.__version__, **_of_torch()}
    return found | {"DALI": nvidia.dali.__version__}


def versions() -> dict[str, str]:
    """Versions by name, of all packages that compute."""
    import torch
    import torchvision

    found = versions_of_training() | {"torchvision": torchvision.__version__}
    for place in sorted(Path(torch.__file__).parents[1].glob("nvidia_*.dist-info")):
        if package := re.fullmatch(r"nvidia_(nvjpeg|nvimgcodec)(?:_cu\d+)?-(.+)\.dist-info", place.name):
            found[package[1]] = package[2]
    return found


def _of_torch() -> dict[str, str]:
    """Versions of torch's CUDA, NCCL and cuDNN; empty for a build without CUDA."""
    import torch

    if not torch.version.cuda:
        return {}
    found = {"CUDA": torch.version.cuda}
    with suppress(AttributeError, RuntimeError):  # a build without NCCL
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if number := torch.backends.cudnn.version():  # type: ignore[no-untyped-call]
        major, rest = divmod(number, 10000 if number >= 90000 else 1000)
        found["cuDNN"] = f"{major}.{rest // 100}.{rest % 100}"
    return found


def system() -> Check:
    """Kernel, Linux, CPUs and memory."""
    name = ""
    with suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    kernel = f"{platform.system()} {platform.release()}"
    model = processor(Path("/proc/cpuinfo").read_text(encoding="utf-8")) or platform.machine()
    mine, all_of_them = cpus(), os.cpu_count() or 0
    count = f"{mine} CPU{'' if mine == 1 else 's'}" + (f" of {all_of_them}" if mine != all_of_them else "")
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:,.1f} GB of memory"
    return Check("system", "ok", ", ".join(filter(None, [kernel, name, model, count, memory])))


def processor(text: str) -> str:
    """CPU model from /proc/cpuinfo; "" if it is not given, as on ARM."""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def software() -> Check:
    """Versions of all packages that compute."""
    return Check("software", "ok", ", ".join(f"{name} {number}" for name, number in versions().items()))


def gpus(files: Sequence[str], seen: int, why: str, known: Sequence[Card], silence: str) -> Check:
    """Whether torch can use the GPUs of this machine.

    Args:
        files: their device files.
        seen: number of GPUs that torch can use; `why` is its explanation if there are none.
        known: cards that nvidia-smi lists; `silence` is why it lists none.
    """
    if not files and not seen and not known:
        return Check("GPUs", "ok", "no NVIDIA GPU on this machine; nets are trained on the CPU")
    if not seen and driver.hidden():
        return Check("GPUs", "ok", "hidden by CUDA_VISIBLE_DEVICES; nets are trained on the CPU")
    if not seen:
        reasons = "; ".join(filter(None, [why, silence])) or "it does not say why"
        found = f"torch cannot use the {len(known) or len(files)} of this machine: {reasons}"
        return Check(
            "GPUs", "fail", found, REMEDY if why != WITHOUT_CUDA else "Install a torch that is built with CUDA."
        )
    if silence:
        return Check("GPUs", "warn", f"torch can use {seen}, but {silence}", "Let this user run nvidia-smi.")
    kinds = Counter((card.name, card.memory_mib, card.capability) for card in known)
    listed = [f"{n} x {name}, {mib} MiB, compute capability {number}" for (name, mib, number), n in kinds.items()]
    return Check("GPUs", "ok", "; ".join(listed) + (f"; torch can use {seen} of them" if seen != len(known) else ""))


def enough(version: str, cuda: str, *, works: bool) -> Check:
    """Whether the driver is new enough for torch's CUDA. An old one `works` with NVIDIA's compatibility package."""
    if not version:
        return Check("driver", "warn", "its version is unknown", "Let this user read /proc/driver/nvidia/version.")
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0] or 0), 0)
    if works or int(version.partition(".")[0]) >= oldest:
        return Check("driver", "ok", f"{version}; torch's CUDA: {cuda or 'none'}")
    found = f"{version} is too old for torch's CUDA {cuda}, which needs r{oldest} or newer"
    return Check("driver", "fail", found, REMEDY)


def jpeg_decoder(known: Sequence[Card]) -> Check:
    """Whether the cards have a JPEG decoder apart from the training cores. Always ok: without one the cores decode."""
    without = sorted({card.name for card in known if not card.capability.startswith(JPEG_ENGINES)})
    if known and not without:
        return Check("JPEG decoder", "ok", "in hardware, according to nvJPEG's documentation")
    return Check("JPEG decoder", "ok", f"none in hardware on {', '.join(without) or 'unknown cards'}")


def mig(known: Sequence[Card]) -> Check:
    """Whether cards are partitioned into slices."""
    cut = [str(card.number) for card in known if card.mig == "Enabled"]
    if not cut:
        return Check("MIG", "ok", "off")
    found = f"enabled on GPU {', '.join(cut)}: a process can use only one slice, and NCCL cannot connect slices"
    return Check("MIG", "warn", found, "Turn it off (nvidia-smi -mig 0), or train with one process.")


def links(matrix: str) -> Check:
    """Links between the GPUs, from the matrix of `nvidia-smi topo -m`. NV# is NVLink; other names are PCIe paths."""
    rows = [line.split() for line in matrix.splitlines() if re.match(r"GPU\d+\s.*\sX\s", line)]
    if len(rows) < 2:
        return Check("topology", "ok", "one GPU" if rows else "unknown to nvidia-smi")
    kinds = sorted({kind for row in rows for kind in row[1 : len(rows) + 1]} - {"X"})
    return Check("topology", "ok", f"{len(rows)} GPUs, connected by {', '.join(kinds)}")


def occupied(apps: str, known: Sequence[Card]) -> Check:
    """Whether other processes use the first GPU."""
    first = {card.uuid for card in known if card.number == 0}
    held = [f"process {pid} ({mib} MiB)" for pid, uuid, mib in driver.holders(apps) if uuid in first]
    if not held:
        return Check("GPU 0", "ok", "free")
    return Check("GPU 0", "warn", f"used by {', '.join(held)}", "End it, or exclude the card (CUDA_VISIBLE_DEVICES).")


def cpus_of_a_gpu(count: int, shared_by: int) -> Check:
    """Whether there are enough CPUs."""
    found, remedy = f"{count}, {count / shared_by:.3g} per GPU", few_cpus(count / shared_by)
    return Check("CPUs", "warn" if remedy else "ok", found, remedy and remedy[0].upper() + remedy[1:] + ".")


def few_cpus(of_a_gpu: float, option: str = "--cpus-per-task") -> str:
    """Remedy if a GPU has too few CPUs to read images, decode some of them, and launch kernels; else "". `option`: of
    Slurm."""
    return f"ask for {FEW_CPUS} or more per GPU (under Slurm with {option})" if of_a_gpu < FEW_CPUS else ""


def compiler(path: str, *, header: bool) -> Check:
    """Whether torch.compile has what it needs."""
    lacking = [name for name, there in (("a C compiler", path), ("Python.h", header)) if not there]
    if not lacking:
        return Check("compiler", "ok", f"{path}, and Python.h")
    remedy = "Install gcc and Python's headers (Debian: gcc python3-dev), or nets are not compiled."
    return Check("compiler", "warn", f"torch.compile lacks {' and '.join(lacking)}", remedy)


def _c_compiler() -> str:
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next(filter(None, (shutil.which(name) for name in names if name)), "")


def space(name: str, place: Path, least_gb: float, setting: str) -> Check:
    """Whether a folder has enough room. `setting`: how to provide more."""
    free = shutil.disk_usage(place).free / 1e9
    found = f"{free:,.1f} GB free in {place}"
    if free >= least_gb:
        return Check(name, "ok", found)
    return Check(name, "warn", found, f"Give it {least_gb:g} GB or more ({setting}).")
