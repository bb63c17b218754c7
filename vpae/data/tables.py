"""Hugging Face datasets on disk as a table of videos: bytes or paths, never decoded by the library (which would need
torchcodec), never copied into its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vpae.data.videos import VideoBytes
from vpae.errors import UserError

_MARKS = ("state.json", "dataset_dict.json")
_SPLITS = ("train", "validation", "val", "dev", "test")  # that a parquet file's name may begin with


def is_table(folder: Path) -> bool:
    """Whether a folder is a dataset of ``save_to_disk``, or holds parquet files."""
    return any((folder / mark).is_file() for mark in _MARKS) or bool(_parquet(folder))


def _parquet(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.parquet") if p.is_file())


class Table:
    """The rows of a dataset.

    Attributes:
        captions: what the caption's column holds, row by row.
        paths: the path that a row's video has, None where it has none.
        holds_bytes: whether the row holds the video itself.
        files: the files that the table lies in.
    """

    def __init__(
        self,
        video: list[pa.ChunkedArray | _Lazy],
        captions: list[Any],
        files: list[Path],
        order: list[int] | None = None,
    ) -> None:
        self._parts, self._order, self.files = video, order, files
        self._starts = [0]
        self.paths: list[str | None] = []
        self.holds_bytes: list[bool] = []
        for part in video:
            paths, held = part.summary() if isinstance(part, _Lazy) else _summary(part)
            self.paths += paths
            self.holds_bytes += held
            self._starts.append(self._starts[-1] + len(paths))
        self.captions = captions
        if order is not None:  # picked row by row: taking them from the table would copy all its videos
            for name in ("captions", "paths", "holds_bytes"):
                values = getattr(self, name)
                setattr(self, name, [values[row] for row in order])

    def __len__(self) -> int:
        return len(self.captions)

    def video(self, row: int, name: str) -> VideoBytes:
        """The bytes in a row."""
        row = row if self._order is None else self._order[row]
        part = max(p for p, start in enumerate(self._starts[:-1]) if start <= row)
        column = self._parts[part]
        try:
            column = column.load() if isinstance(column, _Lazy) else column
            value = column[row - self._starts[part]].as_py()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{name}: cannot be read from its table ({reason})") from error
        return VideoBytes(name, value["bytes"] if isinstance(value, dict) else value)


class _Lazy:
    """A column of one row group of a parquet file, read when asked for; the one read last is kept."""

    _kept: tuple[_Lazy, pa.ChunkedArray] | None = None

    def __init__(self, file: Path, group: int, column: str) -> None:
        self.file, self.group, self.column = file, group, column

    def load(self) -> pa.ChunkedArray:
        if _Lazy._kept is None or _Lazy._kept[0] is not self:
            _Lazy._kept = None  # free it before the next one is read
            _Lazy._kept = (self, pq.ParquetFile(self.file).read_row_group(self.group, [self.column])[self.column])
        return _Lazy._kept[1]

    def summary(self) -> tuple[list[str | None], list[bool]]:
        """As :func:`_summary`, from the file's own counts where they tell, so that no video is read for it."""
        file = pq.ParquetFile(self.file)
        group, kind = file.metadata.row_group(self.group), file.schema_arrow.field(self.column).type
        _check_kind(kind)
        leaves = {group.column(i).path_in_schema: group.column(i).statistics for i in range(group.num_columns)}
        missing = leaves.get(f"{self.column}.bytes" if pa.types.is_struct(kind) else self.column)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            missing = None  # paths, to be read
        if missing is None or not missing.has_null_count or missing.null_count not in (0, group.num_rows):
            return _summary(self.load())
        paths: list[str | None] = [None] * group.num_rows
        if f"{self.column}.path" in leaves:
            part = file.read_row_group(self.group, [f"{self.column}.path"])[self.column]
            paths = pc.struct_field(part, "path").to_pylist()
        return paths, [missing.null_count == 0] * group.num_rows


