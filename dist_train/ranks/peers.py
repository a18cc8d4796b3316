"""What the ranks tell each other before there is a process group, through the launcher's store."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch._C._distributed_c10d import Store

LISTENING = 5.0  # seconds that rank 0 waits for the others to learn why it exits
MIG = "MIG-"  # with which the names of a GPU's slices begin


@dataclass(frozen=True)
class Peer:
    """A rank, as it introduces itself.

    Attributes:
        host: host name.
        boot: id of the kernel's boot, which tells apart machines of one name, and is the same in all containers of one.
        cpus: CPUs that it may use, a number whose bits are those.
        gpu: UUID of the GPU that it takes, or of the slice of one; "" without one.
        master: address that MASTER_ADDR has for it; "" if there is none.
        local: its own address on the way there.
        complaint: why it cannot continue.
    """

    host: str
    boot: str = ""
    cpus: str = "1"
    gpu: str = ""
    master: str = ""
    local: str = ""
    complaint: str = ""

    @property
    def machine(self) -> tuple[str, str]:
        return self.host, self.boot

    @property
    def mask(self) -> frozenset[int]:
        bits = int(self.cpus, 16)
        return frozenset(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def introduction(gpu: str, route: tuple[str, str], complaint: str) -> Peer:
    """This rank, as it introduces itself."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    mask = f"{sum(1 << cpu for cpu in os.sched_getaffinity(0)):x}"
    return Peer(socket.gethostname(), boot, mask, gpu, *route, complaint)


def gpu_index(local_rank: int, seen: int) -> int | None:
    """Which of the GPUs that it sees a rank takes; None if there are too few. If it sees one only, this is meant for it
    (Slurm's `--gpus-per-task` and `--gpu-bind=single`), unless `twice` finds that others see the same."""
    if seen == 1:
        return 0
    return local_rank if local_rank < seen else None


def gpu_name(uuid: str, index: int, visible: str) -> str:
    """Name of a GPU, or of a slice of one, that no other has.

    Args:
        uuid: as torch gives it, possibly that of the GPU which is sliced.
        index: of the GPU among those that the process sees.
        visible: value of CUDA_VISIBLE_DEVICES, in which slices stand by their UUIDs.
    """
    names = [name.strip() for name in visible.split(",")]
    return names[index] if index < len(names) and names[index].startswith(MIG) else uuid


def twice(peers: Sequence[Peer]) -> str:
    """Complaint about a GPU that two ranks would take; "" if there is none."""
    first: dict[str, int] = {}
    for rank, peer in enumerate(peers):
        if peer.gpu and (other := first.setdefault(peer.gpu, rank)) != rank:
            kind = "" if peer.gpu.startswith(MIG) else "GPU "
            return (
                f"ranks {other} and {rank} would both train on {kind}{peer.gpu} of {peer.host}: start one process per "
                f"GPU, and let each see all GPUs of its node, or one of its own (Slurm: --gpus-per-task=1)"
            )
    return ""


def meet(store: Store, rank: int, size: int) -> str:
    """Agree on a name for this start, shared by all its ranks and used by no earlier start.

    torchrun may give a restarted run the store of the run that died, with the addresses of dead processes (torch 2.14,
    `--standalone`). So each rank asks under a name of its own, which only the live rank 0 can answer.
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


def exchange(store: Store, rank: int, size: int, mine: Peer) -> list[Peer]:
    """All ranks, by rank. What follows from it is the same everywhere, so that none waits for one that cannot go on."""
    store.set(f"peer/{rank}", json.dumps(asdict(mine)))
    store.add("ready", 1)
    if rank == 0:
        while store.add("ready", 0) < size:
            time.sleep(0.02)
        store.set("peers", json.dumps([store.get(f"peer/{other}").decode() for other in range(size)]))
    found = [Peer(**json.loads(text)) for text in json.loads(store.get("peers").decode())]
    store.add("heard", 1)
    return found


def await_hearers(store: Store, size: int) -> None:
    """Wait, before rank 0 exits, until the others have heard why: the store may live in its process."""
    until = time.monotonic() + LISTENING
    while store.add("heard", 0) < size and time.monotonic() < until:
        time.sleep(0.02)
