"""The page of a run, without a browser: what it holds, how it is escaped, what it forbids, how large it is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.__main__ import main
from dist_train.page.bottleneck import bottleneck
from dist_train.page.inlined import pictures
from dist_train.page.marks import happenings, marks
from dist_train.page.report import page_names, rendered, script_json
from dist_train.page.series import BUCKETS, STEP, DrawnLines, LineDrawn, logarithmic, recorded
from dist_train.page.told import confused, differing, phases
from dist_train.page.wording import spoken
from dist_train.rundir.overview import overview
from tests.helpers import recorded_runs

ROOT = Path(__file__).parent.parent
VOID = {"meta", "link", "img", "rect"}


class Read(HTMLParser):
    """A page as a browser takes it apart: the tags with their attributes, the text of each script and style."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[dict[str, str | None], str, str]] = []
        self.text = ""
        self._at = ""
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._at = tag
        if tag in ("script", "style"):
            self.inside.append((dict(attrs), tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._at = ""

    def handle_data(self, data: str) -> None:
        if self._at in ("script", "style"):
            attributes, tag, text = self.inside[-1]
            self.inside[-1] = (attributes, tag, text + data)
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        (text,) = (text for attributes, _, text in self.inside if attributes.get("id") == "data")
        found: dict[str, Any] = json.loads(text)
        return found

    @property
    def policy(self) -> dict[str, list[str]]:
        (policy,) = (str(a["content"]) for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")
        return {name: sources for name, *sources in (part.split() for part in policy.split(";"))}


def now_of(run: Path) -> float:
    """A moment after its last heartbeat."""
    return float(json.loads((run / "status.json").read_text())["heartbeat"]) + 5


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_runs.killed_twice(tmp_path_factory.mktemp("runs") / "killed")


@pytest.fixture(scope="module")
def page(killed: Path) -> Read:
    return Read(rendered([killed], now_of(killed)))


def test_every_recorded_number_is_in_the_data(killed: Path, page: Read) -> None:
    """As many lines as this run has are not thinned."""
    (run,) = page.data["runs"]
    for kind, curves in (("step", ("loss", "train_error", "lr", "grad_norm")), ("validation", ("top1_error",))):
        lines = lines_of(killed, kind)
        for name in curves:
            assert run["curves"][name]["y"] == pytest.approx([line[name] for line in lines], rel=1e-6)
            places = [run["rows"]["images"][at] for at in run["curves"][name]["at"]]
            assert places == [line["images"] for line in lines]
    waits = [line["machine"]["data_wait_worst"] for line in lines_of(killed, "step")]
    assert run["curves"]["data_wait_worst"]["y"] == pytest.approx(waits)
    assert run["extremes"] == {}


def test_the_policy_names_each_script_and_style_and_nothing_else(page: Read) -> None:
    """CSP Level 3: the hash is that of the text between the tags; a block of data is no script."""
    for tag in ("script", "style"):
        texts = [text for attributes, name, text in page.inside if name == tag and "type" not in attributes]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert len(texts) == 2
        assert page.policy[f"{tag}-src"] == [f"'sha256-{found}'" for found in hashes]
    others = {name: sources for name, sources in page.policy.items() if not name.startswith(("script", "style"))}
    assert others == {
        "default-src": ["'none'"], "img-src": ["data:"], "base-uri": ["'none'"], "form-action": ["'none'"]
    }  # fmt: skip
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert str(attributes.get(name, "data:")).startswith("data:"), tag


def test_the_contract_of_its_parts(page: Read) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    charts = [f"chart-{key}" for key in ("loss", "error", "lr", "grad_norm", "images_per_s", "data_wait")]
    assert {"summary", "wall-time", "confusion", "classes", "data", *charts} <= set(ids)
    assert "settings" not in ids, "of several runs only"
    (line,) = (a for tag, a in page.tags if tag == "p" and a.get("class") == "run")
    assert (line["data-run"], line["data-state"]) == ("killed", "done")


def test_no_name_becomes_a_tag(tmp_path: Path) -> None:
    """The page of a run full of hostile names has the very tags of one with the names' letters alone."""
    attacks = recorded_runs.ATTACKS
    attacked = recorded_runs.attacked(tmp_path / "attacked")
    recorded_runs.ATTACKS = tuple(f"name {i}" for i in range(len(attacks)))
    recorded_runs.SCRIPT, script = "a script", recorded_runs.SCRIPT
    try:
        plain = recorded_runs.attacked(tmp_path / "plain")
    finally:
        recorded_runs.ATTACKS, recorded_runs.SCRIPT = attacks, script
    hostile, tame = (Read(rendered([run], now_of(run))) for run in (attacked, plain))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in tame.tags]
    assert [sorted(a) for _, a in hostile.tags] == [sorted(a) for _, a in tame.tags]
    assert attacks[0] in hostile.text
    assert script in hostile.text
    (line,) = (a for _, a in hostile.tags if "data-run" in a)
    assert line["data-run"] == attacked.name
    (text,) = (text for attributes, _, text in hostile.inside if attributes.get("id") == "data")
    assert not set(text) & set("<>&\u2028\u2029")
    assert not set(hostile.text) & set("\u2028\u2029\u202e\x07"), "what would turn or hide other text is escaped"


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "a\u2028b\u2029c", "&amp;", '"\\', "\udc80 \u202e"])
def test_json_in_a_script_tag(text: str) -> None:
    made = script_json({text: [text, 1.5, None]})
    assert made.isascii()
    assert not set(made) & set("<>&")
    assert json.loads(made) == {text: [text, 1.5, None]}


