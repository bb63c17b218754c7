"""Which clips a folder, a list or a dataset names, and what is wrong with the bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from vpae.data.listing import list_clips
from vpae.data.sources import VideoFolderSource, open_source
from vpae.data.videos import write_video
from vpae.errors import UserError

SHAPE = {"size": (32, 48), "num_frames": 5, "fps": 16}


def grey(first: int, count: int = 5) -> np.ndarray:
    values = first + 10 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, 32, 48, 3)).copy()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two clips, b/two.mp4 and one.MP4, each with its caption in a text beside it."""
    (tmp_path / "clips" / "b").mkdir(parents=True)
    write_video(tmp_path / "clips" / "one.mp4", grey(0), 16, lossless=True)
    (tmp_path / "clips" / "one.mp4").rename(tmp_path / "clips" / "one.MP4")
    write_video(tmp_path / "clips" / "b" / "two.mp4", grey(100), 16, lossless=True)
    (tmp_path / "clips" / "one.txt").write_text("\ufeffOne, grey.\n", encoding="utf-8")
    (tmp_path / "clips" / "b" / "two.txt").write_text("Two.")
    return tmp_path / "clips"


def opened(path: Path, **more) -> VideoFolderSource:
    return VideoFolderSource(path, **SHAPE, **more)


def faults(source: VideoFolderSource) -> dict[str, str]:
    return {clip.name: clip.fault for clip in source.listing.clips if clip.fault}


def test_a_plain_folder_of_videos_and_texts(folder):
    source = opened(folder)
    assert [(r.name, r.caption) for r in source] == [("b/two", "Two."), ("one", "One, grey.")]
    assert source[0].frames[:, 0, 0, 0].tolist() == [100, 110, 120, 130, 140]
    before = source.fingerprint()
    (folder / "one.txt").write_text("One, white.")
    assert opened(folder).fingerprint()["sha256"] != before["sha256"]


def test_each_odd_file_of_a_folder_is_named(folder):
    write_video(folder / "three.mp4", grey(0), 16)
    write_video(folder / "one.webm.mp4", grey(0), 16)
    (folder / "one.webm.txt").write_text(" \n")
    (folder / "four.mkv").write_bytes(b"")
    (folder / "four.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / "five.txt").write_text("Nothing beside me.")
    (folder / "one.avi").write_bytes(b"")
    (folder / ".hidden.mp4").write_bytes(b"")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "gone.txt").write_text("Gone.")
    (folder / b"caf\xe9.mp4".decode("utf-8", "surrogateescape")).write_bytes(b"")
    found = faults(opened(folder, bad="skip"))
    assert "one.txt" not in found and set(found) == {"three", "one.webm", "four", "five.txt", "one", "gone", "caf?.mp4"}
    for name, words in {
        "three": "three.mp4: has no caption",
        "one.webm": "one.webm.txt: is empty",
        "four": "four.txt: is not UTF-8",
        "five.txt": "a caption without a video",
        "one": "one is named twice",
        "gone": "gone.mp4 does not exist",
        "caf?.mp4": "its name is not UTF-8",
    }.items():
        assert words in found[name]
    with pytest.raises(
        UserError, match=r"caf\?\.mp4: its name is not UTF-8.*\(and 6 more\); or leave such clips out with bad: skip"
    ):
        opened(folder)


