"""The decoder over two ranks against the decoder of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan

from vpae.decoding import bands, decode_in_bands
from vpae.engine.parallel import Processes, leave, start

RELEASED = {"base_dim": 4, "z_dim": 16}  # the released layout, narrow: four levels, no patches
TINY = {"base_dim": 8, "dim_mult": [1, 2, 3], "num_res_blocks": 1, "temperal_downsample": [True, True], "patch_size": 2}
TINY |= {"in_channels": 12, "out_channels": 12}  # as the tiny teacher's
CASES = [(RELEASED, (5, 9)), (RELEASED, (7, 3)), (TINY, (4, 6))]  # uneven columns, uneven rows, patches


def _vae(config: dict) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**config).eval()


def worker(path: str) -> None:
    """One rank; rank 0 leaves the largest difference of each case, and that of a decode whose ranks do not talk."""
    processes, found = start(), []
    for config, size in CASES:
        vae, latents = _vae(config), torch.randn(2, 16, 3, *size, generator=torch.Generator().manual_seed(1))
        whole = vae.decode(latents).sample
        joined = decode_in_bands(vae, latents, processes)
        axis = -1 if size[1] >= size[0] else -2
        deaf = torch.cat([vae.decode(part).sample for part in latents.split(bands(max(size), 2), axis)], axis)
        again = vae.decode(latents).sample  # no hook is left behind
        spread = float(whole.std())
        found.append([float((x - whole).abs().max()) / spread for x in (joined, deaf, again)])
    if processes.is_main:
        with open(path, "w") as file:
            json.dump(found, file)
    leave(0)


def test_two_ranks_decode_what_one_does(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = tmp_path / "differences.json"
    done = subprocess.run(
        [*launcher, __file__, str(result)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.is_file(), done.stderr[-2000:]
    for joined, deaf, again in json.loads(result.read_text()):
        assert joined < 1e-4
        assert deaf > 1e-2  # without the neighbours' lines a seam is seen
        assert again == 0


def test_bands_cover_the_picture_and_differ_by_at_most_a_line():
    assert bands(104, 8) == [13] * 8
    assert bands(90, 8) == [12, 12, 11, 11, 11, 11, 11, 11]
    with pytest.raises(ValueError, match="3 lines"):
        bands(3, 4)


def test_one_process_decodes_as_the_vae_does_and_tiles_are_refused_on_more():
    vae, latents = _vae(TINY), torch.randn(1, 16, 2, 4, 4)
    alone = Processes(0, 1, torch.device("cpu"), None)
    assert torch.equal(decode_in_bands(vae, latents, alone), vae.decode(latents).sample)
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        decode_in_bands(vae, latents, Processes(0, 2, torch.device("cpu"), None))


if __name__ == "__main__":
    worker(sys.argv[1])
