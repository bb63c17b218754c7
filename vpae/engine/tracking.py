"""What a run says while it runs: TensorBoard, the same scalars as JSONL, and a progress bar."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vpae.files import atomic, writing


class Tracker:
    """Rank 0's diary of one phase; on other ranks every call does nothing.

    Args:
        folder: receives ``log.jsonl`` and TensorBoard's event files under ``tensorboard/``.
        turns: length of the run, for the bar.
        first: turn to go on from; later lines of an interrupted run are dropped, so that no turn is logged twice.
        label: name on the bar.
        active: False on other ranks.
    """

    def __init__(self, folder: Path, turns: int, first: int, label: str, active: bool = True) -> None:
        self.active = active
        if not active:
            return
        self.path = folder / "log.jsonl"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, first)
            self.file = self.path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.bar = tqdm(total=turns, initial=first, desc=label, unit="turn", dynamic_ncols=True, mininterval=0.5)
        self.started = time.monotonic()

    def advance(self) -> None:
        """One turn done."""
        if self.active:
            self.bar.update()

    def scalars(self, turn: int, values: dict[str, float]) -> None:
        """Log values under their tags."""
        if not self.active:
            return
        record = {"turn": turn, "seconds": round(time.monotonic() - self.started, 3)}
        line = json.dumps(record | {k: float(f"{v:.6g}") for k, v in sorted(values.items())})
        with writing(self.path):
            self.file.write(line + "\n")
            self.file.flush()
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, turn)

    def video(self, turn: int, tag: str, frames: np.ndarray, fps: float = 8.0) -> None:
        """Show frames uint8 ``[F, H, W, 3]`` as an animation (a GIF, which TensorBoard plays without moviepy)."""
        if not self.active:
            return
        pictures, buffer = [Image.fromarray(f) for f in frames], io.BytesIO()
        pictures[0].save(
            buffer, "GIF", save_all=True, append_images=pictures[1:], duration=int(1000 / fps), loop=0, optimize=False
        )
        self._image(turn, tag, buffer.getvalue(), frames.shape[2], frames.shape[1])

    def picture(self, turn: int, tag: str, picture: np.ndarray) -> None:
        """Show one picture uint8 ``[H, W, 3]``."""
        if not self.active:
            return
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        self._image(turn, tag, buffer.getvalue(), picture.shape[1], picture.shape[0])

    def _image(self, turn: int, tag: str, encoded: bytes, width: int, height: int) -> None:
        image = Summary.Image(encoded_image_string=encoded, height=height, width=width, colorspace=3)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), turn)
        self.writer.flush()

    def say(self, line: str) -> None:
        """A line for people, above the bar."""
        if self.active:
            self.bar.write(line)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self.writer.close()


def _keep_until(path: Path, first: int) -> None:
    """Drop the lines of turns that will be run again, and a line cut by a kill."""
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["turn"] < first]
    with atomic(path) as draft:
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """The records of a ``log.jsonl``; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