def _summary(column: pa.ChunkedArray) -> tuple[list[str | None], list[bool]]:
    """Paths, and which rows hold bytes, of a column of structs (bytes, path), of texts or of bytes."""
    kind = column.type
    _check_kind(kind)
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        held = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist() if "bytes" in names else [False] * len(column)
        paths = pc.struct_field(column, "path").to_pylist() if "path" in names else [None] * len(column)
        return paths, held
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.to_pylist(), [False] * len(column)
    return [None] * len(column), pc.is_valid(column).to_pylist()


def _check_kind(kind: pa.DataType) -> None:
    """A column of videos holds structs of bytes and path, paths, or bytes."""

    def text(of: pa.DataType) -> bool:
        return pa.types.is_string(of) or pa.types.is_large_string(of)

    def data(of: pa.DataType) -> bool:
        return pa.types.is_binary(of) or pa.types.is_large_binary(of)

    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        good = data(fields.get("bytes", pa.binary())) and text(fields.get("path", pa.string()))
        good = good and ("bytes" in fields or "path" in fields)
    else:
        good = text(kind) or data(kind)
    if not good:
        raise ValueError(f"a column of {kind}")


def open_table(folder: Path, columns: tuple[str, str], split: str | None) -> Table:
    """Open a dataset folder.

    Args:
        columns: of the videos (structs of bytes and path as ``datasets.Video(decode=False)`` gives, paths, or bytes)
            and of the captions.
        split: of a dataset with several.

    Raises:
        UserError: it is damaged, has no such column or split, or its column holds no videos.
    """
    saved = any((folder / mark).is_file() for mark in _MARKS)
    try:
        return Table(*(_saved if saved else _from_parquet)(folder, columns, split))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: is not a Hugging Face dataset that can be read ({reason})") from error


def _columns(folder: Path, names: list[str], columns: tuple[str, str]) -> None:
    known = ", ".join(name if name.isprintable() else repr(name) for name in names)
    for column in columns:
        if column not in names:
            raise UserError(
                f"{folder}: the dataset has no column {column} (it has {known}); "
                "say columns: [VIDEO, CAPTION] with its own names"
            )


def _saved(folder: Path, columns: tuple[str, str], split: str | None):
    import datasets

    if (folder / "dataset_dict.json").is_file():
        known = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in known and (split is not None or len(known) != 1):
            raise UserError(f"{folder}: has the splits {', '.join(map(str, known))}; say split: with one of them")
        folder = folder / (split or known[0])
    elif split is not None:
        raise UserError(f"{folder}: holds one split alone; remove the key split, or name the folder above")
    rows = datasets.load_from_disk(str(folder)).with_format("arrow")  # arrow: nothing is decoded
    _columns(folder, rows.column_names, columns)
    table, files = rows.data.table, sorted(p for p in folder.iterdir() if p.is_file())
    # select() and shuffle() save an index beside the rows
    order = None if rows._indices is None else rows._indices.column(0).to_pylist()
    return [table[columns[0]]], table[columns[1]].to_pylist(), files, order


def _from_parquet(folder: Path, columns: tuple[str, str], split: str | None):
    files = _parquet(folder)
    # the Hub's own naming: train-00000-of-00004.parquet, or a folder of that name
    of = {p: {p.name.split("-")[0].split(".")[0], *p.relative_to(folder).parts[:-1]} for p in files}
    found = [s for s in _SPLITS if any(s in names for names in of.values())]
    if split is None and len(found) > 1:
        raise UserError(f"{folder}: has the splits {', '.join(found)}; say split: with one of them")
    if split is not None:
        files = [p for p in files if split in of[p]]
        if not files:
            raise UserError(f"{folder}: has no parquet file of split {split!r} (as {split}-00000-of-00001.parquet)")
    parts, captions = [], []
    for file in files:
        opened = pq.ParquetFile(file)
        _columns(file, opened.schema_arrow.names, columns)
        for group in range(opened.num_row_groups):
            parts.append(_Lazy(file, group, columns[0]))
            captions += opened.read_row_group(group, [columns[1]])[columns[1]].to_pylist()
    return parts, captions, files
