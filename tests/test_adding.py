"""docs/architecture.md, "To add": each worked diff applies, and what it adds works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import backend

from pipelines.augment import Augment
from pipelines.dali import Decode
from pipelines.loader import Loader
from pipelines.plan import FixedPlan, Plan, TrainingPlan
from pipelines.shards import ShardSet
from tests.helpers import adding
from tests.helpers.compare import equal, newest, records
from tests.helpers.launch import command, finish, python, spawn


@pytest.mark.parametrize("heading", adding.headings())
def test_the_diffs_apply(heading: str) -> None:
    if patch := adding.diffs(heading):
        adding.apply(patch, adding.ROOT, "--check")


PAGE = """# A page

## To add

### A thing

```diff
--- a/CITATION.cff
+++ b/CITATION.cff
@@ -1,2 +1,3 @@
 cff-version: 1.2.0
+# one line more
 message: If you use this software, please cite it, and the paper whose net and recipe it implements.
--- /dev/null
+++ b/mine.py
@@ -0,0 +1,1 @@
+X = 1
```

```diff
--- a/mine.py
+++ b/mine.py
@@ -1,1 +1,1 @@
-X = 1
+X = 2
```

### Another

None.

## Next

### No thing to add
"""


def test_the_diffs_below_a_heading_are_applied_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "PAGE", tmp_path / "page.md")
    adding.PAGE.write_text(PAGE)
    assert adding.headings() == ["A thing", "Another"]
    tree = adding.applied("A thing", tmp_path)
    assert (tree / "CITATION.cff").read_text(encoding="utf-8").startswith("cff-version: 1.2.0\n# one line more\n")
    assert (tree / "mine.py").read_text(encoding="utf-8") == "X = 2\n"
    assert (tree / "dist_train" / "train.py").is_file()
    assert not (tree / ".git").exists()
    assert "one line more" not in (adding.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    with pytest.raises(AssertionError, match="no diff"):
        adding.applied("Another", tmp_path)
    with pytest.raises(AssertionError, match="does not apply"):
        adding.apply(adding.diffs("A thing").replace("1.2.0", "1.3.0"), adding.ROOT, "--check")


# An augmentation. ----------------------------------------------------------------------------------------------------

SHOWN = {  # what is shown of a set, by the name of a case: see `shown`
    "off": {"contrast": 0},
    "on": {"contrast": 0.5},
    "other ranks": {"contrast": 0.5, "size": 3, "threads": 1},
    "fixed": {"contrast": 0.5, "training": False},
}


def shown(directory: str, *, training: bool = True, size: int = 1, threads: int = 2, **settings: Any) -> dict[str, Any]:
    """An epoch as so many ranks show it: inputs of the net, float32 [n, 67, 67, 3], levels before lighting and mean,
    and the views."""
    shards = ShardSet(Path(directory))
    augment, statistics = Augment(72, 67, **settings), shards.manifest
    plan: Plan = TrainingPlan(shards, augment, statistics, 3) if training else FixedPlan(shards, augment)
    ranks = []
    for rank in range(size):
        loader = Loader(plan, statistics, batch=40, dp_rank=rank, dp_size=size, decode=Decode(threads=threads))
        ranks.append([batch.inputs.permute(0, 2, 3, 1).numpy() for batch in loader.epoch(1)])
    inputs = np.concatenate([part for step in zip(*ranks, strict=True) for part in step])
    views = plan.views(1, plan.samples(1, 0, len(inputs)), 0)
    levels = inputs + loader.mean - views.shift[:, None, None]
    return {"inputs": inputs, "levels": levels, **{k: v for k, v in vars(views).items() if v is not None}}


def in_the_copy(tree: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """What became of a command in a tree with a diff."""
    return finish(spawn(command, env={"PYTHONPATH": str(tree)}, how="exec"))


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adding.applied("An augmentation", tmp_path_factory.mktemp("contrast"))


def test_an_augmentation_takes_two_files() -> None:
    files = re.findall(r"(?m)^\+\+\+ b/(.+)$", adding.diffs("An augmentation"))
    assert files == ["pipelines/augment.py", "pipelines/dali.py"]


@pytest.mark.integration
@pytest.mark.slow
def test_contrast_is_what_numpy_makes_of_the_levels(
    contrast: Path, shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whatever ranks, and nothing else changes; without it, and in fixed views, not a bit does."""
    monkeypatch.chdir(contrast)
    (tmp_path / "shown.py").write_text(
        "import sys\nimport numpy as np\nfrom tests.test_adding import SHOWN, shown\n"
        "for name, case in SHOWN.items():\n    np.savez(f'{sys.argv[2]}/{name}', **shown(sys.argv[1], **case))\n"
    )
    train = str(shard_sets / "train")
    result = in_the_copy(contrast, [sys.executable, str(tmp_path / "shown.py"), train, str(tmp_path)])
    assert result.returncode == 0, result.stderr
    off, on, other, fixed = (np.load(tmp_path / f"{name}.npz") for name in SHOWN)
    before = shown(train)
    for case in (off, on):
        assert all(case[key].tobytes() == before[key].tobytes() for key in before if key not in ("inputs", "levels"))
    assert off["inputs"].tobytes() == before["inputs"].tobytes()
    assert all(other[key].tobytes() == on[key].tobytes() for key in on)
    assert fixed["inputs"].tobytes() == shown(train, training=False)["inputs"].tobytes()
    assert "contrast" not in fixed

    factor = on["contrast"].astype(np.float64)
    level = np.rint(before["levels"]).astype(np.float64)
    np.testing.assert_allclose(before["levels"], level, atol=1e-3)
    expected = np.rint(127.5 + factor[:, None, None, None] * (level - 127.5)).clip(0, 255)
    assert abs(on["levels"] - expected).max() < 1.001
    assert abs(on["levels"] - expected).mean() < 0.01
    assert factor.min() > 0.5
    assert factor.max() < 1.5
    shares = np.histogram(factor, 5, (0.5, 1.5))[0] / len(factor)
    assert abs(shares - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / len(factor))
    for values in (on["shift"][:, 0], abs(on["shift"]).sum(1), on["corner"][:, 0], on["mirror"]):
        assert abs(np.corrcoef(factor, values)[0, 1]) < 5 / np.sqrt(len(factor))
    assert "BrightnessContrast" in backend.RegisteredGPUOps()


