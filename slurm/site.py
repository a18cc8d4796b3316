"""The site file, slurm.yaml: what a cluster wants of every job. A file that `find_site` takes is code, as are its shell
lines.

submit: {partition: gpu, time: 12:00:00}    defaults of submit's own options
sbatch: {reservation: x, exclusive: true}   options of sbatch, as after --sbatch
env: {NAME: value}                          variables of the job; $OTHER is replaced on the node
setup: [module load cuda]                   lines of bash, each looked at when it has ended
python: ~/venv/bin/python                   what starts the ranks, as a shell reads it
srun: [--mpi=none]                          arguments of srun, as a shell reads them
"""

from __future__ import annotations

import os
import re
import stat
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.rundir.named import is_of_run
from pipelines import yamls
from pipelines.cli import Parser
from pipelines.errors import UserError
from pipelines.files import as_text, read_text
from pipelines.speech import say
from pipelines.words import nearest
from slurm import sbatch
from slurm.options import resources
from slurm.submissions import SlurmError

FILE = "slurm.yaml"
KINDS: dict[str, tuple[type[Any], str]] = {
    **dict.fromkeys(("submit", "sbatch", "env"), (dict, "a mapping, with a line `NAME: value` for each")),
    **dict.fromkeys(("setup", "srun"), (list, "a list, with a line `- ...` for each")),
    "python": (str, "a word or a line: what starts Python on the nodes"),
}
NO_LIMIT = 60 * 24 * 365 * 100  # minutes: submitit's local controller wants a number
OURS = (
    *("output", "error", "open-mode", "ntasks", "ntasks-per-node", "nodes", "time", "job-name", "chdir"),
    *("cpus-per-task", "kill-on-bad-exit"),
)
# Of a training job, and not of one that packs.
OF_TRAINING = ("nodes", "gpus_per_node")


@dataclass(frozen=True)
class SiteFile:
    """A site file that was read; of `SiteFile()`, none."""

    path: str = ""
    submit: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    python: str = ""
    srun: list[str] = field(default_factory=list)


def fill_in(options: Namespace) -> SiteFile:
    """Completes the options of `submit` and `submit pack` from the site file, whose name is told: what is typed wins.
    Returns the site. Raises UserError.

    `options.origins` then tells where each option of sbatch comes from.
    """
    local = getattr(options, "local", False)
    if local and (options.site or options.sbatch):
        raise SlurmError("--local asks no Slurm: leave --site and --sbatch out")
    site = SiteFile() if local else find_site(options.site)
    if site.path:
        say(f"site: {site.path}")
    trains = options.standard["gpus_per_node"] > 0
    given, options.origins = _given(site), {}
    for name in given:
        value, origin = getattr(options, name), "typed"
        if value is None and (trains or name not in OF_TRAINING):
            value, origin = given[name], site.path
        if value is None:
            value, origin = options.standard.get(name), "default"
        setattr(options, name, value)
        options.origins[name.replace("_", "-")] = origin
    if options.time is None and local:
        options.time = NO_LIMIT
    if options.time is None:
        raise SlurmError(
            "--time is missing: type --time 12:00:00, the time limit of one start, or write it in a site file"
        )
    typed = dict(options.sbatch or [])
    typed_gpus = not trains or any(sbatch.asks_for_gpus(*one) for one in typed.items())
    kept = {key: value for key, value in site.sbatch.items() if not (typed_gpus and sbatch.asks_for_gpus(key, value))}
    options.sbatch = kept | typed
    if "dependency" in options.sbatch and getattr(options, "chain", None):
        raise SlurmError("--chain makes the jobs depend on each other: leave dependency out")
    options.origins |= dict.fromkeys(kept, site.path) | dict.fromkeys(typed, "typed")
    sbatch.check_gpus(options.sbatch, options.nodes, options.gpus_per_node)
    return site


def find_site(named: Path | None) -> SiteFile:
    """The site of this file, else of the one here, else of the one in the user's configuration folder; `SiteFile()` if
    there is none. Raises UserError."""
    if named:
        try:
            return read(named, read_text(named))
        except OSError as error:
            raise SlurmError(f"--site {named} cannot be read ({error.strerror}): give a file such as {FILE}") from error
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (Path(FILE), folder / "dist_train" / FILE):
        if os.path.isfile(path):
            text, why = _looked_at(path)
            if not why:
                return read(path, text)
            say(f"{path} is not taken as the site: {why}; --site {path} takes it")
    return SiteFile()


