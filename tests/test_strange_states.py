"""Checkpoints that are whole, by their hash, and do not fit: one sentence, and no SIGSEGV of a fused kernel."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import optim
from tests.helpers.launch import launch

Change = Callable[[dict[str, Any]], Any]


def rewrite(run: Path, change: Change) -> None:
    """Changes the state in the newest checkpoint, and its hash with it."""
    folder = max((run / "checkpoints").glob("step-*"))
    state = torch.load(folder / "state.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "state.pt")
    data = (folder / "state.pt").read_bytes()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(
        json.dumps(meta | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    )


def first(state: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = state["optimizer"]["state"][0]
    return values


CHANGES: dict[str, Change] = {
    "a moment of one element": lambda s: first(s).update(momentum_buffer=torch.zeros(1)),
    "a moment of no dimension": lambda s: first(s).update(momentum_buffer=torch.zeros(())),
    "a moment of another type": lambda s: first(s).update(momentum_buffer=first(s)["momentum_buffer"].double()),
    "a moment that is one number, repeated": lambda s: first(s).update(
        momentum_buffer=torch.zeros(1).expand_as(first(s)["momentum_buffer"])
    ),
    "a sparse moment": lambda s: first(s).update(momentum_buffer=first(s)["momentum_buffer"].to_sparse()),
    "a moment of nobody": lambda s: s["optimizer"]["state"].update({10**6: first(s)}),
    "a moment that is text": lambda s: first(s).update(momentum_buffer="x"),
    "weights of another shape": lambda s: s["model"].update({"conv1.weight": torch.zeros(1)}),
    "weights that are text": lambda s: s["model"].update({"conv1.weight": "x"}),
    "no weights": lambda s: s.pop("model"),
    "no record": lambda s: s.pop("record"),
    "a list for the weights": lambda s: s.update(model=[1]),
    "weights that are not finite": lambda s: s["model"]["conv1.weight"].fill_(torch.nan),
    "weights of nobody": lambda s: s["model"].update(x=torch.zeros(1)),
    "a step beyond the epoch": lambda s: s["state"].update(step_in_epoch=11),
    "a step below zero": lambda s: s["state"].update(step=-1),
    "an error above 1": lambda s: s["state"].update(best_error=2.0),
    "a sum that is text": lambda s: s["window"].update(loss="x"),
    "a schedule of another kind": lambda s: s["schedule"].update(divisions=-(10**9)),
    "a record below zero": lambda s: s.update(record=-1),
    "a ledger that is a list": lambda s: s.update(ledger=[1]),
}


@pytest.fixture(scope="module")
def stopped(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert launch(shard_sets, run, "--train.max_steps=2", ranks=0).returncode == 0
    return run


@pytest.mark.integration
@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_does_not_fit(name: str, shard_sets: Path, stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run, symlinks=True)
    rewrite(run, CHANGES[name])
    result = launch(shard_sets, run, "--train.max_steps=4", ranks=0)
    assert result.returncode == 2, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    assert re.search(r"state\.pt (does not fit this run|is not loaded) \(", result.stderr.splitlines()[-1])


def test_moments_of_other_optimizers_may_have_other_shapes() -> None:
    """Means along an axis, as Adafactor keeps them, and numbers of steps."""
    net = torch.nn.Linear(3, 4)
    adafactor = torch.optim.Adafactor(net.parameters())
    net(torch.ones(2, 3)).sum().backward()  # type: ignore[no-untyped-call]
    adafactor.step()
    optim.load_moments(adafactor, adafactor.state_dict())
