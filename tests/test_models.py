"""The nets are the paper's."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_train import build, models
from dist_train.config import Config, ConfigError, ModelConfig, TrainConfig
from dist_train.data_config import DataConfig
from dist_train.models import lrn
from dist_train.models.alexnet import AlexNet, feature_side
from dist_train.models.dropout import Dropout, mask_keys
from dist_train.models.lrn import local_response_norm, traceable
from dist_train.ranks.world import World


def test_parameters_of_the_paper() -> None:
    """Counted by hand from section 3.5 and figure 2: two towers, 227 pixels, 4096 hidden units, 1000 classes."""
    by_hand = (
        (11 * 11 * 3 + 1) * 96
        + (5 * 5 * 48 + 1) * 256
        + (3 * 3 * 256 + 1) * 384
        + (3 * 3 * 192 + 1) * 384
        + (3 * 3 * 192 + 1) * 256
        + (6 * 6 * 256 + 1) * 4096
        + (4096 + 1) * 4096
        + (4096 + 1) * 1000
    )
    with torch.device("meta"):
        net = AlexNet(1000)
    assert by_hand == 60_965_224 == sum(p.numel() for p in net.parameters())


def test_forward_is_the_paper_layer_by_layer() -> None:
    """Against the same function written with torch.nn modules, LocalResponseNorm with its alpha divided by n."""
    torch.manual_seed(0)
    net = AlexNet(7, 99, ModelConfig(hidden=32)).double().eval()
    x = torch.randn(2, 3, 99, 99, dtype=torch.float64) * 60

    def norm(x: torch.Tensor) -> torch.Tensor:
        layer = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)
        return torch.cat([layer(tower) for tower in x.chunk(2, 1)], 1)

    y = F.max_pool2d(norm(net.conv1(x).relu()), 3, 2)
    y = F.max_pool2d(norm(net.conv2(y).relu()), 3, 2)
    y = F.max_pool2d(net.conv5(net.conv4(net.conv3(y).relu()).relu()).relu(), 3, 2)
    y = net.fc8(0.5 * net.fc7(0.5 * net.fc6(y.flatten(1)).relu()).relu())
    assert y.std() > 0
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-6)


def test_initialisation_of_section_5() -> None:
    torch.manual_seed(0)
    net = AlexNet(10, 67, ModelConfig(hidden=256))
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        layer = getattr(net, name)
        n = layer.weight.numel()
        assert abs(layer.weight.mean()) < 5 * 0.01 / n**0.5, name
        assert abs(layer.weight.std() - 0.01) < 5 * 0.01 / (2 * n) ** 0.5, name
        assert (layer.bias == (name in ("conv2", "conv4", "conv5", "fc6", "fc7"))).all(), name


def lrn_reference(a: np.ndarray, groups: int) -> np.ndarray:
    """Section 3.3, written out in float64."""
    b = np.empty_like(a)
    width = a.shape[1] // groups
    for i in range(a.shape[1]):
        first = i // width * width
        low, high = max(first, i - 2), min(first + width - 1, i + 2)
        b[:, i] = a[:, i] / (2 + 1e-4 * (a[:, low : high + 1] ** 2).sum(1)) ** 0.75
    return b


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lrn_values(groups: int, layout: torch.memory_format) -> None:
    a = np.random.default_rng(0).normal(0, 80, (3, 12, 5, 4))
    ours = local_response_norm(torch.tensor(a, dtype=torch.float32).contiguous(memory_format=layout), groups)
    np.testing.assert_allclose(ours.numpy(), lrn_reference(a, groups), rtol=2e-6, atol=1e-6)


def test_lrn_gradient() -> None:
    """Against central differences of the reference, in float64."""
    rng = np.random.default_rng(1)
    a, w = rng.normal(0, 60, (2, 8, 2, 2)), rng.normal(size=(2, 8, 2, 2))
    x = torch.tensor(a, dtype=torch.float32, requires_grad=True)
    (local_response_norm(x, 2) * torch.tensor(w, dtype=torch.float32)).sum().backward()
    numeric = np.empty_like(a)
    for index in np.ndindex(a.shape):
        step = np.zeros_like(a)
        step[index] = 1e-3
        numeric[index] = ((lrn_reference(a + step, 2) - lrn_reference(a - step, 2)) * w).sum() / 2e-3
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), numeric, rtol=1e-4, atol=1e-6)


WINDOWS = [
    {"groups": 1},
    {"groups": 2},
    {"groups": 3, "n": 3, "k": 1.0, "alpha": 0.02, "beta": 0.5},
    {"groups": 2, "n": 7, "alpha": 1e-3, "beta": 1.0},
    {"n": 1},
    {"groups": 6, "n": 9},  # wider than a group
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_lrn_and_its_gradient_are_torchs(window: dict[str, float], layout: torch.memory_format) -> None:
    """Both forms, in float64, against F.local_response_norm of each group."""
    options = {"groups": 1, "n": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75} | window
    groups, n, k, alpha, beta = options.values()

    def torchs(x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(groups, 1)
        return torch.cat([F.local_response_norm(part, n, alpha * n, beta, k) for part in parts], 1)

    torch.manual_seed(0)
    a = (torch.randn(3, 12, 5, 4, dtype=torch.float64) * 80).to(memory_format=layout)
    gradient = torch.randn(3, 12, 5, 4, dtype=torch.float64)  # of the one layout, whatever the maps have
    found = {}
    for name, form in {
        "torch": torchs,
        "ours": lambda x: local_response_norm(x, *options.values()),
        "traceable": lambda x: traceable(x, *options.values()),
    }.items():
        x = a.clone(memory_format=torch.preserve_format).requires_grad_()
        y = form(x)
        y.backward(gradient)
        found[name] = y.detach(), x.grad
    assert found["ours"][0].is_contiguous(memory_format=layout)
    for name in ("ours", "traceable"):
        for ours, reference in zip(found[name], found["torch"], strict=True):
            assert (ours - reference).abs().max() <= 2e-15 * reference.abs().max(), name
    for part in (a[:1, :, :2, :2], a[:0]):
        x = part.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: local_response_norm(x, *options.values()), x)


def test_the_gradient_of_the_gradient_of_lrn() -> None:
    torch.manual_seed(0)
    y, w = (torch.randn(2, 6, 3, 3, dtype=torch.float64) * 80).requires_grad_(), torch.rand(6, 1, 1).double()
    found = []
    for form in (local_response_norm, lambda x: traceable(x, 1, 5, 2.0, 1e-4, 0.75)):
        weight = w.clone().requires_grad_()
        (first,) = torch.autograd.grad(form(y * weight).sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        found.append(second)
    torch.testing.assert_close(*found)
    assert torch.autograd.gradgradcheck(local_response_norm, y[:1, :, :2, :1].detach().clone().requires_grad_())


def test_lrn_of_more_than_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 12, 5, 4) * 80).requires_grad_()
    found = {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for piece in (1 << 18, 2 * 12 * 5 * 4, 1):  # all samples at once; two, and the last by itself; one by one
        monkeypatch.setattr(lrn, "PIECE", piece)
        x.grad = None
        y = local_response_norm(x, 2)
        (y * y).sum().backward()
        found[piece] = y.detach(), x.grad
    for y, gradient in found.values():
        assert torch.equal(y, found[1][0])
        assert torch.equal(gradient, found[1][1])


def test_lrn_keeps_what_it_is_given() -> None:
    """Its input, also where another operator needs it for its own gradient; and the input's type."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        leaf = (torch.randn(2, 6, 3, 3) * 200).to(dtype).requires_grad_()
        x = leaf.relu()
        before = x.detach().clone()
        y = local_response_norm(x, 2)
        y.float().square().sum().backward()
        assert torch.equal(x, before)
        assert y.dtype == dtype == leaf.grad.dtype
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_where_lrn_takes_which_form() -> None:
    for x, form in (
        (torch.ones(2, 6, 3, 3, requires_grad=True), "_AnalyticBackward"),
        (torch.ones(2, 6, 3, 3, requires_grad=True, device="meta"), "MulBackward0"),  # as a GPU: not the CPU
        (torch.ones(2, 6, 3, 3), "NoneType"),
    ):
        assert type(local_response_norm(x, 2).grad_fn).__name__ == form


