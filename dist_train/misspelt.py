"""What the parser says of a command line that it does not take, as one sentence that names the key and the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dist_train.flat import OPTIONS
from dist_train.packaged import instead_of_config
from pipelines.words import instead_of_argument, instead_of_option

PROGRAM = "python -m dist_train"
KNOWN = ("--help", "--version", *OPTIONS)


def explained(message: str, argv: Sequence[str]) -> str:
    """jsonargparse's message as one sentence that names the key and the remedy."""
    if found := re.search(r"unrecognized arguments: (-[\w.-]+)", message):
        return _unknown(found[1], argv)
    if found := re.search(r"unrecognized arguments: (?:-- )?(.+)", message):
        meant = instead_of_argument(found[1], OPTIONS) or f"see `{PROGRAM} --help`, and write a list as 2,5"
        return f"{found[1]} is one argument too many: {meant}"
    if found := re.search(r"Option '([\w.-]+)' is not accepted", message):
        return _unknown(found[1])
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.-]+)'", message):
        return _unknown(f"{found[1]}.{found[2]}")
    if found := re.search(r"Parser key \"(\w+)\":\s+Unable to load config '(.*?)'\s", message):
        return _no_group(found[1], found[2])
    if found := re.search(r"Parser key \"(\w+)\":\s+Importing '(.*?)' is not allowed", message):
        return _no_group(found[1], found[2])
    if found := re.search(r"Parser key \"config\": (?:File does not exist|Path is not a file): '(.*)'", message):
        return f"--config {found[1]} does not exist, or is no file: {instead_of_config(found[1])}"
    if found := re.search(r"Parser key \"([\w.]+)\":\s+Expected an? (.+?)\. Got value: (.*)", message):
        kind = re.sub(r"<class '(\w+)'>", r"\1", found[2])
        if choices := re.fullmatch(r"typing.Literal\[(.*)\]", kind):
            kind = "one of " + choices[1].replace("'", "")
        if kind == "tuple":
            kind = "a list, such as [2, 5]"
        return f"{found[1]} is {found[3]}: it must be {kind}"
    if found := re.search(r"Parser key \"(\w+\.options)\":\s+Does not validate against any", message):
        return f"{found[1]} takes numbers, words, true, false, null, and lists of these, each by its own KEY"
    return " ".join(message.split())


def _unknown(word: str, argv: Sequence[str] = ()) -> str:
    """The sentence on an option, or on a key of a file."""
    key = word.lstrip("-")
    if word.startswith("-") and "." not in key:
        return f"unknown option {word}: {instead_of_option(word, KNOWN, PROGRAM, argv)}"
    return f"unknown configuration key {key}: {instead_of_option(key, KNOWN, PROGRAM)}"


def _no_group(group: str, value: str) -> str:
    """The sentence on a group that got one word, as other programs have options of that name."""
    sentence = f"--{group} takes a group of settings, and {value} is no YAML file of one"
    option = {"data": "--data.train", "model": "--model.name", "optim": "--optim.name", "schedule": "--schedule.name"}
    if group in option:
        return f"{sentence}: did you mean {option[group]} {value}?"
    return f"{sentence}: {instead_of_option(group, KNOWN, PROGRAM)}"
