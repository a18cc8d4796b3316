"""submitit's parameters, its sbatch script, and the hand-over to Slurm or to this machine."""

from __future__ import annotations

import errno
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

from dist_train.machine import few_cpus
from pipelines import files
from pipelines.speech import flush
from slurm.sbatch import asks_for_gpus
from slurm.setup import setup_lines
from slurm.site import SiteFile
from slurm.submissions import SlurmError

ENTRY = "slurm/entry.py"  # in a copy of the code
RANDOM = ".submission_file_"  # begins a name that submitit uses once, and then for a link
TEARDOWN = """\
code=$?
lasted=$((SECONDS + 2))  # at most
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
cd FOLDER || exit $code
if [ $code -ne 0 ]; then
  rm "$job".started 2>/dev/null && reached=1
  # Only a crash: not an end that Slurm is already bringing about, nor one that was requested; 2 is a refusal.
  if [ -n "$(squeue --noheader --jobs="$job" --states=RUNNING)" ] &&
      { [ ! -e "$job".over ] || [ $code -eq 2 ]; }; then
    # The last error of each rank; a stop signal before the first step is none.
    said=$(find . -name "${job}_*_log.out" -newermt "-$lasted seconds" -exec awk '
      /Starting with JobEnvironment/ { said[FILENAME] = "" }
      /Error(:|$)|error:|stopped before the first step/ && !/Exited with|CANCELLED/ { said[FILENAME] = $0 }
      END { for (file in said) print said[file] }' {} + | grep .)
    error=$(grep -v -e 'stopped before the first step' -e 'Terminated$' <<< "$said" | tail -n 1)
    [ -n "$error" ] || [ -z "$said" ] && echo "$(date +%s.%N) $lasted $code $error" > "$job".crash
    [ -n "$reached" ] && [ ! -e "$job".over ] && scontrol requeue "$job"  # if it had reached the trainer
  fi
fi
exit $code"""


class _Executor(SlurmExecutor):  # type: ignore[misc]  # submitit is not type-checked here
    """submitit's executor, able to write its script without Slurm.

    Args:
        wanted: as `parameters` returns it.
        code: as for `hand_over`.
    """

    def __init__(self, folder: Path, wanted: dict[str, Any], code: Path | None) -> None:
        given = dict(wanted)
        # Not quoted, as submitit would do: the node's shell replaces $PWD and ~ in them.
        self._srun, python = given.pop("srun", ""), given.pop("python", None)
        self.code = code
        # Time-outs lose nothing, so submitit's limit on them must not end a run; `job` counts starts without progress.
        super().__init__(folder, max_num_timeout=10**6, python=python)
        self.update_parameters(**given)

    @property
    def _submitit_command_str(self) -> str:
        """What follows `srun` and the arguments that submitit gives it."""
        return f"{self._srun} {_command(super()._submitit_command_str, self.code)}".lstrip()

    @classmethod
    def affinity(cls) -> int:
        return 2


class _LocalExecutor(LocalExecutor):  # type: ignore[misc]
    """The same on this machine."""

    code: Path | None = None

    @property
    def _submitit_command_str(self) -> str:
        return _command(super()._submitit_command_str, self.code)


def _command(usual: str, code: Path | None) -> str:
    """Command of a task: submitit's, or the same by way of `entry.py` in the copy of the code."""
    return usual.replace("-m submitit.core._submit", shlex.quote(str(code / ENTRY))) if code else usual


def parameters(options: Namespace, name: str, folder: Path, site: SiteFile) -> dict[str, Any]:
    """submitit's parameters for Slurm, and `python` and `srun` of the site: one task per GPU, or one per node without
    GPUs.

    Args:
        options: completed by `site.fill_in`.
    """
    if options.signal_before >= 60 * options.time:
        raise SlurmError(
            f"--signal-before {options.signal_before} s leaves nothing of --time: lower it or ask for more time"
        )
    cpus, asked = options.cpus_per_gpu, options.sbatch
    srun = ["--kill-on-bad-exit=1", "--open-mode=append"]
    wanted = {
        "job_name": name,
        "time": options.time,
        "nodes": options.nodes,
        "ntasks_per_node": max(1, options.gpus_per_node),
        "gpus_per_node": None if any(map(asks_for_gpus, asked, asked.values())) else options.gpus_per_node or None,
        "cpus_per_task": cpus,
        "signal_delay_s": options.signal_before,
        "array_parallelism": getattr(options, "at_once", None),
        "stderr_to_stdout": True,
        "srun_args": srun + ([f"--cpus-per-task={cpus}"] if cpus else []),  # since 22.05 srun does not inherit it
        # A requeue after a lost node; many sites default to no.
        "additional_parameters": {"requeue": True, **{key: value or True for key, value in asked.items()}},
        "setup": setup_lines(site, folder) or None,
        "teardown": TEARDOWN.replace("FOLDER", shlex.quote(str(folder))).splitlines(),
        "python": site.python or None,
        "srun": " ".join(site.srun) or None,
    }
    named = ("partition", "account", "qos", "constraint", "exclude", "mem", "comment")
    wanted |= {key: getattr(options, key) for key in named}
    return {key: value for key, value in wanted.items() if value is not None} | {"wckey": None}


