"""What preflight says of machines that are right, and of each that is not."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from helpers import make_trainer, write_recipe

from vpae import recipe as recipes
from vpae.engine.parallel import start
from vpae.preflight import disk, machine, preflight
from vpae.runs import phases_of

GPU = {
    "index": 0,
    "id": "a",
    "name": "H100",
    "capability": "9.0",
    "total": 80 << 30,
    "used": 1 << 29,
    "driver": "580.1",
}


@pytest.fixture
def four():
    """Facts of two machines of two GPUs each, all well."""
    mine = machine.facts(0, None)
    facts = []
    for rank in range(4):
        gpu = GPU | {"index": rank % 2, "id": str(rank % 2)}
        facts.append(copy.deepcopy(mine) | {"rank": rank, "host": f"node{rank // 2}", "gpu": gpu, "blind": False})
        facts[-1] |= {"files": 1 << 16, "locked": 1 << 40, "infiniband": False, "shared_memory": 1 << 34}
        facts[-1] |= {"recipe": "r", "teacher": ("t", ""), "attention": ("native", "")}
        facts[-1]["variables"] = {"OMP_NUM_THREADS": "4"}
    return facts


@pytest.fixture
def recipe(micro_recipe):
    return recipes.from_plain(micro_recipe, "test")


def _marked(lines, mark):
    return [str(line) for line in lines if line.mark == mark]


def test_machines_that_are_well(four, recipe):
    lines = machine.judge(four, recipe)
    assert not _marked(lines, "fails") and not _marked(lines, "warning")
    assert "4 on 2 machines (node0: 0-1, node1: 2-3)" in str(lines[0])
    assert sum(line.what == "GPU" for line in lines) == 4 and "80.0 GiB" in str(lines[1])


@pytest.mark.parametrize(
    ("rank", "change", "mark", "parts"),
    [
        (
            1,
            {"gpu": GPU | {"id": "0"}},
            "fails",
            ["rank 1 (node0)", "the same as that of rank 0", "CUDA_VISIBLE_DEVICES"],
        ),
        (2, {"gpu": None, "blind": True}, "fails", ["rank 2 (node1)", "cannot use", "CUDA build"]),
        (3, {"gpu": GPU | {"id": "1", "used": 9 << 30}}, "warning", ["9.0 used", "nvidia-smi"]),
        (3, {"gpu": GPU | {"id": "1", "name": "A100"}}, "warning", ["different", "slowest"]),
        (3, {"recipe": "other"}, "fails", ["r on rank 0 (node0) and other on rank 3 (node1)", "--set"]),
        (2, {"teacher": ("u", "")}, "fails", ["t on rank 0 (node0) and u on rank 2 (node1)", "one copy"]),
        (2, {"teacher": (None, "no folder")}, "fails", ["rank 2 (node1): no folder"]),
        (1, {"attention": (None, "flash is not there")}, "fails", ["rank 1 (node0): flash is not there"]),
        (2, {"files": 1024}, "warning", ["node1", "1024 open files", "ulimit -n"]),
        (0, {"infiniband": True, "locked": 1 << 16}, "warning", ["node0", "ulimit -l unlimited"]),
        (0, {"shared_memory": 64 << 20}, "warning", ["node0", "--shm-size"]),
        (3, {"variables": {"OMP_NUM_THREADS": "8"}}, "warning", ["OMP_NUM_THREADS is 4 on rank 0", "8 on rank 3"]),
    ],
)
def test_each_fault_has_its_line(four, recipe, rank, change, mark, parts):
    """On the first rank of a machine where it concerns the machine."""
    four[rank] |= change
    (line,) = _marked(machine.judge(four, recipe), mark)
    assert all(part in line for part in parts), line


def test_versions_threads_fast_paths_and_old_cards(four, micro_recipe):
    four[2]["versions"]["torch"] = "2.12.0"
    for fact in four:
        fact["variables"] = {"NCCL_P2P_DISABLE": "1"}
        fact["gpu"] = fact["gpu"] | {"capability": "7.5"}
    micro_recipe["engine"]["precision"] = "bf16"
    lines = machine.judge(four, recipes.from_plain(micro_recipe, "test"))
    assert any("torch is" in line and "2.12.0 on rank 2 (node1)" in line for line in _marked(lines, "fails"))
    assert sum("bf16 needs capability 8.0" in line for line in _marked(lines, "fails")) == 4
    assert any("unset NCCL_P2P_DISABLE" in line for line in _marked(lines, "warning"))
    assert any("OMP_NUM_THREADS is not set" in line for line in _marked(lines, "warning"))


def test_clocks_that_differ():
    assert machine.clocks([5.0, 5.1]).mark == "ok"
    late = machine.clocks([50.0, 40.0, 50.1])
    assert late.mark == "warning" and "rank 1" in late.text


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_room_that_is_asked_for_is_what_a_checkpoint_holds(micro_recipe, tmp_path, kind):
    micro_recipe["student"]["kind"] = kind
    recipe = recipes.from_plain(micro_recipe, "test")
    tensors = make_trainer(micro_recipe, "priming", tmp_path).tensors()
    sizes = [disk.checkpoint_bytes(recipe, phase) for phase in ("priming", "equilibrium")]
    assert sizes[0] == sum(4 * tensor.numel() for tensor in tensors.values()) > sizes[1]
    assert disk.output_bytes(recipe) == 2 * sum(sizes) + sizes[0]  # two a phase, and the one being written


@pytest.mark.parametrize("name", ["lcm", "mse", "dmd2", "apt"])
def test_room_that_a_peer_asks_for_is_what_its_checkpoint_holds(micro_peer, tmp_path, name):
    """Its last phase's, but for the head."""
    plain = micro_peer(name)
    recipe = recipes.from_plain(plain, "test")
    tensors = make_trainer(plain, plain["method"]["kind"], tmp_path).tensors()
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if not re.search(r"(^|\w\.)head\.(?!judge)", key))
    sizes = [disk.checkpoint_bytes(recipe, phase) for phase in phases_of(recipe)]
    assert len(sizes) == (2 if name == "apt" else 1) and sizes[-1] == 4 * numbers
    assert disk.output_bytes(recipe) == 2 * sum(sizes) + max(sizes)


