"""What is settled once in a process that computes: compiling, determinism, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_train import models
from dist_train.config import Config
from dist_train.ranks.world import World

# Raised when the same settings give other bits than before. 2: the gradient of LRN is computed by its formula; on the
# CPU nothing is compiled unless it is asked for.
NUMERICS = 2

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
THRESHOLDS = (1 << 30, 32 << 20)  # bytes; glibc 2.34 (RHEL 9) and older refuse more than 32 MiB
MALLOC_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES")  # how the variables begin by which a user sets glibc's malloc


@dataclass(frozen=True)
class Settled:
    """What is in force, for the record.

    Attributes:
        compiled: whether the model is.
        deterministic: how the same bits come again, in words.
        freed_memory: what becomes of it, in words.
        numerics: see NUMERICS.
    """

    compiled: bool
    deterministic: str
    freed_memory: str
    numerics: int = NUMERICS


def prepare(config: Config, world: World, say: Callable[[str], None]) -> Settled:
    """Settle them, before the model is built."""
    return Settled(_compiled(config, world, say), _deterministic(config, world.device), keep_freed_memory(world.device))


def _compiled(config: Config, world: World, say: Callable[[str], None]) -> bool:
    """Whether to compile the model, the same on all ranks. auto: on a GPU, if a compiler works on every rank; on the
    CPU nothing is gained."""
    if config.train.compile != "auto":
        return config.train.compile == "on"
    if world.device.type == "cpu" or world.mesh is not None:  # towers exchange activations in the midst of the net
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
    """Raises NoCompiler. That one is missing shows only at the first call."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8, device=device))
    except Exception as error:
        raise NoCompiler(str(error).strip().splitlines()[-1][:120]) from error


def _deterministic(config: Config, device: torch.device) -> str:
    """On the CPU our own nets give the same bits without torch's flag; of nets that are not ours nobody knows it."""
    wanted = config.train.deterministic
    torch.backends.cudnn.benchmark = not wanted
    flag = wanted and not (device.type == "cpu" and config.model.name in models.OURS)
    if flag:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(flag, warn_only=True)
    # It costs time and changes no bit.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return "by torch's flag" if flag else "by construction" if wanted else "no"


def keep_freed_memory(device: torch.device) -> str:
    """On the CPU, let glibc keep the memory that a step frees instead of giving it back to the kernel, from which the
    next step would get it again, zeroed, page by page (`make bench ARGS=settings`).

    It holds for the whole process. Does nothing without glibc, nor where the user has set malloc's variables. See
    mallopt(3).
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
