"""The tests that need a GPU, as parts of the GPU report. Without one they are rehearsed on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from dist_train.analysis.findings import Findings
from dist_train.analysis.gpu_site import Site
from pipelines.speech import say

ROOT = Path(__file__).resolve().parents[2]
REHEARSE = "REHEARSE"  # the variable by which tests/ does on CPU operators and gloo what is meant for a GPU
NO_TESTS = 5  # pytest's exit code
DONE = re.compile(r"^tests/\S*?::(.+?) (PASSED|FAILED|SKIPPED|ERROR)\b")  # a line of pytest -v


def others(findings: Findings, site: Site) -> None:
    """All tests except the two kinds below."""
    _run("not resume and not drill", findings, site)


def resume(findings: Findings, site: Site) -> None:
    """Whether a stopped and resumed run has the same bits as an uninterrupted one, at 1, 2, 4 and 8 ranks."""
    _run("resume", findings, site)


def drills(findings: Findings, site: Site) -> None:
    """Whether a run survives signals, kills and hangs, and gives the reason if it fails."""
    _run("drill", findings, site)


def _run(chosen: str, findings: Findings, site: Site) -> None:
    if not (ROOT / "tests" / "gpu").is_dir():
        findings.say("left out", "there is no folder of tests: run it from a clone of the repository")
        return
    try:
        import pytest  # noqa: F401
    except ImportError:
        findings.say("left out", "there is no pytest: install the extra dev, as `make gpu-report` does")
        return
    xml = site.folder / "tests.xml"
    xml.unlink(missing_ok=True)  # another part's
    words = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-k", chosen, "-v", "--tb=short"]
    words += ["-p", "no:cacheprovider", f"--junitxml={xml}"]
    variables = {} if site.gpus else {REHEARSE: "1"}
    if variables:
        findings.say("ok", "without a GPU, the tests were rehearsed on the CPU")
    with subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout
        for line in process.stdout:
            say(line, end="")  # kept, to be shown if the part fails
            if found := DONE.match(line):
                findings.tell(f"{found[1]} {found[2].lower()}")
                findings.keep(found[1], found[2].lower(), under="tests")  # the XML comes at the end only
    if process.returncode == NO_TESTS:
        findings.say("left out", "there is no such test")
    elif not xml.exists():
        findings.say("failed", f"pytest did not come to its end (exit code {process.returncode})")
    else:
        judge(xml.read_text(encoding="utf-8"), findings)


def judge(xml: str, findings: Findings) -> None:
    """Keep the outcomes in pytest's JUnit XML."""
    passed, failed, skipped = list[str](), dict[str, str](), dict[str, str]()
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = case.get("name", "")
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            passed.append(name)
        else:
            why = (outcome.get("message") or outcome.text or "").strip().partition("\n")[0]
            (skipped if outcome.tag == "skipped" else failed)[name] = why
    findings.result.pop("tests", None)  # the same, as pytest had told it
    findings.keep("passed", passed)
    findings.keep("failed", failed)
    findings.keep("skipped", skipped)
    if skipped:
        findings.say("ok" if passed or failed else "left out", f"{len(skipped)} skipped")
    if failed:
        findings.say("failed", f"{len(failed)} of {len(failed) + len(passed)} failed: {', '.join(failed)}")
