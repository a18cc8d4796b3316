"""`python -m dist_train experiments [NAME ...]`: run the sweeps of configs/experiments and draw what they show.

An experiment is an ordinary configuration, NAME.yaml, and its arms, NAME.sweep: one line of overrides a run (what
`python -m slurm submit --array` takes too), each with its name as a comment. An arm runs with several seeds, or with
the one it gives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from queue import Queue

from tqdm import tqdm

from dist_train.config import CONFIGS, ConfigError
from dist_train.monitor.terminal import STATUS

SWEEPS = CONFIGS / "experiments"
ENDED = ("done", "diverged")  # a run that diverged is a result
ENSEMBLE = "# ensemble of two: "


@dataclass(frozen=True)
class Arm:
    """One variant of an experiment: its name, overrides and seeds; or, with `of`, pairs of runs of another arm."""

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    of: str = ""

    def run(self, root: Path, seed: int) -> Path:
        """The run directory of a seed."""
        return root / f"{slug(self.of or self.name)}-{seed}"


@dataclass
class Experiment:
    """A configuration and its arms; runs lie in `root`."""

    name: str
    config: Path
    root: Path
    arms: list[Arm] = field(default_factory=list)

    def pairs(self, arm: Arm) -> list[tuple[Path, Path, Path]]:
        """The runs that an ensemble arm averages, two by two, and where the result lies."""
        runs = [(arm.run(self.root, a), arm.run(self.root, b)) for a, b in combinations(arm.seeds, 2)]
        return [(a, b, self.root / f"{a.name}+{b.name}.json") for a, b in runs]


def read(name: str, seeds: int, root: Path) -> Experiment:
    """The experiment of that name. Raises ConfigError."""
    sweep = SWEEPS / f"{name}.sweep"
    if not sweep.exists():
        known = ", ".join(sorted(path.stem for path in SWEEPS.glob("*.sweep")))
        raise ConfigError(f"there is no experiment {name}: choose from {known}")
    experiment = Experiment(name, sweep.with_suffix(".yaml"), root / name)
    for line in sweep.read_text().splitlines():
        if line.startswith(ENSEMBLE):
            of = line.removeprefix(ENSEMBLE)
            experiment.arms.append(Arm(f"two of: {of}, averaged", (), tuple(range(seeds)), of))
        elif overrides := shlex.split(line, comments=True):
            given = [int(overrides[i + 1]) for i, word in enumerate(overrides) if word == "--train.seed"]
            label = line.rpartition("# ")[2]
            experiment.arms.append(Arm(label, tuple(overrides), tuple(given) or tuple(range(seeds))))
    return experiment


def slug(name: str) -> str:
    """As part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def run_all(experiments: Sequence[Experiment], extra: Sequence[str], jobs: int) -> list[str]:
    """Run what is not done yet, `jobs` runs at a time, each on a CPU (or a GPU) of its own. Returns what failed."""
    todo = [
        (experiment, arm, seed)
        for experiment in experiments
        for arm in experiment.arms
        if not arm.of
        for seed in arm.seeds
        if _state(arm.run(experiment.root, seed)) not in ENDED
    ]
    todo.sort(key=lambda item: item[2])  # a seed of every arm first: a sweep that is cut short shows something
    slots: Queue[int] = Queue()
    for slot in range(jobs):
        slots.put(slot)
    cpus = sorted(os.sched_getaffinity(0))

    def one(item: tuple[Experiment, Arm, int]) -> str:
        experiment, arm, seed = item
        directory, slot = arm.run(experiment.root, seed), slots.get()
        try:
            command = [sys.executable, "-m", "dist_train", "--config", str(experiment.config), *arm.overrides]
            command += [f"--train.seed={seed}", f"--run.dir={directory}", *extra]
            os.sched_setaffinity(0, {cpus[slot % len(cpus)]})  # of this thread, and so of the process that it starts
            experiment.root.mkdir(parents=True, exist_ok=True)
            with open(f"{directory}.log", "ab") as log:
                subprocess.run(command, stdout=log, stderr=log, env=os.environ | _gpu(slot), check=False)
        finally:
            slots.put(slot)
        state = _state(directory)
        return "" if state in ENDED else f"{directory} is {state or 'not begun'}: see {directory}.log"

    with ThreadPoolExecutor(jobs) as pool:
        results = tqdm(pool.map(one, todo), total=len(todo), unit="run", disable=not sys.stderr.isatty())
        failed = [failure for failure in results if failure]
    for experiment in experiments:
        for arm in (arm for arm in experiment.arms if arm.of):
            for a, b, result in experiment.pairs(arm):
                if _state(a) == _state(b) == "done" and not result.exists():
                    command = [sys.executable, "-m", "dist_train", "evaluate", str(a), str(b), "--json", str(result)]
                    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                        failed.append(f"{result} could not be made")
    return failed


def main(argv: Sequence[str]) -> int:
    """The verb. Returns 0, 1 where a run failed, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="dist_train experiments", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of configs/experiments")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of an arm that gives none (3)")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; default: the GPUs, or else the CPUs")
    parser.add_argument("--root", type=Path, default=Path("runs/experiments"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="where tables and pictures go")
    parser.add_argument("--draw-only", action="store_true", help="run nothing; draw what has been run")
    options, extra = parser.parse_known_args(argv)
    from dist_train.analysis.tables import report  # matplotlib

    try:
        names: Iterable[str] = options.names or sorted(path.stem for path in SWEEPS.glob("*.sweep"))
        experiments = [read(name, options.seeds, options.root) for name in names]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [] if options.draw_only else run_all(experiments, extra, options.jobs or _devices())
    for experiment in experiments:
        for path in report(experiment, options.out):
            print(path)
    for failure in failed:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failed))


def _state(directory: Path) -> str:
    path = directory / STATUS
    return str(json.loads(path.read_text())["state"]) if path.exists() else ""


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _gpu(slot: int) -> dict[str, str]:
    import torch

    return {"CUDA_VISIBLE_DEVICES": str(slot % count)} if (count := torch.cuda.device_count()) else {}