def test_lrn_is_exported_in_operators_that_others_know() -> None:
    """Also from a net whose weights could learn."""
    net = AlexNet(3, 67, ModelConfig(hidden=8, width=0.25)).eval()
    x = torch.randn(2, 3, 67, 67) * 60
    with torch.no_grad():
        expected = net(x)
    exported = torch.export.export(net, (x,))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") and not name.split(".")[1].endswith("_") for name in names), names
    torch.testing.assert_close(exported.module()(x), expected)
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), expected)


def test_lrn_does_not_overflow_in_half_precision() -> None:
    a = np.random.default_rng(0).uniform(300, 900, (2, 12, 3, 3))  # squares beyond 65504
    for form in (torch.tensor, lambda a, dtype: torch.tensor(a, dtype=dtype).requires_grad_()):
        ours = local_response_norm(form(a, dtype=torch.float16))
        assert ours.dtype == torch.float16
        np.testing.assert_allclose(ours.detach().float().numpy(), lrn_reference(a, 1), rtol=1e-3)


def test_crops() -> None:
    assert [feature_side(c) for c in (67, 99, 227)] == [1, 2, 6]
    with pytest.raises(ValueError, match=r"data.crop 224 does not fit .* nearest that does is 227"):
        AlexNet(10, crop=224)


