"""The paper's nets and ablations: what they share, and what each switch changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_train import models
from dist_train.config import ModelConfig
from dist_train.models.alexnet import AlexNet
from dist_train.models.dropout import mask_keys
from dist_train.models.two_tower import TwoTowers, grouped_state
from dist_train.probe import curvature, measure, stable_lr
from dist_train.rundir.state import Progress
from tests.helpers.compare import newest, records, status
from tests.helpers.launch import launch

SWITCHES = [
    ModelConfig(hidden=32),
    ModelConfig(hidden=32, activation="tanh", pooling="plain", lrn="every"),
    ModelConfig(hidden=32, left_out="conv3", lrn="none"),
    ModelConfig(hidden=32, left_out="conv5", biases="ones", width=0.5, outputs=9),
]


def test_parameters_of_the_other_forms() -> None:
    """Counted by hand: 96-256-384-384-256 maps without groups; and what one tower of figure 2 holds."""
    without_groups = (
        (11 * 11 * 3 + 1) * 96
        + (5 * 5 * 96 + 1) * 256
        + (3 * 3 * 256 + 1) * 384
        + (3 * 3 * 384 + 1) * 384
        + (3 * 3 * 384 + 1) * 256
        + (6 * 6 * 256 + 1) * 4096
        + (4096 + 1) * 4096
        + (4096 + 1) * 1000
    )
    with torch.device("meta"):
        one = models.build(ModelConfig("alexnet_one_tower"), classes=1000, crop=227)
        two = models.build(ModelConfig("alexnet_two_tower"), classes=1000, crop=227)
    assert sum(p.numel() for p in one.parameters()) == without_groups == 62_378_344
    assert sum(p.numel() for p in two.parameters()) == 60_965_224
    assert isinstance(two, TwoTowers)
    for tower in two.own():
        maps = [layer.out_channels for layer in tower.modules() if isinstance(layer, nn.Conv2d)]
        assert maps == [48, 128, 192, 192, 128]
        assert (tower.fc6.out_features, tower.fc7.out_features) == (2048, 2048)


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_grouped_and_two_towers_are_the_same_function(options: ModelConfig) -> None:
    """Outputs and the gradient of every weight, dropout included, in float64."""
    torch.manual_seed(0)
    two = TwoTowers(9, 99, options).double()
    grouped = AlexNet(9, 99, options).double()
    grouped.load_state_dict(grouped_state(two.state_dict()))
    x, labels = torch.randn(6, 3, 99, 99, dtype=torch.float64) * 60, torch.arange(6)
    keys = mask_keys(1, 2, np.arange(6))
    logits = [net(x, keys) for net in (two, grouped)]
    assert logits[0].std(0).min() > 0
    torch.testing.assert_close(logits[0], logits[1])
    for out in logits:
        F.cross_entropy(out, labels).backward()
    ours = grouped_state({name: p.grad for name, p in two.named_parameters() if p.grad is not None})
    theirs = {name: p.grad for name, p in grouped.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_two_towers_begin_as_section_5_says() -> None:
    torch.manual_seed(0)
    net = TwoTowers(10, 67, ModelConfig(hidden=256))
    for tower in net.own():
        for name, layer in tower.named_children():
            n = layer.weight.numel()
            assert abs(layer.weight.std() - 0.01) < 5 * 0.01 / (2 * n) ** 0.5, name
            if name != "fc8":
                assert (layer.bias == (name in ("conv2", "conv4", "conv5", "fc6", "fc7"))).all(), name
    assert (net.bias == 0).all()


def test_what_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"even model\.hidden"):
        TwoTowers(10, 67, ModelConfig(hidden=33))


def reference(net: AlexNet, x: torch.Tensor, options: ModelConfig) -> torch.Tensor:
    """The net with its switches, written out with torch.nn modules."""
    act = nn.Tanh() if options.activation == "tanh" else nn.ReLU()
    pool = nn.MaxPool2d(3, 2) if options.pooling == "overlapping" else nn.MaxPool2d(2, 2)
    norm = nn.LocalResponseNorm(5, alpha=5 * options.lrn_alpha, beta=0.75, k=2)
    names = [n for n in ("conv1", "conv2", "conv3", "conv4", "conv5") if n != options.left_out]
    for name in names:
        x = act(net.get_submodule(name)(x))
        if options.lrn == "every" or (options.lrn == "paper" and name in ("conv1", "conv2")):
            x = torch.cat([norm(tower) for tower in x.chunk(2, 1)], 1)
        if name in ("conv1", "conv2", names[-1]):
            x = pool(x)
    return net.fc8(0.5 * act(net.fc7(0.5 * act(net.fc6(x.flatten(1))))))


@pytest.mark.parametrize("options", [*SWITCHES, ModelConfig(hidden=32, left_out="conv4", lrn_alpha=2e-5)], ids=str)
def test_switches_against_torch_modules(options: ModelConfig) -> None:
    torch.manual_seed(0)
    net = AlexNet(9, 99, options).double().eval()
    with torch.no_grad():  # so large that images give different outputs, which at the beginning they hardly do
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                parameter *= 10
    x = torch.randn(4, 3, 99, 99, dtype=torch.float64) * 60
    expected = reference(net, x, options).detach()
    assert expected.std(0).min() > 1e-3
    torch.testing.assert_close(net(x).detach(), expected, rtol=1e-4, atol=1e-4 * float(expected.std(0).min()))


def test_width_and_biases() -> None:
    net = models.build(ModelConfig("alexnet_one_tower", hidden=256, width=0.5, biases="ones"), classes=10, crop=67)
    maps = [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert maps == [48, 128, 192, 192, 128], "one of the paper's towers alone"
    assert all((p == 1).all() for name, p in net.named_parameters() if name.endswith("bias"))
    for name in ("alexnet", "alexnet_two_tower"):
        net = models.build(ModelConfig(name, hidden=8, biases="zeros"), classes=10, crop=67)
        assert all((p == 0).all() for key, p in net.named_parameters() if key.endswith("bias"))


def test_outputs() -> None:
    net = models.build(ModelConfig(hidden=8, outputs=1000), classes=10, crop=67).eval()
    assert net(torch.zeros(1, 3, 67, 67)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"model\.outputs is 5, fewer than the 10 classes"):
        models.build(ModelConfig(outputs=5), classes=10, crop=67)


def test_curvature_is_the_hessians_largest_eigenvalue() -> None:
    """Against the whole Hessian by automatic differentiation, in float64."""
    torch.manual_seed(0)
    h, w, labels = torch.rand(12, 5).double() + 0.5, torch.randn(4, 5).double(), torch.randint(0, 4, (12,))
    loss = lambda w: F.cross_entropy(h @ w.view(4, 5).T, labels)  # noqa: E731
    hessian = torch.autograd.functional.hessian(loss, w.flatten())
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert curvature(h, h @ w.T) == pytest.approx(largest, rel=1e-3)


def test_stable_lr_is_where_descent_with_momentum_begins_to_grow() -> None:
    """On a one-dimensional quadratic of that curvature, torch's own SGD."""
    for factor, grows in ((0.95, False), (1.05, True)):
        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([x], lr=factor * stable_lr(7.0, 0.9), momentum=0.9)
        for _ in range(300):
            sgd.zero_grad()
            (3.5 * x * x).sum().backward()
            sgd.step()
        assert (abs(x.item()) > 1) == grows


