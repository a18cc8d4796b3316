"""README and docs: each command runs, or says what stands in for it or what it needs, and prints what is shown."""

from __future__ import annotations

import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.pack import Options, pack
from pipelines.sources import ImageFolder
from tests.conftest import photograph
from tests.helpers import adding, docs
from tests.helpers.launch import finish, python, spawn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"), *sorted(ROOT.glob("docs/**/*.md"))]
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
READ = {name: docs.read(page.read_text(encoding="utf-8")) for name, page in NAMES.items()}
LIMIT = 1800.0  # seconds for a page

CLOTHES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PHOTOS = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
# Nothing answers, but the machine itself.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
OFFLINE |= {"no_proxy": "localhost,127.0.0.1", "PIP_NO_INDEX": "1", "WANDB_MODE": "disabled"}


def test_each_block_is_run_or_replaced_or_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """And no command stands where it would not be found: in an indented block, or one without a language."""
    assert not [f"{name}, {problem}" for name, page in READ.items() for problem in page.problems]
    blocks = [block for page in READ.values() for block in page.bash]
    needs = Counter(block.needs for block in blocks if block.needs)
    replaced = sum(bool(block.stand_in) for block in blocks)
    run = len(blocks) - replaced - needs.total()
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(needs.items())) or "none"
    with capsys.disabled():
        print(f"\ndocs: {run} blocks run, {replaced} replaced, {needs.total()} marked ({reasons})")