def columns_of(values: list[float | None]) -> DrawnLines:
    columns = DrawnLines(STEP)
    for i, value in enumerate(values, 1):
        columns.take(LineDrawn(kind="step", step=i, images=128.0 * i, loss=value), i / 1000)
    return columns


def test_thinning_invents_nothing_and_loses_no_extreme() -> None:
    """Each point that is shown was recorded, and in each 1/500 of the run, no value is outside of the extremes that are
    shown around it."""
    rng = np.random.default_rng(0)
    values = rng.standard_cauchy(45_000)
    line, extremes = columns_of(values.tolist()).thinned("loss", BUCKETS)
    for point in (*line, *extremes):
        assert point.value == values[point.step - 1]
        assert point.images == 128 * point.step
    assert len(line) <= BUCKETS + 2
    assert len(extremes) <= 2 * BUCKETS
    assert (line[0].step, line[-1].step) == (1, 45_000)
    shown = {point.step: point.value for point in extremes}
    assert {values.min(), values.max()} <= set(shown.values())
    for begin in range(0, 45_000, 90):
        around = [value for step, value in shown.items() if begin - 120 <= step <= begin + 210 and value is not None]
        part = values[begin : begin + 90]
        assert min(around) <= part.min()
        assert part.max() <= max(around)
    for point in line[1:-1]:  # the median of 112 or 113 values around it
        around = values[max(0, point.step - 113) : point.step + 113]
        assert np.quantile(around, 0.2) < (point.value or 0) < np.quantile(around, 0.8)


def test_what_is_not_finite_is_a_gap_and_what_is_missing_is_nothing() -> None:
    line, _ = columns_of([1.0, float("nan"), None, float("inf"), 2.0]).thinned("loss", BUCKETS)
    assert [(point.step, point.value) for point in line] == [(1, 1.0), (2, None), (4, None), (5, 2.0)]
    values = [1.0] * 20_000
    values[7000] = float("nan")
    line, _ = columns_of(list(values)).thinned("loss", BUCKETS)
    assert [point.step for point in line if point.value is None] == [7001]


