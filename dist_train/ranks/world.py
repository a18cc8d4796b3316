"""The process group, the device of this process, and what may end it from outside: signals and silence."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

STOPPED, DIVERGED, USAGE, FAILED = 75, 70, 2, 1  # exit codes of a process without a launcher
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run.

    Attributes:
        mesh: (data, tower), where the towers of a net are on two ranks; else each rank has the whole net.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    def in_pairs(self) -> World:
        """These ranks, an even number, in pairs: rank 2 d + t has tower t of data-parallel rank d."""
        shape, names = (self.size // 2, 2), ("data", "tower")
        return replace(self, mesh=init_device_mesh(self.device.type, shape, mesh_dim_names=names))

    @property
    def dp_rank(self) -> int:
        """The data-parallel rank: which share of a batch this rank sees."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def dp_size(self) -> int:
        """Into how many shares a batch is cut."""
        return self.size if self.mesh is None else self.mesh.size(0)

    @property
    def tower(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank("tower")

    @property
    def counts(self) -> int:
        """1 where what this rank saw is to be counted; 0 where it is another tower that saw the same."""
        return int(self.tower == 0)

    def group(self, dimension: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in nothing but `dimension`, data or tower; None for all ranks."""
        return None if self.mesh is None else self.mesh.get_group(dimension)

    @property
    def threads(self) -> int:
        """CPUs of this process's share of the node."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_size)

    @property
    def launched(self) -> bool:
        """Whether a launcher watches the exit code, so that non-zero means "restart me"."""
        return "TORCHELASTIC_RUN_ID" in os.environ

    def reduce(self, values: Tensor) -> dist.Work | None:
        """Begin to sum `values` over all ranks in place; `wait` on the result before reading them."""
        return dist.all_reduce(values, async_op=True)

    def agree(self, flag: Tensor) -> None:
        """Set `flag`, one number, to the largest of the towers of a net, in place."""
        if self.mesh is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group("tower"))

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_error(self, error: Exception | None) -> str | None:
        """The first message of all ranks' errors, on every rank."""
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, str(error) if error else None)
        return next((message for message in messages if message), None)


def rank_of_launcher() -> int:
    """The rank, before there is a process group."""
    return int(os.environ.get("RANK", 0))


def join(device: str) -> World:
    """Join the process group of torchrun's (or submitit's) environment; a group of one without a launcher.

    `device`: auto, cpu or cuda. Backend: nccl on the GPU, gloo on the CPU. A collective that hangs is ended by `Watch`,
    long before the group's own time-out. Raises ValueError where there is no such device.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and torch.cuda.device_count() <= local_rank:
        raise ValueError(
            f"train.device is {device}, but this node has {torch.cuda.device_count()} GPUs for {local_size} processes: "
            f"start fewer, or set train.device to cpu"
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "MASTER_ADDR" in os.environ:
        shared, rank, size = next(rendezvous("env://", timeout=timedelta(hours=1)))
        store: Store = PrefixStore(_meet(shared, rank, size), shared)
    else:
        store, rank, size = HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=1))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, place)


def _meet(store: Store, rank: int, size: int) -> str:
    """A name for this start that all its ranks share and no earlier start had.

    torchrun may give a restarted run the store of the run that died, and with it the addresses of dead processes (torch
    2.14, `--standalone`). So each rank asks under a name of its own, and only the living rank 0 can answer.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"ask/{rank}", mine)
        name = str(store.get(f"answer/{mine}").decode())
        store.set(f"joined/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, size)), set[str]()
    while missing:
        for other in sorted(missing):
            if store.check([f"ask/{other}"]) and (asked := store.get(f"ask/{other}").decode()) not in answered:
                store.set(f"answer/{asked}", mine)
                answered.add(asked)
            if store.check([f"joined/{mine}/{other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return mine


class Watch:
    """A thread that receives signals and misses heartbeats.

    A Python signal handler does not run while the main thread is inside a collective, so the thread reads signals from
    `signal.set_wakeup_fd`. The first stop signal sets `stop`, which the ranks agree on at a step boundary. A second
    one, a stop that takes longer than `grace`, or silence of the main thread for `patience` ends the process.

    Args:
        patience: seconds between two heartbeats, until the first step; `beat` then sets the shorter one.
        grace: seconds from a stop signal to the end of the process.
    """

    def __init__(self, patience: float, grace: float) -> None:
        self.stop = False
        self.last_words: Callable[[str], None] = lambda _: None
        self.grace = grace
        self._open = True
        self.beat(patience)
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STOPS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        Thread(target=self._run, name="watch", daemon=True).start()

    def beat(self, patience: float) -> None:
        """The main thread is alive, and will be heard again within `patience` seconds."""
        self._patience, self._heard = patience, time.monotonic()

    def close(self) -> None:
        """Training is over: watch no more."""
        self._open = False
        signal.set_wakeup_fd(-1)

    def _run(self) -> None:
        first: float | None = None
        while self._open:
            ready, _, _ = select.select([self._reader], [], [], 0.2)
            now = time.monotonic()
            if ready and any(number in STOPS for number in os.read(self._reader, 64)):
                if first is None:
                    first, self.stop = now, True
                elif now - first > 2:  # Ctrl-C comes twice: from the terminal and from torchrun
                    self._leave("second stop signal: leaving without a save")
            if first is not None and now - first > self.grace:
                self._leave(f"the stop took longer than {self.grace:g} s: leaving; the previous checkpoint stands")
            if now - self._heard > self._patience:
                self._leave(f"no progress for {self._patience:g} s: a rank or a file system hangs")

    def _leave(self, why: str) -> None:
        try:
            print(f"rank {rank_of_launcher()}: {why}", file=sys.stderr, flush=True)
            self.last_words(why)
        finally:
            os._exit(STOPPED)