def read(path: Path, text: str) -> SiteFile:
    """The site of a file with this text. Raises UserError."""
    try:
        # All scalars as they are written: 12:00:00 is no number of seconds, and `on` no truth.
        found = yamls.load(text, words=True)
        return _checked(as_text(" ".join(str(path).split())), found or {})
    except yamls.NoYaml as error:
        raise SlurmError(f"{path} {error}") from error
    except UserError as error:
        raise SlurmError(f"{path}: {error}") from error


def _looked_at(path: Path) -> tuple[str, str]:
    """The text of a file that was not named, and why it is not the user's word; the latter is empty if it is."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = os.fstat(file.fileno())  # of what is read, whatever has this name by now
            text = file.read()
    except PermissionError:
        return "", "it cannot be read"
    if found.st_uid != os.getuid():
        return text, "it belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return text, f"others may write it (`chmod go-w {path}` ends that)"
    return text, "it lies in the directory of a run" if is_of_run(path) else ""


def _checked(path: str, found: Any) -> SiteFile:
    if not isinstance(found, dict):
        raise SlurmError(f"it must be a mapping with the keys {', '.join(KINDS)}")
    for key, value in found.items():
        if key not in KINDS:
            raise SlurmError(f"unknown key {key}: {_meant(key)}")
        kind, words = KINDS[key]
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if value != "" and (not isinstance(value, kind) or not all(isinstance(one, str) for one in inner)):
            raise SlurmError(f"{key} must be {words}")
    found = {key: value for key, value in found.items() if value != ""}
    site = SiteFile(path, **found | {"sbatch": _of_sbatch(found.get("sbatch", {}))})
    for name in site.env:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise SlurmError(f"env: {name!r} is no name of a variable")
    if re.search(r"[\x00-\x1f]", site.python + "".join(site.srun)):
        raise SlurmError("python and the arguments of srun are one line each")
    _check_srun(" ".join(site.srun))
    _given(site)
    return site


def _meant(key: str) -> str:
    """Where a key belongs that is none at the top."""
    if f"--{key.replace('_', '-')}" in _parser().names:
        return f"write it under `submit:`, {key} being an option of submit"
    if key.replace("_", "-") in sbatch.NAMES:
        return f"write it under `sbatch:`, {key} being an option of sbatch"
    meant = nearest(key, KINDS)
    return f"did you mean {meant}?" if meant else f"the keys are {', '.join(KINDS)}"


def _of_sbatch(values: dict[str, str]) -> dict[str, str]:
    """Options of sbatch: their values, of flags an empty one."""
    options = {}
    for key, value in values.items():
        if value in ("false", "False"):
            continue
        name, value = sbatch.named(key), "" if value in ("true", "True") else value
        ours = sbatch.OWNED.get(name, "").format(name=name).split(" ")[0].rstrip(":")
        if ours in _parser().names:
            raise SlurmError(f"{key} is not for sbatch: write {ours.removeprefix('--')} under `submit:`")
        sbatch.check(name, value)
        options[name] = value
    return options


def _check_srun(line: str) -> None:
    """Raises SlurmError for arguments that would break a run."""
    if line and not line.startswith("-"):
        raise SlurmError(f"srun: {line.split()[0]} is no option: options begin with --")
    given = re.findall(r"(?:^|\s)--([a-z-]+)(?:=(\S*))?", line)
    for name, value in given:
        if name in OURS or (name == "export" and "ALL" not in value.split(",")):
            raise SlurmError(f"srun: --{name} is submit's own: leave it out")
    names = {name for name, _ in given}
    if names & {"container-image", "container-name"} and "container-workdir" not in names:
        raise SlurmError(
            'srun: a container needs --container-workdir="$PWD", with that directory among its mounts: the paths of a '
            "run begin there"
        )


def _parser() -> Parser:
    """A parser of what may stand under `submit:`."""
    parser = Parser("python -m slurm submit", "")
    resources(parser, gpus=1)
    return parser


def _given(site: SiteFile) -> dict[str, Any]:
    """All resources by name, those that the site does not give being None. Raises UserError."""
    try:
        words = [f"--{key.replace('_', '-')}={value}" for key, value in site.submit.items()]
        values = vars(_parser().parse(words))
    except UserError as error:
        raise SlurmError(f"submit: {re.sub('--(?!help)', '', str(error))}") from error
    return {key: value for key, value in values.items() if key not in ("rest", "standard")}
