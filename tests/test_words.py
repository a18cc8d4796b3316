"""What is typed by one who comes from another program, or misspells it, and what he is told: a command line in, one
sentence and the exit code out."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pipelines.__main__
import slurm.__main__
from dist_train.__main__ import main
from dist_train.analysis.verbs import SHARED, VERBS
from dist_train.flat import OPTIONS
from pipelines import words
from pipelines.cli import Parser, Verb
from pipelines.shards import ShardSet
from tests.conftest import CLASSES
from tests.test_evaluate import untrained

Tell = Callable[..., str]
VERBS_OF = {
    "python -m dist_train": VERBS,
    "python -m pipelines": pipelines.__main__.VERBS,
    "python -m slurm": slurm.__main__.VERBS,
}


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tell:
    """What a program says on stderr to a command line that it refuses, in an empty directory: one sentence."""
    monkeypatch.chdir(tmp_path)

    def told(line: str, program: str = "dist_train") -> str:
        given = shlex.split(line)
        if program == "dist_train":
            code = main(given)
        elif program == "slurm":
            code = slurm.__main__.main(given)
        else:
            monkeypatch.setattr("sys.argv", [program, *given])
            code = pipelines.__main__.main()
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), line
        assert re.fullmatch(r"error: .*\n", err), err
        return err.removeprefix("error: ").rstrip("\n")

    return told


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--batch-size 64", "here it is --train.global_batch (samples per update, over all ranks)"),
        ("--batch_size=64", "here it is --train.global_batch (samples per update, over all ranks)"),
        ("-b 64", "here it is --train.global_batch (samples per update, over all ranks)"),
        ("--lr 0.1", "here it is --optim.lr"),
        ("-lr 0.1", "here it is --optim.lr"),
        ("--learning-rate 0.1", "here it is --optim.lr"),
        ("--epochs 3", "here it is --train.epochs"),
        ("--trainer.max_epochs 3", "here it is train.epochs"),
        ("--optim.learning_rate 3", "here it is optim.lr"),
        ("--workers 4", "here it is --data.threads ("),
        ("--num-workers 4", "here it is --data.threads ("),
        ("-j 4", "here it is --data.threads ("),
        ("--amp", "here it is --train.precision (auto, off, bf16 or fp16)"),
        ("--seed 1", "here it is --train.seed"),
        ("--device cuda", "here it is --train.device"),
        ("--output-dir x", "here it is --run.dir (the directory of the run)"),
        ("--name x", "here it is --run.name"),
        ("--data-dir x", "here it is --data.train (a shard set; --data.val: the validation set)"),
        ("--arch resnet18", "here it is --model.name (torchvision:resnet18 is one of torchvision's)"),
        ("--patience 3", "here it is --schedule.patience"),
        ("--train-epochs 3", "here it is --train.epochs"),
        ("--resume runs/x", "a run resumes by itself from its newest checkpoint, if it is named by --run.name; "),
        ("--mixup 0.2", "there is nothing like it"),
        ("--nnodes 2", "`python -m slurm submit --nodes N --gpus-per-node N --time HH:MM:SS`"),
        ("--gpus 2", "torchrun starts one process per GPU, type `torchrun --nproc_per_node=2 -m dist_train`"),
        (
            "--train.seed 1 --gpus=0,1,3 --run.name 'a b'",
            "type `torchrun --nproc_per_node=3 -m dist_train --train.seed 1 --run.name 'a b'`",
        ),
        ("--gpu 0", "type `torchrun --nproc_per_node=1 -m dist_train`"),
        ("--distributed --train.seed 1", "type `torchrun --nproc_per_node=N -m dist_train --train.seed 1`"),
        ("evaluate --distributed demo", "type `torchrun --nproc_per_node=N -m dist_train evaluate demo`"),
        ("evaluate demo --gpus 2", "type `torchrun --nproc_per_node=2 -m dist_train evaluate demo`"),
        ("evaluate demo --batch-size 2", "here it is --batch"),
        ("evaluate demo -b 2", "here it is --batch"),
        ("evaluate demo --ckpt best", "here it is --checkpoint"),
        ("speed --batch-size 2", "here it is --train.global_batch (samples per update, over all ranks)"),
        ("experiments --lr 2", "here it is --optim.lr"),
        (
            "--data photos",
            "--data takes a group of settings, and photos is no YAML file of one: did you mean --data.train",
        ),
        ("--model resnet18", "did you mean --model.name resnet18?"),
        ("--optim adam", "did you mean --optim.name adam?"),
        ("--checkpoint last.pt", "a run resumes by itself"),
        (
            "--schedule.milestones 2 5",
            "5 is one argument too many: see `python -m dist_train --help`, and write a list as",
        ),
        ("--schedule.milestones --train.seed 3", "argument --schedule.milestones: expected one argument"),
        ("--config alexnt.yaml", "configs/alexnet.yaml?"),
        ("--run.root . --run.name a/b --train.epochs 0", "train.epochs"),  # no word on run.name
        ("--run.root /x --run.name /x/a --train.epochs 0", "train.epochs"),
        ("--run.name runs/demo", "run.name is runs/demo, and would lie in runs/ again: leave runs/ out"),
        ("own.yaml", "type `python -m dist_train --config own.yaml`"),
        ("train --train.epochs 3", "training has none, type `python -m dist_train --train.epochs 3`"),
        ("test demo", "type `python -m dist_train evaluate demo`"),
        ("val", "type `python -m dist_train evaluate RUN`"),
        ("test demo --crops 10", "type `python -m dist_train evaluate demo --crops 10`"),
        ("test --crops 10 demo", "type `python -m dist_train evaluate --crops 10 demo`"),
        ("--schedule.milestones+ 5", "unknown configuration key schedule.milestones: see"),
        ("classify a.jpg", "type `python -m dist_train predict RUN IMAGE`"),
        ("serve demo", "type `python -m dist_train report demo`"),
        ("plot demo", "type `python -m dist_train figures demo`"),
        ("pack imagefolder a b", "type `python -m pipelines pack imagefolder a b`"),
        ("status", "type `python -m slurm status`"),
        ("evalute demo", "did you mean evaluate?"),
        ("foo", "unknown verb foo: the verbs are runs, report, evaluate, "),
    ],
)
def test_words_of_other_programs(line: str, answer: str, tell: Tell) -> None:
    assert answer in tell(line)


@pytest.mark.parametrize(
    ("program", "line", "answer"),
    [
        ("slurm", "submit --gpus 8 --time 1", "unknown option --gpus: here it is --gpus-per-node"),
        ("slurm", "submit --lr 8 --time 1", "unknown option --lr: here it is --optim.lr"),
        ("slurm", "submit --time 1 own.yaml", "own.yaml is one argument too many: did you mean --config own.yaml?"),
        ("slurm", "sbatch", "type `python -m slurm submit`"),
        ("slurm", "scancel demo", "type `python -m slurm cancel demo`"),
        ("slurm", "statu", "did you mean status?"),
        ("pipelines", "verify x --num-workers 3", "unknown option --num-workers: here it is --workers"),
        ("pipelines", "verify x -j 3", "unknown option -j: here it is --workers"),
        ("pipelines", "pack imagefolder a b --size 3", "here it is --shorter-side"),
        ("pipelines", "convert a b", "type `python -m pipelines pack imagefolder SRC DST`"),
        ("pipelines", "train", "unknown verb train: type `python -m dist_train`"),
        ("pipelines", "evaluate demo", "type `python -m dist_train evaluate demo`"),
    ],
)
def test_words_of_other_programs_elsewhere(program: str, line: str, answer: str, tell: Tell) -> None:
    assert answer in tell(line, program)


@pytest.mark.parametrize(
    "word",
    [
        *("zzz", "verbose", "debug", "save", "rate", "mode", "ratio", "loss", "best", "local", "x", "quiet", "prof"),
        *("foo.bar", "model.foo", "checkpoint.x", "name.x"),
    ],
)
def test_nothing_is_suggested_where_nothing_is_near(word: str, tell: Tell) -> None:
    assert tell(f"--{word} 3").endswith(f"{word}: see `python -m dist_train --help`")
    assert tell(f"evaluate --{word}").endswith(": see `python -m dist_train evaluate --help`") or "." in word


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("optim.l", "optim.lr"),
        ("optimm.lr", "optim.lr"),
        ("train.precison", "train.precision"),
        ("train.global-batch", "train.global_batch"),
        ("model.hiden", "model.hidden"),
        ("confg", "--config"),
        ("hlep", "--help"),
        ("print-config", "--print_config"),
    ],
)
def test_what_is_near_is_suggested(word: str, meant: str, tell: Tell) -> None:
    assert tell(f"--{word} 3").endswith(f"{word}: did you mean {meant}?")


def test_keys_of_a_file(tell: Tell, tmp_path: Path) -> None:
    for text, answer in (
        ("batch_size: 3", "unknown configuration key batch_size: here it is train.global_batch (samples per"),
        ("optim: {learning_rate: 3}", "unknown configuration key optim.learning_rate: here it is optim.lr"),
        ("schedule: {milestones: 3}", "schedule.milestones is 3: it must be a list, such as [2, 5]"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        assert answer in tell("--config own.yaml")


def parser(verb: Verb) -> Parser:
    made = Parser("program", "")
    verb.options(made)
    return made


def test_what_is_answered_exists() -> None:
    """Each option and verb that the tables name; and no word of others is one of ours there."""
    names = {name for verbs in VERBS_OF.values() for verb in verbs.values() for name in parser(verb).names}
    named = {option for ours, _, _ in words.OPTIONS for option in ours.split()}
    assert named <= names | set(OPTIONS)
    told = [answer for table in words.INSTEAD_OF_VERBS.values() for _, answer in table]
    told += [answer for _, answer in words.INSTEAD]
    for program, verb in re.findall(r"`(python -m \w+) ([\w-]+)", " ".join(told)):
        assert verb in VERBS_OF[program], f"{program} {verb}"
    for answer in re.findall(r"--\w+\.\w+", " ".join([*told, *(note for _, _, note in words.OPTIONS)])):
        assert answer in OPTIONS
    for program, table in words.INSTEAD_OF_VERBS.items():
        assert not {word for theirs, _ in table for word in theirs.split()} & set(VERBS_OF[program])
    assert set(SHARED) == set(words.RANKS) - {"dist_train"}


def test_lists_with_and_without_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    for line, found in (
        ("--schedule.milestones 2,5", ("schedule", "milestones", [2, 5])),
        ("--schedule.milestones='2, 5'", ("schedule", "milestones", [2, 5])),
        ("--schedule.milestones '[2, 5]'", ("schedule", "milestones", [2, 5])),
        ("--schedule.milestones 7", ("schedule", "milestones", [7])),
        ("--schedule.milestones=", ("schedule", "milestones", [])),
        ("--monitor.probes 0,20 --train.seed 3", ("monitor", "probes", [0, 20])),
        ("--monitor.wandb_tags a,b", ("monitor", "wandb_tags", ["a", "b"])),
        ("--run.name 2,5", ("run", "name", "2,5")),
    ):
        with pytest.raises(SystemExit) as end:
            main([*shlex.split(line), "--print_config"])
        assert end.value.code == 0
        group, key, value = found
        assert yaml.safe_load(capsys.readouterr().out)[group][key] == value, line


def test_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train import __version__

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    monkeypatch.setattr("sys.argv", ["pipelines", "--version"])
    assert (end.value.code, pipelines.__main__.main(), slurm.__main__.main(["--version"])) == (0, 0, 0)
    names = ("dist_train", "pipelines", "slurm")
    assert capsys.readouterr().out == "".join(f"{name} {__version__}\n" for name in names)


@pytest.mark.integration
def test_a_run_by_its_name(shard_sets: Path, tell: Tell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untrained(tmp_path / "runs" / "demo", shard_sets)
    untrained(tmp_path / "runs" / "sweep" / "one", shard_sets)
    for words_ in (
        "evaluate demo",
        "evaluate runs/demo",
        "evaluate sweep/one --crops 5",
        "figures demo --only inputs,kernels",
    ):
        assert main([*words_.split(), "--device=cpu"]) == 0
    for file in ("demo/evaluation-one.json", "sweep/one/evaluation-five.json", "demo/figures/inputs.png"):
        assert (tmp_path / "runs" / file).exists()
    assert (tmp_path / "runs" / "demo" / "figures" / "kernels.png").exists()
    capsys.readouterr()
    for line in ("evaluate dem", "figures dem"):
        assert tell(line) == "there is no run dem or runs/dem: did you mean demo?"
    (tmp_path / "runs" / "demo" / "slurm").mkdir()
    (tmp_path / "runs" / "demo" / "slurm" / "config.yaml").touch()  # of the run demo, no run itself
    known = "name the directory of a run, or its name in runs/ (the newest in runs/: sweep/one, demo)"
    assert tell("evaluate quite/other") == f"there is no run quite/other or runs/quite/other: {known}"
    assert tell("figures demo --only kernel,top5") == (
        "argument --only: 'kernel' is no figure: choose from kernels, top5, nearest, inputs, wrong"
    )
    for verb in ("status", "logs", "cancel", "requeue"):
        assert tell(f"{verb} demo", "slurm").startswith("runs/demo was never submitted, so it has no job: ")
    (tmp_path / "demo").mkdir()  # of the same name, and no run
    (tmp_path / "other").mkdir()
    assert main(["evaluate", "demo", "--device=cpu"]) == 0
    capsys.readouterr()
    assert tell("evaluate other").startswith("other has no config.yaml, so it is no directory of a run")


def test_the_weights_of_a_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train.cli import parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere" / "other").mkdir(parents=True)
    for line, found in (
        ("--model.init_from demo", "runs/demo"),
        ("--model.init_from here", "here"),
        ("--model.init_from other --run.root elsewhere", "elsewhere/other"),
        ("--model.init_from nothing", "nothing"),
        ("", ""),
    ):
        assert parse(line.split())[0].model.init_from == found


def test_a_folder_that_is_not_packed(
    image_folder: Path, tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that is printed is typed."""
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            shutil.copy(image_folder / split / name / "000.jpg", tmp_path / "photos" / split / name)
    line = "python -m pipelines pack imagefolder photos/val sets/val"
    told = "no shards in photos/val: if its folders are classes of images, pack them with "
    told += f"`{line}`, and name sets/val here"
    for verb in ("verify", "preview", "bench", "index"):
        assert tell(f"{verb} photos/val {'x.png' if verb == 'preview' else ''}", "pipelines") == told
    assert tell("speed --data.train photos/val --data.val photos/val").endswith(told)
    parts = tell("verify photos", "pipelines")
    assert parts.startswith("no shards in photos, which has the parts train, val: pack each, ")
    assert f"`{line}`" in parts
    assert f"`{line}`" in tell("verify photos/val/blue", "pipelines")
    for words_ in ("pack photos/val sets/val", "pack photos/val", "pack folder photos/val sets/val"):
        assert f"did you mean `{line}`?" in tell(words_, "pipelines")
    for typed, meant in (("imagnet", "imagenet"), ("imagefoldr", "imagefolder"), ("stl11", "STL10")):
        assert tell(f"pack {typed} photos/val sets/val", "pipelines").endswith(f"did you mean {meant}?")
    (tmp_path / "cifar10").mkdir()
    assert "did you mean" not in tell("pack cifar10", "pipelines"), "the name of a data set, whatever lies here"
    for name, why in (("photo", "does not exist in"), ("nope.zip", "does not exist in")):
        said = tell(f"pack ./{name} d", "pipelines")
        assert said.startswith("pack wants the kind of source first, imagefolder, ")
        assert "a data set of torchvision, or module:name; " in said
        assert why in said
    assert not (tmp_path / "sets").exists()
    monkeypatch.setattr("sys.argv", ["pipelines", *line.split()[3:]])
    assert pipelines.__main__.main() == 0
    assert ShardSet(tmp_path / "sets" / "val").classes == list(CLASSES)
    capsys.readouterr()
    assert tell("verify sets", "pipelines") == "sets is no shard set itself, but holds some: name one, sets/val"
    (tmp_path / "tars" / "a").mkdir(parents=True)
    (tmp_path / "tars" / "a" / "0.tar").touch()
    assert "index each, `python -m pipelines index tars/a`" in tell("bench tars", "pipelines")
