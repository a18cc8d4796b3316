"""The parts of the GPU report, each run in its own process. Without a GPU they do what is possible on the CPU."""

from __future__ import annotations

import hashlib
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train import driver, machine
from dist_train.analysis import gpu_speed, gpu_tests
from dist_train.analysis.findings import Findings
from dist_train.analysis.gpu_site import Site, halves_chroma
from pipelines.dali import Decode
from pipelines.loader import Loader
from pipelines.misc import cpus
from pipelines.order import Ints
from pipelines.plan import FixedPlan
from pipelines.shards import ShardSet

LEVELS = {"warn": "warn", "fail": "failed"}  # of a check -> the state of its part
LOADS = (1.0, 0.0, 0.65, 0.9)  # of hw_decoder_load; the first is that of deterministic runs
BATCHES = (128, 1, 17)  # in which the same images are decoded; the others are compared with the first one
# nvImageCodec decodes so many images one by one if their chroma subsampling is mixed, or else as a batch.
ALIKE = 13
THREADS = 16  # of DALI, at most
CLOSE = {"max": 4.0, "mean": 0.3}  # levels: as far apart as two ways of rounding are
TIMES = 20  # number of computations of a gradient


def start(name: str, result: Path, data: Path | None, seconds: float) -> int:
    """Run one part, and write its findings into a file. Returns the exit code, which does not depend on them."""
    deadline = time.monotonic() + seconds
    PARTS[name](Findings(result), Site(result.parent, data, machine.usable()[0], deadline))
    return 0


def look_at_machine(findings: Findings, site: Site) -> None:
    """Equipment of the machine, and what of it is insufficient."""
    findings.keep("versions", machine.versions())
    found = machine.checks(site.folder.parent)  # the folder itself is gone when somebody reads this
    findings.keep("checks", [check._asdict() for check in found])
    findings.keep("topology", driver.topology())
    for check in found:
        if check.level != "ok":
            findings.say(LEVELS[check.level], f"{check.name}: {check.found}")


def decoder(findings: Findings, site: Site) -> None:
    """Differences between the decoders, and whether the pixels of an image depend on the batch that it is in."""
    findings.tell("images are drawn")
    shards = ShardSet(site.mixed())
    shown = np.arange(min(len(shards), 512 if site.gpus else 128))
    alike = np.array([i for i in shown if halves_chroma(shards.read(int(i)).tobytes())], np.int64)
    if not ALIKE <= len(alike) < len(shown):
        findings.say("ok", f"{len(alike)} of the {len(shown)} images are 4:2:0: no batch of only those was compared")
        alike = alike[:0]
    alike = alike[: BATCHES[0]]

    def inputs(decode: Decode, batch: int, samples: Ints = shown) -> Tensor:
        plan = FixedPlan(shards, site.augment, samples=samples)
        batches = Loader(plan, shards.manifest, batch=batch, decode=decode).epoch()
        return torch.cat([batch.inputs.cpu() for batch in batches])

    findings.keep("images", len(shown))
    threads = min(THREADS, cpus())
    on_cpu = Decode("cpu", threads=threads)
    expected = inputs(on_cpu, BATCHES[0])
    decoders = {
        f"hw_decoder_load {load:g}": Decode("gpu", device_id=0, threads=threads, hw_decoder_load=load) for load in LOADS
    }
    if not site.gpus:
        decoders = {"CPU": on_cpu}
        findings.say("ok", "without a GPU, its decoder was left out")
    for i, (name, decode) in enumerate(decoders.items()):
        findings.tell(name)
        first = expected if decode is on_cpu else inputs(decode, BATCHES[0])
        if decode is not on_cpu:
            _compare(name, (first - expected).abs(), findings)
        same = {str(batch): torch.equal(inputs(decode, batch), first) for batch in BATCHES[1:]}
        if len(alike):
            same[f"{len(alike)} only 4:2:0"] = torch.equal(inputs(decode, BATCHES[0], alike), first[alike])
        findings.keep(name, same, under="same_bits_in_batches_of")
        if i == 0 and not all(same.values()):  # the others may, and are not for deterministic runs
            findings.say("failed", f"{name}: the pixels of an image depend on which batch it is in")


def _compare(name: str, apart: Tensor, findings: Findings) -> None:
    far = {"max": float(apart.max()), "mean": float(apart.mean())}
    findings.keep(name, far, under="levels_from_the_cpu")
    if any(far[key] > CLOSE[key] for key in CLOSE):
        findings.say("warn", f"{name} is up to {far['max']:.0f} levels from the CPU's, {far['mean']:.2f} on average")


def pooling(findings: Findings, site: Site) -> None:
    """Whether the gradient of overlapping max pooling (section 3.4) has the same bits each time, in both layouts, after
    the first convolution's ReLU, where many values are equal, namely 0."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # as the trainer does
    torch.manual_seed(0)
    shape, device = ((32, 96, 55, 55), "cuda") if site.gpus else ((8, 24, 15, 15), "cpu")
    for kind in (torch.float32, torch.bfloat16) if site.gpus else (torch.float32,):
        for layout in (torch.channels_last, torch.contiguous_format):
            name = f"{str(layout).removeprefix('torch.')} {str(kind).removeprefix('torch.')}"
            findings.tell(name)
            x = torch.randn(shape, device=device).relu().to(kind).contiguous(memory_format=layout).requires_grad_()
            bits = set()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                y = F.max_pool2d(x, 3, 2)
                weight = torch.randn_like(y)
                for _ in range(TIMES):
                    (gradient,) = torch.autograd.grad(F.max_pool2d(x, 3, 2), x, weight)
                    bits.add(
                        hashlib.sha256(gradient.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                    )
            findings.keep(name, {"times": TIMES, "gradients": len(bits), "torch_warns": bool(said)})
            if len(bits) > 1:
                why = f"{len(bits)} different gradients of {TIMES} in {name}: train.deterministic cannot hold"
                findings.say("warn", why)


PARTS = {
    "machine": look_at_machine,
    "decoder": decoder,
    "pooling": pooling,
    "tests": gpu_tests.others,
    "resume": gpu_tests.resume,
    "drills": gpu_tests.drills,
    "speed": gpu_speed.speed,
}
