"""The metadata, the pins and the launch scripts agree with each other and with what is installed."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vpae

ROOT = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(section: str, key: str) -> list[Requirement]:
    return [Requirement(line) for line in setup_cfg()[section][key].split("\n") if line]


def pins() -> dict[str, str]:
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def closure(roots: list[Requirement]) -> set[str]:
    """Names of all distributions that `roots` bring, followed through the metadata of what is installed."""
    found: set[str] = set()
    queue = list(roots)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        queue += [Requirement(line) for line in importlib.metadata.requires(name) or []]
    return found


BASE = requirements("options", "install_requires")
DEV = requirements("options.extras_require", "dev")


def test_base_and_dev_install_bring_no_gpu_kernel():
    assert not closure(BASE + DEV) & {"xformers", "flash-attn", "sageattention", "kernels"}


def test_the_gpu_extra_is_where_they_are():
    assert {r.name for r in requirements("options.extras_require", "gpu")} == {"xformers", "flash-attn"}


def test_everything_that_is_installed_has_a_pin():
    missing = closure(BASE + DEV) - {canonicalize_name(name) for name in pins()}
    # A CUDA build of torch pins these itself, each to one version.
    assert not [name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))]


@pytest.mark.parametrize("requirement", BASE + DEV, ids=lambda r: r.name)
def test_pins_lie_in_the_stated_ranges(requirement):
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    bounds = {spec.operator for spec in requirement.specifier}
    assert bounds == {">=", "<"} or requirement.name == "packaging"  # packaging is versioned by year


def test_versions_and_python_range():
    assert re.fullmatch(r"\d+\.\d+\.\d+", vpae.__version__)
    assert setup_cfg()["metadata"]["version"] == "attr: vpae.__version__"
    assert setup_cfg()["options"]["python_requires"] == ">=3.11,<3.13"
    assert importlib.metadata.version("vpae") == vpae.__version__


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "vpae").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_build_backend_fits_two_lines():
    text = (ROOT / "pyproject.toml").read_text()
    assert len(text.splitlines()) == 2 and list(tomllib.loads(text)) == ["build-system"]


def test_the_container_holds_the_tested_versions():
    text = (ROOT / "launch/Dockerfile").read_text()
    base = re.search(r"^FROM python:(\d+\.\d+)\.\d+-", text, re.M)
    assert base and base[1] in ("3.11", "3.12")
    installs = re.findall(r"pip install .*", text)
    assert len(installs) == 2 and all("-c launch/constraints.txt" in line for line in installs)
    ignored = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    needed = ("vpae", "recipes", "launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    assert ignored[0] == "*" and all(f"!{name}" in ignored for name in needed)


SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_executable(script):
    assert script.stat().st_mode & 0o111 == 0o111
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", script], check=True)
