"""The speeds of the GPU report: each is measured by `speed` in its own processes and read from its profile.json."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from dist_train import driver
from dist_train.analysis import commands
from dist_train.analysis.findings import Findings
from dist_train.analysis.gpu_site import Site
from dist_train.packaged import CONFIGS
from pipelines.files import read_json

STEPS = {True: 60, False: 20}  # of a measurement, with GPUs and without
SECONDS = 120.0  # that one run may take
FIRST = {True: 60.0, False: 15.0}  # that one is thought to take until the first has ended
LOOK = 5.0  # seconds between two looks at who uses which GPU
TAKEN = (
    "step",
    "loader",
    "both",
    "all_reduce",
    "memory",
    "warm_up",
    "process",
    "precision",
    "global_batch",
    "world_size",
)
SMALL = ["--data.resize=72", "--data.crop=67", "--model.hidden=32", "--model.width=0.25", "--train.device=cpu"]
TINY = ["--model.hidden=32", "--model.width=0.125", "--train.compile=off", "--train.deterministic=false"]


class Timing(NamedTuple):
    """A run of `speed`: its name, number of ranks and options."""

    name: str
    ranks: int
    words: list[str]


def timings(gpus: int) -> list[Timing]:
    """The measurements, the most telling first."""
    if not gpus:
        small = [*SMALL, "--train.global_batch=24", "--train.compile=off"]
        return [
            Timing(_named(12, compiled=False, deterministic=True), 2, [*small, "--train.deterministic=true"]),
            Timing(_named(12, compiled=False, deterministic=False), 2, [*small, "--train.deterministic=false"]),
            Timing("12 images a rank, decoded on the CPU", 2, [*small, "--data.device=cpu"]),
        ]

    def timing(batch: int, *, compiled: bool = True, deterministic: bool = True) -> Timing:
        words = [f"--train.global_batch={batch * gpus}", f"--train.compile={'on' if compiled else 'off'}"]
        words += [f"--train.deterministic={str(deterministic).lower()}"]
        return Timing(_named(batch, compiled=compiled, deterministic=deterministic), gpus, words)

    usual = timing(128)
    by_load = [
        Timing(
            f"loader, hw_decoder_load {load:g}",
            1,
            [*TINY, "--train.global_batch=128", f"--data.hw_decoder_load={load}"],
        )
        for load in (0.0, 0.65, 0.9, 1.0)
    ]
    return [
        usual,
        timing(128, deterministic=False),
        timing(128, compiled=False),
        timing(16),
        timing(512),
        *by_load,
        Timing(f"{usual.name}, decoded on the CPU", gpus, [*usual.words, "--data.device=cpu"]),
        timing(512, deterministic=False),
        timing(16, deterministic=False),
        timing(128, compiled=False, deterministic=False),
        *(timing(batch, compiled=False, deterministic=exact) for exact in (True, False) for batch in (512, 16)),
    ]


def _named(batch: int, *, compiled: bool, deterministic: bool) -> str:
    return f"{batch} images a rank, {'compiled' if compiled else 'eager'}{', deterministic' if deterministic else ''}"


def speed(findings: Findings, site: Site) -> None:
    """All measurements; a failure is reported and stops no other."""
    findings.tell("images are drawn")
    images = site.images()
    words = [f"--config={CONFIGS / 'alexnet.yaml'}", f"--data.train={images}", f"--data.val={images}"]
    words += [f"--steps={STEPS[site.gpus > 0]}", *([] if site.data else ["--model.outputs=1000"])]
    if not site.gpus:
        findings.say(
            "ok",
            "without a GPU: small nets and images, 2 ranks on gloo, nothing compiled, no hw_decoder_load; speeds of so "
            "few steps are not to be compared",
        )
    profiles: dict[str, dict[str, Any]] = {}
    longest, late = 0.0, list[str]()
    for timing in timings(site.gpus):
        began = time.monotonic()
        if began + 1.5 * (longest or FIRST[site.gpus > 0]) > site.deadline:
            late.append(timing.name)
            continue
        findings.tell(timing.name)
        profile = _measured(timing, words, findings, site)
        findings.keep(timing.name, profile, under="runs")
        if "failed" in profile:
            findings.say("failed", f"{timing.name}: {profile['failed']}")
        else:
            profiles[timing.name] = profile
        longest = max(longest, time.monotonic() - began)
        if rate := all_reduce_rate(profiles):
            findings.keep("all_reduce_gb_per_s", rate)
        if site.gpus and (costs := costs_of_determinism(profiles)):  # on the CPU there are none
            findings.keep("deterministic_costs_percent", costs)
    if late:
        findings.keep("late", late)
        findings.say("warn", f"{len(late)} runs did not fit into the time of this part: raise --minutes")
    if site.gpus and "processes_by_gpu" not in findings.result:
        findings.say("ok", "nvidia-smi showed no process, as in many containers: who uses GPU 0 is not known")


def _measured(timing: Timing, words: Sequence[str], findings: Findings, site: Site) -> dict[str, Any]:
    """Profile of a measurement, or the reason of its failure."""
    profile, output = site.folder / "profile.json", site.folder / "speed.output"
    profile.unlink(missing_ok=True)
    places, began = Places(driver.known_cards() if site.gpus else []), time.monotonic()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={timing.ranks}"]
    command = [*launcher, "-m", "dist_train", "speed", *words, *timing.words, f"--out={profile}"]
    code = commands.run(command, SECONDS, output, meanwhile=places.look)
    if places.seen:
        findings.keep(timing.name, places.by_gpu(), under="processes_by_gpu")
    for pid in places.astray():
        findings.say("warn", f"{timing.name}: process {pid} of another GPU holds memory of GPU 0")
    if code is None:
        return {"failed": f"it took more than {SECONDS:.0f} s"}
    lines = commands.last_lines(output)
    if code or not profile.exists():  # what a launcher must not start anew leaves with 0
        return {"failed": commands.what_failed(lines), "output": lines}
    found = read_json(profile)
    return {key: found[key] for key in TAKEN} | {"seconds": round(time.monotonic() - began, 1)}


class Places:
    """Processes seen on GPUs, besides those that were there at the beginning.

    Attributes:
        seen: (process, GPU).
    """

    def __init__(self, cards: Sequence[driver.Card]) -> None:
        self._cards = cards
        self._before = driver.gpu_processes(cards)
        self._next = time.monotonic() + LOOK
        self.seen: set[tuple[int, int]] = set()

    def look(self) -> None:
        """Look for processes, but not at every call, since that may slow what is measured."""
        if self._cards and time.monotonic() >= self._next:
            self.seen |= driver.gpu_processes(self._cards) - self._before
            self._next = time.monotonic() + LOOK

    def by_gpu(self) -> dict[str, list[int]]:
        """Processes per GPU."""
        numbers = sorted({gpu for _, gpu in self.seen})
        return {str(number): sorted(pid for pid, gpu in self.seen if gpu == number) for number in numbers}

    def astray(self) -> list[int]:
        """Processes on GPU 0 that also use another GPU: a rank's misplaced context, which costs memory."""
        elsewhere = {pid for pid, gpu in self.seen if gpu}
        return sorted(pid for pid, gpu in self.seen if gpu == 0 and pid in elsewhere)


def all_reduce_rate(profiles: dict[str, dict[str, Any]]) -> dict[str, float]:
    """GB/s of the gradients' all-reduce in the first profile that has one, and of its traffic over a link."""
    for profile in profiles.values():
        if reduced := profile["all_reduce"]:
            rate, ranks = reduced["mb"] / reduced["ms"], profile["world_size"]
            # Each rank sends and receives 2 (n - 1) / n of it (nccl-tests, doc/PERFORMANCE.md).
            return {"algorithm": rate, "bus": rate * 2 * (ranks - 1) / ranks}
    return {}


def costs_of_determinism(profiles: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Cost in percent of a step's time, by the name of the deterministic run, if its counterpart was measured too."""
    costs = {}
    for name, exact in profiles.items():
        if (free := profiles.get(name.removesuffix(", deterministic"))) and free is not exact:
            costs[name] = 100 * (exact["step"]["step_ms"] / free["step"]["step_ms"] - 1)
    return costs
