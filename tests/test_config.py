"""A setting from defaults, YAML or command line; bad ones end with one sentence."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_train import data
from dist_train.analysis.gpu_site import Photographs
from dist_train.cli import parse
from dist_train.config import Config, ConfigError
from dist_train.flat import as_dict, dump
from dist_train.packaged import CONFIGS
from pipelines import kinds
from pipelines.errors import UserError
from pipelines.manifest import Manifest, ShardError


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


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["--data.train=mine/train", "--data.val=mine/val"], ""),
        (["--data.val", "data/fashion-mnist/vall"], ""),
        (["--data", '{"train": "mine/train"}'], ""),
        (["--data={train: mine/train, source: cifar10}"], "cifar10"),
        (["--data.train=mine/train", "--data.source=cifar10"], "cifar10"),
        (["--data.crop=60", "--run.name=data.train"], "fashion-mnist"),
    ],
)
def test_where_a_set_is_named_nothing_is_packed_that_was_not_asked_for(words: list[str], source: str) -> None:
    """Fashion-MNIST among a user's photographs: from `configs/quickstart.yaml`, given or not."""
    assert parse(words)[0].data.source == source
    assert parse(["--config", str(CONFIGS / "quickstart.yaml"), *words])[0].data.source == source


def test_a_file_that_names_its_sets_and_their_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {train: sets/train, val: sets/val, source: cifar10}\n")
    assert parse(["--config", str(file)])[0].data.source == "cifar10"


def test_the_users_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `~` in `--data.train=~/x` as it is; what is recorded is the path itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data: {val: ~/sets/val}\nmodel: {init_from: ~/runs/a}\n")
    config, _ = parse(
        ["--config=~/c.yaml", "--data.train=~/sets/train", "--run.dir=~/runs/b", "--run.root=~nobody.x/r"]
    )
    flat = as_dict(config)
    for key, path in {
        "data.train": "sets/train",
        "data.val": "sets/val",
        "model.init_from": "runs/a",
        "run.dir": "runs/b",
    }.items():
        assert flat[key] == f"{tmp_path}/{path}"
    assert config.run.root == "~nobody.x/r"
    assert "~/" not in dump(config)


def test_what_is_no_directory_of_shards(shard_sets: Path, tmp_path: Path) -> None:
    """A tar, a pattern of tars and a folder of images in the place of a shard set."""
    shutil.copy(shard_sets / "val" / "shard-000000.tar", tmp_path / "a.tar")
    (tmp_path / "photos" / "ant").mkdir(parents=True)
    remedy = "give the directory of a set, which `python -m pipelines index "
    for name, sentence in {
        "a.tar": f"{tmp_path}/a.tar is a file: {remedy}{tmp_path}/a.tar --to DIR`",
        "b.tar": f"{tmp_path}/b.tar is no directory: {remedy}",
        "a-{0000..0012}.tar": f"a-{{0000..0012}}.tar is no directory: {remedy}'{tmp_path}/a-{{0000..0012}}.tar' --to",
        "photos": f"`python -m pipelines pack imagefolder {tmp_path}/photos sets/photos`, and name sets/photos here",
        "phots": f"no shards in {tmp_path}/phots: make them with `python -m pipelines pack ... {tmp_path}/phots`",
    }.items():
        config, _ = parse([f"--data.train={tmp_path}/{name}", f"--data.val={shard_sets}/val"])
        with pytest.raises(ShardError, match=re.escape(sentence)):
            data.open_sets(config)


def test_another_source_needs_sets_of_its_own() -> None:
    """Otherwise a run would train on the Fashion-MNIST that is there already."""
    with pytest.raises(ConfigError, match=r"data\.source is cifar10, but data/fashion-mnist/train and .* name"):
        parse(["--data.source=cifar10"])
    assert parse(["--data.source=fashion-mnist"])[0].data.source == "fashion-mnist"
    assert parse(["--data.source="])[0].data.source == ""