def folders(root: Path, classes: tuple[str, ...], sizes: list[tuple[int, int]], per_class: dict[str, int]) -> None:
    """Write root/<split>/<class>/<image>.jpg; a class is a tint, the last one has twice as many images."""
    for split, count in per_class.items():
        for name in classes:
            rng = np.random.default_rng(zlib.crc32(f"{split}/{name}".encode()))
            tint = np.random.default_rng(zlib.crc32(name.encode())).uniform(60, 200, 3)
            (root / split / name).mkdir(parents=True)
            for i in range(count * (1 + (name == classes[-1]))):
                image = photograph(rng, *sizes[i % len(sizes)], tint)
                image.save(root / split / name / f"{i:03d}.jpg", quality=90)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a home directory of its own and the programs of this Python, in which no server answers."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"HOME": str(tmp_path_factory.mktemp("home")), "PATH": path, **OFFLINE}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str]) -> Iterator[Path]:
    """A clone with what a reader of the docs has by then, all small: .venv, photos/{train,val}/<class>/,
    data/fashion-mnist/{train,val} and the finished run runs/demo."""
    root = tmp_path_factory.mktemp("docs") / "dist_train"
    adding.copied(root)
    (root / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        if (Path(sys.prefix) / part).exists():
            (root / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    (root / ".venv" / "ready").touch()
    folders(root / "photos", PHOTOS, [(80, 96), (110, 75)], {"train": 14, "val": 4})
    folders(root / "small", CLOTHES, [(28, 28)], {"train": 24, "val": 5})
    for split in ("train", "val"):
        packed = root / "data" / "fashion-mnist" / split
        pack(ImageFolder(root / "small" / split), packed, Options(shorter_side=0), split=split, workers=2)
    shutil.rmtree(root / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        command = python("dist_train", "--run.name=demo", "--train.epochs=1")
        result = finish(spawn(command, env={**home, "PYTHONPATH": str(root)}, how="exec"))
    assert result.returncode == 0, result.stderr
    yield root
    shutil.rmtree(root)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, page in READ.items() if any(block.commands for block in page.bash)])
def test_the_commands_of_a_page(
    name: str, tree: Path, home: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From top to bottom in a clone, as somebody types them who follows the page."""
    clone = tmp_path / "dist_train"
    shutil.copytree(tree, clone, symlinks=True)
    monkeypatch.chdir(clone)
    monkeypatch.delenv("DIST_TRAIN_NOTIFY", raising=False)
    try:
        docs.check(READ[name], tmp_path, {**home, "PYTHONPATH": str(clone)}, LIMIT)
    finally:
        shutil.rmtree(clone)


def test_the_readme_is_short() -> None:
    lines = NAMES["README.md"].read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert not [line for line in lines if len(line) > 120]


def test_lines_are_short() -> None:
    """But rows of tables, which Markdown cannot break."""
    long = []
    for name, page in NAMES.items():
        lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        long += [f"{name}:{number}" for number, line in lines if len(line) > 120 and not line.startswith("|")]
    assert not long


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere() -> None:
    lost = []
    for name, page in NAMES.items():
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
            target, _, anchor = "".join(link).partition("#")
            if "://" in target:
                continue
            to = page.parent / target if target else page
            if not to.exists() or (anchor and anchor not in anchors(to.read_text(encoding="utf-8"))):
                lost.append(f"{name}: {''.join(link)}")
    assert not lost


def test_the_tests_that_the_pages_name_exist() -> None:
    """Each promise stands beside the test that holds it."""
    missing, count = [], 0
    for name, page in NAMES.items():
        file = ""
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for named in re.findall(r"`(?:tests/)?((?:slurm/)?test_\w+\.py)?(?:::(test_\w+)(\.\.\.)?)?`", line):
                file, count = named[0] or file, count + 1
                path = ROOT / "tests" / file
                test = f"def {named[1]}{'' if named[2] else '('}" if named[1] else "def test_"
                if any(named) and not (path.is_file() and test in path.read_text(encoding="utf-8")):
                    missing.append(f"{name}:{number}: {'::'.join(named[:2])}")
    assert count > 50
    assert not missing


WORDS = {
    "a fence that is not closed": "```bash\ntrue",
    "code that is not found here": "> ```bash",
    "code that is not found here: begin": "\tmake demo",
    "unknown mark, stand-in: true": "<!-- stand-in: true -->\n```bash\nmake\n```",
    "sh": "```sh\ntrue\n```\n",
    "of no language": "```\ntrue\n```\n",
    "indented": "Type\n\n    make demo\n",
    "prompt": "```bash\n$ make demo\n```\n",
    "unknown mark, needs: time": "<!-- needs: time -->\n```bash\ntrue\n```\n",
    "unknown mark, skip: slow": "<!-- skip: slow -->\n```bash\ntrue\n```\n",
    "unknown mark, stand-in: ": "<!-- stand-in: -->\n```bash\ntrue\n```\n",
    "more than one mark": "<!-- needs: GPU -->\n<!-- stand-in: make -->\n```bash\ntrue\n```\n",
    "a comment that is none": "<!-- not tested -->\n```bash\ntrue\n```\n",
    "not directly above": "<!-- needs: GPU -->\n\n```bash\ntrue\n```\n",
    "above a block of text": "<!-- needs: GPU -->\n```text\ntrue\n```\n",
    "no bash": "```bash\nif true\n```\n",
    "no python": "```python\nclass\n```\n",
    "no yaml": "```yaml\na: [\n```\n",
}


@pytest.mark.parametrize(("said", "text"), WORDS.items(), ids=WORDS)
def test_what_is_against_the_rules_is_found(said: str, text: str) -> None:
    (problem,) = docs.read(f"# A page\n\n{text}\nMore.\n").problems
    assert said in problem


def test_what_a_page_may_hold() -> None:
    """Marks, stand-ins of several lines, and in lists what is indented there."""
    page = docs.read(
        "# A page\n\n<!-- needs: GPU -->\n```bash\nnvidia-smi\n```\n- an item\n\n    goes on, and its\n\n"
        "  ```bash\n  true\n  ```\n\n<!-- stand-in: true\ntrue -->\n```bash\nmake\n```\nprints\n\n```text\ndone\n```\n"
        "## Next\n```text\nno output\n```\n<!-- of no meaning -->\n"
    )
    assert page.problems == []
    assert [block.commands for block in page.bash] == ["", "true", "true\ntrue\n"]
    assert [block.output for block in page.bash] == ["", "", "done\n"]


BROKEN = {
    "a command that fails": ("```bash\ntrue\n```\n```bash\nfalse\n```\n", "line 4\nexit code 1: false"),
    "one in a pipe": ("```bash\nfalse | cat\n```\n", "exit code 1"),
    "a variable that nobody has set": ("```bash\necho $NOBODY\n```\n", "NOBODY: unbound variable"),
    "other output": ("```bash\necho 3 files\n```\n```text\n5 images\n```\n", "no line like '5 images'"),
    "lines between": ("```bash\nprintf 'a\\nb\\nc\\n'\n```\n```text\na\nc\n```\n", "no line like 'c'"),
    "a stand-in that fails": ("<!-- stand-in: false -->\n```bash\ntrue\n```\n", "exit code 1: false"),
    "what a block left behind": ("```bash\nsleep 60 &\n```\n", "processes are left"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_page_that_does_not_hold_is_found(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(docs, "PATIENCE", 0.3)
    with pytest.raises(AssertionError, match=re.escape(said)):
        docs.check(docs.read(text), tmp_path, {}, 30)


def test_output_is_compared_in_its_fixed_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = "epoch  2/3: error 13.83%, 1:02:03 left\nany\nany\nrun  runs/own-20261126-2103\nby 0a1b2c3d, 2 min\n"
    shown = "epoch 3/3: error 9.1%, 0:04 left\n...\nrun      runs/own-20250101-0000\nby 00ffee11, 30 s"
    (tmp_path / "printed").write_text(printed)
    docs.check(docs.read(f"```bash\ncat printed\n```\n```text\n{shown}\n```\n"), tmp_path, {}, 30)
    assert "error" in docs.difference(shown.replace("error", "errors"), printed)
