"""VBench-I2V: manifest and generation on the micro pipeline, collection on published and made-up results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Wan2.1-I2V-14B as published (MUG-V, arXiv 2510.17519, table of VBench-I2V)
WAN = {
    "camera_motion": 0.3476,
    "i2v_subject": 0.9695,
    "i2v_background": 0.9644,
    "subject_consistency": 0.9486,
    "background_consistency": 0.9707,
    "motion_smoothness": 0.9790,
    "dynamic_degree": 0.5138,
    "aesthetic_quality": 0.6475,
    "imaging_quality": 0.7044,
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vbench_scores

    return vbench_scores


def _run(*arguments, **variables):
    command = [sys.executable, str(BENCHMARKS / "vbench_i2v.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_scores_of_the_teacher_are_the_published_ones_and_those_of_the_paper(bench):
    found = bench.scores(WAN)
    assert round(found["i2v_score"], 2) == 92.90 and round(found["total_score"], 2) == 86.86
    assert abs(found["quality_score"] - 80.82) < 0.02  # its dimensions are published to two digits
    assert (round(found["SA"], 1), round(found["TC"], 1), round(found["FQ"], 2)) == (92.9, 80.8, 70.44)
    still = bench.scores(WAN | {"dynamic_degree": 0.0})
    assert still["TC"] < found["TC"] and still["dynamic_degree"] == 0.0


def test_a_score_over_fewer_or_other_dimensions_is_refused(bench):
    with pytest.raises(Exception, match="no result of camera_motion"):
        bench.scores({name: value for name, value in WAN.items() if name != "camera_motion"})
    with pytest.raises(Exception, match=r"aesthetic_quality is 64\.75"):
        bench.scores(WAN | {"aesthetic_quality": 64.75})


@pytest.mark.slow
def test_suite_is_made_judged_and_collected(micro_pipeline, tmp_path):
    images = tmp_path / "crop" / "1-1"
    images.mkdir(parents=True)
    for name, level in (("a cat.jpg", 60), ("a hill.jpg", 200)):
        Image.fromarray(np.full((48, 48, 3), level, np.uint8)).save(images / name)
    subject = [d for d in WAN if d not in ("camera_motion", "i2v_background", "background_consistency")]
    suite = [
        {"prompt_en": "a cat", "dimension": subject, "image_name": "a cat.jpg"},
        {"prompt_en": "a hill", "dimension": ["i2v_background", "background_consistency"], "image_name": "a hill.jpg"},
        {"prompt_en": "a hill, camera zooms in", "dimension": ["camera_motion"]},
    ]
    info, run = tmp_path / "info.json", tmp_path / "run"
    info.write_text(json.dumps(suite))
    small = ("--size", 32, 32, "--frames", 5, "--samples", 2, "--info", info, "--images", images)
    made = _run("manifest", run, "--model", micro_pipeline, *small)
    assert made.returncode == 0, made.stderr
    rows = json.loads((run / "manifest.json").read_text())["videos"]
    assert [r["video"] for r in rows[-2:]] == ["a hill, camera zooms in-0.mp4", "a hill, camera zooms in-1.mp4"]
    assert rows[-1]["image"] == "a hill.jpg" and [r["position"] for r in rows] == list(range(6))

    assert _run("generate", run).returncode == 0
    videos = {p.name: p.read_bytes() for p in (run / "videos").iterdir()}
    assert len(videos) == 6 and len(set(videos.values())) == 6
    (run / "videos" / "a cat-1.mp4").unlink()
    before = (run / "videos" / "a cat-0.mp4").stat().st_mtime_ns
    assert _run("generate", run).returncode == 0  # goes on: the one that is missing, the same as before
    assert {p.name: p.read_bytes() for p in (run / "videos").iterdir()} == videos
    assert (run / "videos" / "a cat-0.mp4").stat().st_mtime_ns == before

    assert "no *_eval_results.json" in _run("collect", run).stderr
    (run / "vbench").mkdir()
    for name, score in WAN.items():
        result = {name: [score, [{"video_path": r["video"]} for r in rows if name in r["dimensions"]]]}
        (run / "vbench" / f"{name}_eval_results.json").write_text(json.dumps(result))
    done = _run("collect", run)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert round(document["runs"][str(run)]["scores"]["SA"], 2) == 92.90
    (run / "vbench" / "i2v_subject_eval_results.json").write_text(json.dumps({"i2v_subject": [0.9, [{}]]}))
    assert "i2v_subject was judged on 1 videos, the manifest has 2" in _run("collect", run).stderr
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(images / "a cat.jpg")
    (run / "videos" / "a cat-1.mp4").unlink()
    assert "is not the picture of the manifest any more" in _run("generate", run).stderr


@pytest.mark.slow
def test_vbench_is_run_a_process_a_dimension_and_not_twice(tmp_path):
    """A stand-in for the package: what matters here is how it is called and what is left."""
    run, images = tmp_path / "run", tmp_path / "crop" / "1-1"
    images.mkdir(parents=True)
    (images / "a cat.jpg").write_bytes(b"x")
    (run / "videos").mkdir(parents=True)
    package = tmp_path / "site" / "vbench2_beta_i2v"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import json, os\n"
        "class VBenchI2V:\n"
        "    def __init__(self, device, info, out): self.out = out\n"
        "    def evaluate(self, videos_path, name, dimension_list, resolution):\n"
        "        assert os.path.isfile(f'vbench2_beta_i2v/data/crop/{resolution}/a cat.jpg')\n"
        "        assert os.path.isfile(f'{videos_path}/a cat-0.mp4') and dimension_list == [name]\n"
        "        json.dump({name: [0.5, [{}]]}, open(f'{self.out}/{name}_eval_results.json', 'w'))\n"
    )
    plan = {
        "info": "info.json",
        "images": str(images),
        "ratio": "1-1",
        "dimensions": ["i2v_subject", "dynamic_degree"],
        "videos": [{"video": "a cat-0.mp4", "dimensions": ["i2v_subject", "dynamic_degree"]}],
    }
    (run / "manifest.json").write_text(json.dumps(plan))
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    assert "1 of 1 videos are not there yet" in _run("evaluate", run, **path).stderr
    (run / "videos" / "a cat-0.mp4").write_bytes(b"x")
    assert _run("evaluate", run, **path).returncode == 0
    again = _run("evaluate", run, **path)
    assert again.returncode == 0 and again.stdout.count("there already") == 2
    assert "VBench failed on" in _run("evaluate", _fresh(run, tmp_path), PYTHONPATH=str(Path.cwd())).stderr


def _fresh(run, folder):
    other = folder / "other"
    other.mkdir()
    (other / "manifest.json").write_text((run / "manifest.json").read_text())
    (other / "videos").symlink_to(run / "videos")
    return other
