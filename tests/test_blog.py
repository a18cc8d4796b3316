"""The blog's nets and its rule for the learning rate (docs/blog.md): what its author says, and what he suspected."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train import models, schedules
from dist_train.analysis.recorded import of_file
from dist_train.config import Config, ModelConfig, ScheduleConfig
from dist_train.models.alexnet import AlexNet
from dist_train.models.blog import BlogAlexNet, BlogTwoTowers
from dist_train.models.two_tower import TwoTowers

pytestmark = pytest.mark.integration
RECORDS = Path(__file__).parent.parent / "docs" / "experiments"

# The settings with which AlexNet is his net.
HIS = ModelConfig(
    "alexnet_one_tower", outputs=1000, dropout_scaling="training", lrn="every", lrn_alpha=2e-5, biases="ones"
)
MENDED = {"crossings": "paper", "conv3": 384, "hidden": 4096, "heads": "sum", "masks": 1}


def lively(net: nn.Module) -> nn.Module:
    """With weights so large that images give different outputs, which at the beginning they hardly do; in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.05 if name.endswith("weight") else 0.5))
    return net.double()


def images(n: int = 4, crop: int = 67) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(n, 3, crop, crop, dtype=torch.float64) * 2 - 1


def torchs_single(crop: int) -> nn.Sequential:
    """Written out with torch's own modules, LocalResponseNorm among them."""
    layers: list[tuple[str, nn.Module]] = []
    shapes = {"conv1": (3, 96, 11, 4, 0), "conv2": (96, 256, 5, 1, 2), "conv3": (256, 384, 3, 1, 1)}
    shapes |= {"conv4": (384, 384, 3, 1, 1), "conv5": (384, 256, 3, 1, 1)}
    for name, shape in shapes.items():
        layers += [
            (name, nn.Conv2d(*shape)),
            (f"relu_{name}", nn.ReLU()),
            (f"lrn_{name}", nn.LocalResponseNorm(5, k=2)),
        ]
        if name in ("conv1", "conv2", "conv5"):
            layers.append((f"pool_{name}", nn.MaxPool2d(3, 2)))
    side = {227: 6, 67: 1}[crop]
    layers += [("flat", nn.Flatten()), ("fc6", nn.Linear(256 * side * side, 4096)), ("relu6", nn.ReLU())]
    layers += [("drop6", nn.Dropout()), ("fc7", nn.Linear(4096, 4096)), ("relu7", nn.ReLU()), ("drop7", nn.Dropout())]
    return nn.Sequential(OrderedDict([*layers, ("fc8", nn.Linear(4096, 1000))]))


def test_parameters() -> None:
    """Counted by hand."""
    single = 11 * 11 * 3 * 96 + 96 + 5 * 5 * 96 * 256 + 256 + 3 * 3 * (256 + 384) * 384 + 2 * 384
    single += 3 * 3 * 384 * 256 + 256 + 6 * 6 * 256 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    tower = 11 * 11 * 3 * 48 + 48 + 5 * 5 * 48 * 128 + 128 + 3 * 3 * 128 * 96 + 96 + 3 * 3 * 192 * 192 + 192
    tower += 3 * 3 * 192 * 128 + 128 + 6 * 6 * 128 * 1024 + 1024 + 2048 * 1024 + 1024 + 2048 * 1000 + 1000
    with torch.device("meta"):
        one, two = (models.build(ModelConfig(name), classes=1000, crop=227) for name in ("blog", "blog_two_tower"))
        mended = BlogTwoTowers(1000, 227, **MENDED)  # type: ignore[arg-type]
        papers = TwoTowers(1000, 227)
    assert sum(p.numel() for p in one.parameters()) == single == 62_378_344
    assert sum(p.numel() for p in two.parameters()) == 2 * tower == 19_403_920
    assert sum(p.numel() for p in mended.parameters()) == sum(p.numel() for p in papers.parameters()) + 1000


def test_shapes() -> None:
    """227-55-27-13-6, after conv 1 and each pooling."""
    with torch.device("meta"):
        net, x = BlogAlexNet(1000), torch.empty(1, 3, 227, 227)
        sides: list[tuple[int, int]] = []
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6"):
            layer = net.get_submodule(name)
            layer.register_forward_hook(lambda _, args, out: sides.append((args[0].shape[-1], out.shape[-1])))
        assert net(x).shape == (1, 1000)
    assert sides == [(227, 55), (27, 27), (13, 13), (13, 13), (13, 13), (9216, 4096)]


