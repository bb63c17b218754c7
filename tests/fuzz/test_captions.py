"""Captions: any Unicode, very long, control characters; through the tokenizer, the cache's report and back."""

from __future__ import annotations

import json

import numpy as np
import torch
from fuzzing import cases, explore, outcome
from hypothesis import strategies as st

from vpae.conditioning import TEXT_LENGTH
from vpae.data.encoders import Encoders
from vpae.data.outcomes import Outcome, summary
from vpae.data.records import Record
from vpae.data.shards import _read
from vpae.errors import UserError
from vpae.files import write_json, write_text

CAPTIONS = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Mn", "So"]), max_size=30),
    st.lists(
        st.sampled_from(["a", "red", "ball", "\0", "</s>", "<pad>", "<extra_id_0>", "\u202e", "\u0301", "😀", "\x85"])
    ).map(" ".join),
    st.tuples(st.text(min_size=1, max_size=4), st.integers(1, 3000)).map(lambda t: t[0] * t[1]),
)


@cases(10, 800)
def test_the_text_encoder_takes_any_caption(count, micro_pipeline, tmp_path):
    """Tokens are finite, no more than the transformer takes, and zero after a caption's end, whatever is beside it."""
    encoders = Encoders(micro_pipeline)

    @explore(count, tmp_path, st.lists(CAPTIONS, min_size=1, max_size=2))
    def check(captions):
        made = outcome(lambda: encoders.texts(captions))
        if isinstance(made, UserError):
            return
        assert made.shape[0] == len(captions) and 1 <= made.shape[1] <= TEXT_LENGTH and made.isfinite().all()
        alone = encoders.texts(captions[:1])
        assert torch.allclose(made[:1, : alone.shape[1]], alone, atol=1e-5)


class _Source:
    bad, folder = "skip", None

    def __init__(self, caption):
        self.caption = caption

    def name(self, item):
        return "clip"

    def __getitem__(self, item):
        return Record("clip", np.zeros((1, 2, 2, 3), np.uint8), self.caption)


@cases(10, 500)
def test_captions_and_names_in_the_report(count, tmp_path):
    """A line a clip, each of them JSON, whatever the caption or the name holds."""

    @explore(count, tmp_path, st.lists(st.tuples(CAPTIONS, CAPTIONS, st.booleans()), min_size=1, max_size=4))
    def check(drawn):
        outcomes = [Outcome(name, caption, left_out=caption if bad else "") for name, caption, bad in drawn]
        kept = _read(_Source(drawn[0][1]), 0)
        assert isinstance(kept, Outcome) == (not drawn[0][1].strip())
        file = tmp_path / "clips.jsonl"
        lines = "".join(json.dumps(o.reported(), ensure_ascii=False) + "\n" for o in outcomes)
        if outcome(lambda: write_text(file, lines)) is None:
            read = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
            assert [line["clip"] for line in read] == [name for name, _, _ in drawn]
        write_json(tmp_path / "m.json", {"captions": [caption for _, caption, _ in drawn]})
        assert json.loads((tmp_path / "m.json").read_text())["captions"] == [caption for _, caption, _ in drawn]
        summary(outcomes, file)