@pytest.mark.parametrize("name", ["dmd2", "mse"])
def test_a_peer_is_looked_at_as_any_run(micro_peer, tmp_path, name, monkeypatch, capsys):
    """Its teacher, attention and cache; each fault alone, and none of them in the recipe as it is."""
    plain = micro_peer(name)
    plain["data"]["cache"] = str(tmp_path / "cache")

    def report(**changes):
        recipe = recipes.from_plain(plain | {"teacher": plain["teacher"] | changes}, "test")
        good = preflight(recipe, tmp_path / "run", 60.0)
        printed = capsys.readouterr().out.splitlines()
        return good, [line for line in printed if line.startswith("fails")], printed

    good, wrong, printed = report()
    assert good and not wrong
    looked_at = {line.split()[1] for line in printed}
    assert {"teacher", "attention", "cache", "output"} <= looked_at and ("samples" in looked_at) == (name == "mse")
    good, wrong, _ = report(path="nowhere")
    assert not good and len(wrong) == 1 and "teacher.path 'nowhere' is no folder" in wrong[0]
    good, wrong, _ = report(attention="flash", fold_text_padding=False)
    assert not good and len(wrong) == 1 and "attention: flash needs flash-attn" in wrong[0]


RELEASED = {  # VAE's config, transformer's config, pipeline's index, numbers of a clip of 17 frames of 64x64
    "i2v": (
        {"z_dim": 16},
        {"text_dim": 4096, "image_dim": 1280},
        {"_class_name": "WanImageToVideoPipeline"},
        2 * 16 * 5 * 8 * 8 + 512 * 4096 + 257 * 1280,
    ),
    "t2v": ({}, {"text_dim": 4096, "image_dim": None}, {"_class_name": "WanPipeline"}, 16 * 5 * 8 * 8 + 512 * 4096),
    "ti2v": (
        {"z_dim": 48, "scale_factor_spatial": 16},
        {"text_dim": 4096},
        {"_class_name": "WanPipeline", "expand_timesteps": True},
        48 * (5 + 1) * 4 * 4 + 512 * 4096,
    ),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_room_for_a_cache_by_the_models_own_vae(micro_recipe, tmp_path, kind):
    vae, transformer, index, numbers = RELEASED[kind]
    for part, config in (("vae", vae), ("transformer", transformer)):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    micro_recipe["teacher"]["path"] = str(tmp_path / "model")
    world = {"size": 64, "num_frames": 17}
    source = {"kind": "bounce", "split": "train", "count": 5, "start": 0, "world": world}
    micro_recipe["data"] |= {"source": source, "cache": str(tmp_path / "cache")}
    assert disk.cache_bytes(recipes.from_plain(micro_recipe, "test")) == 5 * 4 * numbers


def test_places_to_write(tmp_path, monkeypatch):
    alone = start()
    good = disk.shared("output", tmp_path / "not" / "yet", 1, alone)
    assert good.mark == "ok" and str(tmp_path) in good.text and not list(tmp_path.iterdir())
    full = disk.shared("output", tmp_path, 1 << 60, alone)
    assert full.mark == "fails" and "keep_checkpoints" in full.mend
    monkeypatch.setattr(disk.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert "cannot be written (denied)" in disk.shared("cache", tmp_path, 0, alone).text
    monkeypatch.setattr(disk.Path, "write_text", lambda *_: None)  # a file that nobody sees
    monkeypatch.setattr(disk, "_LAG", 0.1)
    assert "rank 0 does not see" in disk.shared("cache", tmp_path, 0, alone).text


def test_two_ranks_are_looked_at(vpae, micro_recipe, tmp_path):
    micro_recipe["engine"] |= {"global_batch": 5, "micro_batch": 1}
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    missing = ["--set", "teacher.path=nowhere"]
    done = vpae("preflight", recipe, *missing, "--output", tmp_path / "run", "--timeout", 300, ranks=2)
    assert done.returncode != 0 and "Traceback (most recent call last)" not in done.stdout
    lines = done.stdout.splitlines()
    assert "preflight: 2 of" in lines[-1] and "checks fail" in lines[-1], done.stdout + done.stderr[-2000:]
    assert any("engine.global_batch 5 cannot be split over 2 ranks" in line for line in lines)
    assert any("teacher.path 'nowhere' is no folder" in line for line in lines)
    for name in ("all-reduce", "all-gather"):
        assert any(f"{name} over gloo of 16 MiB" in line and line.startswith("ok") for line in lines)
    assert any(line.startswith("ok       ranks        2 on 1 machine") for line in lines)


def _alone_in(world: int, rank: int, command: list[str], port: int, local: int | None = None) -> subprocess.Popen:
    here = rank if local is None else local
    together = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(here)}
    environment = os.environ | together | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, **pipes)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_rank_that_never_comes_is_named():
    lonely = _alone_in(3, 0, ["-m", "vpae", "preflight", "--timeout", "2"], _free_port())
    _, err = lonely.communicate(timeout=120)
    assert lonely.returncode == 2
    assert "rank 1 (never seen), rank 2 (never seen) did not come to 'start' within 2 s" in err


HANGS = """
import sys, time
from vpae.preflight import machine
from vpae.__main__ import main
machine.facts = lambda *_: time.sleep(600)
main()
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_one_that_finds_nobody_says_so():
    port = _free_port()
    command = ["preflight", "--timeout", "30"]
    ranks = [_alone_in(2, 0, ["-m", "vpae", *command], port), _alone_in(2, 1, ["-c", HANGS, *command], port)]
    _, err = ranks[0].communicate(timeout=200)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 2
    assert f"rank 1 ({socket.gethostname()}) did not come to 'telling of the machines' within 30 s" in err
    # the first of its machine, since of a machine's ranks the first alone tells of an error
    lost = _alone_in(2, 1, ["-m", "vpae", "preflight", "--timeout", "2"], _free_port(), local=0)
    _, err = lost.communicate(timeout=120)
    assert lost.returncode == 2 and "does not reach rank 0 at 127.0.0.1" in err
