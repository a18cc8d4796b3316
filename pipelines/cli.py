"""Command lines: one parser class, and one way to run a verb, for all three packages.

A verb's options are declared apart from what it starts, so that `--help` and a misspelt option never wait for torch.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pipelines import __version__, speech
from pipelines.errors import UsageError, UserError
from pipelines.limits import USUAL, Limits, apply
from pipelines.misc import cpus
from pipelines.opened import raise_limit
from pipelines.words import instead_of_argument, instead_of_option, instead_of_verb

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; the last is the shell's for Ctrl-C
MOST = (1 << 64) - 1  # that numpy takes
PRINT_CONFIG = "--print_config"  # the one option that is passed on without a value


class Parser(ArgumentParser):
    """argparse's parser, which answers an unknown option with what to type in its place and raises UsageError instead
    of exiting. Its help shows the default of each option that has one.

    Attributes:
        instead: what to type in place of an option of a certain other program, asked first: from the option and the
            command line to an answer, which is empty for others.
    """

    def __init__(self, prog: str, description: str) -> None:
        self.instead: Callable[[str, Sequence[str]], str] = lambda *_: ""
        self.names: list[str] = []  # of all options; before argparse adds its own --help
        super().__init__(prog, description=description, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> Action:
        self.names += [name for name in names if name.startswith("--")]
        if names[0].startswith("-") and not any(options.get("default") is none for none in (None, False, SUPPRESS)):
            options["help"] += " (default: %(default)s)"
        if options.get("type") is Path:
            options["type"] = _path
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, argv: Sequence[str], passes_on: Collection[str] = ()) -> Namespace:
        """Raises UsageError; exits for --help.

        Args:
            passes_on: options of another program, which go to `rest` with their values, as do all with a dot.
        """
        own, rest = _divided(argv, passes_on) if passes_on else (list(argv), [])
        for word in own:
            if word == "--":  # what follows are no options
                break
            # Looked for first: argparse would rather complain of a required option that the misspelt one was to be.
            name = word.partition("=")[0]
            strange = word.startswith("--") and name not in self.names
            if strange or (re.match("-[A-Za-z]", word) and word != "-h" and self.instead(word, argv)):
                raise UsageError(self._unknown(name if strange else word, argv, passes_on))
        # Arguments may stand on both sides of an option, as DST behind --devkit; but argparse then knows no `--`.
        parse = self.parse_known_args if "--" in own else self.parse_known_intermixed_args
        args, left = parse(own)
        if left and re.match("-[A-Za-z]", left[0]):
            raise UsageError(self._unknown(left[0], argv, passes_on))
        if left:
            meant = instead_of_argument(left[0], passes_on) or f"see {self.prog} --help"
            raise UsageError(f"{left[0]} is one argument too many: {meant}")
        args.rest = rest
        return args

    def _unknown(self, name: str, argv: Sequence[str], passes_on: Collection[str]) -> str:
        known = [*self.names, *passes_on]
        return f"unknown option {name}: {self.instead(name, argv) or instead_of_option(name, known, self.prog, argv)}"


def _divided(argv: Sequence[str], passed: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of a verb, and those that it passes on: options with a dot or in `passed`, each with its value."""
    own, rest = list[str](), list[str]()
    words = iter(argv)
    for word in words:
        name, given, _ = word.partition("=")
        if not word.startswith("--") or ("." not in name and name not in passed):
            own.append(word)
            continue
        rest.append(word)
        if not given and name != PRINT_CONFIG and (value := next(words, None)) is not None:
            rest.append(value)
    return own, rest


class Verb(NamedTuple):
    """One verb of a package.

    Attributes:
        help: one line.
        options: declares its options; imports nothing heavy.
        start: runs it; imports what it needs. Returns the exit code.
        passes_on: as for `Parser.parse`.
    """

    help: str
    options: Callable[[Parser], None]
    start: Callable[[Namespace], int]
    passes_on: Collection[str] = ()


def run_verb(
    prog: str,
    verbs: Mapping[str, Verb],
    argv: Sequence[str],
    *,
    speaks: bool = True,
    told: Callable[[int, str], object] = lambda *_: None,
) -> int:
    """Run the verb that `argv` begins with. Returns the exit code: the verb's, 2 after one sentence on stderr, 130 for
    Ctrl-C, 1 if its output could not be written. That a reader has left (`| head`) changes nothing.

    Args:
        speaks: whether this process prints the sentence; under a launcher one rank does for all.
        told: called with a code of 2 and the sentence.
    """
    return heard(_run_verb(prog, verbs, argv, speaks, told), speaks=speaks, told=told)


def heard(code: int, *, speaks: bool = True, told: Callable[[int, str], object] = lambda *_: None) -> int:
    """Exit code of a command that would end with `code`: another one, after saying so, if its output could not be
    written. For the arguments see `run_verb`."""
    lost = speech.unheard()
    if lost is None or speech.left(lost):
        return code
    why = f"the output could not be written ({lost.strerror}): make room, or send it elsewhere, and try again"
    told(code or FAILED, why)
    return refuse(why, code or FAILED, speaks=speaks)