@pytest.mark.integration
@pytest.mark.slow
def test_the_tests_of_the_loader_pass_with_contrast(
    contrast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it off; and with it on in all of them, those that compare ranks, starts in mid-epoch and the graphs of CPU
    and GPU."""
    monkeypatch.chdir(contrast)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'temporary'}"]
    result = in_the_copy(contrast, [*tests, "tests/test_augment.py", "tests/test_dali.py"])
    assert result.returncode == 0, result.stdout
    shutil.copytree(contrast, tmp_path / "on")
    file = tmp_path / "on" / "pipelines" / "augment.py"
    text = file.read_text(encoding="utf-8")
    for off, on in (("within(0, 1, 0.0)", "within(0, 1, 0.3)"), ("lighting=0.0)", "lighting=0.0, contrast=0.0)")):
        assert text.count(off) == 1
        text = text.replace(off, on)
    file.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "on")
    which = "world_sizes or middle_of_an_epoch or graph_of_a_gpu or bytes_that_go or position_alone"
    result = in_the_copy(tmp_path / "on", [*tests, "tests/test_augment.py", "tests/test_dali.py", "-k", which])
    assert result.returncode == 0, result.stdout


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_with_contrast(contrast: Path, shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains, continues with the same value only, and is bounded."""
    monkeypatch.chdir(contrast)
    steps = 0
    for value, code, said in (
        (0.3, 0, ""),
        (0.2, 2, "data.contrast was 0.3, now 0.2"),
        (0.3, 0, "continuing from step-"),
        (1, 2, "data.contrast is 1.0: it must lie in [0, 1)"),
    ):
        steps += 2
        words = (f"--data.contrast={value}", f"--train.max_steps={steps}")
        result = in_the_copy(contrast, command(shard_sets, tmp_path / "run", *words, ranks=0))
        assert result.returncode == code, result.stderr
        assert said in result.stderr


NET = ("--model.hidden=4096", "--model.width=1", "--model.options.width=8")
# Heading; options of the run by `module:name`; the same by the entry of the table; its learning rates.
ADDED = {
    "A net": ((*NET, "--model.name=my_nets:make"), (*NET, "--model.name=small"), [0.01, 0.01]),
    "A schedule": (
        ("--schedule.name=my_schedules:OnLoss", "--schedule.options.divisor=4"),
        ("--schedule.name=on_loss", "--schedule.options.divisor=4"),
        None,
    ),
    "An optimizer": (
        ("--optim.name=my_optimizers:Lion", "--optim.lr=0.0001"),
        ("--optim.name=lion", "--optim.lr=0.0001"),
        [0.0001, 0.0001],
    ),
}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("heading", ADDED)
def test_what_is_added_trains_resumes_and_is_evaluated(
    heading: str, shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `module:name` and by its entry, with the same bits; after one epoch another start continues."""
    tree, runs = adding.applied(heading, tmp_path), [tmp_path / "own", tmp_path / "entry"]
    monkeypatch.chdir(tree)
    *ways, rates = ADDED[heading]
    for run, words in zip(runs, ways, strict=True):
        for more in (["--train.epochs=1"], []):
            result = in_the_copy(tree, command(shard_sets, run, *words, *more, ranks=0))
            assert result.returncode == 0, result.stderr
        assert rates is None or [line["lr"] for line in records(run, "validation")][-2:] == rates
        result = in_the_copy(tree, [*python("dist_train", "evaluate", str(run)), "--trust"])
        assert result.returncode == 0, result.stderr
    (run, names), (other, _) = ((run, newest(run)) for run in runs)
    assert equal(names["model"], newest(other)["model"])
    assert records(run) == records(other)
    if heading == "A schedule":
        assert names["schedule"]["loss"] == pytest.approx(24 * 10 * records(run, "validation")[-1]["train_loss"])
    refused = in_the_copy(tree, python("dist_train", "evaluate", str(other)))
    assert refused.returncode == 0, "an entry of the table needs no trust"
