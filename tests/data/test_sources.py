from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vpae.data.bounce import World, make_clip
from vpae.data.counterfactual import make_pair
from vpae.data.publish import bounce_dataset, export_bounce, export_pairs
from vpae.data.sources import BounceSource, VideoFolderSource, open_source
from vpae.data.videos import read_video_noted, write_video
from vpae.errors import UserError

WORLD = World(size=32, num_frames=5)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two clips of 6 grey frames, 16 fps, with captions."""
    frames = np.broadcast_to(20 * np.arange(6, dtype=np.uint8)[:, None, None, None], (6, 32, 48, 3)).copy()
    (tmp_path / "clips" / "sub").mkdir(parents=True)
    write_video(tmp_path / "clips" / "one.mp4", frames, 16, lossless=True)
    write_video(tmp_path / "clips" / "sub" / "two.mp4", frames[::-1], 16, lossless=True)
    write_captions(tmp_path / "clips", ["one.mp4", "sub/two.mp4"])
    return tmp_path / "clips"


def write_captions(folder: Path, files: list[str], extra: str = "") -> None:
    lines = [json.dumps({"file": file, "caption": f"Clip {number}."}) for number, file in enumerate(files)]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n" + extra)


def open_folder(path: Path, **changes) -> VideoFolderSource:
    return VideoFolderSource(path, **{"size": (32, 48), "num_frames": 5, "fps": 16, **changes})


def test_bounce_source_gives_the_worlds_own_clips():
    source = BounceSource(WORLD, "validation", 3, start=10)
    clip = make_clip(WORLD, "validation", 12)
    assert len(source) == 3 and len(list(source)) == 3
    record = source[2]
    assert (record.name, record.caption) == (clip.name, clip.caption)
    assert np.array_equal(record.frames, clip.frames)
    with pytest.raises(IndexError):
        source[3]


def test_bounce_fingerprint_tells_worlds_and_ranges_apart():
    def key(*args) -> str:
        return json.dumps(BounceSource(*args).fingerprint(), sort_keys=True)

    base = key(WORLD, "train", 3, 0)
    assert base == key(World(size=32, num_frames=5), "train", 3, 0)
    faster = replace(WORLD, speeds={**WORLD.speeds, "fast": 4.0})
    others = [
        key(faster, "train", 3, 0),
        key(WORLD, "test", 3, 0),
        key(WORLD, "train", 4, 0),
        key(WORLD, "train", 3, 1),
    ]
    assert len({base, *others}) == 5


def test_bounce_source_refuses():
    for arguments, word in (("tst", 1), "split"), (("test", 0), "count"), (("test", 1, -1), "start"):
        with pytest.raises(UserError, match=word):
            BounceSource(WORLD, *arguments)


def test_folder_source(folder):
    source = open_folder(folder)
    assert len(source) == 2
    first, second = source
    assert (first.name, first.caption, second.name, second.caption) == ("one", "Clip 0.", "sub/two", "Clip 1.")
    assert first.frames.shape == (5, 32, 48, 3) and first.frames.dtype == np.uint8
    assert first.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80]
    assert second.frames[:, 0, 0, 0].tolist() == [100, 80, 60, 40, 20]
    assert "cut after frame 5" in first.note
    assert np.array_equal(open_folder(folder / "captions.jsonl")[1].frames, second.frames)


def test_folder_source_short_clips(folder):
    with pytest.raises(UserError, match=r"one\.mp4: 6 frames at 16 fps, 9 wanted"):
        open_folder(folder, num_frames=9)[0]
    record = open_folder(folder, num_frames=9, short="repeat_last")[0]
    assert record.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100, 100, 100, 100]
    assert "repeated 3 more times" in record.note


def test_folder_fingerprint_sees_every_change(folder):
    def key(**changes) -> str:
        return json.dumps(open_folder(folder, **changes).fingerprint(), sort_keys=True)

    keys = [key(), key(size=(16, 16)), key(num_frames=4), key(fps=8), key(short="repeat_last")]
    os.utime(folder / "one.mp4", (0, 0))
    assert key() == keys[0]
    write_captions(folder, ["sub/two.mp4", "one.mp4"])
    keys.append(key())
    write_captions(folder, ["one.mp4", "sub/two.mp4"])
    assert key() == keys[0]
    data = bytearray((folder / "one.mp4").read_bytes())
    data[-1] ^= 1
    (folder / "one.mp4").write_bytes(data)
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"file": "one.mp4"', "not JSON"),
        ('["one.mp4", "text"]', "not an object"),
        ('{"file": "sub/three.mp4", "caption": "x"}', "does not exist"),
        ('{"file": "sub", "caption": "x"}', "does not exist"),
        ('{"file": "sub/two.mp4"}', "no caption"),
        ('{"file": "sub/two.mp4", "caption": " "}', "no caption"),
        ('{"file": "sub/two.mp4", "caption": 3}', "no caption"),
        ('{"caption": "x"}', "no file"),
        ('{"file": "../secret.mp4", "caption": "x"}', "outside"),
        ('{"file": "sub/../one.mp4", "caption": "x"}', "outside"),
        ('{"file": "/etc/hostname", "caption": "x"}', "outside"),
        ('{"file": "link.mp4", "caption": "x"}', "outside"),
        ('{"file": "one.mp4", "caption": "x"}', "named by line 1 too"),
    ],
)
def test_a_bad_line_is_named(folder, line, word):
    (folder.parent / "secret.mp4").write_bytes((folder / "one.mp4").read_bytes())
    (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
    write_captions(folder, ["one.mp4"], "\n" + line + "\n")
    with pytest.raises(UserError, match=word) as caught:
        open_folder(folder)
    assert "captions.jsonl, line 3" in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_inside_the_folder_is_fine(folder):
    (folder / "link.mp4").symlink_to(folder / "one.mp4")
    write_captions(folder, ["link.mp4"])
    assert open_folder(folder)[0].name == "link"


def test_no_captions_at_all(folder, tmp_path):
    (folder / "captions.jsonl").write_text("\n")
    with pytest.raises(UserError, match="names no clip"):
        open_folder(folder)
    (folder / "captions.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        open_folder(folder)
    for missing, words in (
        (tmp_path, r"one\.mp4: has no caption.*\(and 1 more\)"),
        (tmp_path / "no", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            open_folder(missing)


def test_open_source(folder):
    spec = {"kind": "bounce", "split": "test", "count": 2, "start": 4, "world": {"size": 32, "num_frames": 5}}
    source = open_source(spec)
    assert source.fingerprint() == BounceSource(WORLD, "test", 2, 4).fingerprint()
    assert spec["world"] == {"size": 32, "num_frames": 5}
    videos = {"kind": "videos", "path": str(folder), "size": [32, 48], "num_frames": 5, "fps": 16}
    assert open_source(videos).fingerprint() == open_folder(folder).fingerprint()


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({}, "kind is None"),
        ({"kind": "vidoes"}, "bounce, videos"),
        ({"kind": "bounce", "split": "test"}, "count is missing"),
        ({"kind": "bounce", "split": "test", "cout": 2}, "'cout'; did you mean count"),
        ({"kind": "bounce", "split": "tst", "count": 2}, "split is 'tst'"),
        ({"kind": "bounce", "split": "test", "count": 2.5}, "count is 2.5"),
        ({"kind": "bounce", "split": "test", "count": True}, "count is True"),
        ({"kind": "bounce", "split": "test", "count": 2, "world": {"sise": 3}}, "sise"),
        ({"kind": "bounce", "split": "test", "count": 2, "world": {"size": "64"}}, "world"),
        ({"kind": "bounce", "split": "test", "count": 2, "world": [64]}, "a mapping"),
        ({"kind": "videos", "path": "x", "size": [8], "num_frames": 5, "fps": 8}, "height, width"),
        ({"kind": "videos", "path": "x", "size": [8, 8], "num_frames": 5, "fps": 0}, "fps is 0"),
        ({"kind": "videos", "path": "x", "size": [8, 8], "num_frames": 5, "fps": float("nan")}, "fps is nan"),
        ({"kind": "videos", "path": "x", "size": [8, 8], "num_frames": 5, "fps": 8, "short": "loop"}, "repeat_last"),
    ],
)
def test_open_source_names_the_mistake(spec, word):
    with pytest.raises(UserError, match=word):
        open_source(spec)


def test_exported_bounce_comes_back_bit_for_bit(tmp_path):
    folder = tmp_path / "bounce"
    export_bounce(WORLD, "test", 3, folder, start=5)
    source = VideoFolderSource(folder, (32, 32), 5, 8)
    states = [json.loads(line) for line in (folder / "states.jsonl").read_text().splitlines()]
    assert len(source) == len(states) == 3
    for index, record, state in zip(range(5, 8), source, states, strict=True):
        clip = make_clip(WORLD, "test", index)
        assert (record.name, record.caption, record.note) == (clip.name, clip.caption, "")
        assert np.array_equal(record.frames, clip.frames)
        assert (state["file"], state["index"], state["gravity"]) == (f"{clip.name}.mp4", index, clip.gravity)
        assert tuple(state["colours"]) == clip.colours
        for key in ("positions", "velocities", "radii"):
            assert np.array_equal(np.array(state[key]), getattr(clip, key))


def test_export_again_is_the_same_and_another_is_refused(tmp_path):
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    folder = tmp_path / "bounce"
    export_bounce(WORLD, "test", 2, folder)
    before = contents()
    (folder / "captions.jsonl").unlink()  # as if it had been stopped
    export_bounce(WORLD, "test", 2, folder)
    assert contents() == before
    with pytest.raises(UserError, match="already holds something else"):
        export_bounce(replace(WORLD, gravity=0.3), "test", 2, folder)
    assert contents() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="already holds something else"):
        export_bounce(WORLD, "test", 2, tmp_path / "mine")


def test_bounce_dataset(tmp_path):
    rows = bounce_dataset(WORLD, "validation", 4, start=3, cache_dir=tmp_path)
    assert len(rows) == 4
    for index, row in zip(range(3, 7), rows, strict=True):
        clip = make_clip(WORLD, "validation", index)
        assert row["frames"].dtype == np.uint8 and np.array_equal(row["frames"], clip.frames)
        for key in ("positions", "velocities", "radii"):
            assert row[key].dtype == np.float64 and np.array_equal(row[key], getattr(clip, key))
        assert (row["caption"], row["split"], row["index"]) == (clip.caption, "validation", index)
        assert row["gravity"] == clip.gravity and tuple(row["colours"]) == clip.colours


def test_bounce_dataset_caches_are_never_shared_by_worlds(tmp_path):
    other = replace(WORLD, gravity=1.0)
    first = bounce_dataset(WORLD, "test", 6, cache_dir=tmp_path)
    second = bounce_dataset(other, "test", 6, cache_dir=tmp_path)
    again = bounce_dataset(WORLD, "test", 6, cache_dir=tmp_path)
    assert np.array_equal(second[5]["positions"], make_clip(other, "test", 5).positions)
    assert {f["filename"] for f in first.cache_files} == {f["filename"] for f in again.cache_files}
    assert {f["filename"] for f in first.cache_files}.isdisjoint(f["filename"] for f in second.cache_files)

    def height(row: dict) -> dict:
        return {"height": float(row["positions"][-1, 0, 1])}

    lows = [rows.map(height, load_from_cache_file=True)["height"][:] for rows in (first, second, again)]
    assert np.array_equal(lows[0], lows[2]) and not np.array_equal(lows[0], lows[1])


REAL = os.environ.get("VPAE_REAL_CLIPS")


@pytest.mark.skipif(not REAL, reason="VPAE_REAL_CLIPS names no folder of clips with a captions.jsonl")
def test_real_clips_fit_the_480p_shape():
    source = VideoFolderSource(REAL, (480, 832), 81, 16, short="repeat_last")
    for record in source:
        print(f"{record.name}: {record.note or 'as it is'}")
        assert record.frames.shape == (81, 480, 832, 3) and record.frames.dtype == np.uint8
        assert record.caption and record.frames[::20].std() > 5
        assert np.any(record.frames[0] != record.frames[40])


def test_exported_pairs_are_the_pairs(tmp_path):
    """Both versions come back bit for bit, equal before the named frame and different from it on."""
    export_pairs(World(), "test", 2, tmp_path / "pairs", start=3)
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for index, line in zip((3, 4), lines, strict=True):
        pair = make_pair(World(), "test", index)
        plausible, impossible = (
            read_video_noted(tmp_path / "pairs" / line[key], num_frames=17, fps=8, size=(64, 64), short="error")[0]
            for key in ("plausible", "impossible")
        )
        assert np.array_equal(plausible, pair.plausible.frames) and np.array_equal(impossible, pair.impossible.frames)
        assert (line["kind"], line["frame"], line["ball"]) == (pair.kind, pair.frame, pair.ball)
        assert np.array_equal(plausible[: line["frame"]], impossible[: line["frame"]])
    with pytest.raises(UserError, match="already holds something else"):
        export_bounce(World(), "test", 2, tmp_path / "pairs")


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        ({"radius": [8.0, 5.0]}, "radius is .smallest, largest."),
        ({"radius": [5.0, 40.0]}, "radius is .smallest, largest."),
        ({"radius": 5.0}, "radius is 5.0; it has to be .smallest, largest. in px"),
        ({"speeds": {}}, "speeds gives each speed's word"),
        ({"speeds": {"very fast": 3.0}}, "speeds gives each speed's word"),
        ({"wall": -1.0}, "wall is at least 0"),
        ({"gravity": "yes"}, "gravity is 'yes'; it has to be a number"),
        ({"ball_counts": [1.5, -0.5]}, "ball_counts holds the probabilities"),
        ({"ball_counts": [0.3333333, 0.3333333, 0.3333333]}, "sums to 1"),
        ({"size": 64.0}, "size is 64.0; it has to be a whole number"),
    ],
)
def test_constants_of_a_world_that_cannot_be_are_named(constant, message):
    with pytest.raises(UserError, match=message):
        open_source({"kind": "bounce", "split": "train", "count": 1, "world": constant})


def test_a_world_without_room_is_told_when_its_clips_are_asked_for():
    world = {"radius": [14.0, 14.0], "ball_counts": [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]}
    source = open_source({"kind": "bounce", "split": "train", "count": 1, "world": world})
    with pytest.raises(UserError, match="train clip 0: "):
        source[0]