def test_a_diverged_run(tmp_path: Path) -> None:
    run = recorded_runs.diverged(tmp_path / "diverged")
    page = Read(rendered([run], now_of(run)))
    curve = page.data["runs"][0]["curves"]["loss"]
    assert curve["y"][-1] is None
    assert "loss" in page.data["runs"][0]["logarithmic"]
    assert "diverged" in page.text
    assert "the loss is not finite" in page.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2, 3], False), ([2, 1, 1, 50], True), ([0, 1, 1, 50], False), ([None, 1e5, 2e5], True), ([], False)],
)
def test_a_spike_makes_an_axis_logarithmic(values: list[float | None], expected: bool) -> None:
    assert logarithmic(values) == expected


def test_ninety_epochs_with_pictures(tmp_path: Path) -> None:
    """45,000 lines and 1000 classes: below 3 MB, in seconds, in a memory that the lines do not fill."""
    run = recorded_runs.imagenet(tmp_path / "imagenet")
    assert len(lines_of(run, "step")) == 45_000
    program = """if True:
        import resource, sys, time
        from pathlib import Path
        from dist_train.page.report import rendered
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        page = rendered([Path(sys.argv[1])], time.time())
        used = resource.getrusage(resource.RUSAGE_SELF)
        assert "torch" not in sys.modules
        print(len(page), used.ru_maxrss - before, used.ru_utime)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], cwd=ROOT, capture_output=True, check=True, timeout=100
    )
    size, memory, seconds = map(float, done.stdout.split())
    assert size < 3_000_000
    assert memory < 120_000, "kB"
    assert seconds < 20


WAITS = {"images_per_s": 1000.0, "data_wait": 0.31, "data_wait_worst": 0.44, "worst_rank": 3, "worst_node": "gpu-07"}
CALM = WAITS | {"data_wait": 0.004, "data_wait_worst": 0.01}
STEPS = {"training": 70.0, "data": 5.0, "validation": 5.0, "startup": 1000.0, "down": 5000.0}


@pytest.mark.parametrize(
    ("machine", "validation", "saving", "gpu", "expected"),
    [
        (WAITS, 0.0, 0, True, "waits for data 31 % of the time, worst on gpu-07, rank 3: more CPUs per rank, or"),
        (WAITS | {"data_wait": 0.1}, 0.0, 0, True, "rank 3 on gpu-07 waits for data 44 % of the time, the average"),
        (CALM, 0.3, 0, True, "validation takes 30 % of an epoch"),
        (CALM, 0.0, 20, True, "stands still 20 % of the time to save: raise checkpoint.minutes"),
        (CALM | {"save_seconds": 2.0}, 0.0, 2, True, "the net itself"),
        (CALM | {"nodes": {"gpu-02": {"throttled": ["hw_thermal"]}}}, 0.0, 0, True, "a GPU of gpu-02 runs at reduced"),
        (CALM, 0.05, 0, True, "limited by the net itself, which waits for data 0.4 % of the time: more GPUs"),
        (CALM, 0.05, 0, False, "of the time: a GPU"),
        ({"worst_node": 7, "nodes": [], "data_wait": "much"}, 0.0, 0, True, "the net itself"),
    ],
)  # fmt: skip
def test_what_limits_the_speed(
    machine: dict[str, Any], validation: float, saving: float, gpu: bool, expected: str
) -> None:
    """The third epoch ends at 300,000 images: at 1000 images/s each takes 100 s and its validation."""
    recent = [{"images": 2000 * i, "machine": machine} for i in range(1, 9)]
    seconds = 100 * validation / (1 - validation)
    checked = {"images": 300_000, "epoch": 2, "machine": {"seconds": seconds, "epoch_seconds": seconds + 3}}
    assert expected in bottleneck(recent, checked, STEPS | {"saving": saving}, 256, gpu=gpu)


def test_no_rank_is_blamed_for_all() -> None:
    """In each line another rank has waited longest."""
    recent = [{"machine": WAITS | {"data_wait": 0.05, "worst_rank": i, "worst_node": f"gpu-{i}"}} for i in range(8)]
    told = bottleneck(recent, None, {}, 256, gpu=True)
    assert told.startswith("one rank or another waits for data 44 % of the time, the average rank 5 %: more CPUs per")


def test_what_limits_the_speed_of_this_start(tmp_path: Path) -> None:
    """Not its first line, in which the loader fills up, and none of an earlier start."""
    story = recorded_runs.Story(tmp_path / "run", data_wait=0.5)
    story.start()
    story.train(200)
    story.save()
    story.die()
    story.data_wait = 0.6
    story.start()
    for until, wait, expected in ((220, 0.001, ""), (320, 0.001, "limited by the net itself")):
        story.train(until)
        story.data_wait = wait
        run = story.write("running")
        told = re.search(r"Speed:(.*)", Read(rendered([run], now_of(run))).text)
        assert (told[1].strip() if told else "").startswith(expected)
        assert bool(told) == bool(expected)


def test_many_runs_have_a_page_that_a_browser_bears(tmp_path: Path) -> None:
    run = recorded_runs.healthy(tmp_path / "run-0", epochs=4, every=1, divided=())
    runs = [run, *(tmp_path / f"run-{i}" for i in range(1, 50))]
    for path in runs[1:]:
        path.symlink_to(run)
    assert len(rendered(runs, now_of(run))) < 4_000_000


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(9.94, "9.9 s"), (59, "59 s"), (61, "1 min 1 s"), (713, "12 min"), (5400, "1 h 30 min"), (71_940, "20 h")],
)
def test_a_duration_is_rounded(seconds: float, expected: str) -> None:
    assert spoken(seconds) == expected


def test_marks_are_where_it_happened() -> None:
    told: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "world_size": 8, "nodes": ["a"]},
        {"event": "bad_samples", "step": 100, "samples": 1},
        {"event": "bad_samples", "step": 101, "samples": 2},
        {"event": "killed", "node": "a", "reason": "out of memory"},
        {"event": "start", "step": 500, "world_size": 4, "nodes": ["b"]},
        {"event": "changed", "step": 500, "settings": {"optim.lr": [0.1, 0.2]}, "code": [{"sources": "x"}, "y"]},
        {"event": "division", "step": 900, "lr": 0.02, "error": 0.5},
    ]
    found = marks(happenings(told), 128.0, 128.0 * 1000)
    assert [(mark.kind, mark.images) for mark in found] == [
        ("bad_samples", 12_800), ("restart", 64_000), ("world_size", 64_000), ("code", 64_000), ("settings", 64_000),
        ("division", 115_200),
    ]  # fmt: skip
    titles = {mark.kind: mark.title for mark in found}
    assert titles["bad_samples"].startswith("2 samples")
    assert "out of memory" in titles["restart"]
    assert titles["world_size"] == "world size 8 → 4"
    assert titles["settings"] == "settings changed: optim.lr: 0.1 → 0.2"
    assert titles["division"] == "learning rate divided, to 0.02 at an error of 50.00 %"


def test_wall_time_adds_up(killed: Path) -> None:
    seconds = json.loads((killed / "status.json").read_text())["seconds"]
    found = phases(seconds)
    assert [phase.key for phase in found] == [key for key, value in seconds.items() if value > 0]
    assert sum(phase.width for phase in found) == pytest.approx(1000, abs=0.1)
    assert found[-1].x + found[-1].width == pytest.approx(1000, abs=0.1)


def test_confusion_is_that_of_the_file(killed: Path) -> None:
    found = confused(killed)
    with np.load(killed / "confusion.npz") as file:
        matrix = np.zeros((10, 11), int)
        matrix[file["label"], file["predicted"]] = file["count"]
        np.fill_diagonal(matrix, file["top1"])
        errors = 1 - file["top1"] / file["samples"]
    assert [[cell.images for cell in row] for row in found.rows] == matrix[:, :10].tolist()
    assert found.worst[0][0] == recorded_runs.CLOTHES[int(errors.argmax())]


def test_several_runs(tmp_path: Path) -> None:
    runs = recorded_runs.three(tmp_path / "sweep")
    now = max(map(now_of, runs))
    page = Read(rendered(runs, now))
    assert [a["data-run"] for _, a in page.tags if "data-run" in a] == ["lr-0.01", "lr-0.02", "lr-0.005"]
    assert differing([overview(run, now) for run in runs]) == [
        ("model.dropout", ["0.5", "0.3", "0.5"]),
        ("optim.lr", ["0.01", "0.02", "0.005"]),
        ("train.seed", ["3", "4", "5"]),
    ]


def test_names_tell_runs_apart() -> None:
    names = page_names([Path("/a/x/run"), Path("/b/y/run"), Path("/c/run"), Path("runs/demo")])
    assert names == ["x/run", "y/run", "c/run", "demo"]


def test_a_run_without_a_heartbeat_does_not_look_alive(tmp_path: Path) -> None:
    run = recorded_runs.three(tmp_path / "sweep")[2]
    alive, dead = (Read(rendered([run], now_of(run) + age)) for age in (0, 7200))
    states = [next(a["data-state"] for _, a in page.tags if "data-state" in a) for page in (alive, dead)]
    assert states == ["running", "silent"]
    assert "no heartbeat for 2 h" in dead.text
    assert " left" not in dead.text.partition("Speed")[0]


FILES = ("config.yaml", "status.json", "metrics.jsonl", "events.jsonl", "confusion.npz")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", [b"", b"\0garbage\n{", b"[1]\n[2]\n", None])
def test_a_damaged_run_has_a_page(name: str, text: bytes | None, tmp_path: Path) -> None:
    run = recorded_runs.healthy(tmp_path / "run", epochs=1, divided=())
    now = now_of(run)
    (run / name).unlink()
    if text is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(text)
    page = Read(rendered([run], now))
    if text and name in ("status.json", "metrics.jsonl", "confusion.npz"):
        assert name in page.text, "it is named"


ODD: tuple[Any, ...] = (None, "x", [], {}, -1, 1e308, float("nan"), True, [1, "a", None], {"a": {}}, "</script>", 2**60)


@pytest.mark.parametrize("seed", range(4))
def test_lines_with_values_of_any_type(killed: Path, seed: int, tmp_path: Path) -> None:
    """One value in each third line is something else: there is a page, whose data are JSON."""
    rng, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(killed, run)

    def changed(line: str) -> str:
        found = json.loads(line)
        place = found
        while rng.random() < 0.6 and (
            inner := [value for value in place.values() if isinstance(value, dict) and value]
        ):
            place = rng.choice(inner)
        if rng.random() < 0.3:
            place[rng.choice(list(place))] = rng.choice(ODD)
        return json.dumps(found)

    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (run / name).read_text().splitlines()
        (run / name).write_text("".join(changed(line) + "\n" for line in lines))
    status = (run / "status.json").read_text()
    for _ in range(10):
        (run / "status.json").write_text(changed(status))
        assert Read(rendered([run], 1.79e9)).data["runs"]


def test_images_beyond_all_bounds(killed: Path, tmp_path: Path) -> None:
    """Times the steps of a mark they would be infinite."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    line = lines_of(run, "step")[-1] | {"images": 1e308}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    assert "1 line of metrics.jsonl left out" in Read(rendered([run], now_of(run))).text


