"""The container files and the lines of docs/install.md name what the repository has; the images are not built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train import machine

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (FOLDER / "dist_train.def").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = {"pyproject.toml", "README.md", "LICENSE", "configs", "dist_train", "pipelines", "slurm"}
EXTRAS = set(
    re.findall(r"(?m)^([\w-]+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0])
)


def instructions(text: str) -> list[tuple[str, str]]:
    """Those of a Dockerfile, lines joined that end in a backslash."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def sections(text: str) -> dict[str, list[str]]:
    """Those of an Apptainer definition; the header is the section ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in re.sub(r"(?m)^\s*#.*\n", "", text).splitlines():
        if line.startswith("%"):
            name = line[1:]
            found[name] = []
        elif line.strip():
            found[name].append(line.strip())
    return found


def test_the_dockerfile() -> None:
    steps = instructions(DOCKERFILE)
    assert [name for name, _ in steps][:1] == ["FROM"]
    assert {name for name, _ in steps} <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    sources = {word.rstrip("/") for name, rest in steps if name == "COPY" for word in rest.split()[:-1]}
    assert sources == {*PACKAGES, "constraints.txt"}
    arguments = dict(rest.split("=") for name, rest in steps if name == "ARG")
    (install,) = (rest for name, rest in steps if "pip install" in rest)
    assert set(re.findall(r"\$\{(\w+)\}", install)) <= arguments.keys()
    assert arguments["EXTRA"] in EXTRAS


def test_the_definition() -> None:
    found = sections(DEFINITION)
    assert dict(line.split(": ") for line in found[""])["Bootstrap"] == "docker"
    assert list(found) == ["", "arguments", "files", "post", "runscript"]
    assert {line.split()[0] for line in found["files"]} == {*PACKAGES, "constraints.txt"}
    arguments = dict(line.split("=") for line in found["arguments"])
    assert set(re.findall(r"{{ (\w+) }}", DEFINITION)) == arguments.keys()
    assert arguments["EXTRA"] in EXTRAS


@pytest.mark.parametrize("text", [DOCKERFILE, DEFINITION])
def test_what_both_install(text: str) -> None:
    (given,) = re.findall(r"pip install --no-cache-dir -c constraints\.txt \"\.\[(.*)\]\"", text)
    assert {word for word in given.split(",") if word.isidentifier() or "-" in word} <= EXTRAS
    version = re.search(r"python:(3\.\d+)-slim", text)
    assert version
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT
    assert f"on Python {version[1]}." in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert {*re.findall(r"EXTRA=(\w+)", text)} == {"cuda12", "cuda13"}


@pytest.mark.parametrize(
    "name", ["README.md", "docs/install.md", "docs/containers/Dockerfile", "docs/containers/dist_train.def"]
)
def test_the_lines_for_cuda_12_agree(name: str) -> None:
    """With what a machine with an older driver is told to type."""
    text = (ROOT / name).read_text(encoding="utf-8")
    (index,) = set(re.findall(r"https://download\.pytorch\.org\S*?cu\d+", machine.CUDA_12))
    assert set(re.findall(r"https://download\.pytorch\.org\S*?cu\d+", text)) == {index}
    for major, driver in machine.OLDEST_DRIVER.items():
        assert re.search(rf"driver\s{driver}|{driver} or later", text), f"CUDA {major}"
    if name.endswith(".md"):
        assert machine.CUDA_12.partition("&& ")[2] in text
    backends = re.findall(r"--torch-backend (\w+)", text)
    assert set(backends) <= {index.rpartition("/")[2]}


def test_the_extras_that_the_page_names() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?:\.|dist_train)\[([\w-]+)\]", page)) <= EXTRAS