@pytest.mark.parametrize("name", ["alexnet", "alexnet_two_tower"])
def test_probe(name: str) -> None:
    """Planted: a dead unit, a layer whose output is the same for all images; and the gradient by backward()."""
    torch.manual_seed(0)
    net = models.build(ModelConfig(name, hidden=32), classes=10, crop=67)
    first = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        first.weight[:3] = 0
        first.bias[:3] = -1
    x, labels, keys = torch.randn(6, 3, 67, 67) * 60, torch.arange(6), mask_keys(0, 0, np.arange(6))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = measure(net, x, labels, keys)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    table = found["layers"]
    conv1 = next(iter(table))
    assert table[conv1]["dead"] == pytest.approx(3 / first.out_channels)
    z = first(x).detach()
    assert table[conv1]["output"] == pytest.approx(float(z.std()), rel=1e-4)
    assert table[conv1]["signal"] == pytest.approx(float(((z - z.mean(0)) ** 2).mean().sqrt()), rel=1e-4)
    loss = F.cross_entropy(net(x, keys), labels)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first.weight.grad is not None
    assert table[conv1]["gradient"] == pytest.approx(float((first.weight.grad**2).mean().sqrt()), rel=1e-3)
    assert len(table) == (8 if name == "alexnet" else 16)
    assert 0 < found["curvature"] < 100
    same = measure(net, x[:1].expand(6, -1, -1, -1), labels, keys[:1].expand(6))
    assert all(row["signal"] < 1e-3 * row["output"] + 1e-6 for row in same["layers"].values())


