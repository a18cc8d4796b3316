"""Settings made once per training process: compilation, determinism, and the handling of freed memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_train import code, machine
from dist_train.choices import PAPER_NETS
from dist_train.config import Config
from dist_train.ranks.share import fewest, in_words
from dist_train.ranks.world import World

# Raised whenever the same settings give other bits than before. 2: the gradient of LRN is computed by its formula; on
# the CPU nothing is compiled unless asked for.
NUMERICS = 2

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
THRESHOLDS = (1 << 30, 32 << 20)  # bytes; glibc 2.34 (RHEL 9) and older refuse more than 32 MiB
MALLOC_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES")  # prefixes of the variables that configure glibc's malloc


@dataclass(frozen=True)
class Settled:
    """Settings in force, for the record.

    Attributes:
        compiled: whether the model is compiled.
        deterministic: how bits are made reproducible, in words.
        freed_memory: how freed memory is handled, in words.
        accelerator: the GPUs of all ranks, with driver and libraries, in words; empty on the CPU.
        numerics: see NUMERICS.
        precision: off, bf16 or fp16: `train.precision` as resolved on this device.
    """

    compiled: bool
    deterministic: str
    freed_memory: str
    accelerator: str = ""
    numerics: int = NUMERICS
    precision: str = ""


def prepare(config: Config, world: World, say: Callable[[str], None]) -> Settled:
    """Makes these settings, before the model is built, and returns them."""
    # On the CPU our own nets are deterministic without torch's flag; of other nets nobody knows.
    flag = config.train.deterministic and not (world.device.type == "cpu" and config.model.name in PAPER_NETS)
    prepare_compiler(world, deterministic=flag)
    _set_deterministic(flag, benchmark=not config.train.deterministic)
    how = "by torch's flag" if flag else "by construction" if config.train.deterministic else "no"
    return Settled(_compiled(config, world, say), how, keep_freed_memory(world.device), _accelerator(world))


def described(world: World, settled: Settled, config: Config) -> dict[str, Any]:
    """Machines, devices, versions and process of a start, for its line in events.jsonl; see `rundir.events`."""
    named = (config.model.name, config.optim.name, config.schedule.name, config.data.source)
    return {
        "nodes": list(dict.fromkeys(world.nodes)),
        "world_size": world.size,
        "device": settled.accelerator or world.device.type,
        "versions": machine.versions_of_training(),
        "code": code.version(named),
        "pid": os.getpid(),
    }


def cpu_warning(world: World) -> str:
    """Warning if a rank has too few CPUs for its GPU; empty otherwise."""
    if world.device.type == "cpu" or not (remedy := machine.few_cpus(fewest(world.shares))):
        return ""
    return f"{in_words(world.shares)} may be too few to feed a GPU: {remedy}"


def surroundings() -> dict[str, str]:
    """Texts that would say too much for that line, by kind: changes of the code since its commit, what is installed."""
    return {"changes.diff": code.changes(), "packages.txt": code.installed()}


def _compiled(config: Config, world: World, say: Callable[[str], None]) -> bool:
    """Whether to compile the model, the same on all ranks. auto: on a GPU if a compiler works on every rank; on the CPU
    it gains nothing."""
    if config.train.compile != "auto":
        return config.train.compile == "on"
    if world.device.type == "cpu" or world.mesh is not None:  # towers exchange activations in the middle of the net
        return False
    try:
        world.together(lambda: try_compiler(world.device), failure=NoCompiler, catch=(NoCompiler,))
        return True
    except NoCompiler as why:
        say(f"torch.compile is off, it does not work here: {why}")
        return False


class NoCompiler(Exception):
    """`torch.compile` does not work here; the message says why."""


def try_compiler(device: torch.device) -> None:
    """Raises NoCompiler if compiling fails; a missing compiler shows only at the first call."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8, device=device))
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise NoCompiler(said[-1][:120]) from error


def prepare_compiler(world: World, *, deterministic: bool) -> None:
    """Sets the variables that torch's compiler, Inductor, reads when imported or used; directories and threads that the
    user has set stay.

    Compiled kernels are kept in the user's cache directory, where a run that moves to another node finds them, not in
    the run's: they are code, which the next start loads and runs. Triton renames and removes its files as if it were
    alone, so it has a directory per node and rank (pytorch issue 173679); Inductor's files include the kernels.
    """
    if deterministic:  # choose without measuring (newer torch follows its flag for deterministic operators)
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(world.threads))
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    with suppress(OSError, RuntimeError):  # no writable home: torch's default, in /tmp
        cache = compiler_cache()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        own = cache / f"triton-{socket.gethostname()}-{world.local_rank}"
        os.environ.setdefault("TRITON_CACHE_DIR", str(own))


def compiler_cache() -> Path:
    """The user's cache directory for this kind of CPU: code compiled for one need not run on another."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    digest = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dist_train" / f"inductor-{platform.machine()}-{digest}"


def _accelerator(world: World) -> str:
    """Distinct accelerators among the ranks, in words; empty on the CPU."""
    if world.device.type == "cpu":
        return ""
    found = [""] * world.size
    dist.all_gather_object(found, machine.accelerator(world.device))
    return "; ".join(sorted(set(found)))


def _set_deterministic(flag: bool, *, benchmark: bool) -> None:
    torch.backends.cudnn.benchmark = benchmark
    if flag:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(flag, warn_only=True)
    # It costs time and does not change results.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory(device: torch.device) -> str:
    """On the CPU, makes glibc keep the memory that a step frees instead of returning it to the kernel, from which the
    next step would get it again, zeroed, page by page (`make bench ARGS=settings`). Returns how memory is handled, in
    words.

    Applies to the whole process. Does nothing without glibc, or if the user has set malloc's variables. See mallopt(3).
    """
    if device.type != "cpu":
        return "as usual: the model is not on the CPU"
    if names := sorted(name for name in os.environ if name.startswith(MALLOC_VARIABLES)):
        return f"as set by {', '.join(names)}"
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "as the allocator of LD_PRELOAD does"
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "as usual: this is not glibc"
    for threshold in THRESHOLDS:
        if libc.mallopt(M_MMAP_THRESHOLD, threshold):
            libc.mallopt(M_TRIM_THRESHOLD, -1)
            return f"kept, in blocks up to {threshold >> 20} MiB"
    return "as usual: glibc refused"
