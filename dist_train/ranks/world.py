"""This process among the ranks of a run: process group, device, and communication between ranks."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from dist_train.machine import use_gpu
from dist_train.outcomes import Refused
from dist_train.ranks import launcher, network, peers
from dist_train.ranks.share import by_host
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.misc import CpuShare, cpu_share

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # for other ranks; `Watch` has less
NEAR = timedelta(minutes=5)  # for a rank 0 that can only be on this machine
CAUGHT = (UserError, OSError)  # errors that a user can fix; others are raised where they happen


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run.

    Attributes:
        mesh: (data, tower) if the towers of a net are on two ranks; None if each rank has the whole net.
        nodes: name of each rank's node, by rank.
        shares: each rank's share of the CPUs of its node, by rank.
        leads: whether this is the first rank of its node, whichever launcher started it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    nodes: list[str] = field(default_factory=list)
    shares: list[CpuShare] = field(default_factory=list)
    leads: bool = True

    @classmethod
    def single(cls, device: torch.device) -> World:
        """A world of one rank, which needs no process group."""
        return cls(0, 1, device.index or 0, 1, device, nodes=[socket.gethostname()], shares=[cpu_share()])

    def in_pairs(self) -> World:
        """The same ranks, an even number, in pairs: rank 2 d + t has tower t of data-parallel rank d."""
        shape, names = (self.size // 2, 2), ("data", "tower")
        return replace(self, mesh=init_device_mesh(self.device.type, shape, mesh_dim_names=names))

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which share of a batch this rank sees."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def dp_size(self) -> int:
        """Number of shares into which a batch is cut."""
        return self.size if self.mesh is None else self.mesh.size(0)

    @property
    def tower(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank("tower")

    @property
    def counted(self) -> bool:
        """Whether this rank's counts are summed; not for the second tower, which saw the same samples."""
        return self.tower == 0

    def group(self, dimension: str) -> dist.ProcessGroup | None:
        """Process group of the ranks that differ from this one only in `dimension`, data or tower; None: all ranks."""
        return None if self.mesh is None else self.mesh.get_group(dimension)

    def leave(self) -> None:
        """Leave the process group, all ranks together. For a normal end only: destroying a group may wait for
        collectives that others have begun, and so hide an error."""
        dist.barrier()
        dist.destroy_process_group()

    @property
    def threads(self) -> int:
        """Threads that suit this process's share of the CPUs."""
        return self.shares[self.rank].threads

    def reduce(self, values: Tensor) -> dist.Work | None:
        """Begin to sum `values` over all ranks in place; `wait` on the result before reading them."""
        return dist.all_reduce(values, async_op=True)

    def sum(self, *tensors: Tensor) -> None:
        """Sum each tensor over all ranks, in place."""
        for work in [self.reduce(values) for values in tensors]:
            if work:
                work.wait()

    def agree(self, flag: Tensor) -> None:
        """Set `flag`, one number, to the maximum over the towers of a net, in place."""
        if self.mesh is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group("tower"))

    def share(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(
        self,
        work: Callable[[], T],
        *,
        on: Collection[int] | None = None,
        failure: type[Exception] = Refused,
        catch: tuple[type[Exception], ...] = CAUGHT,
    ) -> T | None:
        """Do `work` on the ranks `on` (all if None), and continue only if it succeeded on each.

        Returns its result, or None on the other ranks. If it raises one of `catch` on one rank, all ranks raise
        `failure` with the message of the lowest rank that failed, so that none waits for a rank that is gone.
        """
        result, message = None, ""
        if on is None or self.rank in on:
            try:
                result = work()
            except catch as error:
                message = str(error) or type(error).__name__
        messages = [""] * self.size
        dist.all_gather_object(messages, message)
        failed = [message for message in messages if message]
        if failed:
            raise failure(failed[0])
        return result


def pick_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Device of this process. `name`: auto (a GPU if there is one), cpu or cuda. Raises UserError if it has no GPU, or
    was given one that torch cannot use."""
    if name == "cpu" or (not use_gpu() and name == "auto"):
        return torch.device("cpu")
    if (index := peers.gpu_index(local_rank, torch.cuda.device_count())) is None:
        raise UserError(
            f"train.device is {name}, but this node has {torch.cuda.device_count()} GPUs for {local_size} processes: "
            f"start fewer, or set train.device to cpu"
        )
    return torch.device("cuda", index)


def flight_record(folder: Path) -> None:
    """Write NCCL's record of the last collectives, for `torchfrtrace --prefix nccl-rank- FOLDER`. Raises OSError."""
    dump = torch._C._distributed_c10d._dump_nccl_trace  # type: ignore[attr-defined]
    write_atomically(folder / f"nccl-rank-{dist.get_rank()}", dump())


def join(device: str) -> World:
    """Join the process group described by torchrun's (or submitit's) environment, or a group of one without a launcher.

    `device`: as for `pick_device`. Backend: nccl on GPUs, gloo on CPUs. `Watch` ends a collective that hangs, long
    before the group's own time-out. Raises UserError on all ranks if one of them has no such device, or two the same,
    and if the launcher's environment is incomplete.
    """
    try:
        size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise UserError(f"the environment is not a launcher's, use torchrun: {error}") from error
    gpu, complaint = "", ""
    try:
        place = pick_device(device, local_rank, local_size)
    except UserError as error:
        place, complaint = torch.device("cpu"), str(error)
    if place.type == "cuda":
        _prepare(place)
        gpu = _name(place) if size > 1 else ""
    mine = peers.introduction(gpu, network.route_to_master(), complaint)
    if "MASTER_ADDR" in os.environ:
        shared, rank, size = _launchers_store(mine.master, several=size > local_size)
        store: Store = PrefixStore(peers.meet(shared, rank, size), shared)
        known = peers.exchange(store, rank, size, mine)
    else:
        store, rank, size, known = HashStore(), 0, 1, [mine]
    complaints = [*(peer.complaint for peer in known), peers.twice(known), network.unreachable(known)]
    if complaint := next(filter(None, complaints), ""):
        if rank == 0 and size > 1:
            peers.await_hearers(store, size)
        raise UserError(complaint)
    if chosen := network.interface(mine, known, network.interfaces()):
        os.environ.setdefault(network.VARIABLE, chosen)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise RuntimeError(network.disconnected(error)) from error
    machines = [peer.machine for peer in known]
    shares, leads = by_host(machines, [peer.mask for peer in known]), machines.index(mine.machine) == rank
    if place.type == "cpu":
        torch.set_num_threads(shares[rank].threads)
    nodes = [peer.host for peer in known]
    return World(rank, size, local_rank, local_size, place, nodes=nodes, shares=shares, leads=leads)


def _prepare(place: torch.device) -> None:
    """Make this GPU the current one, on which float32 means float32, in matrix products (torch's default) and in
    convolutions (TF32 by default): speed is what mixed precision is for."""
    torch.cuda.set_device(place)
    with warnings.catch_warnings():  # torch 2.9 recommends a newer API, which the compiler does not support
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def _name(place: torch.device) -> str:
    found = str(torch.cuda.get_device_properties(place).uuid)
    return peers.gpu_name(found, place.index, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def _launchers_store(master: str, *, several: bool) -> tuple[Store, int, int]:
    """The store in which the ranks of a launcher meet, this rank and the number of ranks. Raises UserError.

    Args:
        master: address that MASTER_ADDR has here; "" if it has none.
        several: whether there seem to be several nodes. If the address is then one by which a machine reaches itself,
            rank 0 either answers soon, being on the same machine, or never will; nor does a name without an address.
    """
    doubtful = several and (not master or (launcher.rank() > 0 and network.loops(master)))
    try:
        store, rank, size = next(rendezvous("env://", timeout=NEAR if doubtful else PATIENCE))
    except ValueError as error:
        raise UserError(f"the environment is not a launcher's, use torchrun: {error}") from error
    except dist.DistError as error:
        if doubtful:
            raise UserError(network.no_master(master)) from error
        raise
    store.set_timeout(PATIENCE)
    return store, rank, size
