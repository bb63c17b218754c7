"""Which clips a folder, a list or a table names: a caption each, and a file or its bytes.

Mistakes of the list itself (no JSON, no such column, a path that leaves the folder) are errors; mistakes of one clip
(no caption, no such file, named twice) become the clip's fault, and whoever reads the clips decides what to do with it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vpae.data.tables import is_table, open_table
from vpae.data.videos import Readable
from vpae.errors import UserError

CAPTIONS, CAPTIONS_CSV = "captions.jsonl", "captions.csv"
_LINE_END = re.compile(r"\r\n?|\n")  # str.splitlines() knows seven more, which captions may hold
SUFFIXES = tuple(".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv".split())


@dataclass(frozen=True)
class Named:
    """A clip that a list names.

    Attributes:
        name: what it is called in reports.
        caption: stripped; empty only with a fault.
        file: where it lies, None where ``load`` gives it.
        load: reads what lies in no file of its own.
        fault: why it cannot be used, empty where nothing is known against it.
    """

    name: str
    caption: str
    file: Path | None = None
    load: Callable[[], Readable] | None = None
    fault: str = ""


@dataclass(frozen=True)
class Listing:
    """All clips that a path names, in order.

    Attributes:
        kind: folder, jsonl, csv, txt or dataset.
        clips: every one, the bad ones too.
        files: what has to be unchanged for the clips to be the same, besides the clips' own files.
    """

    kind: str
    path: Path
    clips: list[Named]
    files: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """To which the clips' paths are relative."""
        return self.path.parent if self.kind in ("jsonl", "csv", "txt") else self.path


def list_clips(
    path: Path,
    key: str,
    columns: tuple[str, str] | None = None,
    split: str | None = None,
    *,
    repeats: bool = False,
) -> Listing:
    """The clips of ``path``, whatever it is.

    A file is a ``.jsonl`` of objects or a ``.csv`` with a header line, with the keys or columns ``key`` and
    ``caption``, and paths relative to its folder. A folder is, in this order: one that holds ``captions.jsonl`` or
    ``captions.csv``; a Hugging Face dataset (``save_to_disk``, or parquet files); else all video files in it and below,
    each with its caption in a text file of the same name (``a.mp4``, ``a.txt``).

    Args:
        key: file (of videos) or image.
        columns: of a list or table, the names to look for instead of ``(key, "caption")``; a table's are ``video`` and
            ``caption`` unless told.
        split: which one of a dataset with several.
        repeats: of a list, let one file stand in several lines: their clips are told apart by their numbers.

    Raises:
        UserError: there is nothing, or nothing readable, or a list with a mistake (its line is named).
    """
    if path.is_dir():
        lists = [path / name for name in (CAPTIONS, CAPTIONS_CSV) if (path / name).is_file()]
        if len(lists) > 1:
            raise UserError(f"{path}: holds {CAPTIONS} and {CAPTIONS_CSV}; name the one to read")
        if not lists and is_table(path):
            listing = _table(path, columns or ("video", "caption"), split)
        elif not lists:
            listing = _folder(path)
        else:
            listing = _list(lists[0], columns or (key, "caption"), repeats)
    else:
        listing = _list(path, columns or (key, "caption"), repeats)
    if split is not None and listing.kind != "dataset":
        raise UserError(f"{path}: split {split!r} is for Hugging Face datasets, and this is none; remove the key")
    if not listing.clips:
        wanted = f"put {', '.join(SUFFIXES)} files there" if listing.kind == "folder" else "give it one line a clip"
        raise UserError(f"{listing.path}: names no clip; {wanted}")
    return replace(listing, clips=list(_only_once(listing.clips)))


