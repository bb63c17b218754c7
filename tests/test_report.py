from __future__ import annotations

import base64
import hashlib
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vpae.data.bounce import World, make_clip
from vpae.data.videos import probe_video, read_video
from vpae.report import Bars, Variant, format_headline, format_table, headline, write_comparison, write_report
from vpae.report.curves import PANELS
from vpae.report.page import encode_clip

VOID = {"meta", "link", "input"}
EMPTY_IN_SVG = {"rect", "line", "path"}


class Page(HTMLParser):
    """A page read strictly: every element must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict, str]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs), "/".join(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in EMPTY_IN_SVG and "svg" in self.open, tag
        self.elements.append((tag, dict(attrs), "/".join(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text for path, text in self.texts if path[-1] == tag]


def clip(level: int, frames: int = 5, size: int = 24) -> np.ndarray:
    """A grey clip that gets lighter frame by frame."""
    shape = (frames, size, size, 3)
    return np.broadcast_to((level + 4 * np.arange(frames, dtype=np.uint8))[:, None, None, None], shape).copy()


SCORES = {
    "sa": 96.31, "tc": 93.02, "fq": 91.77, "mean": 93.7, "dynamic_degree": 0.98, "frechet": 0.1124,
    "frame0_psnr": 31.26, "trajectory_error": 0.814,
}  # fmt: skip
CAPTIONS = ["A red ball moves down slowly. No gravity.", "two"]


def variants(seconds: float | None = 4.8123, mean: float = 90.46, motion: float = 0.93) -> list[Variant]:
    student = {key: value * 0.9 for key, value in SCORES.items()} | {"mean": mean, "dynamic_degree": motion}
    return [
        Variant("teacher", 100, [clip(60), clip(80)], SCORES, seconds),
        Variant("teacher", 1, [clip(100), clip(120)], SCORES | {"sa": np.float64(41.41), "frechet": math.nan}, 0.0533),
        Variant("student", 1, [clip(140), clip(160)], student, 0.0521),
    ]


def log(turns: int = 60, period: int = 3) -> list[dict]:
    """Players take turns; one value is NaN, one infinite."""
    records = []
    for turn in range(turns):
        if turn % period:
            records.append({"turn": turn, "seconds": 0.1 * turn, "fake_score/flow_matching": 1 / (1 + turn)})
        else:
            records.append({"turn": turn, "student/vsd": 0.5 - 0.001 * turn, "watch/motion_ratio": turn / turns})
    records[9]["watch/motion_ratio"], records[21]["watch/motion_ratio"] = math.nan, math.inf
    return records


def report(folder, **changes) -> str:
    arguments = {
        "title": "One-step student", "clips": CAPTIONS, "real": [clip(20), clip(40)], "variants": variants(),
        "logs": {"priming": log()}, "facts": {"Recipe": "quickstart"},
    } | changes  # fmt: skip
    path = write_report(folder, **arguments)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_asks_for_nothing(tmp_path):
    text = report(tmp_path)
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes, _ in page.elements:
        for reference in attributes.get("aria-labelledby", "").split():
            assert reference in ids
    assert [h for h in page.text_of("h2")] == ["Scores", "Clips", "Training", "How it was made"]


def test_policy_admits_exactly_the_inline_style_and_script(tmp_path):
    page = Page(report(tmp_path))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (inline,) = page.text_of(tag)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes, _ in page.elements)  # the policy would drop them
    assert "unsafe" not in policy and "default-src 'none'" in policy


def test_text_is_escaped(tmp_path):
    nasty = "</p><script>alert(\"1\")</script> & 'two' ü \ud800"
    text = report(
        tmp_path, title=nasty, clips=[nasty, "two"], facts={nasty: nasty, "Text": f"a\n{nasty}"}, logs={nasty: log()}
    )
    page = Page(text)
    shown = nasty.replace("\ud800", "?")
    assert len(page.all("script")) == 1
    assert page.text_of("h1") == [shown] and shown in page.text_of("figcaption")
    assert page.text_of("dt")[-2:] == [shown, "Text"] and page.text_of("pre") == [f"a\n{shown}"]
    assert page.text_of("h3") == [shown]
    assert page.all("video")[0]["aria-label"] == f"real: {shown}"


def test_every_video_is_the_clip_it_says(tmp_path):
    page = Page(report(tmp_path, fps=6))
    videos = page.all("video")
    assert len(videos) == 8
    names = ["real", "teacher 100 NFE", "teacher 1 NFE", "student 1 NFE"]
    for i, video in enumerate(videos):
        caption, column = divmod(i, 4)
        assert video["aria-label"] == f"{names[column]}: {CAPTIONS[caption]}"
        assert {"autoplay", "loop", "muted", "playsinline"} <= set(video) and video["width"] == video["height"] == "24"
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,"), validate=True))
        info = probe_video(path)
        assert (info.frames, info.width, info.height, info.fps) == (5, 48, 48, 6)
        wanted = clip(20 + 40 * column + 20 * caption)
        assert np.abs(read_video(path)[:, ::2, ::2].astype(int) - wanted).max() <= 3
    assert page.all("input")[0]["max"] == "4"


@pytest.mark.parametrize(
    ("size", "stored"), [((160, 176), (160, 176)), ((165, 176), (330, 352)), ((64, 96), (128, 192))]
)
def test_small_and_odd_clips_are_doubled(tmp_path, size, stored):
    frames = np.zeros((3, *size, 3), np.uint8)
    frames[:, 10:14, 20:23] = (232, 56, 56)
    (tmp_path / "a.mp4").write_bytes(encode_clip(frames, 8, tmp_path))
    shown = read_video(tmp_path / "a.mp4")
    assert shown.shape == (3, *stored, 3)
    if stored != size:  # each pixel keeps its own colour, which yuv420p at the frame's own size would smear
        assert np.abs(shown[:, ::2, ::2].astype(int) - frames).max() < 40


def cells(page: Page) -> dict[str, list[str]]:
    """The body of the table by row name, as shown."""
    rows, name = {}, None
    for path, text in page.texts:
        if "tbody" in path and path[-1] == "th":
            name = text.strip()
            rows[name] = []
        elif "tbody" in path and path[-1] in ("td", "data"):
            rows[name].append(text)
    return rows


def test_table_holds_the_numbers(tmp_path):
    real = {key: 100.0 for key in SCORES}
    page = Page(report(tmp_path, real_scores=real))
    values = [float(a["value"]) for tag, a, path in page.elements if tag == "data" and "tbody" in path]
    keys = [*SCORES, "seconds"]
    wanted = [
        value
        for key in keys
        for value in [real.get(key, math.nan)]
        + [v.scores[key] if key in SCORES else v.seconds_per_clip for v in variants()]
        if not math.isnan(value)
    ]
    assert values == wanted
    rows = cells(page)
    assert rows["Semantic alignment"] == ["100.0", "96.3", "41.4", "86.7"]
    assert rows["Fréchet distance"] == ["100.000", "0.112", "–", "0.101"]
    assert rows["Seconds per clip"] == ["–", "4.81", "0.0533", "0.0521"]
    assert page.text_of("th")[:4] == ["real ", "teacher ", "teacher ", "student "]


def test_what_was_not_measured_is_a_dash(tmp_path):
    page = Page(report(tmp_path, variants=variants(seconds=None)))
    assert cells(page)["Seconds per clip"] == ["–", "0.0533", "0.0521"]  # no real clips' scores: no column of theirs
    assert "not measured" in page.text_of("b") and "nan" not in "".join(t for p, t in page.texts if p[-1] != "script")
    few = [Variant("teacher", 100, [], {"sa": 90.0}, None), Variant("student", 1, [], {}, None)]
    page = Page(report(tmp_path, variants=few, logs={}, facts={}))
    assert cells(page)["Semantic alignment"] == ["90.0", "–"]
    assert len(page.all("video")) == 2  # a variant without clips has a column in the table alone
    assert page.text_of("h2") == ["Scores", "Clips"]


def test_headline_is_computed_and_rounded_down():
    mean, motion, speed = headline(variants())
    assert mean.value == pytest.approx(100 * 90.46 / 93.7) and mean.met and mean.shown == "96.5"
    assert motion.value == pytest.approx(100 * 0.93 / 0.98) and motion.shown == "94.8"
    assert speed.value == pytest.approx(4.8123 / 0.0521) and speed.shown == "92.3"
    close = headline(variants(mean=93.7 * 0.94999))[0]
    assert close.shown == "94.9" and not close.met
    assert headline(variants(mean=93.7 * 0.973))[0].shown == "97.3"
    assert not headline(variants(), Bars(mean=98.0))[0].met
    text = format_headline(variants(seconds=None, motion=0.1))
    assert text.isascii() and [line.rsplit(": ")[-1] for line in text.splitlines()] == [
        "met)", "missed)", "not measured)",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'student' with a 'teacher'"):
        headline(variants()[:2])


def test_headline_takes_the_students_fewest_and_the_teachers_most_steps():
    more = [Variant("student", 4, [], SCORES | {"mean": 99.0}, 0.2), *reversed(variants())]
    assert headline(more) == headline(variants())


def test_names_with_and_without_steps_mean_the_same(tmp_path):
    longer = [Variant(v.label, v.nfe, v.frames, v.scores, v.seconds_per_clip) for v in variants()]
    assert [v.name for v in longer] == ["teacher 100 NFE", "teacher 1 NFE", "student 1 NFE"]
    assert headline(longer) == headline(variants()) and format_table(longer) == format_table(variants())
    assert report(tmp_path, variants=longer) == report(tmp_path)
    assert format_table([Variant("real", 0, [], SCORES, None)]) == format_table([], SCORES)


def test_format_table():
    table = format_table(variants(seconds=None), {"sa": 99.96})
    lines = table.splitlines()
    assert table.isascii() and len({len(line) for line in lines}) == 1 and len(lines[0]) <= 90
    assert lines[0].split() == ["SA", "TC", "FQ", "mean", "dynamic", "Frechet", "PSNR", "dB", "path", "px", "s/clip"]
    assert lines[1].split() == ["real", "100.0", *["-"] * 8]
    assert lines[2].split() == [
        "teacher",
        "100",
        "NFE",
        "96.3",
        "93.0",
        "91.8",
        "93.7",
        "0.98",
        "0.112",
        "31.3",
        "0.81",
        "-",
    ]
    assert lines[4].split()[:4] == ["student", "1", "NFE", "86.7"]
    assert len(format_table(variants()).splitlines()) == 4
    long = [Variant("teacher", 1, [], {}, s) for s in (0.000521, 0.0, 12.345, 123.45, 9876.5)]
    assert [line.split()[-1] for line in format_table(long).splitlines()[1:]] == [
        "0.000521",
        "0.000",
        "12.3",
        "123",
        "9876",
    ]


def test_panels_appear_for_what_was_logged(tmp_path):
    second = [
        {"turn": t, "head/logit_real": 0.1 * t, "head/logit_fake": -0.1 * t, "head/adversarial": 2.0} for t in range(6)
    ]
    page = Page(report(tmp_path, logs={"priming": log(), "equilibrium": second, "empty": []}))
    assert page.text_of("h3") == ["Phase I: stability priming", "Phase II: adversarial equilibrium"]
    titles = [p.title for p in PANELS]
    assert page.text_of("h4") == [titles[i] for i in (0, 1, 6, 2, 3)]
    charts = [a for tag, a, path in page.elements if tag == "svg" and "figure" in path]
    assert len(charts) == 5 and all(a["role"] == "img" for a in charts)
    assert "real: turn 0 to 5, from 0 to 0.5" in page.text_of("desc")[-1]
    legends = [text.strip() for path, text in page.texts if path[-1] == "span" and "figcaption" in path]
    assert {"real", "generated", "fake score"} <= set(legends)
    assert "−0.5" in page.text_of("b")


def test_mistakes_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="teacher 100 NFE: 1 clips for 2 captions"):
        report(tmp_path, variants=[Variant("teacher", 100, [clip(1)], SCORES, 1.0), *variants()[1:]])
    with pytest.raises(ValueError, match="real: 0 clips"):
        report(tmp_path, real=[])
    with pytest.raises(ValueError, match="student 1 NFE: unknown score 'saa'"):
        Variant("student", 1, [], {"saa": 1.0}, None)
    with pytest.raises(ValueError, match="real: unknown score"):
        format_table(variants(), {"quality": 1.0})
    assert not (tmp_path / "report.html").exists()


def test_eight_conditions_stay_small(tmp_path):
    """Four columns of eight Bounce clips, one of them noisy, which compresses worst."""
    clips = [make_clip(World(), "test", i) for i in range(8)]
    real = [c.frames for c in clips]
    rng = np.random.default_rng(0)
    noisy = [np.clip(f + rng.normal(0, 8, f.shape), 0, 255).astype(np.uint8) for f in real]
    columns = [Variant("teacher", 100, real, {}, None), Variant("teacher", 1, noisy, {}, None)]
    text = report(
        tmp_path,
        clips=[c.caption for c in clips],
        real=real,
        variants=[*columns, Variant("student", 1, real, {}, None)],
    )
    assert len(text.encode()) < 3e6


def test_comparison(tmp_path):
    captions = ["short", "a caption of many words " * 12]
    columns = [("real", [clip(20), clip(40)]), ("student 1 NFE", [clip(140), clip(160)])]
    film, strip = write_comparison(tmp_path, captions, columns)
    assert (film.name, strip.name) == ("comparison.mp4", "comparison.png")
    frames = read_video(film)
    assert len(frames) == 2 * (5 + 4)
    for first, levels in ((0, (20, 140)), (9, (40, 160))):
        for number in range(5):
            shown = frames[first + number].astype(int)
            for half, level in zip(np.array_split(shown, 2, axis=1), levels, strict=True):
                right = np.abs(half - (level + 4 * number)).max(axis=-1) <= 3
                assert right.sum() > 0.9 * 240 * 240
        assert np.abs(frames[first + 8].astype(int) - frames[first + 4]).max() < 12  # it rests on the last frame
    assert Image.open(strip).height > 4 * 24 * 5


def test_comparison_of_large_clips_is_scaled_down(tmp_path):
    film, _ = write_comparison(tmp_path, ["a"], [("real", [clip(9, 2, 1000)]), ("student", [clip(9, 2, 1000)])])
    assert probe_video(film).width < 600


def test_comparison_mistakes(tmp_path):
    with pytest.raises(ValueError, match="student: 1 clips for 2 captions"):
        write_comparison(tmp_path, CAPTIONS, [("student", [clip(1)])])
    with pytest.raises(ValueError, match="condition"):
        write_comparison(tmp_path, [], [("student", [])])
    with pytest.raises(ValueError, match="one shape"):
        write_comparison(tmp_path, ["a"], [("real", [clip(1)]), ("student", [clip(1, frames=4)])])
