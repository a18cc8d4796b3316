"""`python -m dist_train experiments [NAME ...]`: run the sweeps of configs/experiments and draw their results."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import torch

from dist_train import data
from dist_train.analysis.arms import Experiment
from dist_train.analysis.tables import report
from dist_train.cli import parse
from dist_train.config import ConfigError
from dist_train.rundir import status
from pipelines.files import appended
from pipelines.manifest import MANIFEST
from pipelines.misc import cpus
from pipelines.remote.places import is_url
from pipelines.resolve import FLAG
from pipelines.speech import bar, say, show

ENDED = ("done", "diverged")  # a run that diverged is a result
TRAINER = [sys.executable, "-m", "dist_train"]


class Planned(NamedTuple):
    """A run still to be trained."""

    directory: Path
    seed: int
    options: list[str]


class Place(NamedTuple):
    """CPU of one run at a time, and the environment variable that gives it a GPU."""

    cpu: int
    gpu: dict[str, str]


def start(args: Namespace, experiments: Sequence[Experiment]) -> int:
    """Run and draw. Returns 0, or 1 if a run failed, or an experiment that was named has no images."""
    failed: list[str] = []
    if not args.draw_only:
        lacking = {experiment.name: text for experiment in experiments if (text := _lacking(experiment, args.rest))}
        for name, text in lacking.items():
            failed.append(text) if name in args.names else say(text)
        ready = [experiment for experiment in experiments if experiment.name not in lacking]
        failed += run_all(ready, args.rest, args.jobs or torch.cuda.device_count() or cpus())
    for experiment in experiments:
        drawn = report(experiment, args.out)
        for path in drawn:
            show(str(path))
        if not drawn:
            say(f"{experiment.name}: nothing to draw, since {experiment.root} has no runs and {args.out} no records")
    for failure in failed:
        say(f"error: {failure}")
    return 1 if failed else 0


def _lacking(experiment: Experiment, extra: Sequence[str]) -> str:
    """What is missing if an experiment needs a shard set that is not there and that nothing packs; else empty."""
    for arm in experiment.trained:
        with suppress(ConfigError):  # which its run will say
            config, _ = parse(["--config", str(experiment.config), *arm.overrides, *extra])
            for path in (config.data.train, config.data.val):
                if not (is_url(path) or data.to_pack(config) or (Path(path) / MANIFEST).exists()):
                    return f"{experiment.name} is not run: there is no shard set {path}, so pack it: docs/blog.md"
    return ""


def run_all(experiments: Sequence[Experiment], extra: Sequence[str], jobs: int) -> list[str]:
    """Train the runs that are not done, `jobs` at a time, each on its own CPU (or GPU); then average the runs of
    ensembles. Returns the failures."""
    places: Queue[Place] = Queue()
    usable = sorted(os.sched_getaffinity(0))
    for i in range(jobs):
        gpus = torch.cuda.device_count()
        gpu = {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {}
        places.put(Place(usable[i % len(usable)], gpu))

    def run(planned: Planned) -> str:
        place = places.get()
        try:
            return _train([*planned.options, *extra], planned.directory, place)
        finally:
            places.put(place)

    todo = _todo(experiments)
    _pack([*planned.options, *extra] for planned in todo)
    failed = []
    with ThreadPoolExecutor(jobs) as pool, bar(len(todo), "", "run") as done:
        for failure in pool.map(run, todo):
            failed += [failure] if failure else []
            done.update()
    for experiment in experiments:
        failed += _average(experiment)
    return failed


def _todo(experiments: Sequence[Experiment]) -> list[Planned]:
    """The runs that have not ended, in the order of their seeds: a sweep that is cut short has results of every arm."""
    todo = []
    for experiment in experiments:
        for arm in experiment.trained:
            for seed in arm.seeds:
                directory = arm.run(experiment.root, seed)
                if _state(directory) not in ENDED:
                    given = ["--config", str(experiment.config), *arm.overrides]
                    given += [f"--train.seed={seed}", f"--run.dir={directory}"]
                    todo.append(Planned(directory, seed, given))
    return sorted(todo, key=lambda planned: planned.seed)


def _pack(command_lines: Iterable[Sequence[str]]) -> None:
    """Packs the sources that these command lines name: of runs beside each other only one could. Raises UserError."""
    for words in command_lines:
        with suppress(ConfigError):  # which its run will say
            config, _ = parse(words)
            if data.to_pack(config):
                data.pack_source(config)


def _train(given: Sequence[str], directory: Path, place: Place) -> str:
    """Train a run, with its output in a log beside it. Returns the reason if it failed."""
    os.sched_setaffinity(0, {place.cpu})  # of this thread, and so of the process that it starts
    directory.parent.mkdir(parents=True, exist_ok=True)
    with appended(Path(f"{directory}.log")) as log:
        subprocess.run([*TRAINER, *given], stdout=log, stderr=log, env=os.environ | place.gpu, check=False)
    state = _state(directory)
    return "" if state in ENDED else f"{directory} is {state or 'not begun'}: see {directory}.log"


def _average(experiment: Experiment) -> list[str]:
    """Evaluate the pairs of runs whose predictions an ensemble averages. Returns the failures."""
    failed = []
    trusting = [FLAG] * any(":" in word for arm in experiment.trained for word in arm.overrides)  # code that it names
    for arm in experiment.ensembles:
        for one, two, result in experiment.pairs(arm):
            if _state(one) == _state(two) == "done" and not result.exists():
                command = [*TRAINER, "evaluate", str(one), str(two), "--json", str(result), *trusting]
                if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                    failed.append(f"{result} could not be made")
    return failed


def _state(directory: Path) -> str:
    return str(status.read(directory).get("state", ""))
