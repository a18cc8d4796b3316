"""Architecture: the packages, the imports allowed between them, unique names, and limits of length."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("dist_train", "pipelines", "slurm")

# Who may import whom, also inside a function. A room is a module or a folder of dist_train, or another package.
ARROWS = """
    slurm     cli code flat config data machine monitor outcomes ranks rundir pipelines
    __main__  analysis cli ranks pipelines
    analysis  cli train build process monitor page pictures probe rundir ranks models data flat config data_config \
              choices packaged machine driver outcomes pipelines
    page      rundir flat config outcomes pipelines
    cli       run monitor misspelt rundir ranks data flat config packaged choices pipelines
    run       summary train fetch data monitor rundir ranks process flat config outcomes pipelines
    summary   pictures rundir outcomes
    train     build fetch process validate monitor profiling rundir ranks models numbers optim schedules probe flat \
              config outcomes pipelines
    profiling ranks rundir config pipelines
    fetch     rundir ranks config outcomes pipelines
    monitor   page validate ranks rundir flat config outcomes pipelines
    validate  ranks rundir pipelines
    pictures  pipelines
    build     ranks models config pipelines
    process   code machine ranks config choices
    rundir    ranks numbers optim schedules flat config outcomes pipelines
    ranks     models numbers machine outcomes pipelines
    models    numbers config choices pipelines
    numbers   pipelines
    optim     config choices pipelines
    schedules config packaged choices outcomes pipelines
    data      config pipelines
    misspelt  flat packaged pipelines
    flat      config pipelines
    config    data_config choices pipelines
    data_config pipelines
    packaged  pipelines
    choices   pipelines
    machine   driver pipelines
    driver
    code      pipelines
    probe
    outcomes  pipelines
    pipelines
    __init__  pipelines
