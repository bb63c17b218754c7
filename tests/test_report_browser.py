"""The report in a real browser: it plays, complains of nothing, and fits a phone and a desktop."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vpae.data.bounce import World, make_clip
from vpae.report import Variant, write_report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver on PATH")

VIDEOS = "return [...document.querySelectorAll('video')].map(v => [v.readyState, v.currentTime, v.paused])"


class Browser:
    """Headless Chromium by WebDriver's plain HTTP."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.session = ""

    def ask(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with self.opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def start(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.ask("GET", "/status")
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.1)
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]
        wishes = {
            "goog:chromeOptions": {"args": arguments, "binary": BROWSER},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        started = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wishes}})
        self.session = f"/session/{started['sessionId']}"

    def cdp(self, command: str, **parameters):
        return self.ask("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str):
        return self.ask("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def console(self) -> list[dict]:
        return self.ask("POST", f"{self.session}/se/log", {"type": "browser"})

    def show(self, page: Path, width: int, scheme: str = "light", motion: str = "no-preference") -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in features.items()])
        self.ask("POST", f"{self.session}/url", {"url": page.as_uri()})

    def until(self, script: str, seconds: float = 30):
        """Run ``script`` until it answers something true."""
        deadline = time.monotonic() + seconds
        while not (answer := self.run(script)):
            assert time.monotonic() < deadline, script
            time.sleep(0.1)
        return answer


@pytest.fixture(scope="module")
def browser():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
    driver = Browser(port)
    try:
        driver.start()
        yield driver
    finally:
        try:
            if driver.session:
                driver.ask("DELETE", driver.session)
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    clips = [make_clip(World(), "test", i) for i in range(3)]
    frames = [c.frames for c in clips]
    scores = {"sa": 96.3, "tc": 93.0, "fq": 91.7, "mean": 93.7, "dynamic_degree": 0.98, "trajectory_error": 0.81}
    kinds = (("teacher", 100, 4.81), ("teacher", 1, 0.0533), ("student", 1, 0.0521), ("student", 4, 0.209))
    records = [{"turn": t, "student/vsd": 1 / (1 + t), "watch/motion_ratio": 1 - 1 / (1 + t)} for t in range(50)]
    return write_report(
        tmp_path_factory.mktemp("report"),
        title="One-step student",
        clips=[c.caption + " <b>&amp;" for c in clips],
        real=frames,
        variants=[Variant(name, nfe, frames, scores, seconds) for name, nfe, seconds in kinds],
        logs={"priming": records},
        facts={"Recipe": "quickstart", "Folder": "x" * 200, "All of it": "kind: distill\nname: quickstart"},
        real_scores=scores,
    )


def test_clips_play_in_step_without_a_complaint(browser, page):
    browser.show(page, 1280)
    browser.until("return [...document.querySelectorAll('video')].every(v => v.readyState >= 2 && v.currentTime > 0)")
    before = browser.run(VIDEOS)
    assert len(before) == 15
    time.sleep(0.5)
    after = browser.run(VIDEOS)
    assert all(ready >= 2 and not paused for ready, _, paused in after)
    assert all(a[1] != b[1] for a, b in zip(before, after, strict=True))
    assert browser.run("return [...document.querySelectorAll('video')].every(v => v.videoWidth === 128)")
    browser.run(
        "document.querySelectorAll('video')[7].currentTime = (document.querySelector('video').currentTime + 1) % 2.1"
    )
    browser.until("""
        const angles = [...document.querySelectorAll('video')].map(v => 2 * Math.PI * v.currentTime / v.duration);
        return angles.every(a => Math.cos(a - angles[0]) > 0.8);
    """)
    assert browser.console() == []


def test_controls_hold_and_move_all_clips(browser, page):
    browser.show(page, 1280)
    browser.until("return [...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    assert (
        browser.run("const b = document.querySelector('.controls button'); b.click(); return b.textContent")
        == "Play all"
    )
    browser.until("return [...document.querySelectorAll('video')].every(v => v.paused)")
    moved = "const s = document.querySelector('.controls input'); s.value = 9; s.dispatchEvent(new Event('input'));"
    browser.run(moved)
    browser.until("return [...document.querySelectorAll('video')].every(v => !v.seeking)")
    assert {round(time_ * 8 - 0.5, 3) for _, time_, _ in browser.run(VIDEOS)} == {9.0}
    assert browser.run("return document.querySelector('.controls output').value") == "frame 9"
    browser.run("document.querySelector('.controls button').click()")
    browser.until("return [...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 9.9 / 8)")
    assert browser.console() == []


def test_reduced_motion_is_respected(browser, page):
    browser.show(page, 1280, motion="reduce")
    browser.until("return [...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    time.sleep(0.3)
    assert all(paused for _, _, paused in browser.run(VIDEOS))
    assert browser.run("return document.querySelector('.controls button').textContent") == "Play all"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out(browser, page, width):
    browser.show(page, width)
    assert browser.run("return document.documentElement.scrollWidth") == width
    outside = """
        const wide = document.documentElement.clientWidth;
        return [...document.querySelectorAll('main *')]
            .filter(e => !e.closest('.table, svg') && e.getBoundingClientRect().right > wide + 0.5)
            .map(e => e.outerHTML.slice(0, 80))
    """
    assert browser.run(outside) == []
    if width != 320:  # where five columns may scroll inside their own box
        assert browser.run("const t = document.querySelector('.table'); return t.scrollWidth <= t.clientWidth")
    tops = browser.run("return [...document.querySelectorAll('.row')[0].children].map(c => c.offsetTop)")
    assert len(set(tops)) == (1 if width > 700 else 3)
    figures = browser.run("return [...document.querySelectorAll('.headline li')].map(c => c.offsetTop)")
    assert len(set(figures)) == (1 if width > 700 else 3)
    assert browser.console() == []


def test_dark_and_light(browser, page):
    colours = []
    for scheme in ("light", "dark"):
        browser.show(page, 1280, scheme)
        read = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        levels = [sum(map(int, c.removeprefix("rgb(").removesuffix(")").split(","))) / 3 for c in browser.run(read)]
        colours.append(levels)
    (paper, ink), (night, chalk) = colours
    assert paper > 240 and ink < 40 and night < 40 and chalk > 200