def test_dropout_masks_follow_the_position() -> None:
    """A sample meets the same mask alone and in any batch; another step, layer, seed or position gives another mask."""
    layer = Dropout(0.5, layer=6)
    ones = torch.ones(40, 500)
    whole = layer(ones, mask_keys(3, 17, np.arange(100, 140)))
    parts = [layer(ones[:n], mask_keys(3, 17, np.arange(at, at + n))) for at, n in ((100, 7), (107, 32), (139, 1))]
    assert torch.equal(whole, torch.cat(parts))
    others = (
        layer(ones, mask_keys(3, 18, np.arange(100, 140))),
        layer(ones, mask_keys(4, 17, np.arange(100, 140))),
        layer(ones, mask_keys(3, 17, np.arange(140, 180))),
        Dropout(0.5, layer=7)(ones, mask_keys(3, 17, np.arange(100, 140))),
    )
    for other in others:
        agree = (other == whole).double().mean()
        assert abs(agree - 0.5) < 5 * 0.5 / 20000**0.5


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_rate_and_independence(p: float) -> None:
    kept = Dropout(p, layer=6)(torch.ones(400, 1000), mask_keys(0, 5, np.arange(400))) > 0
    n = kept.numel()
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    for per in (kept.double().mean(0), kept.double().mean(1)):  # no unit and no sample is favoured
        m = n // len(per)
        assert (per - (1 - p)).abs().max() < 5.5 * (p * (1 - p) / m) ** 0.5
    correlation = np.corrcoef(kept[:, :200].numpy().astype(float).T) - np.eye(200)
    assert np.abs(correlation).max() < 5.5 / 400**0.5


def test_dropout_keeps_the_mean() -> None:
    """ "At test time, we use all the neurons but multiply their outputs by 0.5"; the usual form scales in training."""
    x, keys = torch.ones(64, 4096), mask_keys(0, 0, np.arange(64))
    for scaling, dropped, tested in (("test", 1.0, 0.8), ("training", 1.25, 1.0)):
        layer = Dropout(0.2, 6, scaling)
        out = layer(x, keys)
        assert set(out.unique().tolist()) == {0.0, dropped}
        assert abs(out.mean() - tested) < 0.02
        assert (layer.eval()(x, None) == tested).all()