def too_few_cpus(wanted: dict[str, Any]) -> str:
    """Warning if a task has too few CPUs for its GPU; empty otherwise."""
    given, more = wanted.get("cpus_per_task"), wanted["additional_parameters"]
    gpus = wanted.get("gpus_per_node") or any(asks_for_gpus(key, str(value)) for key, value in more.items())
    remedy = few_cpus(given or 1, "--cpus-per-gpu") if gpus else ""
    if not remedy or any("cpu" in key for key in more):
        return ""
    number = f"{given} CPU{'' if given == 1 else 's'}" if given else "one CPU, unless your site gives more"
    return f"each GPU gets {number}, which may be too few to feed it: {remedy}"


def script(
    folder: Path, wanted: dict[str, Any], array: int, code: Path | None, origins: Mapping[str, str], site: str
) -> str:
    """Returns the sbatch script, with a remark on where each line of its head comes from. Writes nothing.

    Args:
        code: as for `hand_over`.
        origins: from `site.fill_in`.
        site: name of the site file.
    """
    executor = _Executor(folder, wanted, code)
    if array:
        executor.parameters["map_count"] = array
    lines = str(executor._make_submission_file_text(executor._submitit_command_str, "")).splitlines()
    others = {"ntasks-per-node": "gpus-per-node", "cpus-per-task": "cpus-per-gpu", "signal": "signal-before"}
    for i, line in enumerate(lines):
        if found := re.match("#SBATCH --([a-z-]+)", line):
            origin = origins.get(others.get(found[1], found[1]), "submit")
            lines[i] = f"{line:<39} # {origin}"
        elif line == "# command" and (wanted.keys() & {"python", "srun"}):
            lines[i] += f": python and arguments of srun from {site}"
    return "\n".join(lines)


def hand_over(
    folder: Path,
    wanted: dict[str, Any],
    tasks: Sequence[Callable[[], None]],
    *,
    local: bool,
    code: Path | None = None,
) -> list[str]:
    """Submits tasks, several as an array. Returns their job numbers. Raises SlurmError, and OSError if there are links
    in the folder, through which submitit, Slurm or the script would write.

    Args:
        code: the copy of the packages that the jobs import; None: those that are there when they start.
    """
    executor: _LocalExecutor | _Executor
    _refuse_links(folder)
    if local:
        executor = _LocalExecutor(folder, max_num_timeout=10**6)
        executor.code = code
        executor.update_parameters(
            timeout_min=wanted["time"],
            tasks_per_node=wanted["ntasks_per_node"],
            gpus_per_node=wanted.get("gpus_per_node", 0),
            visible_gpus=wanted.get("visible_gpus", ()),
            signal_delay_s=wanted["signal_delay_s"],
            stderr_to_stdout=True,
        )
    else:
        executor = _Executor(folder, wanted, code)
    try:
        with _outside(), _aside(folder / "controller.log") if local else nullcontext():
            return [str(job.job_id) for job in executor.submit_array(tasks)]
    except FailedJobError as error:
        raise SlurmError(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    except (FileNotFoundError, RuntimeError) as error:
        raise SlurmError("there is no sbatch here: use a node of the cluster, or --local") from error


def _refuse_links(folder: Path) -> None:
    """Makes the folder into which submitit, Slurm and the script write without looking. Raises OSError if a link is
    there, or in it."""
    files.folder(folder)
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_symlink() and not entry.name.startswith(RANDOM):
                raise files.StrangeFile(errno.ELOOP, "is a link, which is not followed: remove it", entry.path)


@contextmanager
def _outside() -> Iterator[None]:
    """Hides a surrounding job's variables from the new job, except SLURM_CONF and the user's own SBATCH_ACCOUNT
    and its like."""
    own = {key: value for key, value in os.environ.items() if key.startswith("SBATCH_") or key == "SLURM_CONF"}
    with clean_env(["TORCHELASTIC_RUN_ID"]):
        os.environ.update(own)
        yield


@contextmanager
def _aside(log: Path) -> Iterator[None]:
    """Redirects our output to `log`: submitit's local controller inherits it, and would hold a pipe open to its end."""
    flush()
    ours = [os.dup(1), os.dup(2)]
    with files.appended(log) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in enumerate(ours, 1):
            os.dup2(copy, number)
            os.close(copy)


def check_text(path: Path) -> None:
    """Raises SlurmError for a path in which Slurm would replace something."""
    if found := re.search(r"[%\\\x00-\x1f]", str(path)):
        raise SlurmError(f"{path} contains {found[0]!r}, which Slurm replaces in file names: choose another name")