@pytest.mark.integration
def test_a_run_with_probes_that_stops_at_a_training_error(shard_sets: Path, tmp_path: Path) -> None:
    """Probes change nothing; the run ends where the running mean of the training error is below the level and stays so
    with the step that is under way."""
    options = ("--model.name=alexnet_one_tower", "--train.epochs=6", "--optim.name=adam", "--optim.lr=0.0003")
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    assert launch(shard_sets, plain, *options, ranks=0).returncode == 0
    progress, errors = Progress(), []
    for line in records(plain, "step"):
        progress.average(line["train_error"], line["step"])
        errors.append(progress.train_error)
    level = max(errors[51:53]) + 1e-9  # not before the mean is one of 50 steps
    assert errors[49] < level <= errors[50], "a fall that the step under way by then takes back: not the end"
    until = f"--train.until_error={level}"
    result = launch(shard_sets, probed, *options, until, "--monitor.probes=[0,3,12]", ranks=0)
    assert result.returncode == 0, result.stderr
    steps = records(probed, "step")
    assert steps == records(plain, "step")[: len(steps)]
    assert len(steps) == 53, "read a step late"
    assert status(probed)["state"] == "done"
    probes = records(probed, "probe")
    assert [r["step"] for r in probes] == [0, 3, 12]
    recorded = [steps[r["step"]]["loss"] for r in probes]  # a step's loss is the mean cross-entropy that is probed
    assert recorded == pytest.approx([r["loss"] for r in probes], rel=1e-5)
    assert records(probed, "validation")[-1]["step"] == len(steps)
    again = launch(shard_sets, probed, *options, until, ranks=0)
    assert again.returncode == 0, again.stderr
    assert records(probed, "step") == steps


@pytest.mark.integration
def test_a_step_is_of_the_mean_loss(shard_sets: Path, tmp_path: Path) -> None:
    """Section 3.5 maximizes "the average across training cases", and section 5 steps along "the average over the ith
    batch": the gradient's norm is that of the mean loss's, which `test_probe` has from backward()."""
    run = tmp_path / "run"
    options = ("--model.name=alexnet_one_tower", "--train.max_steps=1", "--monitor.probes=[0]")
    result = launch(shard_sets, run, *options, ranks=0)
    assert result.returncode == 0, result.stderr
    (step,), (probe,) = records(run, "step"), records(run, "probe")
    assert step["loss"] == pytest.approx(probe["loss"], rel=1e-5)
    net = models.build(ModelConfig("alexnet_one_tower", hidden=32, width=0.25), classes=3, crop=67)
    sizes = {name: layer.weight.numel() for name, layer in net.named_modules() if name in probe["layers"]}
    square = sum(n * probe["layers"][name]["gradient"] ** 2 for name, n in sizes.items())
    assert square < step["grad_norm"] ** 2 < 1.5 * square, "the rest is of the biases"


def test_init_from(shard_sets: Path, tmp_path: Path) -> None:
    """Fine-tuning: all but the last layer is taken over from a net with more outputs; a missing run is a sentence."""
    first, second = tmp_path / "pretrained", tmp_path / "tuned"
    assert launch(shard_sets, first, "--model.outputs=7", "--train.epochs=1", ranks=0).returncode == 0
    frozen = ("--optim.lr=1e-30", "--optim.weight_decay=0", "--train.epochs=1")
    result = launch(shard_sets, second, *frozen, f"--model.init_from={first}")
    assert result.returncode == 0, result.stderr
    assert "new: fc8.weight, fc8.bias" in result.stderr
    old, new = newest(first)["model"], newest(second)["model"]
    assert new["fc8.weight"].shape == (3, 32)
    for name in old.keys() - {"fc8.weight", "fc8.bias"}:
        assert torch.equal(old[name], new[name]), name
    (tmp_path / "pretrained").rename(tmp_path / "moved")
    again = launch(shard_sets, second, *frozen, "--train.epochs=2", f"--model.init_from={first}", ranks=0)
    assert "continuing from" in again.stderr, "a continued run needs it no more"
    refused = launch(shard_sets, tmp_path / "third", *frozen, f"--model.init_from={first}", ranks=0)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert f"model.init_from: there is no run {first}: " in refused.stderr