def list_prompts(path: Path) -> Listing:
    """The captions of a ``.txt`` with one a line, a ``.jsonl`` of objects or a ``.csv`` with the column ``caption``.

    Raises:
        UserError: it cannot be read, holds none, or is a list with a mistake (its line is named).
    """
    text, suffix = _text_of(path), path.suffix.lower()
    if suffix == ".txt":
        lines = ((number, {"caption": line}) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip())
    else:
        lines = (_csv_rows if suffix == ".csv" else _json_rows)(path, text, ("caption",))
    clips = []
    for number, entry in lines:
        caption, where = entry.get("caption"), f"{path}, line {number}"
        caption = caption.strip() if isinstance(caption, str) else ""
        fault = "" if caption else f"{where}: no caption; give 'caption' a text"
        if caption and not _is_unicode(caption):
            fault = f"{where}: the caption is not valid Unicode; write it anew"
        clips.append(Named(f"{len(clips):06d}", caption, fault=fault))
    if not clips:
        raise UserError(f"{path}: names no clip; give it one line a clip")
    return Listing({".csv": "csv", ".txt": "txt"}.get(suffix, "jsonl"), path, clips)


def _only_once(clips: list[Named]) -> Iterator[Named]:
    first: dict[str, str] = {}
    for clip in clips:
        if clip.name in first and not clip.fault:
            clip = replace(clip, fault=f"{clip.name} is named twice; name each clip once")
        if not clip.fault.isprintable():  # names may hold line ends
            clip = replace(clip, fault="".join(c if c.isprintable() else repr(c)[1:-1] for c in clip.fault))
        first.setdefault(clip.name, clip.name)
        yield clip


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # line ends as they are: a CSV's caption may hold some
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a JSONL or CSV file, or a folder of videos"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; name the list of captions, saved as UTF-8") from error


def _list(path: Path, columns: tuple[str, str], repeats: bool) -> Listing:
    csv_file, text = path.suffix.lower() == ".csv", _text_of(path)
    clips: dict[str, int] = {}
    named = []
    for number, entry in (_csv_rows if csv_file else _json_rows)(path, text, columns):
        where, (file, caption) = f"{path}, line {number}", (entry.get(c) for c in columns)
        if not isinstance(file, str) or not file.strip():
            raise UserError(f"{where}: no {columns[0]}; give {columns[0]!r} a text")
        clip = _named(path.parent, file, caption, columns[1], where)
        if repeats:
            clip = replace(clip, name=f"{len(named):06d}-{clip.name}")
        if clip.name in clips:
            clip = replace(
                clip, fault=f"{where}: {clip.name} is named by line {clips[clip.name]} too; name each clip once"
            )
        clips.setdefault(clip.name, number)
        named.append(clip)
    return Listing("csv" if csv_file else "jsonl", path, named)


