"""Nets, optimizers and schedules of one's own, by `module:name` from outside the package; whose code is imported."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import choices, cli, models, optim, schedules
from dist_train.analysis.trained import RunError, read_config
from dist_train.config import Config, ConfigError, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from dist_train.flat import dump
from dist_train.models import trial
from dist_train.outcomes import NoRate
from pipelines import resolve
from pipelines.errors import UserError
from tests.helpers.compare import assert_same_run, newest, records, status
from tests.helpers.launch import STEPS, at, launch

pytestmark = pytest.mark.integration

OWN = '''
"""Somebody's own code."""

import pathlib

import torch
from torch import nn

from dist_train.schedules import Schedule


def net(classes, crop, width=4):
    layers = [nn.Conv2d(3, width, 11, 4), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(4 * width, 16), nn.ReLU(), nn.Linear(16, classes))


def lazy(classes, crop):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


class Keyed(nn.Sequential):
    """Given the keys of dropout; draws nothing from torch's generators."""

    draws_numbers = False

    def __init__(self, classes, crop):
        super().__init__(nn.Flatten(), nn.Linear(3 * crop * crop, classes))

    def forward(self, images, keys=None):
        assert keys is not None or not self.training
        return super().forward(images)


def normed(classes, crop):
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.LazyLinear(classes))


class Holding(Keyed):
    def get_extra_state(self):
        return {"where": pathlib.Path("here")}

    def set_extra_state(self, state):
        pass


def fails(classes, crop):
    return nn.Sequential(nn.Flatten(), nn.Linear(3, classes)), 1 / 0


def too_wide(classes, crop):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * crop * crop, classes + 1))


def two_rates(parameters, lr, momentum=0.5):
    """Another learning rate for biases, and matrices chosen by their shape."""
    matrices, biases = ([p for p in parameters if (p.ndim > 1) == dense] for dense in (True, False))
    return torch.optim.SGD([{"params": matrices}, {"params": biases, "lr": 2 * lr}], lr, momentum=momentum)


def misfit(classes, crop):
    return nn.Sequential(nn.Flatten(), nn.Linear(3, classes))


class InTraining(Keyed):
    """As it should be, but for what it does in training."""

    def __init__(self, classes, crop, how="tuple"):
        super().__init__(classes, crop)
        self.how, self.unused = how, nn.Linear(2, 2) if how == "unused" else None

    def forward(self, images):
        logits = nn.Sequential.forward(nn.Sequential(*list(self)[:2]), images)
        if self.training:
            if self.how == "exits":
                raise SystemExit("enough")
            return {"tuple": (logits, logits), "detached": logits.detach(), "unused": logits}[self.how]
        return logits


def untrained(classes, crop):
    net = too_wide(classes - 1, crop)
    return net.requires_grad_(False)


class Slower(torch.optim.Optimizer):
    """Divides its step by the square root of the number of steps; knows nothing of steps to skip."""

    def __init__(self, parameters, lr, decay=0.0):
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                steps = self.state[p].setdefault("steps", torch.zeros(()))
                steps += 1
                p -= group["lr"] * (p.grad + group["decay"] * p) / steps.sqrt()


class Boasts(Slower):
    _step_supports_amp_scaling = True  # but it does not


class Forgetful(torch.optim.Optimizer):
    """Counts its steps where no checkpoint sees it."""

    steps = 0

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad / self.steps


class Unsaved(Slower):
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["who"] = Slower


class Losses(Schedule):
    """Halves the learning rate after each epoch, and remembers what it was told."""

    saved = ("told",)

    def __init__(self, divisor=2.0):
        self.divisor, self.told = divisor, []

    def rate(self, lr, epoch, step, steps):
        return lr / self.divisor**epoch

    def end_epoch(self, error, loss, epoch, steps):
        self.told.append([error, loss, epoch, steps])
        return self.divisor


class Negative(Schedule):
    def rate(self, lr, epoch, step, steps):
        return lr if step < 2 else -lr