@pytest.mark.parametrize("net", [BlogAlexNet(10, 67), BlogTwoTowers(10, 67)], ids=["single", "two towers"])
def test_how_they_begin(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std() - 0.01) < 5 * 0.01 / (2 * parameter.numel()) ** 0.5, name
            assert abs(parameter.mean()) < 5 * 0.01 / parameter.numel() ** 0.5, name


def test_the_single_net_is_what_torchs_modules_compute() -> None:
    """Logits, and with one set of masks the gradients too."""
    ours, torchs = lively(BlogAlexNet(1000, 67)), torchs_single(67).double()
    torchs.load_state_dict(ours.state_dict())
    x, labels = images(), torch.arange(4)
    for training in (False, True):
        ours.train(training), torchs.train(training)
        logits = []
        for net in (ours, torchs):
            torch.manual_seed(2)
            logits.append(net(x))
        assert logits[0].std(0).min() > 1e-3
        torch.testing.assert_close(*logits)
    for out in logits:
        F.cross_entropy(out, labels).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_the_single_net_is_a_setting_of_ours() -> None:
    """The sweep that changes one thing at a time begins there (configs/experiments/blog-probes.sweep)."""
    his, ours = lively(BlogAlexNet(1000, 67)), models.build(HIS, classes=10, crop=67).double()
    assert isinstance(ours, AlexNet)
    ours.load_state_dict(his.state_dict())
    torch.testing.assert_close(his.eval()(images()), ours.eval()(images()))


