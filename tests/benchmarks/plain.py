"""A plain PyTorch training script at its best: the baseline for this project's step.

    python tests/benchmarks/plain.py --batch 64 --loaders none folder --folder DIR
    torchrun --nproc_per_node=2 tests/benchmarks/plain.py ...

DIR/<class>/*.jpg holds images stored at shorter side 256. It imports nothing of this project. Prints one line of JSON:
for each loader images, wall seconds, and CPU milliseconds per image of all ranks with their worker processes; and the
peak memory of rank 0 in MB, without its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
import webdataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from torchvision import datasets
from torchvision import transforms as T

Batches = Iterable[tuple[Tensor, Tensor]]
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
WARM_UP = 2  # steps without data; with data half of it, since the net is warm by then


def paper_net(crop: int = 227, outputs: int = 1000, *, lrn: bool, dropout: bool) -> nn.Module:
    """AlexNet as in 2012, two towers as groups."""
    side = (crop - 11) // 4 + 1
    for _ in range(3):  # pools
        side = (side - 3) // 2 + 1

    def norm() -> list[nn.Module]:
        return [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)] if lrn else []

    def drop() -> list[nn.Module]:
        return [nn.Dropout()] if dropout else []

    def relu() -> nn.Module:
        return nn.ReLU(inplace=True)

    features = [nn.Conv2d(3, 96, 11, 4), relu(), *norm(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(96, 256, 5, padding=2, groups=2), relu(), *norm(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(256, 384, 3, padding=1), relu()]
    features += [nn.Conv2d(384, 384, 3, padding=1, groups=2), relu()]
    features += [nn.Conv2d(384, 256, 3, padding=1, groups=2), relu(), nn.MaxPool2d(3, 2)]
    dense = [nn.Flatten(), nn.Linear(256 * side**2, 4096), relu(), *drop(), nn.Linear(4096, 4096), relu(), *drop()]
    return nn.Sequential(*features, *dense, nn.Linear(4096, outputs))


def torchvision_net(crop: int = 227, outputs: int = 1000) -> nn.Module:
    """Its AlexNet, which pools to the same size whatever the crop."""
    net: nn.Module = torchvision.models.alexnet(num_classes=outputs)
    return net


NETS: dict[str, Callable[..., nn.Module]] = {
    "paper": partial(paper_net, lrn=True, dropout=True),
    "torchvision": torchvision_net,
    "bare": partial(paper_net, lrn=False, dropout=False),
    "bare in DDP": partial(paper_net, lrn=False, dropout=False),
}
UPDATED = ("paper", "torchvision")  # of the others forward and backward alone are measured


def loader(name: str, args: argparse.Namespace) -> Batches:
    """Normalised float images and labels: one random batch again and again, a folder, or shards."""
    share = args.batch // RANKS
    if name == "none":
        images = torch.randn(share, 3, args.crop, args.crop).contiguous(memory_format=torch.channels_last)
        return repeat((images, torch.arange(share) % 10))
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transform = T.Compose([T.RandomCrop(args.crop), T.RandomHorizontalFlip(), T.ToTensor(), normalize])
    if name == "folder":
        data = datasets.ImageFolder(args.folder, transform)
        sampler = DistributedSampler(data, drop_last=True) if RANKS > 1 else RandomSampler(data)
        return DataLoader(data, share, sampler=sampler, num_workers=args.workers, drop_last=True)
    tars = sorted(map(str, args.shards.glob("*.tar")))
    shards = webdataset.WebDataset(tars, shardshuffle=100, nodesplitter=webdataset.split_by_node, seed=0)
    samples = shards.repeat().shuffle(1000).decode("pil").to_tuple("jpg;jpeg;png;webp", "cls")
    samples = samples.map_tuple(lambda image: transform(image.convert("RGB")), int)
    return DataLoader(samples.batched(share, partial=False), batch_size=None, num_workers=args.workers)


def without_end(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def cpu_seconds(pid: int) -> float:
    """That a process, its threads and all its descendants have used so far, ended ones included."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except FileNotFoundError:  # it ended a moment ago
        return 0.0
    return sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))


def together() -> None:
    if RANKS > 1:
        dist.barrier()


def measured(batches: Batches, step: Callable[[Tensor, Tensor], None], warm: int, steps: int) -> dict[str, float]:
    """`steps` steps after `warm` of them, on all ranks."""
    endless = without_end(batches)
    for images, labels in islice(endless, warm):
        step(images, labels)
    together()
    began, cpu = time.perf_counter(), cpu_seconds(os.getpid())
    count = 0
    for images, labels in islice(endless, steps):
        step(images, labels)
        count += len(labels)
    totals = torch.tensor([count, cpu_seconds(os.getpid()) - cpu], dtype=torch.float64)
    wall = time.perf_counter() - began
    if RANKS > 1:
        dist.all_reduce(totals)
    images_seen, cpu = totals.tolist()
    return {"images": int(images_seen), "wall_s": wall, "cpu_ms_per_image": 1000 * cpu / images_seen}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--net", choices=list(NETS), default="paper")
    parser.add_argument("--loaders", nargs="+", choices=["none", "folder", "webdataset"], default=["none"])
    parser.add_argument("--folder", type=Path, help="for the loader `folder`")
    parser.add_argument("--shards", type=Path, help="for the loader `webdataset`: the folder of the tars")
    parser.add_argument("--batch", type=int, default=64, help="over all ranks")
    parser.add_argument("--steps", type=int, default=4, help="that are measured")
    parser.add_argument("--crop", type=int, default=227)
    parser.add_argument("--outputs", type=int, default=1000, help="classes")
    parser.add_argument("--workers", type=int, default=1, help="of the DataLoader, for each rank")
    args = parser.parse_args()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // RANKS))
    if RANKS > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = NETS[args.net](args.crop, args.outputs).to(memory_format=torch.channels_last)
    net = DistributedDataParallel(model) if RANKS > 1 and args.net != "bare" else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4, fused=True)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)), labels).backward()  # type: ignore[no-untyped-call]
        if args.net in UPDATED:
            optimizer.step()

    found = {
        name: measured(loader(name, args), step, WARM_UP if name == "none" else WARM_UP // 2, args.steps)
        for name in args.loaders
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    if RANK == 0:
        print(json.dumps({"net": args.net, "batch": args.batch, "ranks": RANKS, "loaders": found, "peak_mb": peak}))
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