class NoRates(Schedule):
    pass


class Silent(Schedule):
    """Returns numbers of torch, and nothing at the end of an epoch."""

    def rate(self, lr, epoch, step, steps):
        return torch.tensor(lr, dtype=torch.float64)

    def end_epoch(self, error, loss, epoch, steps):
        pass


class Forgets(Silent):
    epochs_seen = 0

    def rate(self, lr, epoch, step, steps):
        return lr / (1 + self.epochs_seen)

    def end_epoch(self, error, loss, epoch, steps):
        self.epochs_seen += 1


class Says(Silent):
    def __init__(self, what):
        self.what = what

    def end_epoch(self, error, loss, epoch, steps):
        return self.what


class PerEpoch(Silent):
    rates = (0.1, 0.05, 0.01)

    def rate(self, lr, epoch, step, steps):
        return self.rates[epoch]


class Shared(Silent):
    saved = ("seen",)
    seen = []

    def end_epoch(self, error, loss, epoch, steps):
        self.seen.append(error)


class Keys(Silent):
    saved = ("seen",)

    def __init__(self):
        self.seen = {3: 0.1}


class Misled(Silent):
    def end_epoch(self, error):
        pass


class Holds(Negative):
    saved = ("held",)
    held = Slower


NUMBER = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module `own_code`, on the path of imports; nothing is trusted yet."""
    (tmp_path / "own_code.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(resolve, "_trusted", set())
    yield tmp_path
    sys.modules.pop("own_code", None)


def trusted(name: str) -> str:
    resolve.trust(name)
    return name


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_of_own_code(own: Path, shard_sets: Path, tmp_path: Path) -> None:
    """It trains on two ranks, resumes in mid-epoch with the same bits, and is evaluated and drawn, by those who trust
    it."""
    names = ("--model.name=own_code:net", "--optim.name=own_code:Slower", "--schedule.name=own_code:Losses")
    options = ("--model.options.width=6", "--optim.options.decay=0.01", "--schedule.options.divisor=4")
    extra = ("--model.hidden=4096", "--model.width=1", *names, *options)
    there: dict[str, Any] = {"env": {"PYTHONPATH": str(own)}, "how": "exec"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(shard_sets, whole, *extra, **there).returncode == 0
    launch(shard_sets, run, *extra, fault=at("step", STEPS + 3, "SIGTERM"), **there)
    assert (status(run)["state"], status(run)["epoch"]) == ("stopped", 1), "not in mid-epoch"
    assert launch(shard_sets, run, *extra, **there).returncode == 0
    assert_same_run(run, whole)

    batch = 24
    told = newest(run)["schedule"]["told"]
    for (error, loss, epoch, steps), line in zip(told, records(run, "validation"), strict=True):
        assert (error, steps) == (line["top1_error"], STEPS)
        each = [r["loss"] for r in records(run, "step") if r["epoch"] == epoch]
        assert len(each) == STEPS
        assert loss == pytest.approx(batch * sum(each))
    assert [r["lr"] for r in records(run, "validation")] == pytest.approx([0.01, 0.0025])

    changed = launch(shard_sets, run, *extra, "--model.options.width=8", **there)
    assert changed.returncode != 0
    assert "model.options was {'width': 6}, now {'width': 8}" in changed.stderr

    env = {**os.environ, "PYTHONPATH": str(own)}
    for verb, *more in (["evaluate"], ["figures", "--device=cpu"]):
        command = [sys.executable, "-m", "dist_train", verb, str(run), *more]
        refused = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "model.name own_code:net comes from a run directory" in refused.stderr
        assert "add --trust" in refused.stderr
        done = subprocess.run([*command, "--trust"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    report = json.loads((run / "evaluation-one.json").read_text())
    assert report["top1_error"] == records(run, "validation")[-1]["top1_error"]
    assert (run / "figures" / "kernels.png").exists()
    again = ["--config", str(run / "config.yaml"), "--train.epochs=3"]
    command = [sys.executable, "-m", "dist_train", *again]
    assert b"comes from a run directory" in subprocess.run(command, env=env, capture_output=True, check=False).stderr
    assert subprocess.run([*command, "--trust"], env=env, capture_output=True, check=False).returncode == 0
    assert status(run)["epoch"] == 3


def test_code_that_a_run_names_is_not_imported(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way its configuration is reached, unless the user has named the code himself or says --trust."""
    (own / "stranger.py").write_text("raise SystemExit('imported')")
    run = tmp_path / "runs" / "theirs"
    (run / "checkpoints").mkdir(parents=True)
    (run / "slurm").mkdir()
    model, schedule = ModelConfig("stranger:net"), ScheduleConfig("stranger:schedule")
    theirs = Config(model=model, schedule=schedule, optim=OptimConfig("stranger:optimizer"))
    theirs = replace(theirs, data=replace(theirs.data, train=str(tmp_path), source="stranger:source"))
    (run / "deeper").mkdir()
    (run / "deeper" / "other.yaml").write_text(dump(theirs))
    blob = tmp_path / "blobs" / "abc123"  # as caches keep what they have fetched
    blob.parent.mkdir()
    blob.write_text(dump(theirs))
    linked = tmp_path / "linked"
    (linked / "checkpoints").mkdir(parents=True)
    (linked / "config.yaml").symlink_to(blob)
    files = [run / "config.yaml", run / "slurm" / "config.yaml", tmp_path / "link.yaml", run / "deeper" / "other.yaml"]
    files += [linked / "config.yaml", tmp_path / "includes.yaml"]
    for file in files[:2]:
        file.write_text(dump(theirs))
    files[2].symlink_to(files[0])
    files[5].write_text(f"config: {files[0]}")
    monkeypatch.setenv("HOME", str(tmp_path))
    files.append(Path("~/runs/theirs/config.yaml"))

    def refuses(config: Config) -> None:
        for what in (
            lambda: cli.checked(config),
            lambda: models.build(config.model, classes=3, crop=67),
            lambda: optim.build(config.optim, nn.Linear(2, 2)),
            lambda: schedules.build(config),
            lambda: resolve.resolve("data.source", config.data.source, {}),
        ):
            with pytest.raises(UserError, match=r"stranger:\w+ comes from a run directory.*add --trust"):
                what()

    for file in files:
        for words in (["--config", str(file)], [f"--config={file}"], ["--config", str(file), "--optim.lr=0.1"]):
            refuses(cli.parse(words)[0])
    (run / "model.yaml").write_text("{name: stranger:net}")
    for words in (["--model", str(run / "model.yaml")], [f"--model={run / 'model.yaml'}"]):
        with pytest.raises(ConfigError, match=r"stranger:net comes from a run directory"):
            cli.checked(cli.parse(words)[0])
    refuses(read_config(run))
    own_words = ["--config", str(files[0]), "--model.name=stranger:net"]  # one of them is the user's choice now
    with pytest.raises(ConfigError, match=r"optim\.name stranger:optimizer comes from"):
        cli.checked(cli.parse(own_words)[0])
    assert cli.checked(cli.parse([*own_words, "--trust"])[0]).schedule.name == "stranger:schedule"
    copy = tmp_path / "mine.yaml"
    copy.write_bytes(files[0].read_bytes())
    resolve._trusted.clear()
    cli.checked(cli.parse(["--config", str(copy)])[0])  # a file of the user's own is his word
    resolve._trusted.clear()
    read_config(run, trusting=True)
    with pytest.raises(UserError, match="cannot be imported: SystemExit: imported"):
        resolve.resolve("model.name", "stranger:net", {})


