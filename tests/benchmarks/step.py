"""The shipped step at 227 pixels compared with the plain script's, a torchvision net's and its own bare layers.

All in one run, in turn, each in processes of its own; the least CPU time per image of the rounds (ROUNDS=N) counts.
Then the step of configs/quickstart.yaml, the demo, beside its bare layers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CASES = ((32, 1), (32, 2), (64, 1), (64, 2))  # global batch, ranks
IMAGES = 128  # that are measured for a number in a round
LOADERS = ("none", "folder", "webdataset")
OURS = "this project, as shipped"
KEEP = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}  # what mallopt does, from outside
TITLES = ("without data", "ImageFolder, PIL", "webdataset, PIL")
ALLOCATORS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
PEAK = "peak"  # MB of a process, beside the loaders
DEMO, DEMO_SET = (128, 2), Path("data/fashion-mnist/train")  # the latter where the demo has been run
DEMO_IMAGES = 2560


class Rival(NamedTuple):
    """What the shipped step is measured against, and how much of its CPU time it may take."""

    name: str
    net: str
    bar: float
    loads: bool = True


RIVALS = (
    Rival("the plain script, nn.LocalResponseNorm", "paper", 0.65),
    Rival("torchvision's alexnet, no LRN, in that script", "torchvision", 1.0),
    Rival("bare layers: no LRN, dropout, update", "bare", 1.15, loads=False),
)
EXCHANGED = Rival("bare layers and the all-reduce of their gradients", "bare in DDP", math.inf, loads=False)
Found = dict[str, float]  # CPU milliseconds per image, by loader; and PEAK


def started(words: Sequence[str], ranks: int, extra: dict[str, str]) -> str:
    """What `python WORDS` says, or torchrun with so many of it. Waiting threads rest in all programs alike, since
    their CPU time would be counted otherwise; nothing else of the environment touches the allocator."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(ALLOCATORS)}
    env |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), **extra}
    if ranks > 1:
        env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*launcher, *words], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}:\n{done.stderr[-2000:]}")
    return done.stdout


def ours(words: Sequence[str], case: tuple[int, int], images: int = IMAGES) -> Found:
    """What `speed` finds for these options of the trainer. Without data there is only "none"."""
    batch, ranks = case
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "profile.json"
        command = ["-m", "dist_train", "speed", *words, f"--train.global_batch={batch}", "--train.device=cpu"]
        started([*command, f"--steps={images // batch}", f"--out={out}"], ranks, {})
        profile = json.loads(out.read_text())
    found = {"none": profile["step"]["cpu_ms_per_image"], PEAK: profile["memory"]["peak_host_mb"]}
    if both := profile["both"]:
        found |= dict.fromkeys(LOADERS[1:], both["cpu_ms_per_image"])
    return found


def theirs(
    rival: Rival, words: Sequence[str], case: tuple[int, int], extra: dict[str, str], images: int = IMAGES
) -> Found:
    """What the plain script finds for these options of its own."""
    batch, ranks = case
    command = ["tests/benchmarks/plain.py", f"--net={rival.net}", f"--batch={batch}", f"--steps={images // batch}"]
    said = json.loads(started([*command, *words], ranks, extra).splitlines()[-1])
    return {name: found["cpu_ms_per_image"] for name, found in said["loaders"].items()} | {PEAK: said["peak_mb"]}


def least(rounds: Sequence[Found]) -> Found:
    return {name: min(found[name] for found in rounds) for name in rounds[0]}


def show(case: tuple[int, int], mine: Found, rows: Sequence[tuple[str, Found, float]]) -> None:
    """A row is a name, what was found, and the bar; an infinite one is none."""
    (batch, ranks), blank = case, " " * 14
    what = f"the step at 227, batch {batch}, {ranks} rank{'s' if ranks > 1 else ''}"
    print(f"\n{what}: CPU ms per image, and our share of it")
    print(f"  {'':50} {''.join(f'{title:>23}' for title in TITLES)}    bar  peak MB")
    print(f"  {OURS:50} {''.join(f'{mine[name]:9.1f}{blank}' for name in LOADERS)}{mine[PEAK]:16,.0f}")
    for title, numbers, bar in rows:
        cells = ""
        for name in LOADERS if numbers else ():
            if name in numbers:
                share = mine[name] / numbers[name]
                verdict = "" if math.isinf(bar) else "met" if share <= bar else "NOT met"
                cells += f"{numbers[name]:9.1f}  {share:4.2f} {verdict:7}"
            else:
                cells += f"{'-':>9}{blank}"
        if numbers:
            cells += f"{'' if math.isinf(bar) else f'{bar:.2f}':>7}{numbers[PEAK]:9,.0f}"
        print(f"  {title:50} {cells}".rstrip(), flush=True)


