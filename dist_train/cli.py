"""The trainer's command line: `--config FILE` and `--optim.lr 0.02` become a Config. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from dist_train.config import DEFAULT, UNDOTTED, Config, ConfigError, as_dict
from dist_train.monitor import notify
from dist_train.ranks import kin, launcher
from dist_train.ranks.watch import Watch
from dist_train.rundir import events, restarts
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.last_words import LastWords
from pipelines.cli import interrupted, nearest
from pipelines.errors import UserError
from pipelines.opened import raise_limit
from pipelines.speech import train_on


def parse(argv: Sequence[str]) -> tuple[Config, str]:
    """The configuration of a command line and the name of the YAML file it came from. Without `--config` the embedded
    default, `configs/quickstart.yaml`, is used. Where `argv` names a set without `data.source`, that of the file falls
    away: nothing is packed where a user's own set is looked for. Raises ConfigError; exits for --help and
    --print_config."""
    parser = _parser()
    argv, files = list(argv), _files(argv)
    if not files:
        files = ["--config", str(DEFAULT)]
        argv = files + argv
    try:
        namespace = parser.parse_args(argv)
        groups = parser.instantiate(namespace)
        of_files = parser.parse_args(files).data
    except ArgumentError as error:
        raise ConfigError(_explain(str(error))) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config is not a text file in UTF-8 ({error.reason}): write it anew") from error
    config = Config(**{f.name: groups[f.name] for f in fields(Config)})
    data = config.data
    here = (data.train, data.val) == (of_files.train, of_files.val)
    if not here and data.source == of_files.source and not any("data.source" in word for word in argv):
        config = replace(config, data=replace(data, source=""))
    return _at_home(config), Path(str(namespace.config[-1])).stem


def overrides_of(line: str, file: Path) -> list[str]:
    """The overrides in a line of a sweep, without its comment. Raises ConfigError."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{file}: {error} in the line {line.strip()!r}") from error


def default_name(stem: str) -> str:
    """The name of the YAML file, and when the launcher of this process began: no other start's, but that of a restart
    by the launcher."""
    return f"{stem}-{kin.stamp()}"


def train(argv: Sequence[str]) -> int:
    """Train a net as this command line says. Returns the exit code; exits for --help and --print_config."""
    train_on()
    try:
        config, stem = parse(argv)
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
    except UserError as error:
        announcement.fail(str(error))
        notify.tell_now(config.run.name or path.name, path, "given_up", reason=str(error))
        return launcher.end_refused(error)
    try:
        announcement.say("torch is imported")
        from dist_train import run  # torch takes seconds, which no misspelt option should cost
    except BaseException as error:
        words.fail(error)
    return run.start(config, name, watch, words, announcement)


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="dist_train",
        description="Train an image classifier. Without --config: configs/quickstart.yaml (Fashion-MNIST). "
        "`python -m dist_train evaluate|figures RUN` looks at a trained one, `experiments` runs sweeps, `speed` "
        "measures a command line before it is run; each has its own --help.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_class_arguments(Config, None, as_group=False)
    return parser


def _files(argv: Sequence[str]) -> list[str]:
    """The words of a command line that name YAML files."""
    found = list[str]()
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--config":
            found += [word, following]
        elif word.startswith("--config="):
            found.append(word)
    return found


def _explain(message: str) -> str:
    """jsonargparse's message as one sentence that names the key and the remedy."""
    for pattern in (r"unrecognized arguments: --([\w.-]+)", r"Option '([\w.-]+)' is not accepted"):
        if found := re.search(pattern, message):
            return _unknown(found[1])
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown(f"{found[1]}.{found[2]}")
    if found := re.search(r"Parser key \"([\w.]+)\":\s+Expected an? (.+?)\. Got value: (.*)", message):
        kind = re.sub(r"<class '(\w+)'>", r"\1", found[2])
        if choices := re.fullmatch(r"typing.Literal\[(.*)\]", kind):
            kind = "one of " + choices[1].replace("'", "")
        return f"{found[1]} is {found[3]}: it must be {kind}"
    return " ".join(message.split())


def _unknown(key: str) -> str:
    meant = nearest(key, [*as_dict(Config()), "help", *(name.removeprefix("--") for name in UNDOTTED)])
    if "." in key or "." in meant:
        return f"unknown configuration key {key}: did you mean {meant}?"
    return f"unknown option --{key}: did you mean --{meant}?"


def _at_home(config: Config) -> Config:
    """The same with `~` in paths replaced by the user's directory, which a shell does not do in `--data.train=~/x`."""
    data, model, run = config.data, config.model, config.run
    return replace(
        config,
        data=replace(data, train=_path(data.train), val=_path(data.val)),
        model=replace(model, init_from=_path(model.init_from)),
        run=replace(run, root=_path(run.root), dir=_path(run.dir)),
    )


def _path(text: str) -> str:
    """The name as the system takes it, in a locale without its characters, too."""
    return os.fsdecode(os.path.expanduser(text).encode(errors="surrogateescape"))
