"""Tables: JSONL, CSV and parquet, damaged or of any content."""

from __future__ import annotations

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import SCALARS, VALUES, WORDS, cases, damaged, explore, outcome
from hypothesis import strategies as st

from vpae.data.listing import list_clips
from vpae.data.sources import open_source
from vpae.errors import UserError

TOKENS = tuple(b'"file"|"caption"|{|}|[|]|:|,|null|\\ud800|\\u0000|NaN|1e999|"|\n|\r|\t| '.split(b"|"))
TOKENS += (
    b"\xff",
    b"\x00",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"[" * 2000,
    b"1" * 5000,
    b"a.mp4",
    b"b.mp4",
)
SPEC = {"kind": "videos", "size": [32, 32], "num_frames": 5, "fps": 8, "bad": "skip"}


def _folder(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(b"no video")
    return folder


def _look(path):
    """List, open as a source, read each: no clip here can be read."""
    listing = outcome(lambda: list_clips(path, "file"))
    source = outcome(lambda: open_source(SPEC | {"path": str(path)}))
    assert isinstance(source, UserError) or len(source) == len(listing.clips)
    if isinstance(source, UserError):
        return None
    source.fingerprint()
    for item in range(len(source)):
        assert isinstance(outcome(lambda i=item: source[i]), UserError)
    return listing


@cases(15, 800)
def test_damaged_jsonl(count, tmp_path):
    file = _folder(tmp_path) / "list.jsonl"
    lines = [
        {"file": "a.mp4", "caption": "a ball \u2028 \x85 moves"},
        {"file": "b.mp4", "caption": "snow", "x": [1, {}]},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()

    @explore(count, tmp_path, damaged(text, TOKENS))
    def check(data):
        file.write_bytes(data)
        _look(file)


@cases(10, 600)
def test_jsonl_of_any_content(count, tmp_path):
    file = _folder(tmp_path) / "list.jsonl"
    entry = st.fixed_dictionaries({"file": st.sampled_from(["a.mp4", "b.mp4"]) | VALUES, "caption": WORDS | VALUES})

    @explore(count, tmp_path, st.lists(entry | VALUES, min_size=1, max_size=4))
    def check(entries):
        text = "".join(json.dumps(e) + "\n" for e in entries)
        file.write_text(text, encoding="utf-8")
        listing = _look(file)
        if listing is not None:
            assert len(listing.clips) == len(entries)
            for clip, e in zip(listing.clips, entries, strict=True):
                assert clip.fault or clip.caption == e["caption"].strip()


@cases(10, 600)
def test_csv(count, tmp_path):
    """What a spreadsheet writes is read as it was meant, line ends and quotes in captions too."""
    file = _folder(tmp_path) / "list.csv"
    rows = st.lists(st.tuples(st.sampled_from(["a.mp4", "b.mp4"]), st.text(st.characters(codec="utf-8"))), max_size=4)

    @explore(count, tmp_path, rows)
    def check(rows):
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer)
        writer.writerows([("file", "caption"), *rows])
        file.write_text(buffer.getvalue(), encoding="utf-8", newline="")
        listing = _look(file)
        if listing is not None:
            assert len(listing.clips) == len(rows)
            for clip, (_, caption) in zip(listing.clips, rows, strict=True):
                assert clip.fault or clip.caption == caption.strip()


@cases(10, 600)
def test_damaged_csv(count, tmp_path):
    file = _folder(tmp_path) / "list.csv"
    text = 'file,caption\na.mp4,"a ball, ""red"""\r\nb.mp4,snow \u2028 and \x85 rain\n'.encode()

    @explore(count, tmp_path, damaged(text, TOKENS))
    def check(data):
        file.write_bytes(data)
        _look(file)


@cases(5, 400)
def test_damaged_parquet(count, tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    videos = [{"bytes": b"no video", "path": "a.mp4"}, {"bytes": None, "path": "b.mp4"}, {"bytes": None, "path": None}]
    table = pa.table({"video": pa.array(videos, kind), "caption": ["a", "b", None]})
    pq.write_table(table, folder / "train.parquet")
    file = folder / "train.parquet"
    whole = file.read_bytes()

    @explore(count, tmp_path, damaged(whole))
    def check(data):
        file.write_bytes(data)
        _look(folder)


@cases(5, 300)
def test_parquet_of_any_content(count, tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    columns = st.dictionaries(st.sampled_from(["video", "caption", "x"]), st.lists(SCALARS, min_size=2, max_size=2))

    @explore(count, tmp_path, columns)
    def check(columns):
        try:
            pq.write_table(pa.table(columns), folder / "train.parquet")
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            return  # no such table can be
        _look(folder)