def test_a_setting_is_not_made_into_an_object(own: Path, tmp_path: Path) -> None:
    """jsonargparse imports what a class_path names, and calls it for a type that allows it: reading a stranger's
    configuration would be enough."""
    (own / "evil.py").write_text("import pathlib\npathlib.Path('imported').touch()\nclass Evil: pass")
    spec = "{class_path: evil.Evil, init_args: {x: 1}}"
    texts = [f"{group}: {spec}" for group in ("model", "optim", "schedule", "data", "run", "train")]
    texts += [f"{group}: {{options: {spec}}}" for group in ("model", "optim", "schedule")]
    texts += [f"model: {{options: {{x: {spec}}}}}", "data: 'class_path: evil.Evil'", "config: included.yaml"]
    (tmp_path / "included.yaml").write_text(f"model: {spec}")
    for text in texts:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises((ConfigError, RunError)):
            read_config(tmp_path)
        with pytest.raises(ConfigError):
            cli.parse(["--config", str(tmp_path / "config.yaml")])
    assert "evil" not in sys.modules


def test_only_what_was_typed_is_trusted(own: Path, tmp_path: Path) -> None:
    """Not a name that another one contains; and a long word is no name of a file."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("optim: {name: code:Slower}")
    long = f"--schedule.milestones={list(range(1, 200))}"
    config, _ = cli.parse(["--config", str(run / "config.yaml"), "--model.name=own_code:Slower", long])
    with pytest.raises(ConfigError, match=r"optim\.name code:Slower comes from a run directory"):
        cli.checked(replace(config, model=ModelConfig()))
    shutil.rmtree(run / "checkpoints")  # and however little of the run is left
    (run / "owner").touch()
    with pytest.raises(ConfigError, match=r"optim\.name code:Slower comes from a run directory"):
        cli.checked(cli.parse(["--config", str(run / "config.yaml")])[0])
    (tmp_path / "checkpoints").mkdir()  # beside a file of the user's own, which is no run for that
    (tmp_path / "mine.yaml").write_text("optim: {name: own_code:Slower}")
    assert cli.checked(cli.parse(["--config", str(tmp_path / "mine.yaml")])[0])


NAMES = {
    "own_code:ne": "own_code has no ne: did you mean own_code:net?",
    "own_cod:net": r"there is no module own_cod in .* or on PYTHONPATH",
    "own_code.py:net": "write the module as Python imports it, and one of its names, such as own_code:net",
    "./own_code.py:net": "such as own_code:net",
    "own_code:NUMBER": "is an object of type int, which cannot be called",
    "own_code:fails": r"failed: ZeroDivisionError: division by zero \(own_code.py, line \d+\)",
    "own_code:Slower": r"failed: TypeError|returned an object of type Slower, which is no Module",
    "torch.nn.Linear": "did you mean .torch.nn:Linear",
    "own_code": "did you mean .own_code:NAME, with one of its names",
    "own_code.sub:net": "cannot be imported: ModuleNotFoundError|there is no module own_code.sub",
    "exiting:net": r"cannot be imported: SystemExit: 2 \(exiting.py, line 1\)",
    "own_code: net": "such as own_code:net",
    "broken:net": r"cannot be imported: SyntaxError: .*\(broken.py, line 1\)",
    "raising:net": r"cannot be imported: KeyError: 'x' \(raising.py, line 1\)",
    "alexnt": "did you mean 'alexnet'",
    "resnet18": "did you mean 'torchvision:resnet18'",
    "torchvision:resnt18": "did you mean 'torchvision:resnet18'",
    ":": "is no module:name",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_net_that_is_none_is_one_sentence(own: Path, name: str) -> None:
    (own / "broken.py").write_text("def net(:")
    (own / "exiting.py").write_text("raise SystemExit(2)")
    (own / "raising.py").write_text("{}['x']")
    with pytest.raises(UserError, match=NAMES[name]) as error:
        models.build(ModelConfig(trusted(name)), classes=3, crop=67)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"model.name {name}") or name == "torchvision:resnt18" or "'" in str(error.value)


def tried(name: str, **options: Any) -> nn.Module:
    config = ModelConfig(trusted(name), options=options)
    net = models.build(config, classes=3, crop=16)
    trial.try_out(net, config, 3, 16, torch.device("cpu"))
    return net


def test_a_net_of_ones_own(own: Path) -> None:
    images, keys = torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    for name, draws in (("own_code:net", True), ("own_code:lazy", True), ("own_code:Keyed", False)):
        net = tried(name)
        assert net.training
        assert net(images, keys).shape == (2, 3)
        assert models.draws_numbers(net) == draws
    assert tried("own_code:net", width=7).net[0].out_channels == 7  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "own_code:too_wide": r"gives logits of shape \[2, 4\] for two images: they must have the shape \[2, 3\]",
        "own_code:misfit": r"failed on two images of 16 pixels a side: RuntimeError: mat1 and mat2",
        "own_code:untrained": "has no parameter to train",
    }.items(),
)
def test_a_net_that_cannot_be_trained_is_one_sentence(own: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tried(name)


@pytest.mark.parametrize(
    ("how", "said"),
    {
        "tuple": "gives logits of type tuple for two images",
        "detached": "failed on two images of 16 pixels a side: RuntimeError: element 0 of tensors",
        "unused": "the logits do not depend on its parameter unused.weight, for whose gradient ranks would wait",
        "exits": r"failed on two images of 16 pixels a side: SystemExit: enough \(own_code.py, line",
    }.items(),
)
def test_a_net_is_tried_in_training_too(own: Path, how: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tried("own_code:InTraining", how=how)


def test_a_trial_changes_nothing(own: Path) -> None:
    """Neither weights nor running statistics, nor gradients, nor the state of random numbers."""
    config = ModelConfig(trusted("own_code:normed"))
    net = models.build(config, classes=3, crop=16)
    before, drawn = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    trial.try_out(net, config, 3, 16, torch.device("cpu"))
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_a_state_that_no_checkpoint_could_hold(own: Path) -> None:
    with pytest.raises(UserError, match=r"failed on two images .*: UnpicklingError: Weights only load failed"):
        tried("own_code:Holding")


def test_options_that_no_net_takes(own: Path) -> None:
    with pytest.raises(UserError, match=r"takes \(classes, crop, width=4\), and is called with \(..., ..., wdth=3\)"):
        tried("own_code:net", wdth=3)
    with pytest.raises(ConfigError, match=r"model.options is \{'a': 1\}, but alexnet does not have it: leave it out$"):
        Config(model=ModelConfig(options={"a": 1}))
    with pytest.raises(ConfigError, match=r"model\.hidden is 3, but own_code:net does not have it"):
        Config(model=ModelConfig("own_code:net", hidden=3))
    with pytest.raises(UserError, match=r"torchvision:resnet18 does not take model.options: .*'wdth'"):
        models.build(ModelConfig("torchvision:resnet18", options={"wdth": 3}), classes=3, crop=64)
    net = models.build(ModelConfig("torchvision:squeezenet1_1", options={"dropout": 0.25}), classes=3, crop=64)
    assert [layer.p for layer in net.modules() if isinstance(layer, nn.Dropout)] == [0.25]


OPTIMIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    "sgd": ({}, True),
    "adam": ({}, True),
    "torch.optim:AdamW": ({"fused": True, "betas": [0.8, 0.9]}, True),
    "torch.optim:AdamW ": ({}, False),
    "torch.optim:RMSprop": ({}, False),
    "torch.optim:NAdam": ({}, False),
    "torch.optim:Adafactor": ({}, False),
    "own_code:Slower": ({"decay": 0.1}, False),
    "own_code:Boasts": ({}, False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "fp16"])
def test_a_gradient_that_is_not_finite_changes_nothing_whatever_the_optimizer(
    own: Path, name: str, scaled: bool
) -> None:
    """It is tried whether an optimizer skips by itself, whatever it says of itself; if not, it is not asked to step."""
    options, skips = OPTIMIZERS[name]
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = optim.build(OptimConfig(trusted(name.strip()), options=options), layer)
    assert optimizer._step_supports_amp_scaling == skips  # type: ignore[attr-defined]
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for i in range(4):
        before = [p.detach().clone() for p in layer.parameters()]
        state = {k: v.clone() for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v)}
        for p in layer.parameters():
            p.grad = scaler.scale(torch.randn_like(p))
        if poisoned := i in (0, 2):
            layer.bias.grad[1] = math.nan  # type: ignore[index]
        refused = bool(optim.update(optimizer, scaler).refused)
        assert refused == (poisoned and not scaled)
        same = all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
        assert same == poisoned
        after = {k: v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v)}
        assert not poisoned or all(torch.equal(state[k], after[k]) for k in state)
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OptimConfig("sdg"), "optim.name sdg is unknown: did you mean sgd?"),
        (OptimConfig("lamb"), "optim.name lamb is unknown: choose sgd, adam, or module:name of your own"),
        (OptimConfig("torch.optim.AdamW"), "did you mean torch.optim:AdamW?"),
        (OptimConfig("adm"), "optim.name adm is unknown: did you mean adam?"),
        (OptimConfig("own_code:Forgetful"), "steps otherwise once its state was saved and loaded"),
        (OptimConfig("own_code:Unsaved"), "failed when it was tried on .*: UnpicklingError"),
        (
            OptimConfig("torch.optim:LBFGS"),
            "failed when it was tried on .*: TypeError: .*'closure'",
        ),
        (OptimConfig("own_code:net"), r"takes \(classes, crop, width=4\)|returned|failed"),
        (OptimConfig("own_code:NUMBER"), "which cannot be called"),
        (OptimConfig("own_code:Slower", momentum=0.5), "optim.momentum is 0.5, but own_code:Slower does not have it"),
        (
            OptimConfig("own_code:Slower", options={"x": 1}),
            r"takes \(parameters, lr, decay=0.0\), .* \(..., ..., x=1\)",
        ),
        (OptimConfig("torch.optim:SGDD"), "torch.optim has no SGDD: did you mean torch.optim:SGD?"),
    ],
)
def test_an_optimizer_that_is_none_is_one_sentence(own: Path, config: OptimConfig, said: str) -> None:
    resolve.trust(config.name)
    with pytest.raises(UserError, match=said) as error:
        optim.build(config, nn.Linear(2, 2))
    assert "\n" not in str(error.value)


def test_the_settings_of_an_optimizer(own: Path) -> None:
    """momentum and weight_decay go to an optimizer that has arguments of these names; options to any."""
    config = OptimConfig(trusted("torch.optim:RMSprop"), momentum=0.3, weight_decay=0.1, options={"alpha": 0.5})
    (group,) = optim.build(config, nn.Linear(2, 2)).param_groups
    assert {k: group[k] for k in ("lr", "momentum", "weight_decay", "alpha")} == {
        "lr": 0.01,
        "momentum": 0.3,
        "weight_decay": 0.1,
        "alpha": 0.5,
    }


def test_groups_keep_the_ratio_of_their_learning_rates(own: Path) -> None:
    optimizer = optim.build(OptimConfig(trusted("own_code:two_rates"), lr=0.1), nn.Linear(2, 2))
    optim.set_lr(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    plain = optim.build(OptimConfig(lr=0.1), nn.Linear(2, 2))
    optim.set_lr(plain, 0.03)
    assert [group["lr"] for group in plain.param_groups] == [0.03]


def made(name: str, *, epochs: int = 90, options: dict[str, Any] | None = None, **settings: Any) -> schedules.Schedule:
    schedule = ScheduleConfig(trusted(name), options=options or {}, **settings)
    return schedules.build(Config(schedule=schedule, optim=OptimConfig(lr=0.4), train=TrainConfig(epochs=epochs)))


@pytest.mark.parametrize("warmup", [0, 2, 2.5])
def test_cosine(warmup: float) -> None:
    """Against the formula of torch's CosineAnnealingLR after its LinearLR, step by step."""
    epochs, steps = 10, 8
    cosine = made("cosine", epochs=epochs, warmup_epochs=warmup)
    rates = [cosine.lr(epoch, step, steps) for epoch in range(epochs) for step in range(steps)]
    first = round(warmup * steps)
    np.testing.assert_allclose(rates[:first], [0.4 * (i + 1) / first for i in range(first)])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps - first)
    expected = []
    for _ in range(epochs * steps - first):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose(rates[first:], expected, rtol=1e-9)
    assert cosine.lr(epochs, 0, steps) == pytest.approx(0)
    assert cosine.ended(0.5, 1.0, 3, steps) == 1


