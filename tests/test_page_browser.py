"""The page of runs as a browser shows it: in Chromium, without a window. References are the files of the runs."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from dist_train.page.report import rendered
from tests.helpers import recorded_runs
from tests.helpers.browser import MISSING, Shown, chromium, program
from tests.helpers.recorded_runs import ATTACKS, CLOTHES

pytestmark = [pytest.mark.integration]

CHARTS = ("loss", "error", "lr", "grad_norm", "images_per_s", "data_wait")
# Everything by which a page may reach a server; each is tried, and none may.
REACH = """async (to) => {
    const tries = [
        () => fetch(to + "fetch", {mode: "no-cors"}),
        () => new Promise((done) => { const i = new Image(); i.onload = i.onerror = done; i.src = to + "image"; }),
        () => new Promise((done) => { new WebSocket(to.replace("http", "ws") + "socket").onerror = done; }),
        () => navigator.sendBeacon(to + "beacon", "x"),
        () => new Promise((done) => {
            const s = document.createElement("script");
            s.onload = s.onerror = done; s.src = to + "script"; document.head.append(s);
        }),
        () => new Promise((done) => {
            const s = document.createElement("link");
            s.rel = "stylesheet"; s.onload = s.onerror = done; s.href = to + "style"; document.head.append(s);
        }),
        () => new Promise((done) => {
            const s = document.createElement("iframe");
            s.onload = done; s.src = to + "frame"; document.body.append(s);
        }),
    ];
    await Promise.all(tries.map(async (attempt) => { try { await attempt(); } catch {} }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not program():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def page_of(*runs: Path) -> Path:
    """The page of these runs a moment after the last heartbeat, in a file."""
    now = max(json.loads((run / "status.json").read_text())["heartbeat"] for run in runs) + 5
    path = runs[0].parent / f"{runs[0].name[:9]}.html"
    path.write_bytes(rendered(runs, now))
    return path


@pytest.fixture(scope="module")
def killed(browser: Browser, root: Path) -> Shown:
    """The page of a run that was killed twice, for all tests that only look."""
    return Shown(browser, page_of(recorded_runs.killed_twice(root / "killed")))


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def place(page: Page, chart: str, images: float, y: float | None = None) -> tuple[float, float]:
    """Where on the screen a point of a chart is; in the middle of its height without `y`."""
    x, y = page.evaluate(
        """([chart, x, y]) => {
            const u = window.page.charts[chart], box = u.over.getBoundingClientRect();
            const scale = u.series[1].scale;
            return [box.x + u.valToPos(x, "x"), box.y + (y === null ? box.height / 2 : u.valToPos(y, scale))];
        }""",
        [chart, images, y],
    )
    return x, y


def quiet(shown: Shown) -> None:
    """Nothing was complained about, and nothing asked for but the page."""
    assert shown.complaints == []
    assert shown.requests == [shown.path.as_uri()]


def test_curves_are_drawn(killed: Shown, root: Path) -> None:
    """Each chart has points, within its frame, and the pixels of its first curve are there."""
    quiet(killed)
    for chart in CHARTS:
        shown = killed.page.evaluate(
            """(chart) => {
                const u = window.page.charts[chart], {left, top, width, height} = u.bbox;
                const k = u.series.findIndex((s, k) => k && s.show && u.data[k].some((y) => y != null));
                const at = u.data[0].map((x, i) => [x, u.data[k][i]]).filter(([x, y]) => y != null)
                    .map(([x, y]) => [u.valToPos(x, "x", true), u.valToPos(y, u.series[k].scale, true)]);
                const inside = at.filter(([x, y]) => x >= left - 1 && x <= left + width + 1 && y >= top - 1 &&
                    y <= top + height + 1);
                const drawn = inside.filter(([x, y]) => {
                    const pixels = u.ctx.getImageData(x - 2, y - 2, 5, 5).data;
                    return pixels.some((value, i) => i % 4 == 3 && value > 0);
                });
                return [at.length, inside.length, drawn.length];
            }""",
            chart,
        )
        points, inside, drawn = shown
        assert points > 5, chart
        assert points == inside == drawn, chart


def test_the_first_line(killed: Shown) -> None:
    line = killed.page.locator("#summary p.run").inner_text()
    assert killed.page.locator("#summary p.run").get_attribute("data-run") == "killed"
    assert "done" in line
    found = re.search(r"waits for data (\d+) % of the time, worst on gpu-05, rank 3: ", line)
    assert found, line
    assert int(found[1]) == pytest.approx(31, abs=2), "what it was made with"


def test_hovering_shows_what_was_recorded(killed: Shown, root: Path) -> None:
    """At a point of the curve, and in all charts at once: the cursors are linked."""
    page = killed.page
    line = steps(root / "killed")[40]
    page.locator("#chart-loss").scroll_into_view_if_needed()
    page.mouse.move(*place(page, "loss", line["images"]))
    shown = {chart: page.locator(f"#chart-{chart}").inner_text() for chart in CHARTS}
    expected = {"loss": line["loss"], "error": 100 * line["train_error"], "lr": line["lr"]}
    expected |= {"grad_norm": line["grad_norm"], "images_per_s": line["machine"]["images_per_s"]}
    expected["data_wait"] = 100 * line["machine"]["data_wait"]
    for chart, value in expected.items():
        numbers = [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", shown[chart])]
        assert any(number == pytest.approx(value, rel=2e-3) for number in numbers), (chart, value, shown[chart])
        where = f"{line['images']:,} images · epoch {line['progress']:.2f} · step {line['step']:,}"
        assert where in shown[chart], (chart, shown[chart])
    at = page.evaluate("Object.values(window.page.charts).map((u) => u.posToVal(u.cursor.left, 'x'))")
    assert len(at) == len(CHARTS)
    assert at == pytest.approx([line["images"]] * len(CHARTS), rel=0.01)


def test_dragging_zooms_and_a_double_click_shows_all(killed: Shown) -> None:
    page = killed.page
    scale = "Object.values(window.page.charts).map((u) => [u.scales.x.min, u.scales.x.max])"
    before = page.evaluate(scale)
    page.locator("#chart-loss").scroll_into_view_if_needed()
    low, high = 100_000, 200_000
    page.mouse.move(*place(page, "loss", low))
    page.mouse.down()
    page.mouse.move(*place(page, "loss", high), steps=3)
    page.mouse.up()
    for zoomed in page.evaluate(scale):
        assert zoomed == pytest.approx([low, high], rel=0.02)
    assert page.locator("#reset").is_visible()
    page.mouse.dblclick(*place(page, "loss", (low + high) / 2))
    assert page.evaluate(scale) == before
    assert page.locator("#reset").is_hidden()


def test_restarts_and_what_changed_are_marked(killed: Shown, root: Path) -> None:
    """At the images from which the run went on."""
    batch, per_epoch = 128, 468
    expected = {"restart": [1, 3], "world_size": [1], "code": [3], "settings": [3], "division": [3, 5]}
    marks = killed.page.locator("#chart-loss .mark")
    found: dict[str, list[float]] = {}
    for mark in marks.all():
        box = mark.bounding_box()
        assert box
        assert mark.get_attribute("title")
        found.setdefault(str(mark.get_attribute("data-kind")), []).append(box["x"] + box["width"] / 2)
    for kind, epochs in expected.items():
        where = [place(killed.page, "loss", epoch * per_epoch * batch)[0] for epoch in epochs]
        assert sorted(found[kind]) == pytest.approx(where, abs=4), kind
    assert found["bad_samples"] == pytest.approx([place(killed.page, "loss", 1000 * batch)[0]], abs=4)
    assert found.keys() == expected.keys() | {"bad_samples"}


def test_three_runs_overlay(browser: Browser, root: Path) -> None:
    """Each has a curve and a line, and a table has the settings in which they differ, and no other."""
    runs = recorded_runs.three(root / "sweep")
    shown = Shown(browser, page_of(*runs))
    quiet(shown)
    page = shown.page
    assert [p.get_attribute("data-run") for p in page.locator("#summary p.run").all()] == [run.name for run in runs]
    curves = page.evaluate(
        """() => { const u = window.page.charts.lr;
            return u.series.slice(1).map((s, k) => [s.label, s.stroke(u, k), u.data[k + 1].find((y) => y > 0)]); }"""
    )
    names, colours, rates = zip(*curves, strict=True)
    assert list(names) == [run.name for run in runs]
    assert len(set(colours)) == 3
    assert rates == (0.01, 0.02, 0.005)
    table = page.locator("#settings").inner_text()
    assert {key: key in table for key in ("optim.lr", "model.dropout", "optim.momentum")} == {
        "optim.lr": True,
        "model.dropout": True,
        "optim.momentum": False,
    }
    assert all(value in table for value in ("0.01", "0.02", "0.005", "0.3"))
    page.context.close()


def test_hovering_runs_of_other_steps(browser: Browser, root: Path) -> None:
    """Of each run the line that is nearest in images is shown, be it of another batch and length; and no step or epoch,
    which are not the same."""
    (root / "other").mkdir()
    short = recorded_runs.healthy(root / "other" / "short", epochs=1, divided=(), every=1, seed=6)
    long = recorded_runs.healthy(root / "other" / "long", epochs=3, divided=(), batch=512, every=45, seed=7)
    shown = Shown(browser, page_of(short, long))
    page = shown.page
    page.locator("#chart-grad_norm").scroll_into_view_if_needed()
    for images in (30_000, 58_000, 90_000, 400_000):
        page.mouse.move(*place(page, "grad_norm", images))
        at = page.evaluate("(() => { const u = window.page.charts.grad_norm; return u.data[0][u.cursor.idx]; })()")
        assert at == pytest.approx(images, abs=12_000)
        text = page.locator("#chart-grad_norm .u-legend").inner_text()
        assert "step" not in text
        found = dict(re.findall(r"(short|long)\s*([\d.]+)", text))
        for run in (short, long):
            line = min(steps(run), key=lambda line: abs(line["images"] - at))
            assert float(found[run.name]) == pytest.approx(line["grad_norm"], rel=1e-3), (images, run.name)
    quiet(shown)
    page.context.close()


def test_a_run_that_diverged_says_why(browser: Browser, root: Path) -> None:
    run = recorded_runs.diverged(root / "diverged")
    shown = Shown(browser, page_of(run))
    quiet(shown)
    line = shown.page.locator("#summary p.run").inner_text()
    assert "diverged" in line
    assert "the loss is not finite at step 601" in shown.page.locator("body").inner_text()
    assert shown.page.evaluate("window.page.charts.loss.scales.y.distr") == 3, "a logarithmic axis, or the fall is flat"
    told = " ".join(shown.page.locator("#chart-loss figcaption").inner_text().split())
    assert "logarithmic" in told
    assert "some values are not finite" in told


def test_an_old_page_does_not_look_alive(browser: Browser, root: Path) -> None:
    """A minute and two hours after it was written."""
    path = page_of(recorded_runs.three(root / "old")[2])
    for age, expected in ((60, "running"), (7500, "was running")):
        shown = Shown(browser, path)
        written = shown.page.evaluate("window.page.data.written")
        shown.page.clock.set_fixed_time(written + age)
        shown.page.reload()
        assert shown.page.locator(".word").inner_text() == expected
        line = shown.page.locator("#summary p.run").inner_text()
        assert ("when this page was written, 2 hours ago" in line) == (age > 60)
        assert bool(re.search(r"[\d.]+ (s|min|h|d) left", line)) == (age == 60)
        shown.page.context.close()


def test_names_are_text(browser: Browser, root: Path) -> None:
    """Whatever a stranger wrote into a run is shown as it stands, and nothing of it runs or is asked for."""
    shown = Shown(browser, page_of(recorded_runs.attacked(root / "attacked")))
    page = shown.page
    page.mouse.move(*place(page, "loss", 20_000))
    quiet(shown)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], svg[onload], [onerror]").count() == 0
    text = " ".join(page.locator("body").inner_text().split())
    escaped = ("line\\u2028and paragraph\\u2029separator", "\\u202eright to left")
    for name in (*ATTACKS[:2], *ATTACKS[3:5], *escaped, *CLOTHES):
        assert name in text, name
    assert page.locator("#summary p.run").get_attribute("data-run") == f"run {ATTACKS[0]}"


@pytest.mark.slow
def test_ninety_epochs_of_imagenet_are_under_three_megabytes(browser: Browser, root: Path) -> None:
    run = recorded_runs.imagenet(root / "imagenet")
    path = page_of(run)
    assert path.stat().st_size < 3_000_000
    shown = Shown(browser, path)
    quiet(shown)
    sizes = shown.page.evaluate("[...document.images].map((i) => [i.naturalWidth, i.complete])")
    assert len(sizes) == 5
    assert all(width > 300 and complete for width, complete in sizes)
    last = shown.page.evaluate("window.page.charts.loss.data[0].at(-1)")
    assert last == steps(run)[-1]["images"]
    ends = shown.page.evaluate(
        """() => { const ys = window.page.charts.grad_norm.data.slice(1).flat().filter((y) => y != null);
            return [Math.min(...ys), Math.max(...ys)]; }"""
    )
    norms = [line["grad_norm"] for line in steps(run)]
    assert ends == pytest.approx([min(norms), max(norms)], rel=1e-6), "of thousands of lines no spike is lost"


@pytest.mark.parametrize(("width", "dark"), [(1100, True), (400, False), (400, True)])
def test_nothing_is_wider_than_the_window(browser: Browser, killed: Shown, width: int, dark: bool) -> None:
    shown = Shown(browser, killed.path, dark=dark, width=width)
    quiet(shown)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    lightness = shown.page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)"
    )
    assert (max(lightness) < 80) == dark, lightness
    frame = shown.page.evaluate("window.page.charts.loss.width")
    assert 0.8 * width < frame <= width or width > 400


class Answering(BaseHTTPRequestHandler):
    """Answers every request, and notes it."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_the_policy_forbids_every_request(browser: Browser, killed: Shown) -> None:
    """A script inside the page reaches no server by any way, all of which work in a page without a policy."""
    asked: list[str] = []
    handler = type("Handler", (Answering,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        plain = browser.new_page()
        plain.goto(address)
        asked.clear()
        plain.evaluate(REACH, address)
        ways = {path for path in asked if path != "/favicon.ico"}
        assert ways == {"/fetch", "/image", "/socket", "/beacon", "/script", "/style", "/frame"}
        asked.clear()
        shown = Shown(browser, killed.path)
        shown.page.evaluate(REACH, address)
        assert asked == []
        assert len(shown.complaints) >= len(ways)
    finally:
        server.shutdown()
        server.server_close()
