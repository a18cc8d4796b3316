"""Queries to NVIDIA's driver about the cards of this machine, and separate functions that parse the answers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"
HIDING = ("", "-1", "NoDevFiles")  # its values that hide all GPUs
GIVEN = "SLURM_GPUS_ON_NODE"  # Slurm's number of them for this job; it leaves SLURM_JOB_GPUS of an outer job as it is
ANSWER = 10.0  # time limit of nvidia-smi, seconds
CARDS = "--query-gpu=index,uuid,name,memory.total,compute_cap,mig.mode.current,driver_version"
APPS = "--query-compute-apps=pid,gpu_uuid,used_memory"
CSV = "--format=csv,noheader,nounits"


class Card(NamedTuple):
    """A GPU as listed by nvidia-smi; unknown values are kept in its words."""

    number: int
    uuid: str
    name: str
    memory_mib: str
    capability: str
    mig: str
    driver: str


class Answer(NamedTuple):
    """Output of nvidia-smi, or why there is no useful one."""

    text: str
    why: str = ""


def nvidia_smi(*options: str, seconds: float = ANSWER) -> Answer:
    """Runs nvidia-smi, for `seconds` at most. Never raises."""
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return Answer("", f"nvidia-smi cannot be started ({error.strerror})")
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # it cannot be killed if the driver hangs
            process.communicate(timeout=1)
        return Answer("", f"nvidia-smi has not answered within {seconds:g} s")
    if process.returncode:
        return Answer("", f"nvidia-smi has failed: {next(iter(text.splitlines()), f'exit code {process.returncode}')}")
    return Answer(text)


def device_files() -> list[str]:
    """Device files of the GPUs visible to this process."""
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def hidden() -> bool:
    """Whether the user has hidden all GPUs."""
    return os.environ.get(VISIBLE) in HIDING


def given(files: Sequence[str], variables: Mapping[str, str]) -> str:
    """What shows that this process was given GPUs, in words; "" if nothing does.

    In a Slurm job only Slurm's variables count: a node that does not constrain devices shows its device files to jobs
    without GPUs, too, and a container may hide those of a job with GPUs. Elsewhere the device files count, or
    CUDA_VISIBLE_DEVICES, but not submitit's local one, which follows from --gpus-per-node on any machine.

    Args:
        files: device files of the GPUs.
        variables: the environment.
    """
    visible, in_slurm = variables.get(VISIBLE), "SLURM_JOB_ID" in variables
    if visible in HIDING:
        return ""
    if files and not in_slurm:
        return ", ".join(files)
    if visible and variables.get("SUBMITIT_EXECUTOR") != "local":
        return f"{VISIBLE}={visible}"
    number = (variables.get(GIVEN) if in_slurm else "") or "0"
    return "" if number == "0" else f"{GIVEN}={number}"


def version() -> str:
    """Version of the driver; "" if there is none, or it does not answer."""
    with suppress(OSError):
        if found := kernel_module(Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")):
            return found
    return next((card.driver for card in known_cards()), "")


def topology() -> str:
    """Matrix of the links between the GPUs, from nvidia-smi; "" if it fails."""
    return nvidia_smi("topo", "-m").text


def known_cards() -> list[Card]:
    """Cards that nvidia-smi lists."""
    return cards(nvidia_smi(CARDS, CSV).text)


def gpu_processes(among: Sequence[Card]) -> set[tuple[int, int]]:
    """Pairs (pid, GPU number) of the processes that hold memory on these GPUs."""
    if not among:
        return set()
    places = {card.uuid: card.number for card in among}
    return {(pid, places[uuid]) for pid, uuid, _ in holders(nvidia_smi(APPS, CSV).text) if uuid in places}


def kernel_module(text: str) -> str:
    """Driver version from /proc/driver/nvidia/version; "" if it is not given."""
    found = re.search(r"NVRM version:.*?Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def cards(text: str) -> list[Card]:
    """Parses the answer to CARDS; other lines are skipped."""
    return [Card(int(row[0]), *row[1:]) for row in _rows(text, len(Card._fields))]


def holders(text: str) -> list[tuple[int, str, str]]:
    """Parses the answer to APPS: pid, UUID of the GPU, and MiB of each line."""
    return [(int(row[0]), row[1], row[2]) for row in _rows(text, 3)]


def _rows(text: str, fields: int) -> list[list[str]]:
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == fields and row[0].isdigit()]