def test_a_run_that_is_all_warm_up() -> None:
    cosine = made("cosine", epochs=2, warmup_epochs=2)
    assert [round(cosine.lr(e, s, 2), 9) for e in range(2) for s in range(2)] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("plateu", {}, "schedule.name plateu is unknown: did you mean plateau?"),
        ("cosin", {}, "did you mean cosine?"),
        ("poly", {}, "choose plateau, milestones, cosine, blog, or module:name of your own"),
        ("own_code:NoRates", {}, r"failed .*: NotImplementedError: NoRates defines no rate\(lr, epoch, step, steps\)"),
        ("own_code:Holds", {}, "failed .*: TypeError: a checkpoint holds numbers, strings, .* and no type"),
        ("own_code:Slower", {}, r"takes \(parameters, lr, decay=0.0\).*derives from dist_train.schedules.Schedule"),
        ("own_code:NUMBER", {}, "cannot be called"),
        ("own_code:Losses", {"x": 1}, r"takes \(divisor=2.0\), and is called with \(x=1\)"),
        ("own_code:Forgets", {}, "goes on otherwise once its state was saved and loaded: name in `saved` what changes"),
        ("own_code:Keys", {}, "keys of dicts in a checkpoint are strings, and 3 is none"),
        ("own_code:Misled", {}, r"failed when it was tried on some epochs: TypeError: .*end_epoch\(\)"),
        ("own_code:Says", {"what": 0}, "divides the learning rate by 0: end_epoch must return a number above 0"),
        ("own_code:Says", {"what": "x"}, "divides the learning rate by x: end_epoch must return a number above 0"),
        ("plateau", {"x": 1}, "takes"),
        ("cosine", {"x": 1}, "takes"),
    ],
)
def test_a_schedule_that_is_none_is_one_sentence(own: Path, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        made(name, options=options)
    assert "\n" not in str(error.value)


def test_a_learning_rate_that_is_none(own: Path) -> None:
    negative = made("own_code:Negative")
    assert negative.lr(0, 1, 9) == 0.4
    assert made("own_code:Silent").lr(0, 2, 9) == 0.4
    assert made("own_code:PerEpoch", epochs=3).lr(2, 2, 9) == 0.01
    shared: Any = made("own_code:Shared")
    assert shared.seen == [], "the trial left nothing"
    assert made("own_code:Silent").ended(0.5, 1.0, 0, 9) == 1
    with pytest.raises(NoRate, match=r"own_code:Negative gives -0.4 as the learning rate of epoch 1, step 3: it must"):
        negative.lr(0, 2, 9)


def test_the_state_of_a_schedule_is_plain(own: Path) -> None:
    """Numbers of numpy and torch, which a checkpoint that executes nothing could not hold, become Python's."""
    losses: Any = made("own_code:Losses")
    losses.end_epoch(np.float64(0.5), torch.tensor(2.0), np.int64(3), 7)
    state = losses.state_dict()
    assert state == {"told": [[0.5, 2.0, 3, 7]]}
    assert {type(value) for value in state["told"][0]} == {float, int}


def test_every_entry_of_the_tables_resolves() -> None:
    for key, table in (("model", choices.NETS), ("optim", choices.OPTIMIZERS), ("schedule", choices.SCHEDULES)):
        for name in table:
            assert callable(resolve.resolve(key, name, table))
            assert name in cli._parser().format_help(), f"the help does not name {name}"