def test_dropout_is_of_the_outputs_of_the_hidden_layers() -> None:
    """Section 4.2: about half of what enters fc 7 and fc 8 is zero, and next to nothing of what enters fc 6."""
    torch.manual_seed(0)
    net = AlexNet(10, 67, ModelConfig(hidden=512))
    entering: dict[str, torch.Tensor] = {}
    for name in ("fc6", "fc7", "fc8"):
        net.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: entering.update({name: args[0]}))
    net(torch.randn(16, 3, 67, 67) * 60, mask_keys(0, 0, np.arange(16)))
    assert (entering["fc6"] > 0).double().mean() > 0.95, "biases of 1 keep nearly all of conv 5 above zero"
    for name in ("fc7", "fc8"):
        assert abs((entering[name] > 0).double().mean() - 0.5) < 0.05, name


def test_models_by_name() -> None:
    net = models.build(ModelConfig("torchvision:resnet18"), classes=5, crop=64)
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="'alexnt' is unknown: did you mean 'alexnet'"):
        models.build(ModelConfig("alexnt"), classes=5, crop=64)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_four_layers(activation: str) -> None:
    """As cuda-convnet's layers-18pct.cfg without normalisation: Caffe's copy of that net has 89,578 parameters."""
    net = models.build(ModelConfig("four_layers", options={"activation": activation}), classes=10, crop=32)
    assert sum(parameter.numel() for parameter in net.parameters()) == 89_578
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32) * 80
    nonlinear = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
    convolutions = [nn.Conv2d(i, o, 5, padding=2) for i, o in ((3, 32), (32, 32), (32, 64))]
    pools = [kind(3, 2, ceil_mode=True) for kind in (nn.MaxPool2d, nn.AvgPool2d, nn.AvgPool2d)]
    layers = [layer for conv, pool in zip(convolutions, pools, strict=True) for layer in (conv, nonlinear(), pool)]
    theirs = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))
    for ours, other in zip(net.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(ours.data)
    torch.testing.assert_close(net(x), theirs(x))
    deviations = [layer.weight.std().item() for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert deviations == pytest.approx([1e-4, 0.01, 0.01, 0.01], rel=0.05)
    for crop in (27, 28, 29, 30):
        small = models.build(ModelConfig("four_layers"), classes=10, crop=crop)
        assert small(torch.zeros(1, 3, crop, crop)).shape == (1, 10)
    with pytest.raises(ConfigError, match="activation is gelu: choose relu or tanh"):
        models.build(ModelConfig("four_layers", options={"activation": "gelu"}), classes=10, crop=32)


def test_one_sample_has_no_statistics() -> None:
    """Of a map of one pixel, which batch normalisation would divide by its deviation; said before the first step."""
    world = World.single(torch.device("cpu"))
    for crop, batch, pieces, refused in ((32, 5, 3, True), (32, 6, 3, False), (64, 5, 3, False)):
        train = TrainConfig(global_batch=batch, accumulate=pieces)
        config = Config(DataConfig(64, crop), ModelConfig("torchvision:shufflenet_v2_x0_5"), train=train)
        net = build.model(config, world, 3, compiled=False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        if refused:
            with pytest.raises(
                ConfigError, match=r"cannot take the statistics of one sample, .* train.global_batch 5 .*: raise"
            ):
                build.distribute(net, config, world, compiled=False)
        else:
            build.distribute(net, config, world, compiled=False)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch.manual_seed(0)
    net = AlexNet(10, 67, ModelConfig(hidden=64)).to(memory_format=torch.channels_last)
    x, keys = torch.randn(8, 3, 67, 67) * 60, mask_keys(0, 3, np.arange(8))
    eager = torch.autograd.grad(F.cross_entropy(net(x, keys), torch.arange(8)), list(net.parameters()))
    net.compile(dynamic=False)
    compiled = torch.autograd.grad(F.cross_entropy(net(x, keys), torch.arange(8)), list(net.parameters()))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
