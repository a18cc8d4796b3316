"""The update rule and the learning rate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import cli, optim, schedules
from dist_train.config import Config, OptimConfig, ScheduleConfig, TrainConfig

MILESTONES = ScheduleConfig(name="milestones", milestones=(2,))
OFF = torch.amp.GradScaler("cpu", enabled=False)


def test_update_rule_of_section_5() -> None:
    """v := 0.9 v - 0.0005 lr w - lr g; w := w + v, in numpy."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(4, 3, bias=False).double()
    optimizer = optim.build(OptimConfig(), layer)
    w, v = layer.weight.detach().numpy().copy(), np.zeros((3, 4))
    for _ in range(5):
        g = rng.normal(size=(3, 4))
        layer.weight.grad = torch.tensor(g)
        assert optim.update(optimizer, OFF).refused == 0
        v = 0.9 * v - 0.0005 * 0.01 * w - 0.01 * g
        w = w + v
    np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, poison: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = optim.build(OptimConfig(name=name), layer)
    for i in range(3):
        before = [p.detach().clone() for p in layer.parameters()]
        moments = {k: v.clone() for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v)}
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        if i == 2:
            layer.bias.grad[1] = poison  # type: ignore[index]
        assert bool(optim.update(optimizer, OFF).refused) == (i == 2)
        same = all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
        assert same == (i == 2)
    after = {k: v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v)}
    assert all(torch.equal(moments[k], after[k]) for k in after)


def made(lr: float = 0.01, epochs: int = 90, **settings: Any) -> Any:
    """The schedule of these settings."""
    settings = {"name": "plateau"} | settings
    train = TrainConfig(epochs=epochs)
    return schedules.build(Config(schedule=ScheduleConfig(**settings), optim=OptimConfig(lr=lr), train=train))


def errors(of: schedules.Schedule, values: list[float]) -> list[float]:
    """The learning rate after each of these validation errors, of epochs of 10 steps."""
    rates = []
    for epoch, value in enumerate(values):
        of.end_epoch(value, 0.0, epoch, 10)
        rates.append(round(of.lr(epoch + 1, 0, 10), 9))
    return rates


def test_divided_when_the_error_stops_improving() -> None:
    plateau = made(patience=2, max_divisions=2, min_improvement=0.01)
    values = [0.9, 0.8, 0.8, 0.795, 0.7, 0.7, 0.71, 0.7, 0.7]
    #        better better  bad  bad:/10 better bad bad:/10  bad  bad: exhausted
    assert errors(plateau, values) == [0.01, 0.01, 0.01, 0.001, 0.001, 0.001, 0.0001, 0.0001, 0.0001]
    assert plateau.exhausted


def test_epochs_of_few_steps_have_to_be_more() -> None:
    """`patience_steps` is a floor in steps under `patience`, of which the larger counts."""
    for steps, rates in {
        0: [1, 0.1, 0.1, 0.01],
        20: [1, 0.1, 0.1, 0.01],
        21: [1, 1, 0.1, 0.1],
        40: [1, 1, 1, 0.1],
    }.items():
        plateau = made(1.0, patience=2, patience_steps=steps)
        assert errors(plateau, [0.9, 0.9, 0.9, 0.9, 0.9])[1:] == rates, steps


def test_not_exhausted_before_the_last_division_is_used() -> None:
    plateau = made(patience=1, max_divisions=3)
    errors(plateau, [0.5, 0.5, 0.5, 0.5])
    assert plateau.divisions == 3
    assert not plateau.exhausted
    errors(plateau, [0.5])
    assert plateau.exhausted


def test_state_survives() -> None:
    a = made(patience=2)
    errors(a, [0.9, 0.9])
    b = made(patience=2)
    b.load_state_dict(a.state_dict())
    assert errors(b, [0.9]) == [0.001] == errors(a, [0.9])


def test_warmup_rises_linearly_and_does_not_count() -> None:
    plateau = made(0.08, warmup_epochs=2, patience=1)
    rates = [plateau.lr(e, s, 4) for e in range(3) for s in range(4)]
    np.testing.assert_allclose(rates, [0.08 * min(1, (i + 1) / 8) for i in range(12)])
    plateau.end_epoch(0.9, 0.0, 0, 4)
    plateau.end_epoch(0.9, 0.0, 1, 4)
    assert (plateau.divisions, plateau.best) == (0, float("inf"))


def test_milestones() -> None:
    milestones = made(1.0, name="milestones", milestones=(2, 5))
    assert [round(milestones.lr(e, 0, 3), 9) for e in range(7)] == [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert [milestones.end_epoch(0.9, 0.0, epoch, 3) for epoch in range(6)] == [1, 10, 1, 1, 10, 1]


def test_a_remedy_says_where_the_milestones_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ["--data.train=sets/train", "--data.val=sets/val"]
    quickstart = "schedule.milestones [2] is the default of configs/quickstart.yaml, made for Fashion-MNIST; for"
    for words, remedy in (
        (mine, f"{quickstart} images of your own begin a run with --config configs/own.yaml"),
        (
            [*mine, "--data.source=imagefolder"],
            f"{quickstart} images of your own begin a run with --config configs/own.yaml",
        ),
        ([], "move schedule.milestones [2] to later epochs"),  # Fashion-MNIST itself
        ([*mine, "--schedule.milestones=[3]"], "move schedule.milestones [3] to later epochs"),
        (
            [*mine, "--schedule.name=plateau"],
            "raise schedule.patience_steps above 500, the steps that it has waited for",
        ),
    ):
        config, _ = cli.parse(words)
        assert schedules.remedy(config, schedules.build(config), 100) == remedy
    for text in ("", "schedule: {milestones: [2]", "schedule: 3"):  # nothing that is wrong with the file ends a run
        (tmp_path / "quickstart.yaml").write_text(text)
        monkeypatch.setattr(schedules, "DEFAULT", tmp_path / "quickstart.yaml")
        config = Config(schedule=MILESTONES)
        assert schedules.remedy(config, schedules.build(config), 100) == "move schedule.milestones [2] to later epochs"
