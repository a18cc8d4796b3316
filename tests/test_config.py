"""One line of configuration, three ways; bad ones end with one sentence."""

from pathlib import Path

import pytest
import yaml

from dist_train.cli import parse
from dist_train.config import CONFIGS, Config, ConfigError, as_dict, dump


def test_the_defaults_are_the_paper() -> None:
    """Sections 3.5 to 5."""
    flat = as_dict(Config())
    paper = {
        "data.resize": 256,
        "data.crop": 227,
        "data.lighting": 0.1,
        "data.inputs": "mean_subtracted",
        "model.name": "alexnet",
        "model.hidden": 4096,
        "model.dropout": 0.5,
        "optim.name": "sgd",
        "optim.lr": 0.01,
        "optim.momentum": 0.9,
        "optim.weight_decay": 0.0005,
        "schedule.name": "plateau",
        "schedule.factor": 10,
        "schedule.max_divisions": 3,
        "train.epochs": 90,
        "train.global_batch": 128,
    }
    assert {k: flat[k] for k in paper} == paper


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.5, momentum: 0.8}\nschedule: {milestones: [3, 4]}\n")
    config, name = parse(["--config", str(file), "--optim.lr", "2e-2"])
    assert name == "mine"
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.02, 0.8, 0.0005)
    assert config.schedule.milestones == (3, 4)


def test_without_arguments_the_embedded_default() -> None:
    config, name = parse([])
    assert (name, config.data.source, config.data.crop, config.model.hidden) == (
        "quickstart",
        "fashion-mnist",
        67,
        4096,
    )


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse_and_say_what_they_need(file: Path) -> None:
    parse(["--config", str(file)])
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("Data:", "Hardware:", "Error:", "Time:"):
        assert any(word in line for line in head), f"{file.name} does not state {word}"


def test_dump_is_read_back(tmp_path: Path) -> None:
    config, _ = parse(["--schedule.milestones", "[1, 7]", "--run.name", "ä b", "--optim.lr", "1e-5"])
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert parse(["--config", str(file)])[0] == config
    assert yaml.safe_load(file.read_text())["run"]["name"] == "ä b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.lrr", "3"], "unknown configuration key optim.lrr: did you mean optim.lr?"),
        (["--train.precison=bf16"], "unknown configuration key train.precison: did you mean train.precision?"),
        (["--train.epochs", "three"], "train.epochs is three: it must be int"),
        (["--optim.name", "foo"], "optim.name is foo: it must be one of sgd, adam"),
        (["--optim.lr", "-3"], "optim.lr is -3.0: it must be above 0"),
        (["--train.epochs", "0"], "train.epochs is 0: it must be at least 1"),
        (["--model.dropout", "1"], r"model.dropout is 1.0: it must lie in \[0, 1\)"),
        (["--data.crop", "99"], "data.crop 99 is larger than data.resize 72.*: raise data.resize"),
        (["--checkpoint.keep", "1"], "keep at least 2"),
        (
            ["--train.seed", str(1 << 64)],
            r"train.seed is 18446744073709551616: it must lie in \[0, 18446744073709551616\)",
        ),
        (["--run.step_timeout", "0"], "run.step_timeout is 0.0: it must be above 0"),
        (["--run.start_timeout=-1"], "run.start_timeout is -1.0: it must be above 0"),
        (["--run.stop_timeout", "0"], "run.stop_timeout is 0.0: it must be above 0"),
        (
            ["--model.name=torchvision:resnet18", "--model.hidden=32"],
            "model.hidden is 32, but torchvision:resnet18 does not have it: leave it out",
        ),
        (["--model.name=torchvision:resnet18", "--model.lrn=none"], "model.lrn is none, but torchvision:resnet18"),
        (["--optim.l", "0.1"], "unknown configuration key optim.l: did you mean optim.lr?"),
        (["--confg", "x.yaml"], "unknown option --confg: did you mean --config?"),
        (["--conf", "x.yaml"], "unknown option --conf: did you mean --config?"),
        (["--print-config"], "unknown option --print-config: did you mean --print_config?"),
        (["--hlep"], "unknown option --hlep: did you mean --help?"),
        (["--config", "/no/such.yaml"], "does not exist: '/no/such.yaml'"),
    ],
)
def test_bad_values_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(argv)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"optim: {lr: 1}  # \xff\xfe")
    with pytest.raises(ConfigError, match="--config is not a text file in UTF-8"):
        parse(["--config", str(file)])


def test_bad_keys_in_a_file(tmp_path: Path) -> None:
    for text, key in (("optim: {lrr: 1}", "optim.lrr"), ("optimm: {lr: 1}", "optimm.lr")):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"unknown configuration key {key}: did you mean optim.lr"):
            parse(["--config", str(file)])
