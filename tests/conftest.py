"""A whole pipeline of the real classes, too small to be good at anything: what the engine is tested on."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

MICRO_VAE = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
MICRO_TRANSFORMER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1.0e-6,
    "image_dim": 64,
    "added_kv_proj_dim": 24,
    "rope_max_seq_len": 64,
}
MICRO_T2V = MICRO_TRANSFORMER | {"in_channels": 16, "image_dim": None, "added_kv_proj_dim": None}
MICRO_TI2V = MICRO_T2V | {"in_channels": 8, "out_channels": 8}
MICRO_TI2V_VAE = MICRO_VAE | {
    "z_dim": 8,
    "is_residual": True,
    "decoder_base_dim": 6,
    "latents_mean": [0.1 * k for k in range(8)],
    "latents_std": [1.0 + 0.1 * k for k in range(8)],
}
WORLD = {"size": 32, "num_frames": 5}
_LORA = {"rank": 2, "alpha": 2.0, "targets": ["to_q", "to_v"]}


def _optimiser(rate: float) -> dict:
    return {
        "learning_rate": rate,
        "betas": [0.0, 0.99],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "warmup_steps": 0,
        "schedule": "constant",
        "clip_norm": 10.0,
    }


def _law(low: float = 0.02, high: float = 0.98, shift: float = 1.0) -> dict:
    return {"kind": "uniform", "low": low, "high": high, "shift": shift, "mean": 0.0, "std": 1.0}


def make_pipeline(folder: Path, kind: str = "i2v") -> Path:
    """Write a micro pipeline folder with random weights: i2v, t2v or ti2v."""
    from vpae.data.tiny import write_encoders
    from vpae.export.folder import model_index, write_transformer
    from vpae.files import write_json
    from vpae.finetune import build_vae
    from vpae.models import fresh_transformer

    write_encoders(folder, 3.0, images=kind == "i2v")
    build_vae(MICRO_TI2V_VAE if kind == "ti2v" else MICRO_VAE, 0).save_pretrained(folder / "vae")
    config = {"i2v": MICRO_TRANSFORMER, "t2v": MICRO_T2V, "ti2v": MICRO_TI2V}[kind]
    transformer = fresh_transformer(config, 0)
    write_transformer(transformer.config, dict(transformer.state_dict()), folder)
    write_json(folder / "model_index.json", model_index(kind))
    return folder


@pytest.fixture(scope="session")
def micro_pipeline(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="session")
def micro_t2v(tmp_path_factory) -> Path:
    """A pipeline of Wan2.1-T2V's classes: no CLIP, no first frame."""
    return make_pipeline(tmp_path_factory.mktemp("micro_t2v"), "t2v")


@pytest.fixture(scope="session")
def micro_ti2v(tmp_path_factory) -> Path:
    """A pipeline of Wan2.2-TI2V's classes: the first latent frame is given in its place, a residual VAE."""
    return make_pipeline(tmp_path_factory.mktemp("micro_ti2v"), "ti2v")


@pytest.fixture(scope="session")
def micro_cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache") / "micro"


@pytest.fixture
def micro_recipe(micro_pipeline, micro_cache_folder) -> dict:
    """A plain distill recipe over the micro pipeline; change a copy of it."""
    phase_two = {
        "student_steps": 4,
        "head_per_student": 1,
        "head_warmup_turns": 0,
        "judge": "unified",
        "taps": None,
        "head": {"kind": "semantic", "width": 16, "num_heads": 2, "queries": 1},
        "adversarial": "hinge",
        "judge_time": _law(0.0, 0.98),
        "judge_input": "noised",
        "share_noise": False,
        "r1": {
            "weight": 1.0,
            "spatial_sigma": 0.01,
            "temporal_sigma": 0.1,
            "form": "separate",
            "on": "real",
            "precision": "engine",
            "every": 1,
        },
        "sds": {"weight": 10.0, "time": _law(), "guidance_scale": 2.0, "first_frame_weight": 1.0},
        "ema_decay": 0.9,
        "student_optimiser": _optimiser(1e-3),
        "head_optimiser": _optimiser(1e-3),
    }
    phase_one = {
        "student_steps": 3,
        "fake_per_student": 2,
        "student_time": _law(0.9, 1.0),
        "score_time": _law(),
        "fake_time": _law(0.0, 1.0),
        "guidance_scale": 2.0,
        "normaliser": "dmd",
        "fake_lora": _LORA,
        "ema_decay": 0.9,
        "student_optimiser": _optimiser(1e-3),
        "fake_optimiser": _optimiser(1e-3),
    }
    return copy.deepcopy(
        {
            "kind": "distill",
            "name": "micro",
            "seed": 0,
            "teacher": {"path": str(micro_pipeline), "dtype": "fp32", "attention": "native", "fold_text_padding": True},
            "data": {
                "source": {"kind": "bounce", "split": "train", "count": 20, "start": 0, "world": WORLD},
                "cache": str(micro_cache_folder),
                "negative_prompt": "",
            },
            "student": {"kind": "full", "lora": _LORA},
            "priming_run": None,
            "priming": phase_one,
            "equilibrium": phase_two,
            "engine": {
                "global_batch": 4,
                "micro_batch": 2,
                "parallel": "fsdp",
                "sequence_parallel": 1,
                "precision": "fp32",
                "checkpointing": False,
                "compile": False,
                "optimiser_state": "fp32",
                "ema_on": "device",
                "log_every": 1,
                "sample_every": 100,
                "samples": 2,
                "checkpoint_every": 100,
                "async_checkpoints": False,
                "keep_checkpoints": 2,
            },
            "watch": {
                "action": "warn",
                "after_steps": 0,
                "patience": 3,
                "min_motion_ratio": 0.0,
                "max_motion_ratio": 1e6,
                "max_frame0_likeness": 1.0,
                "max_channel_drift": 1e6,
                "max_logit": 1e6,
            },
            "evaluate": {"clips": 2, "batch": 2, "teacher_steps": 2, "teacher_guidance": 2.0, "seed": 0},
        }
    )