"""
ALLOWED = {room: set(targets) for room, *targets in map(str.split, ARROWS.strip().splitlines())}
# What slurm takes of these rooms: modules that import no torch.
FOR_SLURM = {
    "monitor": {"notify", "webhook"},
    "ranks": {"kin", "launcher"},
    "rundir": {
        "announcement",
        "checkpoint",
        "events",
        "last_words",
        "ledger",
        "lines",
        "listing",
        "named",
        "overview",
        "restarts",
        "status",
    },
}

# Words that mean one thing: where each may be a name. A part is a packing task's share of the shards.
WORDS = {"alone": set[str](), "choose": set[str](), "part": {"slurm/job.py"}}

LINES, COLUMNS, FUNCTION, ARGUMENTS, METHODS = 300, 120, 50, 8, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        package, _, rest = self.name.partition(".")
        return (rest.split(".")[0] or "__init__") if package == "dist_train" else package

    @property
    def public(self) -> list[Function | ast.ClassDef]:
        """The functions and classes at its top."""
        nodes = (node for node in self.tree.body if isinstance(node, Function | ast.ClassDef))
        return [node for node in nodes if not node.name.startswith("_")]

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def _modules() -> dict[str, Module]:
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = Module(name, path, ast.parse(path.read_text()))
    return found


MODULES = _modules()


# What could import something without an arrow, and so is not allowed anywhere.
HIDDEN = ("importlib", "__import__", "runpy")
# But here: of the user's code, and of the callables in tables such as those of `dist_train.choices`.
BY_NAME = ("pipelines.resolve",)
# What each of these stands for is known to one module alone.
HOMES = {
    "status.json": "dist_train/rundir/status.py",
    "metrics.jsonl": "dist_train/rundir/record.py",
    "events.jsonl": "dist_train/rundir/events.py",
    "starts.json": "dist_train/rundir/restarts.py",
    "message.json": "dist_train/monitor/notify.py",
    "confusion.npz": "dist_train/rundir/confusion.py",
    "owner": "dist_train/rundir/lease.py",
    "state.pt": "dist_train/rundir/checkpoint.py",
    "ArgumentParser": "pipelines/cli.py dist_train/cli.py",  # of argparse, and of jsonargparse for the trainer
}


def imports(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """The product modules that a module imports, wherever in it."""
    for node in ast.walk(module.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        yield from ((node, name) for name in names if name in MODULES)


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def arguments(function: Function) -> list[ast.arg]:
    """All of them but self."""
    a = function.args
    listed = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [argument for argument in listed if argument.arg not in ("self", "cls")]


def test_the_arrows_between_rooms() -> None:
    offenders = []
    for module in MODULES.values():
        for node, name in imports(module):
            target = MODULES[name].room
            own = target == module.room or (target == "__init__" and module.name.startswith("dist_train."))
            if not own and target not in ALLOWED[module.room]:
                offenders.append(f"{module.at(node)}: {module.room} imports {name}")
            if module.room == "slurm" and name.split(".")[-1] not in FOR_SLURM.get(target, {name.split(".")[-1]}):
                offenders.append(f"{module.at(node)}: slurm imports {name}, which is not for it")
    assert not offenders, "\n".join(offenders)


def test_no_import_goes_around_the_arrows() -> None:
    """No relative one, none of a package as a whole, none at run time by a name, none of the tests."""
    offenders = []
    for module in MODULES.values():
        if module.room != "__init__" and module.room not in ALLOWED:
            offenders.append(f"{module.name}: a room that has no line in ARROWS")
        for node in ast.walk(module.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
                if node.level:
                    offenders.append(f"{module.at(node)}: a relative import")
            names += [node.id] if isinstance(node, ast.Name) and node.id in HIDDEN else []
            if module.name in BY_NAME:
                names = [name for name in names if name.split(".")[0] != "importlib"]
            whole = PACKAGES if isinstance(node, ast.Import) else ()
            names = [name for name in names if name != "importlib.metadata"]  # which imports nothing
            wrong = [name for name in names if name in whole or name.split(".")[0] in (*HIDDEN, "tests")]
            offenders += [f"{module.at(node)}: {name}" for name in wrong]
    assert not offenders, "\n".join(offenders)


def test_one_truth_one_place() -> None:
    offenders = []
    for module in MODULES.values():
        here = str(module.path.relative_to(ROOT))
        for node in ast.walk(module.tree):
            word = node.value if isinstance(node, ast.Constant) else getattr(node, "id", None)
            if isinstance(word, str) and word in HOMES and here not in HOMES[word].split():
                offenders.append(f"{module.at(node)}: {word}")
    assert not offenders, "\n".join(offenders)


def test_one_place_speaks() -> None:
    """`pipelines.speech` alone writes to the two streams and draws progress bars: what it writes cannot raise. The name
    of a bar's class may be imported for a type; a table is drawn into a string."""
    offenders = []
    for module in MODULES.values():
        if module.name == "pipelines.speech":
            continue
        for node in ast.walk(module.tree):
            said = ast.unparse(node.func if isinstance(node, ast.Call) else node)
            if module.name == "dist_train.rundir.listing" and said == "console.print":
                continue
            calls = isinstance(node, ast.Call) and said.split(".")[-1] in ("print", "print_exc", "tqdm", "input")
            if calls or (isinstance(node, ast.Attribute) and said in ("sys.stdout", "sys.stderr")):
                offenders.append(f"{module.at(node)}: {said}")
    assert not offenders, "\n".join(offenders)


def test_each_program_begins_with_a_guard() -> None:
    """Before any file is opened: see `pipelines.speech.begin`."""
    for name, function in (
        ("pipelines.__main__", "main"),
        ("dist_train.__main__", "main"),
        ("slurm.__main__", "main"),
        ("slurm.job", "__call__"),
    ):
        found = [f for f in functions(MODULES[name].tree) if f.name == function]
        assert found
        for f in found:
            body = [
                node for node in f.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            ]
            assert ast.unparse(body[0]) == "begin()", f"{name}: {function}"


def test_every_arrow_is_needed() -> None:
    drawn = {(module.room, MODULES[name].room) for module in MODULES.values() for _, name in imports(module)}
    assert [
        (room, target) for room, targets in ALLOWED.items() for target in targets if (room, target) not in drawn
    ] == []


