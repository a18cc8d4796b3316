"""What is written beside the code: the map of its modules, changelog, citation, bounds of versions, workflow."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dist_train
from dist_train.config import Config
from dist_train.flat import as_dict

ROOT = Path(__file__).parent.parent
PACKAGES = ("dist_train", "pipelines", "slurm")
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
SUFFIXES = {"py", "md", "json", "jsonl", "yaml", "npy", "npz", "png", "pt", "html"}
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tree() -> Iterator[tuple[str, str]]:
    """Path and line of each file and folder in the tree of the map."""
    block = re.search(r"## The tree\n+```text\n(.*?)```", MAP, re.DOTALL)
    assert block
    above: list[str] = []
    for line in block[1].splitlines():
        found = re.fullmatch(r"((?:  )*)(\S+)(?: +(\S.*))?", line)
        assert found, line
        above[len(found[1]) // 2 :] = [found[2]]
        yield "".join(above), found[3] or ""


def test_the_map_has_a_line_for_each_module_and_for_no_other() -> None:
    drawn = dict(tree())
    empty = {name for name, module in MODULES.items() if name.endswith("__init__.py") and len(module.body) < 2}
    empty |= {f"{package}/__init__.py" for package in PACKAGES}
    assert MODULES.keys() - empty - drawn.keys() == set(), "not in docs/architecture.md"
    assert [name for name in drawn if not (ROOT / name).exists()] == []
    assert [name for name, says in drawn.items() if name.endswith(".py") and not says] == []


def test_the_names_on_the_map_exist() -> None:
    """Of `Trainer.train_step`, `optim.update` and the like; keys of the configuration are names, too."""
    known = {key.rpartition(".")[2] for key in as_dict(Config())}
    for module in MODULES.values():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                known.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
    prose = re.sub(r"```.*?```", "", MAP, flags=re.DOTALL)
    dotted = re.findall(r"`(\w[\w/]*\.(?:\w+\.)*)(\w+)`", prose)
    files = {place + name for place, name in dotted if name == "py" and not place.startswith("test_")}
    assert len(files) > 10
    assert [file for file in files if not any(f"/{name}".endswith(f"/{file}") for name in MODULES)] == []
    names = [(place, name) for place, name in dotted if name not in SUFFIXES and place != "os."]
    assert len(names) > 30
    assert [place + name for place, name in names if name not in known] == []


def test_the_changelog_knows_the_version() -> None:
    heads = re.findall(r"(?m)^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"))
    assert heads
    assert heads[0][0] == dist_train.__version__
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.+)$", text("CHANGELOG.md"))) <= kinds


def test_the_citation_is_one() -> None:
    """By the schema of version 1.2.0: the fields that it requires, and that an entity has a name."""
    citation: dict[str, Any] = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == dist_train.__version__
    assert f'license = "{citation["license"]}"' in PROJECT
    for work in (citation, *citation["references"]):
        assert {"title", "authors"} <= work.keys()
        assert all(who.keys() & {"name", "family-names"} for who in work["authors"])
    assert citation["message"]


def bounds() -> list[str]:
    """What the project needs, of those that it takes at run time and to be tested."""
    blocks = re.findall(
        r"(?ms)^(?:dependencies|dev|cuda1\d|tensorboard|gpu-stats|parquet|onnx|remote) = \[(.*?)\]$",
        re.sub("#.*", "", PROJECT),
    )
    return re.findall(r'"([^"]+)"', "".join(blocks))


def test_what_the_project_needs_has_a_lowest_and_a_highest_version() -> None:
    """Which the weekly workflow installs. Types of others have the version of what they describe."""
    found = [need for need in bounds() if not need.startswith(("types-", "dist_train["))]
    assert len(found) > 15
    assert [need for need in found if not re.fullmatch(r"[\w\[\]-]+>=[\d.]+,<[\d.]+", need)] == []


def test_the_pinned_versions_are_within_the_bounds() -> None:
    pinned = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)", text("constraints.txt")))
    for need in bounds():
        name, *limits = re.split(r"(?:\[[\w,-]+\])?>=|,<", need)
        version = next((v for n, v in pinned.items() if n.lower() == name.lower()), "")
        if len(limits) == 2:
            assert version, f"{name} is not in constraints.txt"
            low, given, high = (tuple(map(int, text.split("."))) for text in (limits[0], version, limits[1]))
            assert low <= given < high, name


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text(".github/workflows/test.yml"))
    return found


def test_the_workflow_runs_what_there_is(workflow: dict[str, Any]) -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", text("Makefile")))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    made = re.findall(r"(?m)^make ([\w-]+)", "\n".join(step.get("run", "") for step in steps))
    assert made
    assert set(made) <= targets
    packages = workflow["env"]["SLURM"]
    assert packages in PROJECT.replace(", ", " ").replace(" and ", " ")
    assert all("$SLURM" in str(job["steps"]) for job in workflow["jobs"].values())


def test_the_workflow_runs_on_the_first_python_and_on_the_last(workflow: dict[str, Any]) -> None:
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', PROJECT)
    assert oldest
    assert classified[0] == oldest[1]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [classified[0], classified[-1]]
    weekly = workflow["jobs"]["weekly"]["strategy"]["matrix"]["include"]
    assert [(run["python"], run["resolution"]) for run in weekly] == [
        (classified[0], "lowest-direct"),
        (classified[-1], "highest"),
    ]


@pytest.mark.parametrize("epochs", ["0", "-1", "2.5", "abc", "", "3 4"])
def test_the_demo_wants_a_number_of_epochs(epochs: str) -> None:
    """Before anything is installed."""
    words = ["make", "-n", "demo", f"EPOCHS={epochs}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"EPOCHS is '{epochs}': give a number of epochs, 1 or more" in done.stderr
    assert "installing" not in done.stdout
