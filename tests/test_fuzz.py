"""Random damage to what may come from a stranger: data sets and checkpoints are read, or refused in one sentence."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import run as execute
from typing import Any

import numpy as np
import pytest

from pipelines.pack import Options, pack
from pipelines.sources import ImageFolder
from tests.conftest import CLASSES, SIZES, TINTS, photograph
from tests.helpers.launch import launch

EXAMPLES = 500
SUBJECTS = {"manifest": "fuzzed_sets", "index": "fuzzed_sets", "tar": "fuzzed_sets", "state": "fuzzed_states"}


def fuzz(module: str, subject: str, base: Path, folder: Path, examples: int) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.helpers.fuzz", module, subject, str(base), str(folder), str(examples)]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # which would have begun threads
    result = execute(words, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds sets/{train,val}, of 60 and 18 small images, and run, which has trained on them for a step."""
    root, rng = tmp_path_factory.mktemp("valid"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for name, tint in zip(CLASSES, TINTS, strict=True):
            (root / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                image = photograph(rng, *SIZES[i % len(SIZES)], tint)
                image.save(root / "photos" / split / name / f"{i:03d}.jpg", quality=92)
        options = Options(shorter_side=72, shard_mb=0.06)
        pack(ImageFolder(root / "photos" / split), root / "sets" / split, options, split=split, workers=2)
    tiny = ("--train.max_steps=1", "--train.global_batch=4", "--model.width=0.1")
    assert launch(root / "sets", root / "run", *tiny, ranks=0).returncode == 0
    return root


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_random_damage(subject: str, valid: Path, tmp_path: Path) -> None:
    """Each failure is listed, with the smallest damage that was seen to cause it; what was read is kept."""
    report = fuzz(SUBJECTS[subject], subject, valid, tmp_path, EXAMPLES)
    listed = [
        f"{tmp_path}/failure-{number}: {name}: {message}\n    after {changes}"
        for number, (name, (*_, message, changes)) in enumerate(report["failures"].items())
    ]
    assert not listed, f"{report['ends']}\n" + "\n".join(listed)
    ends = report["ends"]
    assert sum(ends.values()) == EXAMPLES
    assert ends["success"] > EXAMPLES / 50, "all damage is seen at the door: nothing behind it is tried"
    assert ends["sentence"] > EXAMPLES / 10
    assert ends.get("unmade", 0) < EXAMPLES / 50


@pytest.mark.integration
@pytest.mark.slow
def test_each_bad_end_is_seen(tmp_path: Path) -> None:
    report = fuzz("fuzzed_trial", "trial", tmp_path, tmp_path, 60)
    assert report["ends"].keys() == {
        *("success", "sentence", "no sentence", "traceback", "signal", "hang", "memory", "vanished")
    }
    seen = {name: changes for name, (*_, changes) in report["failures"].items()}
    assert seen == {
        "no sentence UserError": ["no sentence"],
        "traceback KeyError": ["traceback"],
        "traceback SystemExit": ["exit"],
        "traceback MemoryError": ["all memory"],
        "signal SIGSEGV": ["signal"],
        "hang SIGALRM": ["hang"],
        "memory success": ["much memory"],
        "vanished": ["vanished"],
    }
    assert len(list(tmp_path.glob("failure-*/way"))) == len(seen)