def test_no_arrows_form_a_circle() -> None:
    """Neither among rooms nor among modules, imports inside functions counted; a circle is a CycleError here."""
    tuple(TopologicalSorter(ALLOWED).static_order())
    tuple(
        TopologicalSorter(
            {m.name: {name for _, name in imports(m)} - {m.name} for m in MODULES.values()}
        ).static_order()
    )
    assert {room for room, targets in ALLOWED.items() if "analysis" in targets} == {"__main__"}


def test_one_name_one_thing() -> None:
    """A public class stands in one module. A function may stand in two if neither is ever imported by its name."""
    classes, shared = defaultdict(list), defaultdict(list)
    for module in MODULES.values():
        for node in module.public:
            (classes if isinstance(node, ast.ClassDef) else shared)[node.name].append(module)
    twice = {name: [m.name for m in where] for name, where in classes.items() if len(where) > 1}
    assert not twice
    offenders = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                for alias in node.names:
                    homes = [m.name for m in shared[alias.name]]
                    if len(homes) > 1 and node.module in homes:
                        offenders.append(f"{module.at(node)}: {alias.name} by name, which stands in {homes}")
    assert not offenders, "\n".join(offenders)


def test_words_that_mean_one_thing() -> None:
    offenders = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            for field in ("id", "attr", "arg", "name", "asname"):
                word = getattr(node, field, None)
                if word in WORDS and str(module.path.relative_to(ROOT)) not in WORDS[word]:
                    offenders.append(f"{module.at(node)}: {word}")
    assert not offenders, "\n".join(offenders)


def test_configuration_classes_are_called_so() -> None:
    public = [node for name in ("config", "data_config") for node in MODULES[f"dist_train.{name}"].public]
    classes = [node.name for node in public if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if not name.endswith(("Config", "ConfigError"))] == []


def test_no_module_hands_on_the_names_of_another() -> None:
    """But `pipelines` itself, for training scripts of others."""
    offenders = []
    for module in MODULES.values():
        if module.name == "pipelines":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                offenders += [module.at(node) for alias in node.names if alias.asname == alias.name]
            if isinstance(node, ast.Name) and node.id == "__all__":
                offenders.append(module.at(node))
    assert not offenders, "\n".join(offenders)


def test_every_text_has_its_encoding() -> None:
    """In a locale that is ASCII, too, a class may be called "café": what is read or written as text says how."""
    offenders = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            named = {keyword.arg for keyword in node.keywords}
            texts = name.endswith((".read_text", ".write_text")) or "text" in named  # the latter of a process
            if name in ("open", "os.fdopen"):
                modes = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
                texts = "b" not in str(modes[0] if modes else "r")
            if texts and "encoding" not in named:
                offenders.append(f"{module.at(node)}: {name}")
    assert not offenders, "\n".join(offenders)


def test_sizes() -> None:
    offenders = []
    for module in MODULES.values():
        lines = module.path.read_text().splitlines()
        if len(lines) > LINES:
            offenders.append(f"{module.path.relative_to(ROOT)} has {len(lines)} lines")
        offenders += [
            f"{module.path}:{i}: {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > COLUMNS
        ]
        for function in functions(module.tree):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > FUNCTION:
                offenders.append(f"{module.at(function)}: {function.name} has {length} lines")
            if (count := len(arguments(function))) > ARGUMENTS:
                offenders.append(f"{module.at(function)}: {function.name} has {count} arguments")
    assert not offenders, "\n".join(offenders)


def test_the_trainer_is_small_and_goes_nowhere() -> None:
    """Few methods, no base class, no class that is made of it, and no function that takes it."""
    (trainer,) = (node for node in MODULES["dist_train.train"].public if node.name == "Trainer")
    assert isinstance(trainer, ast.ClassDef)
    assert not trainer.bases
    methods = [node for node in trainer.body if isinstance(node, Function | ast.Assign)]  # a lambda is one, too
    assert len(methods) <= METHODS
    offenders = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases):
                offenders.append(f"{module.at(node)}: {node.name} is made of it")
            if isinstance(node, Function):
                for argument in arguments(node):
                    said = ast.unparse(argument.annotation) if argument.annotation else ""
                    if "Trainer" in said or argument.arg == "trainer":
                        offenders.append(f"{module.at(node)}: {node.name} takes it")
    assert not offenders, "\n".join(offenders)