def _run_verb(
    prog: str, verbs: Mapping[str, Verb], argv: Sequence[str], speaks: bool, told: Callable[[int, str], object]
) -> int:
    try:
        name = " ".join(argv[:2])  # `submit pack` is a verb, and `submit` is one
        if name not in verbs:
            name = argv[0] if argv else ""
        if name not in verbs:
            return _without_verb(prog, verbs, argv)
        raise_limit()
        verb, given = verbs[name], argv[len(name.split()) :]
        parser = Parser(f"{prog} {name}", verb.help)
        verb.options(parser)
        return verb.start(parser.parse(given, verb.passes_on))
    except (UserError, OSError) as error:
        told(USAGE, str(error))
        return refuse(error, speaks=speaks)
    except KeyboardInterrupt:
        return interrupted(speaks=speaks)
    except SystemExit as exiting:  # of --help
        return exiting.code if isinstance(exiting.code, int) else int(bool(exiting.code))


def as_module() -> None:
    """Let a console script find modules of the current directory, as `python -m` does. They come last: in a clone, the
    installed packages would otherwise import the rest of themselves from there."""
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        with suppress(OSError):  # it has been removed
            sys.path.append(os.getcwd())


def refuse(error: Exception | str, code: int = USAGE, *, speaks: bool = True) -> int:
    """Print the one sentence, if this process speaks. Returns the exit code."""
    if speaks:
        speech.say(f"error: {error}")
    return code


def interrupted(remedy: str = "", *, speaks: bool = True) -> int:
    """Say that Ctrl-C has ended the command, and what to do, if this process speaks. Returns the exit code."""
    if speaks:
        speech.say(f"interrupted: {remedy}" if remedy else "interrupted")
    return INTERRUPTED


def positive(text: str) -> int:
    """An argument's type: an integer above 0."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """An argument's type: an integer not below 0."""
    return _at_least(0, text)


def watch_option(parser: ArgumentParser, also: str = "") -> None:
    """Declares --watch, of a table. `also`: what else is done meanwhile."""
    parser.add_argument(
        "--watch",
        type=positive,
        nargs="?",
        const=10,
        metavar="SECONDS",
        help=f"repeat every so many seconds (10 if none are given) until Ctrl-C{also}",
    )


def limit_options(parser: ArgumentParser) -> None:
    """Declares the options of `chosen_limits`."""
    parser.add_argument(
        "--max-pixels", type=positive, default=USUAL.pixels, metavar="N", help="leave out images of more pixels"
    )
    parser.add_argument(
        "--max-bytes", type=positive, default=USUAL.bytes, metavar="N", help="leave out image files of more bytes"
    )


def decoding_options(parser: ArgumentParser) -> None:
    """Declares the options of verbs that decode images in many processes."""
    limit_options(parser)
    parser.add_argument("--workers", type=positive, default=cpus(), help="number of processes")


def chosen_limits(options: Namespace) -> Limits:
    """The limits that were typed."""
    return Limits(options.max_pixels, options.max_bytes)


def _path(text: str) -> Path:
    """The path with the user's directory for `~`, which a shell leaves as it is in `--out=~/x`."""
    return Path(os.path.expanduser(text))


def _at_least(minimum: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < minimum:
        raise ArgumentTypeError(f"{text} is below {minimum}")
    if number > MOST:
        raise ArgumentTypeError(f"{text} is above {MOST}")
    return number


def _without_verb(prog: str, verbs: Mapping[str, Verb], argv: Sequence[str]) -> int:
    """Print help or the version if it was asked for; otherwise raise UsageError."""
    if argv and argv[0] in ("-h", "--help", "help"):
        width = max(map(len, verbs))
        lines = [f"  {name:{width}}  {verb.help}" for name, verb in verbs.items()]
        speech.show(
            "\n".join([f"usage: {prog} VERB ...", "", *lines, "", f"Each has its own help: {prog} VERB --help"])
        )
        return 0
    if argv and argv[0] in ("--version", "version"):
        speech.show(f"{prog.split()[-1]} {__version__}")
        return 0
    if not argv:
        raise UsageError(f"{prog} needs a verb: one of {', '.join(verbs)}")
    raise UsageError(f"unknown verb {argv[0]}: {instead_of_verb(argv, verbs, prog)}")


def view_options(parser: ArgumentParser) -> None:
    """Declares a shard set, and how its images are shown to a net."""
    parser.add_argument("directory", type=Path, help="a shard set")
    parser.add_argument(
        "--resize", type=positive, default=256, help="shorter side that the crop is cut from, in pixels"
    )
    parser.add_argument("--crop", type=positive, default=227, help="side of the net's input, in pixels")
    parser.add_argument(
        "--max-pixels", type=positive, default=USUAL.pixels, metavar="N", help="refuse a set with images of more pixels"
    )


def check_view(options: Namespace) -> None:
    """Applies the limits that were typed. Raises UsageError for sizes that do not go together."""
    if options.crop > options.resize:
        raise UsageError(f"--crop {options.crop} is larger than --resize {options.resize}: it is cut from that")
    apply(Limits(options.max_pixels))
