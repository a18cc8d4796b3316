"""The trainer's command line: `--config FILE` and `--optim.lr 0.02` become a Config. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from dist_train import __version__, choices
from dist_train.config import Config, ConfigError
from dist_train.data import to_pack
from dist_train.flat import as_dict
from dist_train.misspelt import PROGRAM, explained
from dist_train.monitor import notify
from dist_train.packaged import DEFAULT, with_packaged
from dist_train.ranks import kin, launcher
from dist_train.ranks.watch import Watch
from dist_train.rundir import events, restarts
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.last_words import LastWords
from dist_train.rundir.named import is_of_run, run_named
from pipelines import resolve, yamls
from pipelines.cli import interrupted
from pipelines.errors import UserError, first_line
from pipelines.opened import raise_limit
from pipelines.speech import train_on

_plainly = get_loader("yaml")


def parse(argv: Sequence[str], *, strange: bool = False) -> tuple[Config, str]:
    """The configuration of a command line and the name of the YAML file it came from. Without `--config` the embedded
    default, `configs/quickstart.yaml`, is used. If `argv` names a set without `data.source`, the file's
    source is dropped: nothing is packed in place of a user's own set. Raises ConfigError; exits for --help, --version
    and --print_config.

    Code that the configuration names as `module:name` may be imported from now on, unless only a file of a run names
    it, and `argv` has no --trust.

    Args:
        strange: every file is one of a run, wherever it lies.
    """
    parser = _parser()
    given, trusting = list(argv), resolve.FLAG in argv
    argv = _lists(word for word in argv if word != resolve.FLAG)
    argv = with_packaged(argv, speaks=launcher.rank() == 0)
    files = _files(argv)
    if not files:
        files = ["--config", str(DEFAULT)]
        argv = files + argv
    _look_at(files[1::2])
    try:
        namespace = parser.parse_args(argv)
        groups = parser.instantiate(namespace)
        of_files = parser.parse_args(files).data
    except ArgumentError as error:
        raise ConfigError(explained(str(error), given)) from error
    except ImportError as error:  # jsonargparse's, for a class_path
        raise ConfigError("a setting has a class_path, which is not taken here: write the value itself") from error
    except (yamls.NoYaml, UnicodeDecodeError, OSError) as error:  # of the files that these name
        raise ConfigError(f"a setting, or a file that a file names, {first_line(error)}") from error
    config = Config(**{f.name: groups[f.name] for f in fields(Config)})
    _trust(config, argv, None if trusting else [] if strange else files[1::2])
    data = config.data
    here = (data.train, data.val) == (of_files.train, of_files.val)
    if not here and data.source == of_files.source and not any("data.source" in word for word in argv):
        config = replace(config, data=replace(data, source=""))
    if here and of_files.source not in ("", data.source) and data.source:
        raise ConfigError(
            f"data.source is {data.source}, but {data.train} and {data.val} are for {of_files.source}: name the sets "
            f"to make by --data.train and --data.val"
        )
    run = config.run
    if run.name and any(word.startswith("--run.name") for word in argv) and not any("--run.dir" in w for w in argv):
        config = replace(config, run=replace(run, dir=""))  # the name was typed, the directory stands in a file
        run = config.run
    root, name = Path(run.root), Path(run.name)
    if not run.dir and root.parts and not name.is_absolute() and root in name.parents and not run.path("").exists():
        raise ConfigError(f"run.name is {run.name}, and would lie in {run.root}/ again: leave {run.root}/ out")
    return _at_home(config), Path(str(namespace.config[-1])).stem


def _trust(config: Config, argv: Sequence[str], files: Sequence[str] | None) -> None:
    """Allows the import of the code that the user has named, in words or in these files; None: of all."""
    own = [path for path in map(_file, files or ()) if not is_of_run(path)]
    for code in (config.model.name, config.optim.name, config.schedule.name, config.data.source):
        if resolve.is_code(code) and (files is None or _says(code, argv, own)):
            resolve.trust(code)


def checked(config: Config) -> Config:
    """The same. Raises ConfigError if code that it names cannot be imported, as far as this shows without importing."""
    try:
        choices.check(config.model.name, config.optim.name, config.schedule.name, imports=True)
        if to_pack(config) and resolve.is_code(config.data.source):
            resolve.check("data.source", config.data.source, {})
    except UserError as error:
        raise ConfigError(str(error)) from error
    return config


def overrides_of(line: str, file: Path) -> list[str]:
    """The overrides in a line of a sweep, without its comment. Raises ConfigError."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{file}: {error} in the line {line.strip()!r}") from error


def default_name(stem: str) -> str:
    """Name of the YAML file and start time of the launcher of this process: only a restart by that launcher has the
    same name."""
    return f"{stem}-{kin.stamp()}"