def test_a_source_is_packed_into_nothing_of_the_users(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into a folder of photographs nor beside a set of another kind, and nothing is fetched for it."""
    monkeypatch.setattr(kinds, "Torchvision", lambda name, root, train: pytest.fail(f"fetched: {name}"))
    (tmp_path / "photos" / "ant").mkdir(parents=True)
    for train, val in ((tmp_path / "photos", tmp_path / "val"), (tmp_path / "train", tmp_path / "photos")):
        config, _ = parse([f"--data.train={train}", f"--data.val={val}", "--data.source=cifar10"])
        assert data.to_pack(config)
        with pytest.raises(ShardError) as error:
            data.pack_source(config)
        assert f"{tmp_path}/photos holds ant, which `pack` did not make: pack into an empty or a new" in str(
            error.value
        )
        assert sorted(os.listdir(tmp_path)) == ["photos"]

    photographs = Photographs(40, (30, 30))
    monkeypatch.setattr(kinds, "Torchvision", lambda name, root, train: photographs)
    config, _ = parse([f"--data.train={shard_sets}/train", f"--data.val={tmp_path}/vall", "--data.source=cifar10"])
    with pytest.raises(ShardError) as error:
        data.pack_source(config)
    assert f"data.source cifar10 is not packed, though there is no set in {tmp_path}/vall: " in str(error.value)
    assert "already holds 240 images in 5 shards, packed with --shorter-side 72" in str(error.value)
    assert str(error.value).endswith("; or, for sets of your own, leave out data.source")
    assert not (tmp_path / "vall").exists()

    config, _ = parse([f"--data.train={tmp_path}/new/train", f"--data.val={tmp_path}/new/val", "--data.source=cifar10"])
    (tmp_path / "new" / "raw").mkdir(parents=True)
    data.pack_source(config)
    assert [len(shards) for shards in data.open_sets(replace(config, train=replace(config.train, global_batch=8)))] == [
        40,
        40,
    ]


def test_a_channel_without_deviation_is_refused_at_the_start(shard_sets: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_sets / "train", tmp_path / "train")
    for std in (0.0, 1e-9):  # the latter as rounding left it on an earlier day
        replace(Manifest.read(tmp_path / "train"), std=[0.2, std, 0.1]).write(tmp_path / "train")
        words = [f"--data.train={tmp_path}/train", f"--data.val={shard_sets}/val"]
        sentence = "less than one level of 255 for green in the training set: set data.inputs to mean_subtracted"
        with pytest.raises(UserError, match=sentence):
            data.open_sets(parse([*words, "--data.inputs=standardized"])[0])
        data.open_sets(parse(words)[0])


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
        (["--optim.name", "foo"], "optim.name foo is unknown: choose sgd, adam, or module:name of your own"),
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
        (["--config", "/no/such.yaml"], "--config /no/such.yaml does not exist, or is no file: name a YAML file"),
        (
            ["--config=configs/alexnt.yaml"],
            "/alexnt.yaml does not exist, or is no file: did you mean .*configs/alexnet.yaml",
        ),
    ],
)
def test_bad_values_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(argv)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"optim: {lr: 1}  # \xff\xfe")
    with pytest.raises(ConfigError, match=r"--config .*bad\.yaml is not a text file in UTF-8"):
        parse(["--config", str(file)])


def test_bad_keys_in_a_file(tmp_path: Path) -> None:
    for text, key in (("optim: {lrr: 1}", "optim.lrr"), ("optimm: {lr: 1}", "optimm.lr")):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"unknown configuration key {key}: did you mean optim.lr"):
            parse(["--config", str(file)])


def test_a_group_in_a_file_names_sets_too(tmp_path: Path) -> None:
    group = tmp_path / "data.yaml"
    group.write_text("train: mine/train\nval: mine/val\n")
    for words in (["--data", str(group)], [f"--data={group}"]):
        assert parse(words)[0].data.source == ""
    assert parse(["--data", str(group), "--data.source=fashion-mnist"])[0].data.source == "fashion-mnist"


def test_a_configuration_is_read_again_whatever_its_paths_are(tmp_path: Path) -> None:
    """In an ASCII locale Python has a path's bytes as surrogates, which YAML does not take."""
    path = b"s\xc3\xa9t/train".decode("ascii", "surrogateescape")
    config = replace(Config(), data=replace(Config().data, train=path))
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.yaml")])[0].data.train == "sét/train"


def test_a_name_that_is_typed_is_another_run_than_the_files(tmp_path: Path) -> None:
    """Begun with the settings of a run, `--config RUN/config.yaml`, whose directory they hold."""
    file = tmp_path / "config.yaml"
    file.write_text("run: {name: old, dir: runs/old}")
    assert parse(["--config", str(file)])[0].run.path("") == Path("runs/old")
    assert parse(["--config", str(file), "--run.name=new"])[0].run.path("") == Path("runs/new")
    assert parse(["--config", str(file), "--run.name=new", "--run.dir=x"])[0].run.path("") == Path("x")


@pytest.mark.parametrize("text", ["'{a: {x: 1}}'", "'{a: [[1, 2]]}'"])
def test_options_are_not_nested(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.options"):
        parse(["--model.name=torchvision:resnet18", "--model.options", text.strip("'")])
    with pytest.raises(ConfigError, match=r"model\.options takes numbers, words, true, false, null, and lists"):
        parse(["--model.name=torchvision:resnet18", "--model.options.a", "{x: 1}"])
