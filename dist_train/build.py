"""The parts of a run, built from its configuration."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train import models
from dist_train.config import Config, ConfigError
from dist_train.models.trial import try_out
from dist_train.ranks import tower_parallel
from dist_train.ranks.world import World
from pipelines.dali import Decode
from pipelines.errors import first_line
from pipelines.loader import Loader, Read
from pipelines.order import Ints, even_split
from pipelines.plan import FixedPlan, Plan, TrainingPlan
from pipelines.shards import ShardSet

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_loader(config: Config, world: World, shards: ShardSet) -> Loader:
    """This rank's loader of shuffled and augmented global batches of the training set."""
    data = config.data
    plan = TrainingPlan(shards, data, shards.manifest, config.train.seed, data.shuffle_shards)
    return _loader(config, world, plan, shards, config.train.global_batch)


def fixed_loader(
    config: Config,
    world: World,
    shards: ShardSet,
    statistics: ShardSet,
    *,
    batch: int,
    view: int = 0,
    samples: Ints | None = None,
) -> Loader:
    """This rank's loader of global batches of `batch` samples: all of `shards`, or the given ones, in order and in one
    fixed view, normalised with the training set's `statistics`."""
    plan = FixedPlan(shards, config.data, view, samples, config.train.seed)
    return _loader(config, world, plan, statistics, batch)


def _loader(config: Config, world: World, plan: Plan, statistics: ShardSet, batch: int) -> Loader:
    data = config.data
    on_gpu = data.device == "gpu" or (data.device == "auto" and world.device.type == "cuda")
    decode = Decode(
        device="gpu" if on_gpu else "cpu",
        device_id=_gpu(world) if on_gpu else None,
        threads=data.threads or world.threads,
        inputs=data.inputs,
        hw_decoder_load=1.0 if config.train.deterministic else data.hw_decoder_load,
        wanted=world.device,
    )
    reading = Read(readers=data.readers, ahead=data.ahead)
    return Loader(
        plan,
        statistics.manifest,
        batch=batch,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        decode=decode,
        reading=reading,
    )


def _gpu(world: World) -> int:
    """The rank's GPU, or that which it would have, for decoding only."""
    return world.local_rank if world.device.index is None else world.device.index


def model(config: Config, world: World, classes: int, *, compiled: bool) -> nn.Module:
    """The model, or this rank's tower of it, on this rank's device, with weights from the seed. Raises ConfigError for
    a bad name or crop."""
    torch.manual_seed(config.train.seed)
    net = models.build(config.model, classes=classes, crop=config.data.crop)
    if world.mesh is not None:
        tower_parallel.place(net, world)
    net.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    try_out(net, config.model, classes, config.data.crop, world.device)
    if compiled:
        net.compile(dynamic=False)  # one kernel per size, whatever sizes came before
    return net


def autocast(config: Config, world: World) -> torch.autocast:
    """Mixed precision, or a context that does nothing if it is off."""
    chosen = precision(config, world)
    return torch.autocast(world.device.type, PRECISIONS[chosen], enabled=chosen != "off")


def precision(config: Config, world: World) -> str:
    """off, bf16 or fp16. `auto`: off on the CPU, where bfloat16 was measured to be slower; bf16 on a GPU that has it,
    else fp16, but off for towers on two ranks: a GradScaler would see the overflows of one tower only."""
    if config.train.precision != "auto":
        return config.train.precision
    if world.device.type == "cpu":
        return "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if world.mesh is None else "off"


def _try_least_share(model: nn.Module, config: Config, world: World) -> None:
    """Raises ConfigError if a rank may get a single sample, and the net has a layer that cannot take its statistics."""
    batch, pieces = config.train.global_batch, config.train.accumulate
    batch_norm = nn.modules.batchnorm._BatchNorm
    if batch // world.dp_size // pieces > 1 or not any(isinstance(layer, batch_norm) for layer in model.modules()):
        return
    before = copy.deepcopy(model.state_dict())
    sample = torch.zeros(1, 3, config.data.crop, config.data.crop, device=world.device)
    try:
        with torch.no_grad(), autocast(config, world):
            model.forward(sample)  # uncompiled
    except ValueError as error:
        raise ConfigError(
            f"{config.model.name} cannot take the statistics of one sample, which is all that a rank gets of "
            f"train.global_batch {batch} (ranks: {world.dp_size}, train.accumulate: {pieces}): raise the first, or "
            f"lower the others ({first_line(error)})"
        ) from error
    finally:
        model.load_state_dict(before)


def distribute(model: nn.Module, config: Config, world: World, *, compiled: bool) -> nn.Module:
    """The model wrapped in DDP, whose buckets are final.

    DDP rebuilds its buckets after its first step, which changes the order of summation on more than two ranks: seen
    with gloo, and in NCCL's ring the rank that starts a sum depends on a number's place in its bucket. Two
    throw-away steps get this over with, so that a resumed run sums like one that never stopped.

    Raises ConfigError if the net cannot be trained on so few samples per rank.
    """
    _try_least_share(model, config, world)
    if world.dp_size == 1 and config.train.ddp == "auto":
        return model
    net = DistributedDataParallel(model, process_group=world.group("data"), gradient_as_bucket_view=True)
    if world.dp_size == 1:  # nothing to sum
        return net
    before = copy.deepcopy(model.state_dict())
    low, high = even_split(config.train.global_batch, world.dp_rank, world.dp_size)
    share = even_split(high - low, 0, config.train.accumulate)[1]
    n = share if compiled else min(share, 2)  # buckets do not depend on n, but kernels are compiled for one size
    side = config.data.crop
    inputs = torch.zeros(n, 3, side, side, device=world.device).to(memory_format=torch.channels_last)
    keys = torch.zeros(n, dtype=torch.int64, device=world.device)

    def step() -> None:
        with autocast(config, world):
            logits = net(inputs, keys)
        logits.float().sum().backward()

    # The first rank of a node compiles, and the others find its kernels in the cache; not on GPUs, each of which has
    # its own kernels there.
    if compiled and world.device.type == "cpu":
        if world.local_rank:
            dist.barrier()
        net.broadcast_buffers, broadcast = False, net.broadcast_buffers
        with net.no_sync():  # this rank alone: it waits for no other
            step()
        net.broadcast_buffers = broadcast
        if not world.local_rank:
            dist.barrier()
    for _ in range(2):
        step()
    net.zero_grad()
    model.load_state_dict(before)
    return net