def calling_twice(net: BlogTwoTowers, x: Tensor) -> Tensor:
    """His forward pass as he describes it, in evaluation mode: the layers before a crossing are called once for the
    left half and once for the right."""
    left, right = (net.towers[t] for t in "01")
    norm, pool = nn.LocalResponseNorm(5, k=2), nn.MaxPool2d(3, 2)

    def convolved(tower: nn.Module, name: str, x: Tensor) -> Tensor:
        return norm(F.relu(tower.get_submodule(name)(x)))

    def crossed(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        once = convolved if name.startswith("conv") else lambda tower, name, x: F.relu(tower.get_submodule(name)(x))
        halves = [torch.cat([once(left, name, a), once(right, name, b)], 1) for _ in range(2)]
        return halves[0], halves[1]

    a, b = (pool(convolved(tower, "conv2", pool(convolved(tower, "conv1", x)))) for tower in (left, right))
    a, b = crossed("conv3", a, b)
    a, b = (
        pool(convolved(tower, "conv5", convolved(tower, "conv4", x))).flatten(1) for tower, x in ((left, a), (right, b))
    )
    a, b = crossed("fc6", a, b)
    a, b = crossed("fc7", a, b)
    logits: Tensor = (left.fc8(a) + right.fc8(b)) / 2  # type: ignore[operator]
    return logits


def test_calling_twice_is_calling_once() -> None:
    """What the author suspected: harmless. In float32, as he ran it: equal logits, and gradients to 1e-5 of the
    largest."""
    net = lively(BlogTwoTowers(1000, 67)).float().eval()
    x, labels, gradients = images().float(), torch.arange(4), []
    logits = [net(x), calling_twice(net, x)]  # type: ignore[arg-type]
    assert logits[0].std(0).min() > 1e-3
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for out in logits:
        net.zero_grad()
        F.cross_entropy(out, labels).backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == 32
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
        assert one.abs().max() > 0


def test_the_last_rung_is_the_papers_net() -> None:
    """Mended in all its options it computes what `alexnet_two_tower` does from the same weights, to 1e-5: with that
    one's LRN and dropout as the blog has them."""
    mended = lively(BlogTwoTowers(1000, 67, **MENDED)).float().eval()  # type: ignore[arg-type]
    papers = TwoTowers(1000, 67, ModelConfig(lrn="every", lrn_alpha=2e-5, dropout_scaling="training")).eval()
    state = mended.state_dict()
    state["bias"] = state.pop("towers.0.fc8.bias") + state.pop("towers.1.fc8.bias")
    papers.load_state_dict(state)
    ours, theirs = mended(images().float()), papers(images().float())
    assert theirs.std(0).min() > 1e-3
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_each_option_changes_what_it_says() -> None:
    layers = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")

    def inputs(**options: object) -> dict[str, int]:
        with torch.device("meta"):
            tower = BlogTwoTowers(1000, 227, **options).towers["0"]  # type: ignore[arg-type]
        return {name: tower.get_submodule(name).weight.shape[1] for name in layers}  # type: ignore[union-attr,index,misc]

    his = {"conv1": 3, "conv2": 48, "conv3": 128, "conv4": 192, "conv5": 192, "fc6": 4608, "fc7": 2048, "fc8": 2048}
    assert inputs() == his
    assert inputs(crossings="paper") == his | {"conv3": 256, "conv4": 96, "fc6": 9216, "fc8": 1024}
    assert inputs(conv3=384) == his | {"conv4": 384}
    assert inputs(hidden=4096) == his | {"fc7": 4096, "fc8": 4096}
    net = lively(BlogTwoTowers(10, 67)).eval()
    mean = net(images())
    net.heads = "sum"  # type: ignore[assignment]
    torch.testing.assert_close(net(images()), 2 * mean)


@pytest.mark.parametrize("crossings", ["blog", "paper"])
def test_both_halves_have_masks_of_their_own_or_one(crossings: str) -> None:
    for masks in (1, 2):
        net = BlogTwoTowers(10, 67, crossings=crossings, masks=masks)  # type: ignore[arg-type]
        seen: list[Tensor] = []
        for tower in net.towers.values():
            tower.fc7.register_forward_pre_hook(lambda _, args, kept=seen: kept.append(args[0]))  # type: ignore[union-attr]
        net(images().float())
        (left, right), units = seen, seen[0].numel()
        assert left.shape == right.shape == (4, 2048)
        assert torch.equal(left, right) == (masks == 1)
        for half in (left, right):
            assert abs((half == 0).float().mean() - 0.5) < 5 * 0.5 / units**0.5
        if masks == 2:
            both = (left > 0) & (right > 0)
            assert torch.equal(left[both], right[both]), "the same units, of which each half keeps some"
            assert abs(both.float().mean() - 0.25) < 5 * 0.5 / units**0.5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.crop 224 does not fit"):
        models.build(ModelConfig("blog"), classes=10, crop=224)
    with pytest.raises(ValueError, match=r"model\.hidden is 512, but blog does not have it"):
        Config(model=ModelConfig("blog", hidden=512))


@pytest.mark.parametrize("wrong", [{"crossings": "papers"}, {"heads": "max"}, {"masks": 3}], ids=str)
def test_an_option_that_is_none_is_refused(wrong: dict[str, bool | int | float | str]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"model\.options\.{name} is {value}: choose \w+ or \w+$"):
        models.build(ModelConfig("blog_two_tower", options={**wrong}), classes=10, crop=67)


def rates(losses: list[float]) -> list[float]:
    """The learning rate, from 1, after each epoch with these summed training losses."""
    schedule = schedules.build(Config(schedule=ScheduleConfig(name="blog")))
    schedule.base = 1.0
    found = []
    for epoch, loss in enumerate(losses):
        schedule.ended(0.9, loss, epoch, 20)
        found.append(schedule.lr(epoch + 1, 0, 20))
    return found


def test_his_rule_for_the_learning_rate() -> None:
    """Ten epochs above the minimum are free; from the eleventh on each divides."""
    assert rates([5, *[6] * 13]) == pytest.approx([1] * 11 + [0.1, 0.01, 0.001])
    assert rates([5, *[6] * 12, 4, *[6] * 11])[-12:] == pytest.approx([0.01] * 11 + [0.001]), "a new minimum ends a row"
    assert rates([5, *[6] * 10, 5, *[6] * 10])[-1] == 1, "so does a tie"
    assert rates([9.0 - i / 10 for i in range(80)])[-1] == 1


def test_his_rule_after_a_loss_that_is_not_a_number() -> None:
    """No comparison with it is true: the minimum is not a number either, and nothing is ever divided."""
    assert rates([5, *[6] * 9, *[math.nan] * 30])[-1] == 1
    assert rates([5, math.nan, 8, *[9] * 11])[-2:] == pytest.approx([1, 0.1]), "the next number is the new minimum"


def test_his_rule_on_the_recorded_losses() -> None:
    """What docs/blog.md tells of the runs on 640 photographs, 20 steps an epoch: the epochs after which it divides."""
    divided = {}
    for run in of_file(RECORDS / "blog-rule.jsonl"):
        assert [step.step for step in run.steps] == list(range(10, 1201, 10))
        losses = [step.loss for step in run.steps]  # means over ten steps
        found = [1.0, *rates([one + other for one, other in zip(losses[::2], losses[1::2], strict=True)])]
        divided[run.arm] = [epoch for epoch in range(1, 61) if found[epoch] < found[epoch - 1]]
    assert divided == {"single, SGD 0.01": [36, 37, 50, 51, 52], "single, Adam 0.0001": [58]}
