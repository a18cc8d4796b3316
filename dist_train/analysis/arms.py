"""Experiments: a configuration, NAME.yaml, and its arms, NAME.sweep, one line of overrides per run (which
`python -m slurm submit --array` takes too), each with its name as a comment. An arm runs with several seeds, or with
the one it gives. `# ensemble of two: NAME` averages the runs of another arm, two by two; `# begun below: 0.6` gives the
training error below which a net has begun to learn, `# validated below: 0.5, 0.4` the validation errors that are looked
for in the same way; `# columns: ONE, OTHER` puts the arms called "ONE, ..." and "OTHER, ..." side by side in a table of
their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

from dist_train.cli import overrides_of, parse
from dist_train.config import ConfigError
from dist_train.packaged import CONFIGS
from pipelines.files import read_text

SWEEPS = CONFIGS / "experiments"
ENSEMBLE, BEGUN, VALIDATED, COLUMNS = "# ensemble of two: ", "# begun below: ", "# validated below: ", "# columns: "


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


class Averaged(NamedTuple):
    """Two runs whose predictions are averaged, and the file of the result."""

    one: Path
    two: Path
    result: Path


@dataclass
class Experiment:
    """A configuration and its arms; runs lie in `root`.

    Attributes:
        begun: training error below which a net has begun to learn. 0.8 is right twice as often as a guess among ten
            classes.
        validated: top-1 validation errors; the table says when a run was below each.
        columns: names that arms begin with, for the table that has them side by side; none for no such table.
    """

    name: str
    config: Path
    root: Path
    arms: list[Arm] = field(default_factory=list)
    begun: float = 0.8
    validated: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def trained(self) -> list[Arm]:
        """The arms that have runs of their own."""
        return [arm for arm in self.arms if not arm.of]

    @property
    def ensembles(self) -> list[Arm]:
        """The arms that average runs of another one."""
        return [arm for arm in self.arms if arm.of]

    def pairs(self, arm: Arm) -> list[Averaged]:
        """The runs that an ensemble averages, two by two."""
        pairs = []
        for seeds in combinations(arm.seeds, 2):
            one, two = (arm.run(self.root, seed) for seed in seeds)
            pairs.append(Averaged(one, two, self.root / f"{one.name}+{two.name}.json"))
        return pairs


def known() -> list[str]:
    """The names of all experiments."""
    return sorted(path.stem for path in SWEEPS.glob("*.sweep"))


def chosen(names: Sequence[str], seeds: int, root: Path, extra: Sequence[str]) -> list[Experiment]:
    """The named experiments, or all. Raises ConfigError, also if no arm of one could run with the options `extra`."""
    experiments = [read(name, seeds, root) for name in names or known()]
    for experiment in experiments if extra else ():
        refusals = [
            _refusal(["--config", str(experiment.config), *arm.overrides, *extra]) for arm in experiment.trained
        ]
        if all(refusals):
            raise ConfigError(refusals[0])
    return experiments


def _refusal(argv: Sequence[str]) -> str:
    """The trainer's objection to a command line; empty if there is none."""
    try:
        parse(argv)
    except ConfigError as error:
        return str(error)
    return ""


def read(name: str, seeds: int, root: Path) -> Experiment:
    """The experiment of that name, whose arms have seeds 0 ... `seeds` - 1 if they give none. Raises ConfigError."""
    sweep = SWEEPS / f"{name}.sweep"
    if not sweep.exists():
        raise ConfigError(f"there is no experiment {name}: choose from {', '.join(known())}")
    experiment = Experiment(name, sweep.with_suffix(".yaml"), root / name)
    for line in read_text(sweep).splitlines():
        if line.startswith(ENSEMBLE):
            of = line.removeprefix(ENSEMBLE)
            experiment.arms.append(Arm(f"two of: {of}, averaged", (), tuple(range(seeds)), of))
        elif line.startswith(BEGUN):
            experiment.begun = float(line.removeprefix(BEGUN))
        elif line.startswith(VALIDATED):
            experiment.validated = tuple(map(float, line.removeprefix(VALIDATED).split(", ")))
        elif line.startswith(COLUMNS):
            experiment.columns = tuple(line.removeprefix(COLUMNS).split(", "))
        elif overrides := overrides_of(line, sweep):
            given = [int(value) for word, value in pairwise(overrides) if word == "--train.seed"]
            label = line.rpartition("# ")[2]
            experiment.arms.append(Arm(label, tuple(overrides), tuple(given) or tuple(range(seeds))))
    return experiment


def slug(name: str) -> str:
    """The name as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
