"""A teacher's safetensors files: headers of any content, cut files, indices that name others."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from fuzzing import SCALARS, cases, damaged, explore, mutated, outcome
from hypothesis import strategies as st
from safetensors.torch import load_file

from vpae.backbone import Backbone
from vpae.data.encoders import load_transformer, transformer_config
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.models import find_model, weights_fingerprint
from vpae.roles import Role
from vpae.weights import give_memory, read_weights, unborn_transformer

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def teacher(micro_pipeline, tmp_path):
    """A copy of the micro pipeline's transformer, and a network to read it into."""
    folder = tmp_path / "teacher"
    shutil.copytree(micro_pipeline / "transformer", folder / "transformer")
    backbone = Backbone(unborn_transformer(transformer_config(folder)))
    give_memory(backbone, start())
    return folder, backbone


def _header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


HEADERS = SCALARS | st.sampled_from(["F32", "F16", "BF16", "I32", "U8", "F64", "F8_E4M3", "BOOL"])


@cases(10, 1000)
def test_files_of_any_header(count, teacher, tmp_path):
    """What is read is what the file says, as floating point, or it is refused in one line."""
    folder, backbone = teacher
    file = folder / "transformer" / NAME
    whole = file.read_bytes()
    header = _header(whole)
    few = dict(list(header.items())[:4])
    end = struct.unpack("<Q", whole[:8])[0] + 8
    lengths = st.one_of(st.none(), st.sampled_from([0, 1, end, 1 << 31, (1 << 64) - 1]))

    def written(drawn):
        changed, length = drawn
        plain = (
            changed
            if not isinstance(changed, dict)
            else {**{k: v for k, v in header.items() if k not in few}, **changed}
        )
        text = json.dumps(plain).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + whole[end:]

    @explore(count, tmp_path, st.tuples(mutated(few, HEADERS), lengths).map(written) | damaged(whole))
    def check(data):
        file.unlink()
        file.write_bytes(data)
        made = outcome(lambda: read_weights(backbone, folder, start()))
        weights_fingerprint(folder)
        if isinstance(made, UserError):
            return
        stored = load_file(file)
        for name, parameter in Role("base", backbone).named_parameters():
            assert stored[name].is_floating_point() and torch.equal(
                parameter.detach().nan_to_num(), stored[name].to(parameter.dtype).nan_to_num()
            ), f"{name} is not what the file holds"


@cases(3, 200)
def test_the_library_that_reads_single_models(count, teacher, tmp_path):
    folder, _ = teacher
    file = folder / "transformer" / NAME
    whole = file.read_bytes()

    @explore(count, tmp_path, damaged(whole[:4096]).map(lambda head: head + whole[4096:]) | damaged(whole))
    def check(data):
        file.unlink()
        file.write_bytes(data)
        outcome(lambda: load_transformer(folder))


@cases(7, 500)
def test_indices_and_configs_of_any_content(count, teacher, tmp_path):
    """An index may name files of another folder, a config any numbers."""
    folder, backbone = teacher
    config, index = folder / "transformer" / "config.json", folder / "transformer" / f"{NAME}.index.json"
    plain = json.loads(config.read_text())
    names = list(_header((folder / "transformer" / NAME).read_bytes()))[1:4]
    indices = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, NAME)}
    files = SCALARS | st.sampled_from(["../../secret.safetensors", "/etc/passwd", "other.safetensors"])

    @explore(count, tmp_path, st.tuples(st.booleans(), mutated(plain), mutated(indices, files)))
    def check(drawn):
        configured, of_config, of_index = drawn
        config.write_text(json.dumps(of_config if configured else plain))
        index.unlink(missing_ok=True)
        if not configured:
            index.write_text(json.dumps(of_index))
        outcome(lambda: find_model(str(folder)))
        if configured:
            read = outcome(lambda: transformer_config(folder))
            if not isinstance(read, UserError):
                _small(read) and outcome(lambda: unborn_transformer(read))
        else:
            outcome(lambda: read_weights(backbone, folder, start()))


def _small(config: object) -> bool:
    """Whether a network of it can be put together in a moment, even without memory."""
    numbers = [v for value in config.values() for v in (value if isinstance(value, list) else [value])]
    return all(abs(v) < 1000 for v in numbers if isinstance(v, int | float))
