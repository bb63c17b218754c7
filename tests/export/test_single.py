"""Single files: written, read again, compared, and gone where they do not hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vpae.commands import export
from vpae.errors import UserError
from vpae.export import keys, proof, reload, single
from vpae.export.single import export_lora, export_wan, proof_path
from vpae.files import sha256


def _header(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_wan_file_says_what_it_is_and_is_proven(full_student, tmp_path, at_once):
    path = tmp_path / "student.safetensors"
    found = export_wan(full_student, path)
    assert found.max_error < 1e-4 < found.rms
    own = full_student.role.backbone.transformer.state_dict()
    weights = load_file(path)
    assert torch.equal(weights["blocks.3.cross_attn.k_img.weight"], own["blocks.3.attn2.add_k_proj.weight"])
    assert torch.equal(weights["blocks.0.norm3.bias"], own["blocks.0.norm2.bias"]) and len(weights) == len(own)
    expected = {"steps": "1", "terminal_time": "1.0", "shift": "3", "guidance": "none", "height": "32", "width": "32"}
    expected |= {"num_frames": "5", "layout": "wan", "dtype": "fp32", "format": "pt"}
    header = _header(path)
    assert expected.items() <= header.items() and {"base_model", "base_weights", "recipe", "vpae_version"} <= set(
        header
    )
    record = json.loads(proof_path(path).read_text())
    assert record["sha256"] == {path.name: sha256(path)} and record["header"] == header
    assert record["max_error"] == found.max_error and record["motion_limits"] and "environment" in record
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.proof.json", "student.safetensors"]
    assert path.stat().st_mode & 0o777 == proof_path(path).stat().st_mode & 0o777


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_a_rounded_file_keeps_to_the_student(full_student, tmp_path, at_once, dtype):
    path = tmp_path / "student.safetensors"
    (reading,) = export_wan(full_student, path, dtype).readings
    assert reading.max_error < 1e-4 < reading.distance and reading.dtype != "float32"
    sizes = {w.dtype for w in load_file(path).values()}
    assert torch.float32 not in sizes and (torch.float8_e4m3fn in sizes) == (dtype == "fp8")


def test_a_lora_student_is_written_as_it_is(lora_student, tmp_path, at_once):
    path = tmp_path / "student.safetensors"
    found, truncation, ignored = export_lora(lora_student, path)
    assert truncation is None and ignored == [] and found.max_error < 1e-4
    entries, own = load_file(path), dict(lora_student.role.named_parameters())
    assert len(entries) == len(own) and all(key.startswith("diffusion_model.") for key in entries)
    assert not any(key.endswith(".alpha") for key in entries)
    name = "blocks.1.attn1.to_q.lora_B.weight"
    assert torch.allclose(entries["diffusion_model.blocks.1.self_attn.q.lora_B.weight"], own[name] * 1.5)
    assert _header(path)["rank"] == "2" and _header(path)["layout"] == "lora"


def test_a_full_student_of_full_rank_is_the_student(full_student, tmp_path, at_once):
    found, truncation, ignored = export_lora(full_student, tmp_path / "student.safetensors", rank=64)
    whole, heard = found.readings
    assert whole.reader == "every entry" and whole.distance < 1e-5 and truncation.total < 1e-5
    # what diffusers has no place for is told, and is what its reading lacks
    assert heard.max_error < 1e-4 and heard.distance > 1e-3 and len(ignored) == 4 * 8 + 7
    record = json.loads((tmp_path / "student.proof.json").read_text())
    assert record["not_read_by_diffusers"] == ignored and len(record["truncation"]["layers"]) == 4 * 12 + 8


def test_stock_diffusers_loads_a_cut_student(full_student, tmp_path, at_once):
    found, truncation, _ = export_lora(full_student, tmp_path / "student.safetensors", "bf16", rank=20)
    assert found.max_error < 1e-4 and 0.01 < truncation.total < 0.6
    assert _header(tmp_path / "student.safetensors")["rank"] == "20"


def _damaging(name: str, monkeypatch) -> None:
    def damaged(tensors, path, metadata):
        save_file(tensors | {name: tensors[name] + 0.05}, path, metadata)

    monkeypatch.setattr(single, "save_file", damaged)


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "head.head.bias"), ("bf16", "blocks.2.cross_attn.norm_q.weight")])
def test_a_damaged_tensor_removes_the_file(full_student, tmp_path, at_once, monkeypatch, dtype, name):
    _damaging(name, monkeypatch)
    with pytest.raises(UserError, match="does not reproduce the student .* was removed"):
        export_wan(full_student, tmp_path / "student.safetensors", dtype)
    assert not list(tmp_path.iterdir())


def test_a_damaged_lora_is_removed(lora_student, tmp_path, at_once, monkeypatch):
    _damaging("diffusion_model.blocks.2.cross_attn.v.lora_B.weight", monkeypatch)
    with pytest.raises(UserError, match="does not reproduce the student"):
        export_lora(lora_student, tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_swapped_name_removes_the_file(full_student, lora_student, tmp_path, at_once, monkeypatch):
    table = keys.IN_BLOCK
    swapped = {"attn1.to_q": table["attn1.to_v"], "attn1.to_v": table["attn1.to_q"]}
    monkeypatch.setattr(keys, "IN_BLOCK", table | swapped)
    with pytest.raises(UserError, match="from_single_file does not reproduce the student"):
        export_wan(full_student, tmp_path / "student.safetensors")
    # our own reader believes the same table; diffusers' does not
    with pytest.raises(UserError, match="load_lora_weights does not reproduce the student"):
        export_lora(lora_student, tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_rounded_file_that_stands_still_is_removed(full_student, tmp_path, at_once, monkeypatch):
    def still(pipeline, request, tensors):
        latents = answer(pipeline, request, tensors)
        rounded = pipeline.transformer.dtype != torch.float32
        return (latents + 0.03 * (latents.mean(2, keepdim=True) - latents)).contiguous() if rounded else latents

    answer = reload.answer
    monkeypatch.setattr(reload, "answer", still)
    with pytest.raises(UserError, match="moves 0.9.* times as much as the student"):
        export_wan(full_student, tmp_path / "student.safetensors", "bf16")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_removed(full_student, tmp_path, monkeypatch):
    monkeypatch.setattr(proof.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="could not be read again in a fresh process: exit status 1"):
        export_wan(full_student, tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_and_survives_a_failure(full_student, tmp_path, at_once, monkeypatch):
    path = tmp_path / "student.safetensors"
    export_wan(full_student, path)
    before = sha256(path)
    (tmp_path / ".student.partial").mkdir()
    (tmp_path / ".student.partial" / ".tmpW0yd4i").write_bytes(b"what a kill left, by safetensors' own name")
    export_wan(full_student, path, "bf16")
    assert sha256(path) != before and len(list(tmp_path.iterdir())) == 2
    kept = sha256(path), proof_path(path).read_text()
    _damaging("head.head.bias", monkeypatch)
    with pytest.raises(UserError):
        export_wan(full_student, path)
    assert (sha256(path), proof_path(path).read_text()) == kept


def test_mistakes_are_named_before_anything_is_written(full_student, lora_student, tmp_path):
    taken = tmp_path / "mine.safetensors"
    taken.write_bytes(b"mine")
    with pytest.raises(UserError, match="mine.safetensors exists and is not an earlier export"):
        export_wan(full_student, taken)
    with pytest.raises(UserError, match="must end in .safetensors"):
        export_wan(full_student, tmp_path / "student.bin")
    new = tmp_path / "new.safetensors"
    with pytest.raises(UserError, match="--rank 4 is for full students"):
        export_lora(lora_student, new, rank=4)
    with pytest.raises(UserError, match="--dtype fp8 is for whole weights"):
        export_lora(full_student, new, "fp8")
    with pytest.raises(UserError, match="is no run of vpae distill"):
        export_lora(replace(full_student, recipe=None), new)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"] and taken.read_bytes() == b"mine"


def test_a_rank_for_whole_weights_is_refused():
    from vpae.__main__ import build_parser

    with pytest.raises(UserError, match="--rank 8 is for --format lora; --format wan"):
        export(build_parser().parse_args(["export", "nowhere", "--format", "wan", "--rank", "8"]))
