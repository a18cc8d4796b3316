"""A real Slurm of several nodes on this machine, with its own configuration, ports, munge key and files.

Where we are root a node is a UTS, mount and process namespace; elsewhere it is a slurmd of its own name. Only processes
that were started here are ended, by their numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
ROOT = os.geteuid() == 0
SIGNALS = "SlurmctldParameters=preempt_send_user_signal"

CONF = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,bf_interval=1,sched_interval=1,sched_min_interval=1
KillWait=20
MinJobAge=3600
FirstJobId={first_job}
SlurmdTimeout=6
MessageTimeout=10
ReturnToService=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Packages to install for a cluster; empty if none is missing."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    packages = "slurmctld slurmd slurm-client munge"
    return f"no {', '.join(absent)}: install Debian's {packages}" if absent else ""


CLUSTERS = count()


class Cluster:
    """Starts with the object; `close` ends it.

    Args:
        root: an empty directory for all its files.
        nodes: how many.
        cpus: of each node. May be more than the machine has, unless tasks are bound to them.
        bound: whether each task is given its own CPUs (task/affinity), which the nodes then share with each other.
    """

    def __init__(self, root: Path, nodes: int, *, cpus: int = 8, bound: bool = False) -> None:
        self.root = root
        self._cpus, self._bound = cpus, bound
        # Without namespaces there is no /etc/hosts of our own; this is how inet_aton spells 127.0.1.1 and so on.
        self.nodes = [f"node{i}" if ROOT else f"0x7f0001{i:02d}" for i in range(1, nodes + 1)]
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool", "dev"):
            (root / name).mkdir()
        self._write_configuration()
        try:
            self._start("munged", "munged", "--foreground", "--force", *self._munge())
            wait_for((root / "munge.sock").exists, 10, "munge")
            self._start("slurmctld", "slurmctld", "-D", "-i", "-c")
            for node in self.nodes:
                self.boot(node)
            wait_for(lambda: self.states() == ["idle"] * nodes, 30, "the nodes to be idle")
        except BaseException:
            self.close()
            raise

    def boot(self, node: str) -> None:
        """Start a node."""
        (self.root / "spool" / node).mkdir(exist_ok=True)
        daemon = f"slurmd -D -c -N {node}"
        if ROOT:
            # bash is the first process of the namespace, and reaps orphans
            script = f"hostname {node}; mount --bind '{self.root}/hosts' /etc/hosts; {daemon} & wait"
            spaces = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
            self._start(node, "unshare", *spaces, "bash", "-c", script)
        else:
            self._start(node, *daemon.split())

    def crash(self, node: str) -> None:
        """Kills all processes of the node at once."""
        self._kill(node)
        for process in self._of(node):
            with contextlib.suppress(ProcessLookupError):  # it went with its daemon
                os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """End all."""
        for node in self.nodes:
            self.crash(node)
        for name in list(self._processes):
            self._kill(name)

    def run(self, *words: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def states(self) -> list[str]:
        """States of the nodes."""
        words = ("sinfo", "-h", "-N", "-p", "low", "-o", "%t")
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False).stdout.split()

    def job(self, number: str) -> str:
        """State of a job, such as RUNNING."""
        return self.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", number).strip()

    def preempt_with(self, user_signal: bool) -> None:
        """Sets whether a preemption is announced by the job's own signal or by SIGTERM."""
        path = self.root / "slurm.conf"
        path.write_text(path.read_text().replace(f"\n{SIGNALS}", "") + (f"\n{SIGNALS}" if user_signal else ""))
        self.run("scontrol", "reconfigure")

    def process(self, job: str, rank: int) -> int:
        """Process of a rank of a job; 0 if there is none."""
        step = {f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0", f"SLURM_PROCID={rank}"}  # the batch script has a rank too
        return process_with({*step, f"SLURM_CONF={self.root}/slurm.conf"})

    def _of(self, node: str) -> list[int]:
        mine = f"PRIVATE_NODE={self.root}/{node}"  # slurmd has it, and hands it on to its step daemons
        tasks = {f"SLURM_CONF={self.root}/slurm.conf", f"SLURMD_NODENAME={node}"}
        return [number for number, variables in _processes() if mine in variables or tasks <= variables]

    def _start(self, name: str, *words: str) -> None:
        """Start a process that ends with this one, however that ends."""
        environment = self.environment | {"PRIVATE_NODE": f"{self.root}/{name}"}
        words = ("setpriv", "--pdeathsig", "KILL", *words)
        with open(self.root / f"{name}.console", "ab") as log:
            self._processes[name] = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _kill(self, name: str) -> None:
        if process := self._processes.pop(name, None):
            process.kill()
            process.wait()

    def _munge(self) -> list[str]:
        key = self.root / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--key-file={key}", *(f"--{option}={self.root}/munge.{end}" for option, end in files.items())]

    def _write_configuration(self) -> None:
        host, *ports = socket.gethostname().split(".")[0], *_free_ports(1 + len(self.nodes))
        user = "root" if ROOT else subprocess.check_output(["id", "-un"], text=True).strip()
        plugin = "task/affinity" if self._bound else "task/none"
        # A job's port follows from its number: clusters of other workers, or of this one, need others at the same time.
        first = 1 + 500 * ((os.getpid() + 12 * next(CLUSTERS)) % 24)
        text = CONF.format(host=host, port=ports[0], user=user, root=self.root, task_plugin=plugin, first_job=first)
        hosts = Path("/etc/hosts").read_text()
        for i, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True), 1):
            layout = f"CPUs={self._cpus} CoresPerSocket={self._cpus}"
            text += f"NodeName={node} NodeAddr=127.0.1.{i} Port={port} {layout} Gres=gpu:4\n"
            hosts += f"127.0.1.{i} {node}\n"
        (self.root / "slurm.conf").write_text(text)
        (self.root / "hosts").write_text(hosts)
        for i in range(4):
            (self.root / "dev" / f"gpu{i}").touch()
        names = ",".join(self.nodes)
        gpus = f"AutoDetect=off\nNodeName={names} Name=gpu File={self.root}/dev/gpu[0-3]\n"
        (self.root / "gres.conf").write_text(gpus)


def process_with(variables: set[str]) -> int:
    """Number of the process with these in its environment, unlike its parent; 0 if there is none. Of several the
    oldest: a rank has git and others beside it for a moment, whose parents may be gone."""
    found = [number for number, its in _processes() if variables <= its]
    kin = {number: _kin(number) for number in found}
    first = [(began, number) for number, (parent, began) in kin.items() if parent and parent not in found]
    return min(first, default=(0, 0))[1]


def parent(process: int) -> int:
    """Parent of a process; 0 if that process is gone."""
    return _kin(process)[0]


def _kin(process: int) -> tuple[int, int]:
    """Parent of a process, and when it began, in ticks since the machine did; zeros if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return int(fields[1]), int(fields[19])


def wait_for(condition: Callable[[], object], seconds: float, what: str, every: float = 0.1) -> None:
    """Poll. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(every)


def _free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def _processes() -> list[tuple[int, set[str]]]:
    """All processes whose environment we may read."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "environ").read_bytes()
            except OSError:
                continue
            found.append((int(entry.name), set(text.decode(errors="replace").split("\0"))))
    return found