def train(argv: Sequence[str]) -> int:
    """Train a net as this command line says. Returns the exit code; exits for --help, --version and --print_config."""
    train_on()
    try:
        config, stem = parse(argv)
        checked(config)
        raise_limit()
        name = default_name(stem)
        path = config.run.path(name)
        announcement = Announcement(path, writes=launcher.rank() == 0)
        words = LastWords(path, announcement)
        if not launcher.attended():  # nobody sees why the run does not begin
            words.tellers = [partial(events.tell, path), partial(notify.tell_now, config.run.name or path.name, path)]
        watch = Watch(config.run.start_timeout, config.run.stop_timeout, words)
    except ConfigError as error:
        return launcher.end_refused(error)
    except KeyboardInterrupt:  # from here on a stop signal is the watch's
        return interrupted()
    try:
        if launcher.rank() == 0:
            with suppress(OSError):  # the claim will tell
                restarts.count(path)
        announcement.say("torch is imported")
        from dist_train import run  # torch takes seconds, which no misspelt option should cost
    except UserError as error:  # no progress, or no DALI
        announcement.fail(str(error))
        notify.tell_now(config.run.name or path.name, path, "given_up", reason=str(error))
        return launcher.end_refused(error)
    except BaseException as error:
        words.fail(error)
    return run.start(config, name, watch, words, announcement)


def _parser() -> ArgumentParser:
    # A class_path in a file would be imported before it is refused, and the file may be a stranger's.
    set_loader("yaml", _bounded, (yaml.YAMLError,))
    set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=["*"])
    parser = ArgumentParser(
        prog="dist_train",
        description="Train an image classifier. Without --config: configs/quickstart.yaml (Fashion-MNIST). "
        "VERB, each with its own --help: `runs` and `report` show runs, in the terminal and in a browser; `evaluate`, "
        "`predict`, `figures` and `export` work with a trained one; `speed` measures a command line before it is run, "
        "`gpu-report` a machine with GPUs; `experiments` runs sweeps. "
        f"{resolve.FLAG}: import code (module:name) that a file of a run names, too.",
        usage=f"{PROGRAM} [--config FILE] [--KEY VALUE ...] [{resolve.FLAG}]\n       {PROGRAM} VERB ...",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_class_arguments(Config, None, as_group=False)
    return parser


def _files(argv: Sequence[str]) -> list[str]:
    """The words of a command line that name YAML files, each after its own `--config`."""
    found = list[str]()
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--config":
            found += [word, following]
        elif word.startswith("--config="):
            found += word.split("=", 1)
    return found


def _look_at(files: Iterable[str]) -> None:
    """Raises ConfigError for a file that is no YAML, or would take much memory; the parser tells of those that are not
    there."""
    for word in files:
        try:
            if os.path.exists(_file(word)):
                yamls.load(yamls.read(_file(word)))
        except yamls.NoYaml as error:
            raise ConfigError(f"--config {word} {error}") from error
        except OSError as error:
            raise ConfigError(f"--config {word} cannot be read ({first_line(error)}): name a YAML file") from error


def _bounded(text: str) -> Any:
    """jsonargparse's reading of a text, or of a word of the command line."""
    yamls.check(text)
    try:
        return _plainly(text)
    except ValueError as error:
        raise yamls.NoYaml(f"holds what is no number ({first_line(error)}): mend it") from error


def _file(word: str) -> Path:
    return Path(os.path.expanduser(word))  # as jsonargparse does


def _says(code: str, argv: Sequence[str], own: Sequence[Path]) -> bool:
    """Whether the user himself has named code: as a word, or in the text of one of his files, not in a file that these
    name in turn."""
    if any(code in (word, word.partition("=")[2]) for word in argv):
        return True
    with suppress(OSError, yamls.NoYaml):
        return any(code in _scalars(yamls.load(yamls.read(file))) for file in own)
    return False


def _scalars(value: Any) -> Iterator[Any]:
    """The scalars of a YAML file, keys aside."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _scalars(inner)
    else:
        yield value


def _lists(argv: Iterable[str]) -> list[str]:
    """The same command line with brackets around `2,5`, if it is the value of a list."""
    lists = {f"--{key}" for key, value in as_dict(Config()).items() if isinstance(value, tuple)}
    changed, name = list[str](), ""
    for word in argv:
        option, given, value = word.partition("=")
        if name in lists and not word.startswith("--"):  # the value of the option before
            changed.append(_listed(word))
        else:
            changed.append(f"{option}={_listed(value)}" if given and option in lists else word)
        name = word
    return changed


def _listed(value: str) -> str:
    if re.match(r"\s*\[", value):
        return value
    return f"[{', '.join(piece.strip() for piece in value.split(',') if piece.strip())}]"


def _at_home(config: Config) -> Config:
    """The same with the user's directory for `~` in paths, which a shell does not replace in `--data.train=~/x`, and
    with the directory of a run that `model.init_from` gives by its name."""
    data, model, run = config.data, config.model, config.run
    root, init_from = _path(run.root), _path(model.init_from)
    if init_from:
        init_from = str(run_named(init_from, Path(root)))
    return replace(
        config,
        data=replace(data, train=_path(data.train), val=_path(data.val), raw=_path(data.raw)),
        model=replace(model, init_from=init_from),
        run=replace(run, root=root, dir=_path(run.dir)),
    )


def _path(text: str) -> str:
    """The name as the system takes it, in a locale without its characters, too."""
    return os.fsdecode(os.path.expanduser(text).encode(errors="surrogateescape"))