def test_a_folder_without_videos_and_links_that_leave_it(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a")
    with pytest.raises(UserError, match="empty: names no clip; put .*mp4"):
        opened(tmp_path / "empty")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "b" / "two.txt").unlink()
    (folder / "b" / "two.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="two.txt' lies outside"):
        opened(folder, bad="skip")


def test_a_csv_is_the_jsonl(folder):
    (folder / "captions.csv").write_text('\ufefffile,caption,seconds\none.MP4,"One, ""grey"".",3\nb/two.mp4,Two.\n')
    source = opened(folder)
    assert [(r.name, r.caption) for r in source] == [("one", 'One, "grey".'), ("b/two", "Two.")]
    lines = [json.dumps({"file": "one.MP4", "caption": 'One, "grey".'}), '{"file": "b/two.mp4", "caption": "Two."}']
    (folder / "list.jsonl").write_text("\n".join(lines))
    assert opened(folder / "list.jsonl").fingerprint() == source.fingerprint()
    (folder / "other.csv").write_text("path,text\none.MP4,One.\n")
    assert opened(folder / "other.csv", columns=("path", "text"))[0].caption == "One."
    (folder / "captions.jsonl").write_text(lines[0])
    with pytest.raises(UserError, match="captions.jsonl and captions.csv; name the one"):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,text\none.MP4,One.\n", r"no column file or caption \(it has path, text\)"),
        ("", r"no column file or caption \(it has none\)"),
        ("file,caption\n", "names no clip"),
        ('file,caption\none.MP4,"One\n', "after line 1: not CSV"),
        ("file,caption\none.MP4\n", "line 2: no caption for one.MP4"),
        ("file,caption\n,One.\n", "line 2: no file"),
        ("file,caption\none.MP4,One.\n../x.mp4,Two.\n", "line 3: '../x.mp4' lies outside"),
        ("file,caption\none.MP4,One.\none.MP4,Two.\n", "line 3: one is named by line 2 too"),
    ],
)
def test_a_bad_csv_is_named(folder, text, words):
    (folder / "list.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        opened(folder / "list.csv")


def test_bad_lines_of_a_list_become_faults(folder):
    lines = ["one.MP4", "no.mp4", "b/two.mp4", "one.MP4"]
    entries = [{"file": f, "caption": " " if f.startswith("b") else "A."} for f in lines]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    source = opened(folder, bad="skip")
    assert [bool(clip.fault) for clip in source.listing.clips] == [False, True, True, True]
    assert source[0].caption == "A."
    for item, words in ((1, "no.mp4 does not exist"), (2, "no caption"), (3, "line 1 too")):
        with pytest.raises(UserError, match=words):
            source[item]
    (folder / "captions.jsonl").write_text('{"file": "one.MP4", "caption": "half a \\ud83d"}')
    assert "caption of one.MP4 is not valid Unicode" in faults(opened(folder, bad="skip"))["one"]
    for file, words in (
        ("\\ud800.mp4", "lies outside"),
        ("x" * 3000, "cannot be looked up"),
        ("loop.mp4", "loop of links"),
    ):
        (folder / "loop.mp4").unlink(missing_ok=True)
        (folder / "loop.mp4").symlink_to("loop.mp4")
        (folder / "captions.jsonl").write_text(f'{{"file": "{file}", "caption": "A."}}')
        with pytest.raises(UserError, match=words):
            opened(folder, bad="skip")
    (folder / "captions.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1: not JSON"):
        opened(folder, bad="skip")


def rows_of(folder: Path) -> dict[str, list]:
    return {"video": [str(folder / "b" / "two.mp4"), str(folder / "one.MP4")], "caption": ["Two.", "One."]}


def test_a_saved_dataset_with_paths_or_bytes(folder, tmp_path):
    plain = datasets.Dataset.from_dict(rows_of(folder)).cast_column("video", datasets.Video())  # never decoded by it
    plain.save_to_disk(str(tmp_path / "paths"))
    held = [{"bytes": Path(p).read_bytes(), "path": None} for p in rows_of(folder)["video"]]
    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"video": held, "caption": ["Two.", " "]}, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "bytes"))
    source = opened(tmp_path / "paths")
    assert source.listing.kind == "dataset" and len(source) == 2
    assert (source[0].name, source[0].caption) == ("row-000000-two", "Two.")
    assert source[0].frames[:, 0, 0, 0].tolist() == [100, 110, 120, 130, 140]
    with pytest.raises(UserError, match="has the splits train, test; say split"):
        opened(tmp_path / "bytes")
    source = opened(tmp_path / "bytes", split="train", bad="skip")
    assert np.array_equal(source[0].frames, opened(tmp_path / "paths")[0].frames)
    assert list(faults(source)) == ["row-000001"] and "row 1: no caption" in faults(source)["row-000001"]
    assert len(opened(tmp_path / "bytes", split="test")) == 1
    with pytest.raises(UserError, match="no column text .*columns: .VIDEO, CAPTION."):
        opened(tmp_path / "paths", columns=("video", "text"))
    with pytest.raises(UserError, match="split 'train' is for"):
        opened(folder, split="train")