def test_steps_that_fall_are_left_out_and_named(killed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"kind": "probe", "step": 1000000}\n' + text)
    told = Read(rendered([run], now_of(run))).text
    assert f"{text.count(chr(10))} lines of metrics.jsonl left out: line 2, its step is lower than one before" in told


def test_runs_that_have_hardly_begun(tmp_path: Path) -> None:
    """Nothing; a configuration alone; a single record."""
    empty, begun, single = (tmp_path / name for name in ("empty", "begun", "single"))
    empty.mkdir()
    begun.mkdir()
    (begun / "config.yaml").write_text("optim: {lr: 0.1}\n")
    single.mkdir()
    line = {"kind": "step", "step": 20, "epoch": 0, "progress": 0.1, "images": 2560, "loss": 2.3, "lr": 0.01}
    (single / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "st')
    for run in (empty, begun, single):
        page = Read(rendered([run], 1e9))
        assert "not validated yet" in page.text
        assert "Nothing yet" in page.text
    assert page.data["runs"][0]["curves"]["loss"] == {"at": [0], "y": [2.3]}


def test_a_record_of_the_first_version() -> None:
    found = recorded(ROOT / "tests" / "fixtures" / "old" / "run")
    assert found.curves["images_per_s"][0].value == pytest.approx(157.43944578790777)
    assert found.curves["loss"][0].images == 8


def test_a_hole_in_the_record_ends_it(tmp_path: Path) -> None:
    line = {"kind": "step", "step": 20, "progress": 0.1, "images": 2560, "loss": 2.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    os.truncate(tmp_path / "metrics.jsonl", 1 << 40)
    found = recorded(tmp_path)
    assert [point.value for point in found.curves["loss"]] == [2.3]
    assert found.damaged[1] == 1


def test_pictures_fit_their_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    for name in ("wrong", "kernels"):
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{name}.png")
    Image.fromarray(noise[:20, :20]).save(tmp_path / "pictures" / "inputs.png")
    (tmp_path / "pictures" / "top5.png").write_bytes(b"<svg onload=alert(1)>")
    found, wrong = pictures(tmp_path, 400_000)
    assert [picture.name for picture in found] == ["inputs", "wrong", "kernels"]
    assert sum(len(picture.uri) for picture in found) <= 400_000
    small = base64.b64decode(found[0].uri.partition(",")[2])
    assert small == (tmp_path / "pictures" / "inputs.png").read_bytes(), "what fits stays as it is"
    assert len(wrong) == 1
    assert "pictures/top5.png" in wrong[0]


def test_a_picture_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("L", (12_000, 12_000)).save(tmp_path / "pictures" / "wrong.png")
    found, wrong = pictures(tmp_path, 1 << 20)
    assert found == []
    assert "pixels" in wrong[0]
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "pictures" / "wrong.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    assert pictures(tmp_path, 1 << 20)[1] == wrong, "no word of options that this program does not have"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = recorded_runs.three(tmp_path / "sweep")
    assert main(["report", str(runs[0])]) == 0
    written = runs[0] / "report.html"
    assert capsys.readouterr().out.startswith(str(written))
    assert Read(written.read_bytes()).data["live"] == 0
    assert main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "sweep" / "report-of-3-runs.html").exists()
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists()
    capsys.readouterr()
    for words, sentence in (
        (["report", str(tmp_path / "nothing")], "there is no run"),
        (["report", str(tmp_path)], "there is no run"),
        (["report", str(runs[0]), "--out", str(tmp_path / "no" / "page.html")], "name another place by --out"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.splitlines()) == 1


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    run = recorded_runs.healthy(tmp_path / "run", epochs=1, divided=())
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / "report.html").symlink_to(victim)
    assert main(["report", str(run)]) == 0
    assert victim.read_text() == "mine"
    assert not (run / "report.html").is_symlink()


def test_ours_is_small_and_asks_for_nothing() -> None:
    """The words by which a script or a style would reach a network, or make code of text, are in none of our files."""
    for name in ("page.js", "page.css", "page.html"):
        text = (ROOT / "dist_train" / "page" / name).read_text(encoding="utf-8")
        assert not re.search(
            r"https?://|url\(|@import|fetch\(|XMLHttp|innerHTML|insertAdjacent|\beval\b|Function\(", text
        )
        assert len(text) < 20_000
