"""No import of torch for help, misspelt options and the table of runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Runs a package once for each command line, as `python -m` does, but in one process.
PROGRAM = """
import json, os, runpy, sys

package, commands = sys.argv[1], json.loads(sys.argv[2])
verbs = list(runpy.run_module(package, run_name="listing")["VERBS"])
os._exit = sys.exit  # the trainer ends itself by it
codes = {}
for words in commands:
    sys.argv = [package, *words]
    try:
        runpy.run_module(package, run_name="__main__")
    except SystemExit as end:
        codes[" ".join(words)] = int(end.code or 0)
assert "torch" not in sys.modules
with open("done.json", "w") as file:
    json.dump({"verbs": verbs, "codes": codes}, file)
"""


@pytest.mark.parametrize(
    ("package", "verbs", "others"),
    [
        ("pipelines", ["pack", "index", "verify", "preview", "bench"], []),
        ("slurm", ["submit", "submit pack", "status", "logs", "cancel", "requeue"], ["status"]),
        (
            "dist_train",
            ["runs", "report", "evaluate", "predict", "figures", "export", "experiments", "speed", "gpu-report"],
            ["runs", "runs . --json", "--print_config", "speed --print_config"],
        ),
    ],
)
def test_who_only_asks_does_not_wait_for_torch(
    package: str, verbs: list[str], others: list[str], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')")  # found before the real one
    fine = ["--help", "--version", *(f"{verb} --help" for verb in verbs), *others]
    misspelt = ["hlep", "--hlep", *(f"{verb} --hlep" for verb in verbs)]
    words = json.dumps([line.split() for line in (*fine, *misspelt)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, package, words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "done.json").read_text())
    assert found["verbs"] == verbs
    assert found["codes"] == {**dict.fromkeys(fine, 0), **dict.fromkeys(misspelt, 2)}
    if package == "dist_train":
        described = "".join(done.stdout.partition("\noptions:")[0].split())
        assert [verb for verb in verbs if f"`{verb}`" not in described] == []
    assert done.stdout.count("usage: ") == 1 + len(verbs)
    complaints = done.stderr.splitlines()
    assert len(complaints) == len(misspelt), "one sentence each"
    assert all(line.startswith("error: ") for line in complaints)
