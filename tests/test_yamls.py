"""Settings that a stranger wrote, or that were mistyped: one sentence with the file, at once, and little memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.analysis.trained import RunError, read_config
from dist_train.cli import parse
from dist_train.config import Config, ConfigError, RunConfig
from pipelines import yamls


def laughs(levels: int) -> str:
    """Nine times nine times nine ... (the "billion laughs")."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


BAD = {
    "aliases": (laughs(12), r"stands for more than \d+ values, up to line \d+: no settings do"),
    "an alias in itself": ("optim: &a {lr: *a}", r"repeats \*a where it is not known yet, in line 1: mend it"),
    "depth": ("[" * 100_000, "is more than 50 levels deep in line 1: no settings are"),
    "a key twice": ("optim:\n  lr: 0.1\n  lr: 0.2", "has the key lr twice, in line 3, too: leave one"),
    "a group twice": ("optim: {lr: 0.1}\noptim: {}", "has the key optim twice, in line 2, too: leave one"),
    "digits": (f"train: {{epochs: {'9' * 5000}}}", "is no YAML .*mend it"),
    "an object": ("optim: !!python/object/apply:os.system [id]", "is no YAML .could not determine a constructor"),
    "bytes": ("optim: {name: !!binary aGFsbG8=}", "is no YAML .could not determine a constructor"),
    "a list as a key": ("? [1, 2]\n: x", "is no YAML .*unhashable key"),
    "two documents": ("optim: {}\n---\noptim: {}", "is no YAML .expected a single document"),
    "size": ("# " + "x" * (1 << 20), r"has more than \d+ bytes"),
    "no end": ("optim: {", "is no YAML"),
    "a NUL": ("a: \x00", "is no YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"--config {file} {message}") as error:
        parse(["--config", str(file)])
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(RunError, match=f"{file}: --config {file} {message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "config"),
        ("just words", "config"),
        ("optim: {lr: 2020-01-01}", "optim.lr is 2020-01-01: it must be float"),
        ("optim: {lr: .nan}", "optim.lr is nan: it must be above 0"),
        ("train: {epochs: 1e400}", "train.epochs is inf: it must be int"),
        (f"train: {{epochs: {1 << 80}}}", "train.epochs has more digits than this setting can have"),
        ('data: {train: "a\\0b"}', r"data.train is a\\x00b: it must not hold a NUL"),
        ("data: {train: [x]}", "data.train is .*it must be str"),
    ],
)
def test_settings_of_other_types(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        parse(["--config", str(file)])
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"optim: {name: \xff}")
    with pytest.raises(ConfigError, match="is not a text file in UTF-8"):
        parse(["--config", str(file)])


def test_files_that_a_file_includes(tmp_path: Path) -> None:
    (tmp_path / "optim.yaml").write_text(laughs(12))
    (tmp_path / "config.yaml").write_text(f"optim: {tmp_path}/optim.yaml")
    with pytest.raises(ConfigError, match="a setting, or a file that a file names, stands for more than"):
        parse(["--config", str(tmp_path / "config.yaml")])


def test_good_yaml() -> None:
    text = "a: &a {x: 1, y: [1.5, true]}\nb: {<<: *a, y: 2020-01-01}\nc: *a\nd: null\n"
    assert yamls.load(text) == {
        "a": {"x": 1, "y": [1.5, True]},
        "b": {"x": 1, "y": "2020-01-01"},
        "c": {"x": 1, "y": [1.5, True]},
        "d": None,
    }
    assert yamls.load("a: on\nb: 12:00:00", words=True) == {"a": "on", "b": "12:00:00"}
    assert yamls.load("") is None


@pytest.mark.parametrize(
    "name", [".", "..", "/", "./..", "a/../..", "a\0b", "a\nb", "a\tb", "\x1b[2J", "x" * 201, "ä" * 101]
)
def test_names_that_no_run_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.name is .*: it must ") as error:
        Config(run=RunConfig(name))
    assert len(str(error.value)) < 250
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["", "a", "ä b", "sweep/lr=0.1", "..a", "x" * 200, "/tmp/x", "~x", "a.b"])
def test_names_that_a_run_can_have(name: str) -> None:
    assert Config(run=RunConfig(name)).run.name == name


@pytest.mark.parametrize("path", ["/", "..", "runs/a\nb", "x" * 201, f"{'x' * 256}/a"])
def test_directories_that_no_run_can_have(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match=r"^run\.dir is .*: it must end with the name of a folder"):
        Config(run=RunConfig(dir=path))


def test_names_on_the_command_line() -> None:
    for words in (["--run.name=.."], ["--run.name", "."], ["--run.name=a/../b"], ["--run.dir=a\0b"]):
        with pytest.raises(ConfigError, match=r"run\.(name|dir) is .*: it must "):
            parse(words)