def test_a_selection_that_was_saved_keeps_its_order(folder, tmp_path):
    plain = datasets.Dataset.from_dict(rows_of(folder))
    plain.select([1, 0]).save_to_disk(str(tmp_path / "turned"))
    assert [r.caption for r in opened(tmp_path / "turned")] == ["One.", "Two."]
    held = [Path(p).read_bytes() for p in rows_of(folder)["video"]]
    data = datasets.Dataset.from_dict({"video": held, "caption": ["Two.", "One."]})
    data.select([1, 0]).save_to_disk(str(tmp_path / "bytes"))
    assert datasets.load_from_disk(str(tmp_path / "bytes"))["caption"][:] == ["One.", "Two."]
    first, second = opened(tmp_path / "bytes")
    assert (first.caption, first.frames[0, 0, 0, 0], second.frames[0, 0, 0, 0]) == ("One.", 0, 100)
    data.to_parquet(str(tmp_path / "one.parquet"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "one.parquet").rename(tmp_path / "hub" / "one.parquet")
    assert [r.frames[0, 0, 0, 0] for r in opened(tmp_path / "hub")] == [100, 0]


def test_parquet_files_with_bytes(folder, tmp_path):
    held = [{"bytes": Path(p).read_bytes(), "path": Path(p).name} for p in rows_of(folder)["video"]]
    features = datasets.Features({"clip": datasets.Video(decode=False), "text": datasets.Value("string")})
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number, row in enumerate(held):
        part = datasets.Dataset.from_dict({"clip": [row], "text": [f"Row {number}."]}, features=features)
        part.to_parquet(str(tmp_path / "hub" / "data" / f"train-{number:05d}-of-00002.parquet"))
    source = opened(tmp_path / "hub", columns=("clip", "text"))
    assert [(r.name, r.caption) for r in source] == [("row-000000-two", "Row 0."), ("row-000001-one", "Row 1.")]
    assert source[1].frames[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    part.to_parquet(str(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet"))
    with pytest.raises(UserError, match="has the splits train, test"):
        opened(tmp_path / "hub", columns=("clip", "text"))
    assert len(opened(tmp_path / "hub", columns=("clip", "text"), split="test")) == 1
    with pytest.raises(UserError, match="no parquet file of split 'dev'"):
        opened(tmp_path / "hub", columns=("clip", "text"), split="dev")
    (tmp_path / "hub" / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match="is not a Hugging Face dataset that can be read"):
        opened(tmp_path / "hub", columns=("clip", "text"), split="train")


def test_bytes_that_are_no_video_are_named_by_their_row(tmp_path):
    rows = {"video": [b"", b"hello " * 100, None], "caption": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    source = opened(tmp_path / "set", bad="skip")
    for item, words in ((0, "row-000000: the file is empty"), (1, "row-000001: not a video"), (2, "row 2: no video")):
        with pytest.raises(UserError, match=words):
            source[item]


def test_a_dataset_that_names_files_elsewhere_by_relative_paths_is_refused(tmp_path):
    datasets.Dataset.from_dict({"video": ["../x.mp4"], "caption": ["a"]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="row 0: '../x.mp4' lies outside"):
        opened(tmp_path / "set", bad="skip")


def test_rules_that_refuse_a_clip_of_another_rate_or_size(folder):
    with pytest.raises(UserError, match="16 fps, 8 wanted.*other_fps: nearest"):
        VideoFolderSource(folder, (32, 48), 3, 8, other_fps="error")[0]
    with pytest.raises(UserError, match="48x32, 32x32 wanted.*other_size: crop"):
        VideoFolderSource(folder, (32, 32), 5, 16, other_size="error")[0]
    assert VideoFolderSource(folder, (32, 48), 5, 16, other_fps="error", other_size="error")[0].note == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bad": "ignore"}, "bad is 'ignore'; it has to be one of error, skip"),
        ({"other_fps": "blend"}, "one of nearest, error"),
        ({"other_size": True}, "one of crop, error"),
        ({"columns": ["file"]}, "two names"),
        ({"split": 3}, "split is 3; it has to be text"),
        ({"bda": "skip"}, "did you mean bad"),
    ],
)
def test_keys_of_the_source_are_checked(folder, change, words):
    with pytest.raises(UserError, match=words):
        open_source({"kind": "videos", "path": str(folder), "size": [32, 48], "num_frames": 5, "fps": 16} | change)


def test_a_disk_that_does_not_answer_is_no_fault_of_the_clip(folder, monkeypatch):
    from vpae.data.records import Unreachable

    source, real = opened(folder, bad="skip"), Path.open

    def fails(path, *arguments, **more):
        if path.suffix == ".MP4":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(Unreachable, match="one.MP4: cannot be opened .Input/output error."):
        source[1]


def test_a_list_may_name_one_picture_twice(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": "y"}')
    clips = list_clips(tmp_path, "image", repeats=True).clips
    assert [(c.name, c.caption, c.fault) for c in clips] == [("000000-a", "x", ""), ("000001-a", "y", "")]


def test_characters_that_end_lines_elsewhere_are_part_of_a_caption(tmp_path):
    """U+2028, U+0085 and the like end no line of JSONL or CSV, and a CSV's quoted caption keeps its own line ends."""
    (tmp_path / "a.mp4").touch()
    caption = "a \u2028 b \x85 c \x1c d"
    (tmp_path / "l.jsonl").write_text(json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False), "utf-8")
    (tmp_path / "l.csv").write_bytes(f'file,caption\r\na.mp4,"{caption}\r\nand more"\r\n'.encode())
    assert [c.caption for c in list_clips(tmp_path / "l.jsonl", "file").clips] == [caption]
    assert [c.caption for c in list_clips(tmp_path / "l.csv", "file").clips] == [f"{caption}\r\nand more"]


def test_odd_lines_and_folders_are_named_in_one_line(tmp_path):
    """Found by fuzzing; each was a traceback, or a message of two lines."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match=r"a.txt: cannot be read \(Is a directory\)"):
        opened(tmp_path)
    with pytest.raises(UserError, match="columns is .*; it has to be two names"):
        open_source({"kind": "videos", "path": str(tmp_path), **SHAPE, "size": [32, 48], "columns": ["a\nb", "c"]})
    (tmp_path / "l.csv").write_text('"a\nb",c\n1,2\n')
    with pytest.raises(UserError, match=r"it has 'a\\nb', c"):
        opened(tmp_path / "l.csv")
    for line, says in (
        ('{"file": ".", "caption": "a"}', "'.' names no file"),
        ('{"file": "a.mp4", "caption": ' + "1" * 5000 + "}", "not JSON .a number of too many digits"),
        ('{"file": "a\\nb.mp4", "caption": "a"}', r"a\\nb.mp4 does not exist"),
    ):
        (tmp_path / "l.jsonl").write_text(line)
        with pytest.raises(UserError, match=says) as caught:
            opened(tmp_path / "l.jsonl")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", [[True, False], [1, 2], [{"bytes": 1}, {"bytes": 2}], [{"x": "a"}, {"x": "b"}]])
def test_a_column_that_holds_no_videos_is_named(tmp_path, column):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"video": column, "caption": ["a", "b"]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="is not a Hugging Face dataset that can be read .a column of"):
        opened(tmp_path)
