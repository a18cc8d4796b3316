"""Callables by name: the entry of a table, or `module:name` of somebody's own code. Nothing else imports by name.

A name that came with a run directory is a stranger's choice of code. It is imported only after `trust`, which is called
for what the user has typed or written into a file of his own, and for all names if he gives `--trust`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pipelines.errors import UserError, first_line
from pipelines.words import nearest

T = TypeVar("T")
FLAG = "--trust"
Table = Mapping[str, str]  # short name -> `module:name`
_trusted = set[str]()


class NameProblem(UserError):
    """A name of no code, of code that does not do what it should, or of code that is not trusted."""


def is_code(name: str) -> bool:
    """Whether it has the form `module:name`, rather than that of an entry of a table."""
    return ":" in name


def trust(name: str) -> None:
    """Allows the import of a `module:name`: the user himself has named it."""
    _trusted.add(name)


def check(key: str, name: str, table: Table) -> None:
    """Raises NameProblem, with the remedy, for a name that cannot be resolved, as far as this shows without importing
    it.

    Args:
        key: the setting, for messages: `optim.name`.
    """
    if not is_code(name):
        if name not in table:
            meant = of_a_module(name) or nearest(name, table) or next(iter(get_close_matches(name, table, 1, 0.6)), "")
            known = ", ".join((*table, "or module:name of your own"))
            raise NameProblem(f"{key} {name} is unknown: " + (f"did you mean {meant}?" if meant else f"choose {known}"))
        return
    module, _, attribute = name.partition(":")
    dotted = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    if module.endswith(".py") or not (re.fullmatch(dotted, module) and re.fullmatch(dotted, attribute)):
        path = re.sub(r"\.py$", "", module.strip()).strip("./").replace("/", ".").replace("-", "_")
        raise NameProblem(
            f"{key} {name} is no module:name: write the module as Python imports it, and one of its names, such as "
            f"{path or 'my_module'}:{attribute.partition(':')[0].strip(' .') or 'make'}"
        )
    check_trust(key, name)
    if find_spec(module.partition(".")[0]) is None:  # imports nothing
        raise NameProblem(
            f"{key} {name}: there is no module {module} in {Path.cwd()} or on PYTHONPATH: start where it lies, or add "
            f"its folder to PYTHONPATH"
        )


def check_trust(key: str, name: str) -> None:
    """Raises NameProblem for a `module:name` that nobody has trusted."""
    if is_code(name) and name not in _trusted:
        raise NameProblem(
            f"{key} {name} comes from a run directory, or an included file, and is code: if you trust its author, "
            f"add {FLAG}"
        )


def of_a_module(name: str) -> str:
    """What is meant by `torch.optim.AdamW`, or by the name of a module alone; empty if neither is one."""
    module, _, attribute = name.rpartition(".")
    top = (module or name).partition(".")[0]
    if not re.fullmatch(r"[\w.]+", name) or not top.isidentifier() or find_spec(top) is None:
        return ""
    return f"{module}:{attribute}" if module else f"{name}:NAME, with one of its names"


def places(name: str) -> list[Path]:
    """Where the top-level module of a dotted or `module:name` lies: its file, its folder, or each folder of a namespace
    package. Empty if there is none, or it is built in. Imports nothing."""
    try:
        spec = find_spec(re.split(r"[.:]", name, maxsplit=1)[0])
    except ValueError:  # `__main__`
        spec = None
    if spec is None:
        return []
    found = list(spec.submodule_search_locations or ([spec.origin or ""] if spec.has_location else []))
    return [Path(place) for place in found if place and os.path.exists(place)]


def resolve(key: str, name: str, table: Table) -> Callable[..., Any]:
    """The callable that a name stands for. Raises NameProblem; see `check` for the arguments."""
    check(key, name, table)
    module, _, attribute = table.get(name, name).partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise NameProblem(f"{key} {name}: there is no module {error.name}: look at its spelling") from error
        raise failed(key, name, error, "cannot be imported") from error
    except (Exception, SystemExit) as error:  # a script that parses its command line
        raise failed(key, name, error, "cannot be imported") from error
    for word in attribute.split("."):
        if not hasattr(found, word):
            meant = nearest(word, [known for known in dir(found) if not known.startswith("_")])
            remedy = f"did you mean {module}:{meant}?" if meant else "name one that it defines"
            raise NameProblem(f"{key} {name}: {getattr(found, '__name__', module)} has no {word}: {remedy}")
        found = getattr(found, word)
    if not callable(found):
        raise NameProblem(f"{key} {name} is {_a(found)}, which cannot be called: name a function or a class")
    made: Callable[..., Any] = found
    return made


def make(
    key: str,
    name: str,
    make: Callable[..., Any],
    args: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
    *,
    kind: type[T],
    remedy: str,
) -> T:
    """What a resolved callable makes of these arguments. Raises NameProblem if it does not take them, returns nothing
    of this kind, or fails in somebody's own code.

    Args:
        remedy: for messages: how the callable comes to return this kind.
    """
    options = options or {}
    try:
        if signature := _signature(make):
            signature.bind(*args, **options)
    except TypeError as error:
        given = ", ".join([*["..."] * len(args), *(f"{k}={v!r}" for k, v in options.items())])
        raise NameProblem(
            f"{key} {name} takes {signature}, and is called with ({given}), {first_line(error)}: {remedy}"
        ) from error
    try:
        made = make(*args, **options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if not is_code(name) and make.__module__.startswith(("dist_train.", "pipelines.")):
            raise
        raise failed(key, name, error) from error
    if not isinstance(made, kind):
        raise NameProblem(f"{key} {name} returned {_a(made)}, which is no {kind.__qualname__}: {remedy}")
    return made


def failed(key: str, name: str, error: BaseException, how: str = "failed") -> NameProblem:
    """The sentence on an error in somebody's own code, with its place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    libraries = (str(Path(__file__).parent.parent), "site-packages", "dist-packages")
    own = [frame for frame in frames if not any(library in frame.filename for library in libraries)] or frames
    own = [frame for frame in own if frame.filename != __file__]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError):
        place = ""  # stands in its message
    return NameProblem(f"{key} {name} {how}: {type(error).__name__}: {first_line(error)}{place}")


def argument_names(make: Callable[..., Any]) -> set[str]:
    """Names of the arguments of a callable."""
    signature = _signature(make)
    return set(signature.parameters) if signature else set()


def _signature(make: Callable[..., Any]) -> inspect.Signature | None:
    """Names and defaults of the arguments of a callable, without types, which would fill a screen."""
    try:
        whole = inspect.signature(make)
    except ValueError:  # written in C
        return None
    names = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in whole.parameters.values()]
    return inspect.Signature(names)


def _a(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__qualname__}"
