"""sbatch's options: their names, those that `submit` decides itself, and what is answered to one that is typed without
`--sbatch`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from slurm.submissions import SlurmError

# Of Slurm 22.05, with what later ones have added. `=`: takes a value; `?`: may take one; a letter is its short form.
NAMES = {
    long: (short, kind)
    for short, long, kind in re.findall(
        r"(?:(\w):)?([a-z][a-z-]+)([=?]?)(?:\s|$)",
        """
        A:account= acctg-freq= a:array= batch= bb= bbf= b:begin= D:chdir= cluster-constraint= M:clusters= comment=
        C:constraint= container= container-id= contiguous S:core-spec= cores-per-socket= cpu-freq= cpus-per-gpu=
        c:cpus-per-task= deadline= delay-boot= d:dependency= m:distribution= e:error= x:exclude= exclusive? export=
        export-file= extra= B:extra-node-info= get-user-env? gid= gpu-bind= gpu-freq= G:gpus= gpus-per-node=
        gpus-per-socket= gpus-per-task= gres= gres-flags= h:help hint= H:hold ignore-pbs i:input= J:job-name=
        kill-on-invalid-dep= L:licenses= mail-type= mail-user= mcs-label= mem= mem-bind= mem-per-cpu= mem-per-gpu=
        mincpus= network= nice? k:no-kill? no-requeue F:nodefile= w:nodelist= N:nodes= n:ntasks= ntasks-per-core=
        ntasks-per-gpu= ntasks-per-node= ntasks-per-socket= oom-kill-step? open-mode= o:output= O:overcommit
        s:oversubscribe parsable p:partition= power= prefer= priority= profile= propagate? q:qos= Q:quiet reboot requeue
        reservation= segment= signal= sockets-per-node= spread-job stepmgr switches= test-only thread-spec=
        tasks-per-node= threads-per-core= t:time= time-min= tmp= tres-bind= tres-per-task= uid= usage use-min-nodes
        v:verbose V:version W:wait wait-all-nodes= wckey= wrap=
        """,
    )
}
GPUS = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "tres-per-task")
# What `submit` decides itself: the reason, or our own option.
OWNED = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude", "mem", "comment", "time"), "--{name}"),
    "nodes": "--nodes",
    "cpus-per-task": "--cpus-per-gpu",
    "cpus-per-gpu": "--cpus-per-gpu",
    "signal": "--signal-before",
    "job-name": "--run.name",
    "array": "--array FILE, a sweep",
    **dict.fromkeys(
        [name for name in NAMES if "tasks-per-" in name or name == "ntasks"],
        "--gpus-per-node and --nodes: there is one task per GPU, or one per node without GPUs",
    ),
    **dict.fromkeys(("requeue", "no-requeue", "no-kill"), "a run is requeued until it is done or cancelled"),
    **dict.fromkeys(
        ("output", "error", "open-mode"), "the logs lie in the run directory, `python -m slurm logs RUN` reads them"
    ),
    "chdir": "a job works in the directory where it is submitted: go there first",
    "clusters": "`status` and `cancel` ask this cluster: submit on a node of the other one",
    "export-file": "a job has the variables of the shell that submits it: set others in `env:` of a site file",
    "wait": "`python -m slurm logs RUN --follow` waits for the end of a job",
    "test-only": "--dry-run",
    "wrap": "the script is written here: `setup:` of a site file adds lines to it",
    **dict.fromkeys(("parsable", "quiet", "verbose", "help", "usage", "version"), "it asks sbatch for no resources"),
}
KEPT = (
    "a job needs the variables of the shell that submits it (export=ALL,NAME=VALUE adds to them, as does a site file)"
)


def read(text: str) -> tuple[str, str]:
    """The name and the value of `KEY=VALUE`; the value of `KEY`, a flag, is empty. Raises SlurmError."""
    key, given, value = text.partition("=")
    name = named(key)
    if given and not value:
        raise SlurmError(f"--sbatch {text} has no value: write --sbatch {name}, or --sbatch {name}=VALUE")
    check(name, value)
    return name, value


def named(key: str) -> str:
    """The long name of an option, with or without its dashes. Raises SlurmError for what can be none."""
    name = key.lstrip("-").replace("_", "-")
    name = next((long for long, (short, _) in NAMES.items() if short and short == name), name)
    if not re.fullmatch("[A-Za-z][A-Za-z0-9-]+", name):
        raise SlurmError(f"{key!r} is no option of sbatch: write KEY=VALUE, such as reservation=x")
    # sbatch would take the beginning of a name for the whole of it.
    if name not in NAMES and (begun := [known for known in NAMES if known.startswith(name)]):
        raise SlurmError(f"{key} is no option of sbatch: did you mean {' or '.join(begun[:3])}?")
    return name


def check(name: str, value: str) -> None:
    """Raises SlurmError, with the reason, for an option that is not to be given, and for one without its value. A name
    that is not known may be a plugin's: sbatch will tell."""
    if name in OWNED:
        raise SlurmError(f"{name} is not for sbatch: {_ours(name)}")
    if _empties(name, value):
        raise SlurmError(f"export={value} is refused: {KEPT}")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise SlurmError(f"the value of {name} has more than one line, or a control character: write it in one line")
    if value and name in NAMES and not NAMES[name][1]:
        raise SlurmError(f"{name} is a flag of sbatch and takes no value: leave ={value} out")
    if not value and name in NAMES and NAMES[name][1] == "=":
        raise SlurmError(f"{name} needs a value: write {name}=VALUE")


