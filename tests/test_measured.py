"""The numbers of README, docs and configs are measured, and the tables drawn from their records."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest

from dist_train.__main__ import main
from dist_train.analysis.arms import known
from dist_train.analysis.recorded import ArmRun, EpochLine, StepLine
from tests.helpers import numbers
from tests.helpers.quantities import quantities, value_of


def test_each_measured_number_has_a_marker() -> None:
    assert numbers.main([]) == 0, "see what it printed"


def test_measurements_say_how_they_were_made() -> None:
    entries = numbers.entries()
    assert list(entries) == sorted(entries)
    for name, entry in entries.items():
        assert list(entry) == ["command", "machine", "date", "values"], name
        assert entry["command"], name
        assert entry["machine"], name
        assert date.fromisoformat(entry["date"]), name
        assert entry["values"], name
        for value in entry["values"].values():
            assert numbers.values_of(value), name


# What a text says, and the numbers that are found in it
FOUND = {
    "24.30 %, 0.65 %": ["24.30 %", "0.65 %"],
    "40.7 % top-1, 18.2 % top-5": ["40.7 %", "18.2 %"],
    "33.9 and 34.9 %": ["33.9 %", "34.9 %"],
    "within 7, 2 and 5 points": ["7 points", "2 points", "5 points"],
    "24.3 ± 0.4 %": ["24.3 %", "0.4 %"],
    "24.3 % +- 0.4": ["24.3 %", "0.4 %"],
    "35.43% (33.53% to 37.53%)": ["35.43 %", "33.53 %", "37.53 %"],
    "35.4 % (33.5 to 37.5)": ["35.4 %", "33.5 %", "37.5 %"],
    "35.4 (33.5 to 37.5) %": ["35.4 %", "33.5 %", "37.5 %"],
    "ten per cent": ["ten per cent"],
    "a 20-minute run": ["20 minute"],
    "160 to 210 steps": ["160 steps", "210 steps"],
    "160–210 steps": ["160 steps", "210 steps"],
    "at steps 160, 180 and 210 (three seeds)": ["steps 160", "steps 180", "steps 210"],
    "before step 0 / 10 / 100": ["step 0", "step 10", "step 100"],
    "step 105 (100 to 110), 50 %": ["step 105", "step 100", "step 110", "50 %"],
    "at step 5, 30 % of": ["step 5", "30 %"],
    "below 80 % at step 1,820": ["80 %", "step 1,820"],
    "150~420 스텝에 학습을": ["150 스텝", "420 스텝"],
    "901 thousand steps, 2.5k images/second": ["901 thousand steps", "2.5k images/second"],
    "Twenty-five per cent in 10 mins": ["Twenty-five per cent", "10 mins"],
    "1.5e3 steps, 12 ms and 40 us per image": ["1.5e3 steps", "12 ms", "40 us"],
    "Two minutes; two to three hours; 5 days": ["Two minutes", "two hours", "three hours", "5 days"],
    "8 core-hours": ["8 core-hours"],
    "487 images/s, 20 steps a second, 4 MB per second": ["487 images/s", "20 steps a second", "4 MB per second"],
    "eight times smaller, 2.6 times later, 3x": ["eight times", "2.6 times", "3 x"],
    "ten times this, by a factor of 8": ["ten times", "factor of 8"],
    "24 % in place of 25 and 26 vs. 27 %": ["24 %", "25 %", "26 %", "27 %"],
    "487 images / s, 3 steps/sec, 3 steps every second": ["487 images / s", "3 steps/sec", "3 steps every second"],
    "at iteration 300, after 400 iterations, 1.8-fold": ["iteration 300", "400 iterations", "1.8 fold"],
    "300 more steps, 3.5 percentage points": ["300 steps", "3.5 points"],
    "5 μs, 5 microseconds, 5 milliseconds": ["5 μs", "5 microseconds", "5 milliseconds"],
    "two hundred steps, seventeen minutes": ["two hundred steps", "seventeen minutes"],
    "with seed 1, 24.3 %, at lr 0.01 and 24 %, in fc 7, 98 %": ["24.3 %", "24 %", "98 %"],
    "twice as long, Twice the": ["twice", "twice"],
    "9 to 10 times": ["9 times", "10 times"],
    "14.53\nto 15.14\n%": ["14.53 %", "15.14 %"],
    # not measured numbers:
    "top-1, fc 7, conv 1 and 2, 2^0.75, 11x11, 30 x 30 x 2, lr 0.01, 60 epochs, 256 pixels, 3 GB": [],
    "twice on the same inputs; three times, then it stops": [],
    "an hour, a point or two, one step, half the steps, a third of it": [],
    "on 8x H100, 2 × A100": [],
    "version 2.5.1 s": [],
}


@pytest.mark.parametrize("text", FOUND)
def test_numbers_with_a_unit_are_found(text: str) -> None:
    assert [number.text for number in quantities(text)] == FOUND[text]


def test_a_unit_is_one_of_several_names() -> None:
    seconds = [quantities(text)[0].value for text in ("7200 s", "120 min", "two hours", "2 h", "7200000 ms")]
    assert seconds == pytest.approx([7200] * 5)
    assert [number.value for number in quantities("10 to 25 thousand images/s")] == [10_000, 25_000]


AGREE = {
    "24 %": "24.30 %",
    "24.3 %": "24.30 %",
    "2 minutes": "119.2 s",
    "two minutes": "119.2 s",
    "0.5 points": "0.46 %",
    "eight times as": "8.49",
    "1.2x": "1.15",
    "twice as": "2.2",
    "22 %": "0.222",
    "0.222 %": "0.222 %",
    "step 300": "300 steps",
    "about 1,700 steps": "1,712 steps",
    "about 20 %": "21.9 %",
    "two hundred steps": "200 steps",
    "487 images per second": "487 images/s",
    "2.5k images/second": "2,500 images/s",
    "twenty-five %": "25.4 %",
}
DISAGREE = {
    "24.31 %": "24.30 %",
    "25 %": "24.30 %",
    "2.0 minutes": "115 s",
    "about 1,700 steps": "1,751 steps",
    "about 20 %": "24.30 %",
    "1,700 steps": "1,701 steps",
    "24 s": "24 %",
    "24 times": "24 %",
    "8 core-hours": "8 hours",
    "487 images/s": "487 steps/s",
    "eight times as": "8.6",
    "twice as": "2.3",
}


@pytest.mark.parametrize(("text", "value"), AGREE.items())
def test_a_value_rounded_agrees(text: str, value: str) -> None:
    assert value_of(value).agrees(quantities(text)[0])


@pytest.mark.parametrize(("text", "value"), DISAGREE.items())
def test_another_value_does_not(text: str, value: str) -> None:
    assert not value_of(value).agrees(quantities(text)[0])


def records() -> numbers.Records:
    def layers(signal: float) -> dict[str, dict[str, float]]:
        return {"towers.0.fc7": {"signal": signal, "dead": 0.98}, "towers.1.fc7": {"signal": 7 * signal, "dead": 0.98}}

    runs = [
        ArmRun(
            "as it is, 1: so",
            seed,
            momentum=0.9,
            steps=[StepLine(100, 2.0, 0.9), StepLine(end, 1.0, 0.4)],
            errors=[0.5, 0.25 + seed / 100],
            probes=[{"step": 10, "lr": 0.01, "loss": 2.5, "curvature": 190.0, "layers": layers(1e-3)}],
        )
        for seed, end in ((0, 200), (1, 220))
    ]
    runs.append(ArmRun("half", 0, steps=[StepLine(100, 2.0, 0.4)], errors=[0.5]))
    runs.append(ArmRun("half", 1, steps=[StepLine(150, 2.0, 0.9)], errors=[0.5]))
    epochs = [EpochLine(50 * i, lr, 1.5, 1.0, 0.3 - i / 100) for i, lr in enumerate([0.01, 0.01, 0.001, 0.001], 1)]
    runs.append(ArmRun("divided", 0, steps=[StepLine(200, 1.0, 0.4)], errors=[0.5, 0.35, 0.27, 0.28], epochs=epochs))
    entries: dict[str, dict[str, str | list[str]]] = {
        "demo": {
            "error": "24.30 %",
            "took": "2 minutes",
            "part": "1.3",
            "zero": "0 s",
            "twins": ["5", "5"],
            "pair": ["5", "7"],
            "row": ["27.8 ms", "37.0 ms", "20"],
        },
        "other": {"took": "3 minutes", "row": ["13.9 ms", "37.0 ms", "20"]},
    }
    return numbers.Records(entries, lambda name: runs if name == "small" else [])


def wrong(text: str, name: str = "page.md", drawn: tuple[str, ...] = ()) -> list[str]:
    return numbers.problems(name, text, drawn, records())


SMALL = "small/as it is, 1: so"
RIGHT = {
    "an entry": "<!-- measured: demo.error -->\nIt has 24.3 %.",
    "on several lines": "<!-- measured: demo.error;\n  demo.took -->\n- It has 24 %\n- after two\n  minutes.",
    "several comments": "<!-- measured: demo.error -->\n<!-- not measured: 90 %: a setting -->\n24 % of 90 %",
    "in one comment": "<!-- measured: demo.error\nnot measured: 90 %: derived, from ten classes -->\n24 % of 90 %",
    "a heading": "<!-- measured: demo.error -->\n## 24 %\n\nMore.",
    "in the order of the text": "<!-- measured: demo.took; demo.error; demo.took -->\ntwo minutes, 24 %, 2 minutes",
    "a ratio": "<!-- measured: other.took / demo.took -->\n1.5 times as long",
    "a mean": f"<!-- measured: {SMALL}/below 0.5; {SMALL}/error -->\nAt step 210, 25.5 %.",
    "least": f"<!-- measured: {SMALL}/least steps -->\nafter 200 steps",
    "most": f"<!-- measured: {SMALL}/most steps -->\nafter 220 steps",
    "a seed": f"<!-- measured: {SMALL}/seed 1 error -->\nOne had 26 %.",
    "least of those that did": "<!-- measured: small/half/least below 0.5 -->\nthe first after 100 steps",
    "a probe": f"<!-- measured: {SMALL}/stable lr at 10; {SMALL}/loss at 10 -->\nlr below 0.02, 2.5 nats",
    "the last steps": f"<!-- measured: {SMALL}/loss of the last 120 steps -->\n1.25 nats",
    "epochs": "<!-- measured: small/divided/training error; small/divided/validated below 0.4 -->\n26 % at step 100",
    "rates": "<!-- measured: small/divided/last error at lr 0.001; small/divided/lowest error at lr 0.01 -->\n28, 35 %",
    "epochs in number": "<!-- measured: small/divided/epochs; small/divided/steps -->\n4 epochs, 200 steps",
    "a layer in towers": f"<!-- measured: {SMALL}/signal fc 7 at 10; {SMALL}/dead fc7 at 10 -->\n0.005; 98 % are dead",
    "a list of the paper's": "<!-- not measured: 1.4, 0.4 and 2 points: the paper's -->\n1.4, 0.4 and 2 points",
    "a word": "<!-- not measured: twice, ten seconds: a setting -->\ntwice as long, ten seconds",
    "a row": "<!-- measured: demo.row -->\n| batch | | | |\n|---|---|---|---|\n| 28 | 27.8 ms | 37 ms | 20 |",
    "ratios of rows": "<!-- measured: demo.row / other.row -->\n| 2x | 1.0 | 1.00 |",
    "all": "<!-- not measured: all: published (Goyal et al.) -->\n24 % after 3 steps",
    "what is no text": "`90 %` [a](b-90%) <b title='90 %'>b</b> https://x.org/90% <!-- 90 % -->\n```text\n90 %\n```",
    "code over two lines": "a ``90\n%`` b",
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_a_page_may_say(case: str) -> None:
    assert wrong(f"# Page\n\n{RIGHT[case]}\n") == []


FAULTS = {
    "no marker": ("It has\n24 %.", "page.md:4: 24 %: no marker"),
    "a marker of another block": ("<!-- measured: demo.error -->\n24 %\n\n24 %", "page.md:6: 24 %: no marker"),
    "a heading without": ("## 24 %", "page.md:3: 24 %: no marker"),
    "a cell without": ("| a |\n|---|\n| 24 % |", "page.md:5: 24 %: no marker"),
    "a column without": ("| a | took (minutes) |\n|---|---|\n| b | 24 |", "page.md:5: 24 minutes: no marker"),
    "a column of errors": ("| error, % | n |\n|---|:-:|\n| 24.3 | 5 |", "page.md:5: 24.3 %: no marker"),
    "an item without": ("- a\n- b\n\n  24 %", "page.md:6: 24 %: no marker"),
    "a caption without": ("![24 %](a.png)", "page.md:3: 24 %: no marker"),
    "a link without": ("[24 %](a.md)", "page.md:3: 24 %: no marker"),
    "a quotation without": ("> in 24\n> steps", "page.md:3: 24 steps: no marker"),
    "a footnote without": ("[^1]: 24 %", "page.md:3: 24 %: no marker"),
    "HTML without": ("<td>24&nbsp;%</td>", "page.md:3: 24 %: no marker"),
    "emphasis without": ("**24** %", "page.md:3: 24 %: no marker"),
    "emphasis of another kind": ("_24 %_", "page.md:3: 24 %: no marker"),
    "beside a comment": ("<!-- a --> 24 %", "page.md:3: 24 %: no marker"),
    "after a fence": ("```text\n90 %\n```\n24 %", "page.md:6: 24 %: no marker"),
    "after a fence that ends longer": ("```text\n90 %\n````\n24 %", "page.md:6: 24 %: no marker"),
    "before a fence": ("24 %\n```text\n90 %\n```", "page.md:3: 24 %: no marker"),
    "another number": ("<!-- measured: demo.error -->\n24 %, 25 %", "25 %: no marker"),
    "another value": (
        "<!-- measured: demo.error; demo.took -->\n24 %",
        "demo.took: is 2, which no number of the block says",
    ),
    "no such entry": (
        "<!-- measured: demos.error; demo.error -->\n24 %",
        "demos.error: measurements.yaml has no demos",
    ),
    "no such value": ("<!-- measured: demo.err; demo.error -->\n24 %", "demo.err: measurements.yaml has no demo.err"),
    "no such experiment": ("<!-- measured: demo.error; large/x/steps -->\n24 %", "large.jsonl has no arm 'x'"),
    "no such arm": ("<!-- measured: demo.error; small/x/steps -->\n24 %", "small.jsonl has no arm 'x'"),
    "no such field": (f"<!-- measured: demo.error; {SMALL}/loss -->\n24 %", "'loss' is no field"),
    "no such step": (f"<!-- measured: demo.error; {SMALL}/loss at 3 -->\n24 %", "has no loss at 3"),
    "no such seed": (f"<!-- measured: demo.error; {SMALL}/seed 2 error -->\n24 %", "has no seed 2 error"),
    "a mean of some": ("<!-- measured: demo.error; small/half/below 0.5 -->\n24 %", "or not for each seed"),
    "the most of some": ("<!-- measured: demo.error; small/half/most below 0.5 -->\n24 %", "or not for each seed"),
    "a digit that happens to be near": ("<!-- measured: demo.part -->\n1 of them", "demo.part: is 1.3, which"),
    "a ratio of other things": (
        "<!-- measured: demo.error; demo.took / other.took -->\n24 %, 0.66",
        "demo.took / other.took: is 0.66667, which",
    ),
    "in another order": (
        "<!-- measured: demo.took; demo.error -->\n24 % in 2 minutes",
        "demo.error: is 24.3, which the block says before what is named before it",
    ),
    "a row in another order": ("<!-- measured: demo.pair -->\n7 and 5 of them", "demo.pair: is 5, 7, which"),
    "a row too short": ("<!-- measured: demo.twins -->\nonce 5, and", "demo.twins: is 5, 5, which"),
    "no reason": ("<!-- not measured: 24 %: so -->\n24 %", "24 %: 'so' is no reason"),
    "no name of what is published": ("<!-- not measured: 24 %: published -->\n24 %", "'published' is no reason"),
    "a number of another unit": (
        "<!-- not measured: 24 %: a setting -->\n24 % of 24 steps",
        "page.md:4: 24 steps: no marker",
    ),
    "a number that is not there": ("<!-- not measured: 24 %, 3 s: a setting -->\n24 %", "3 s: no number of the block"),
    "no number": ("<!-- not measured: 24 %, 3: a setting -->\n24 %", "3: is no number with a unit"),
    "all are settings": ("<!-- not measured: all: a setting -->\n24 %", "all: stands alone"),
    "a ratio to nothing": ("<!-- measured: demo.error; demo.took / demo.zero -->\n24 %", "float division by zero"),
    "all of none": ("<!-- not measured: all: a setting -->\nText.", "all: stands alone"),
    "all and one": ("<!-- measured: demo.error\nnot measured: all: derived -->\n24 %", "all: stands alone"),
    "a marker above nothing": ("<!-- measured: demo.error -->\n\nText.", "demo.error: is 24.3, which"),
    "a marker above a fence": ("<!-- measured: demo.error -->\n```text\n24 %\n```", "demo.error: is 24.3, which"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_found(case: str) -> None:
    text, said = FAULTS[case]
    (problem,) = wrong(f"# Page\n\n{text}\n")
    assert said in problem


TABLE = "| arm | error |\n| --- | --- |\n| a | 24.30% |\n"


def test_a_table_that_is_drawn_needs_no_marker() -> None:
    assert wrong(f"Text.\n\n{TABLE}\nText.\n", drawn=(TABLE,)) == []
    assert len(wrong(TABLE.replace("24.30", "24.31"), drawn=(TABLE,))) == 1
    assert len(wrong(f"{TABLE}| b | 24.30% |\n", drawn=(TABLE,))) == 2
    assert len(wrong(f"<!-- measured: demo.error -->\n{TABLE}", drawn=(TABLE,))) == 1


def test_the_head_of_a_configuration() -> None:
    head = "# A net.\n# Error:    24.30 % after\n#           two minutes; lr falls below 90 %.\n"
    marked = "# measured: demo.error;\n#   demo.took\n# not measured: 90 %: a setting\n"
    rest = "data:  # 3 s\n  x: y\n# 4 s\n"
    assert wrong(head + marked + rest, "a.yaml") == []
    without = wrong(head + rest, "a.yaml")
    assert [line.partition(": no")[0] for line in without] == [
        "a.yaml:2: 24.30 %",
        "a.yaml:3: two minutes",
        "a.yaml:3: 90 %",
    ]
    assert len(wrong(f"# A net.\n\n{head.removeprefix('# A net.')[1:]}{rest}", "a.yaml")) == 3
    (late,) = wrong(f"{head}{marked}# Time: 5 s\n{rest}", "a.yaml")
    assert late.startswith("a.yaml:7: 5 s: no marker")


def test_an_entry_that_is_named_is_known_to_be() -> None:
    own = records()
    numbers.problems("page.md", "<!-- measured: demo.error -->\n24 %\n", (), own)
    assert own.named == {"demo.error"}


RECORDED = sorted(path.stem for path in numbers.EXPERIMENTS.glob("*.jsonl"))


def tables_by_experiment() -> dict[str, dict[str, str]]:
    """The tables in docs/experiments, each by its file's name, of each experiment: NAME.md and NAME-*.md."""
    tables: dict[str, dict[str, str]] = {name: {} for name in RECORDED}
    for path in numbers.EXPERIMENTS.glob("*.md"):
        owners = [name for name in tables if f"{path.stem}-".startswith(f"{name}-")]
        assert owners, f"{path} has no records from which it could be redrawn"
        tables[max(owners, key=len)][path.name] = path.read_text("utf-8")
    return tables


def test_each_table_is_of_an_experiment() -> None:
    """Each experiment has records, and each of its tables stands in a page of docs, as it is."""
    assert known() == RECORDED
    pages = [path.read_text("utf-8") for path in sorted(numbers.ROOT.glob("docs/*.md"))]
    for name, tables in tables_by_experiment().items():
        assert tables, f"{name} has no table in docs/experiments"
        for file, table in tables.items():
            assert any(f"\n{table}\n" in page for page in pages), f"{file} stands in no page of docs"


@pytest.mark.integration
@pytest.mark.parametrize("name", RECORDED)
def test_tables_are_drawn_from_the_records(name: str, tmp_path: Path) -> None:
    """Byte for byte those in docs/experiments, which are those of the pages."""
    shutil.copy(numbers.EXPERIMENTS / f"{name}.jsonl", tmp_path)
    assert main(["experiments", name, "--draw-only", "--root", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.md")}
    assert drawn == tables_by_experiment()[name]