def _json_rows(path: Path, text: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_LINE_END.split(text), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
            if isinstance(error, json.JSONDecodeError):
                at = f"{error.msg} at column {error.colno}"
            raise UserError(f"{where}: not JSON ({at}); write one object a line") from error
        if not isinstance(entry, dict):
            keys = ", ".join(f'"{column}": ...' for column in columns)
            raise UserError(f"{where}: not an object; write {{{keys}}}")
        yield number, entry


def _csv_rows(path: Path, text: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        missing = [c for c in columns if c not in header]
        if missing:
            known = ", ".join(name if name.isprintable() else repr(name) for name in header) or "none"
            other = ", or say columns: [FILE, CAPTION] with its own names" if len(columns) > 1 else ""
            raise UserError(
                f"{path}: its first line names no column {' or '.join(missing)} (it has {known}); mend it{other}"
            )
        for entry in reader:
            yield reader.line_num, entry
    except csv.Error as error:
        raise UserError(f"{path}, after line {reader.line_num}: not CSV ({error}); mend its quotes") from None


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: names of files may hold other bytes, and JSON halves of letters."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def _check_inside(folder: Path, file: str, where: str) -> None:
    relative = PurePosixPath(file)
    leaves = relative.is_absolute() or ".." in relative.parts or "\0" in file or not _is_unicode(file)
    try:
        leaves = leaves or not (folder / file).resolve().is_relative_to(folder.resolve())
        if not leaves:
            (folder / file).is_file()  # raises for a name that is too long
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise UserError(f"{where}: {file[:80]!r} cannot be looked up ({reason}); mend the name") from None
    if leaves:
        raise UserError(f"{where}: {file!r} lies outside {folder}; keep the clips in the folder of their captions")


def _named(folder: Path, file: str, caption: Any, column: str, where: str) -> Named:
    _check_inside(folder, file, where)
    relative, path = PurePosixPath(file), folder / file
    if not relative.name:
        raise UserError(f"{where}: {file!r} names no file; mend the name")
    name, text = str(relative.with_suffix("")), caption.strip() if isinstance(caption, str) else ""
    fault = ""
    if not text:
        fault = f"{where}: no {column} for {file}; give {column!r} a text"
    elif not _is_unicode(text):
        fault = f"{where}: the {column} of {file} is not valid Unicode; write it anew"
    elif not path.is_file():
        fault = f"{where}: {path} does not exist; mend the name or remove the line"
    return Named(name, text, path, fault=fault)


def _folder(folder: Path) -> Listing:
    """Every video below a folder with the text file beside it; a text without a video is a fault too."""
    shown = [p for p in folder.rglob("*") if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    files = sorted((p for p in shown if not p.is_dir()), key=lambda p: p.relative_to(folder).as_posix())
    videos = [p for p in files if p.suffix.lower() in SUFFIXES]
    clips = []
    for video in videos:
        file = video.relative_to(folder).as_posix()
        beside = video.with_suffix(".txt")
        if not _is_unicode(file):
            readable = file.encode("utf-8", "replace").decode()
            clips.append(Named(readable, "", None, fault=f"{readable}: its name is not UTF-8; rename it"))
            continue
        try:
            _check_inside(folder, beside.relative_to(folder).as_posix(), str(folder))
            caption = beside.read_text(encoding="utf-8-sig")
            fault = "" if caption.strip() else f"{beside}: is empty; write the clip's caption into it"
        except FileNotFoundError:
            caption, fault = (
                "",
                f"{video}: has no caption; write it into {beside.name} beside it, or list all in {CAPTIONS}",
            )
        except UnicodeDecodeError:
            caption, fault = "", f"{beside}: is not UTF-8 text; save it as UTF-8"
        except OSError as error:
            caption, fault = "", f"{beside}: cannot be read ({error.strerror}); write the clip's caption into it"
        if fault:
            clips.append(Named(str(PurePosixPath(file).with_suffix("")), "", video, fault=fault))
        else:
            clips.append(_named(folder, file, caption, "caption", str(folder)))
    with_video = {video.with_suffix("") for video in videos}
    for file in files:
        if file.suffix.lower() == ".txt" and file.with_suffix("") not in with_video:
            name = file.relative_to(folder).as_posix().encode("utf-8", "replace").decode()
            clips.append(Named(name, "", file, fault=f"{folder / name}: a caption without a video of that name"))
    return Listing("folder", folder, clips if videos else [])


def _table(folder: Path, columns: tuple[str, str], split: str | None) -> Listing:
    table = open_table(folder, columns, split)
    clips = []
    for row in range(len(table)):
        caption, path = table.captions[row], table.paths[row]
        name = f"row-{row:06d}" + (f"-{PurePosixPath(path).stem}" if path else "")
        where, text = f"{folder}, row {row}", caption.strip() if isinstance(caption, str) else ""
        fault, file = "" if text and _is_unicode(text) else f"{where}: no {columns[1]}", None
        if table.holds_bytes[row]:
            clips.append(Named(name, text, None, lambda row=row, name=name: table.video(row, name), fault))
            continue
        if path and not PurePosixPath(path).is_absolute():
            _check_inside(folder, path, where)
        if path:  # datasets itself stores absolute paths of the videos on this machine
            file = folder / path
        if not fault and (file is None or not file.is_file()):
            fault = f"{where}: {file} does not exist" if file else f"{where}: no {columns[0]}"
        clips.append(Named(name, text, file, None, fault))
    return Listing("dataset", folder, clips, table.files)