def asks_for_gpus(name: str, value: str) -> bool:
    """Whether an option asks for GPUs."""
    return name in GPUS and ("gpu" in value or not name.startswith(("gres", "tres")))


def check_gpus(options: Mapping[str, str], nodes: int, per_node: int) -> None:
    """Raises SlurmError if the GPUs that sbatch is asked for are not one per task.

    Args:
        per_node: what --gpus-per-node counts.
    """
    for name, value in options.items():
        if not asks_for_gpus(name, value):
            continue
        tasks = {"gpus": nodes * per_node, "gpus-per-task": 1, "tres-per-task": 1}.get(name, per_node)
        counts = list(_counts(name, value))
        if counts and name != "gpus-per-socket" and (sum(counts) != tasks or not per_node):
            raise SlurmError(
                f"{name}={value} asks for {sum(counts)} GPUs where {tasks if per_node else 0} of the tasks run, one "
                f"per GPU: set --gpus-per-node, which counts the tasks of a node and is {per_node}"
            )


def instead(word: str, argv: Sequence[str], own: Sequence[str]) -> str:
    """What to type in place of an option of sbatch, to follow a colon; empty for a word that is none.

    Args:
        word: as typed, `--gres`, `-p` or `-N4`.
        argv: the words of the command line, among them the option.
        own: the options of the command.
    """
    letters = {short: long for long, (short, _) in NAMES.items() if short}
    name = word[2:].replace("_", "-") if word.startswith("--") else letters.get(word[1:2], "")
    if name not in NAMES or name == "batch" or (len(word) > 2 and word[2:].isalpha() and not word.startswith("--")):
        return ""  # --batch is that of a training here; -lr is no -l
    value = _value(word, argv, NAMES[name][1])
    if f"--{name}" in own:
        return f"here it is --{name} {shlex.quote(value) if value else ''}".rstrip()
    typed = f"`--sbatch {shlex.quote(f'{name}={value}' if value else name)}`"
    if name in GPUS:
        return f"here it is --gpus-per-node, and {typed} beside it replaces what sbatch is asked for"
    if name in OWNED:
        return _ours(name)
    return KEPT if _empties(name, value) else f"type {typed}"


def _empties(name: str, value: str) -> bool:
    """Whether an option takes the user's variables from the job."""
    return name == "export" and "ALL" not in value.split(",")


def _ours(name: str) -> str:
    told = OWNED[name].format(name=name)
    return f"here it is {told}" if told.startswith("--") else told


def _value(word: str, argv: Sequence[str], kind: str) -> str:
    """The value that an option has on the command line, or VALUE if it needs one."""
    otherwise = "VALUE" if kind == "=" else ""
    if not word.startswith("--") and len(word) > 2:
        return word[2:].removeprefix("=")
    for one, following in zip(argv, [*argv[1:], "-"], strict=True):
        if one.startswith(f"{word}="):
            return one.partition("=")[2]
        if one == word:
            return following if kind == "=" and not following.startswith("-") else otherwise
    return otherwise


def _counts(name: str, value: str) -> Iterator[int]:
    """The numbers of GPUs that a value lists: 8 of `gpu:h100:8`, of `h100:8` and of `8`, 1 of `gpu`."""
    for one in re.sub(r"\(.*?\)", "", value).split(","):  # without the sockets
        words = re.split("[:=]", one.removeprefix("gres/").removeprefix("gres:"))
        if name in ("gres", "tres-per-task") and words[0] != "gpu":
            continue
        if words[-1].isdecimal():
            yield int(words[-1])
        elif name in ("gres", "tres-per-task"):
            yield 1