def table(stored: Path, packed: Path, rounds: int = 2) -> None:
    """Measure, in turn, and print.

    Args:
        stored: a folder of classes of JPEGs with a shorter side of 256.
        packed: a shard set of the same images.
    """
    rounds = int(os.environ.get("ROUNDS", rounds))
    options = ["--config=configs/alexnet.yaml", "--model.outputs=1000", f"--data.train={packed}"]
    everything = [f"--folder={stored}", f"--shards={packed}", "--loaders", *LOADERS]
    worst: dict[Rival, float] = dict.fromkeys(RIVALS, 0.0)
    for case in CASES:
        mine: list[Found] = []
        found: dict[Rival, list[Found]] = {rival: [] for rival in RIVALS}
        more: list[tuple[str, Found, float]] = []  # these carry no bar: one round will do
        for turn in range(rounds):
            mine.append(ours(options, case))
            for rival in RIVALS:
                found[rival].append(theirs(rival, everything if rival.loads else [], case, {}))
                if not turn:
                    more.append((f"  {rival.name}", theirs(rival, [], case, KEEP), math.inf))
        exchanged = [(EXCHANGED.name, theirs(EXCHANGED, [], case, {}), math.inf)] if case[1] > 1 else []
        best = {rival: least(numbers) for rival, numbers in found.items()}
        with_bar = [(rival.name, numbers, rival.bar) for rival, numbers in best.items()]
        show(case, least(mine), [*with_bar, *exchanged, ("with mallopt:", {}, math.inf), *more])
        for rival, numbers in best.items():
            shares = [least(mine)[name] / numbers[name] for name in LOADERS if name in numbers]
            worst[rival] = max(worst[rival], *shares)
    print(f"\n  at most, over all of these (least of {rounds} rounds of {IMAGES} images):")
    for rival, share in worst.items():
        print(f"  {share:.2f} x {rival.name}; bar {rival.bar}: {'met' if share <= rival.bar else 'NOT met'}")
    print("  peak MB: of a process and without the workers of a DataLoader; ours holds the loader's images as well")
    demo(rounds)


def demo(rounds: int) -> None:
    """The demo's net, batch and ranks beside its bare layers, no bars."""
    there = (ROOT / DEMO_SET).exists()
    options = [
        "--config=configs/quickstart.yaml",
        "--model.outputs=10",
        f"--data.train={DEMO_SET if there else 'none'}",
    ]
    bare = next(rival for rival in RIVALS if rival.net == "bare")
    mine, found = [], {rival: list[Found]() for rival in (bare, EXCHANGED)}
    for _ in range(rounds):
        mine.append(ours(options, DEMO, DEMO_IMAGES))
        for rival, numbers in found.items():
            numbers.append(theirs(rival, ["--crop=67", "--outputs=10"], DEMO, {}, DEMO_IMAGES))
    batch, ranks = DEMO
    print(f"\nthe demo's step (67 pixels, batch {batch}, {ranks} ranks): CPU ms per image, peak MB of a process")
    rows = [(f"{OURS}, without data", least(mine)["none"], least(mine)[PEAK])]
    if there:
        rows.append((f"{OURS}, with {DEMO_SET}", least(mine)["folder"], least(mine)[PEAK]))
    rows += [(rival.name, least(numbers)["none"], least(numbers)[PEAK]) for rival, numbers in found.items()]
    for title, milliseconds, peak in rows:
        print(f"  {title:55} {milliseconds:6.2f} {peak:9,.0f}", flush=True)