def _peers(samples_folder: str) -> dict:
    """Sections ``method`` by kind; ``lcm`` is ``pcm`` without its adversary."""
    head = {"kind": "convolutional", "width": 16, "num_heads": 2, "queries": 1}
    samples = {"folder": samples_folder, "count": 6, "steps": 2, "guidance_scale": 2.0, "seed": 0, "batch": 4}
    consistency = {
        "student_steps": 2,
        "grid_steps": 4,
        "grid_shift": 3.0,
        "guidance_range": [2.0, 2.0],
        "target": "ema",
        "distance": "huber",
        "huber_c": 0.001,
        "ema_decay": 0.9,
        "student_optimiser": _optimiser(1e-3),
    }
    both = {"ema_decay": 0.9, "student_optimiser": _optimiser(1e-3), "head_optimiser": _optimiser(1e-3)}
    gan = {"student_steps": 2, "head_per_student": 1, "judge_time": _law(0.0, 0.98), "taps": None, "head": head} | both
    adversary = {"weight": 0.1, "head_per_student": 1, "taps": [0, 3], "head": head}
    return {
        "mse": {
            "kind": "mse",
            "teacher_samples": samples,
            "student_steps": 3,
            "ema_decay": 0.9,
            "student_optimiser": _optimiser(1e-3),
        },
        "dmd2": {
            "kind": "dmd2",
            "student_steps": 2,
            "critic_per_student": 2,
            "guidance_scale": 2.0,
            "normaliser": "dmd",
            "score_time": _law(),
            "fake_time": _law(0.0, 1.0),
            "judge_time": _law(0.0, 0.98),
            "fake_lora": None,
            "taps": None,
            "head": head,
            "student_gan_weight": 0.5,
            "critic_gan_weight": 0.25,
            "ema_decay": 0.9,
            "student_optimiser": _optimiser(1e-3),
            "critic_optimiser": _optimiser(1e-3),
        },
        "lcm": {"kind": "pcm", "consistency": consistency, "adversary": None},
        "pcm": {
            "kind": "pcm",
            "consistency": consistency | {"target": "student"},
            "adversary": adversary | {"head_optimiser": _optimiser(1e-3)},
        },
        "apt": {"kind": "apt", "consistency": consistency, "r1_weight": 10.0, "r1_sigma": 0.1} | gan,
        "ladd": {
            "kind": "ladd",
            "teacher_samples": samples,
            "student_times": [1.0],
            "student_weights": [1.0],
            "share_noise": False,
            "adversarial": "hinge",
        }
        | gan,
    }


@pytest.fixture(scope="session")
def micro_samples_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("samples") / "micro"


@pytest.fixture
def micro_peer(micro_recipe, micro_samples_folder):
    """``micro_peer("dmd2" | "apt" | "pcm" | "lcm" | "ladd" | "mse")``: a plain peer recipe, to be changed freely."""

    def make(name: str) -> dict:
        shared = ("seed", "teacher", "data", "student", "engine", "watch", "evaluate")
        plain = {"kind": "peer", "name": name, "method": _peers(str(micro_samples_folder))[name]}
        return copy.deepcopy(plain | {key: micro_recipe[key] for key in shared})

    return make


@pytest.fixture
def vpae():
    """Run the command line in a process of its own: ``vpae("distill", ...) -> CompletedProcess``."""

    def run(*arguments: object, ranks: int = 1, timeout: float = 300, **environment: str):
        command = [sys.executable, "-m", "vpae", *map(str, arguments)]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *launcher, "-m", "vpae", *map(str, arguments)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables)

    return run
