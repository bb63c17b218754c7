"""Which versions of which libraries made a cache.

None of them refuses a cache. A version says that numbers may have moved, not that they have: a release of torch that
changes the last bit of a convolution would cost a cluster its weeks of encoding, and a fault in a release whose
number looks harmless would pass. So versions are recorded (``made_with`` in the manifest, one entry for every set of
them that took part), and what is compared is numbers: each cache stores what its encoders say of a fixed small clip and
prompt, and a run whose encoders say something else is refused, with the versions that changed named. What decides the
pixels before the encoders (PyAV with its FFmpeg, Pillow) is recorded alone: the videos' own bytes are in the
fingerprint, and decoding H.264 is exact by its standard, up to the conversion to RGB.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch

from vpae import __version__

_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "av", "pillow", "numpy", "datasets")


def versions(device: torch.device) -> dict[str, Any]:
    """Versions of vpae, the libraries, FFmpeg's parts and Python, and the device's name."""
    import av

    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    for part in ("libavcodec", "libswscale"):
        found[part] = ".".join(map(str, av.library_versions[part]))
    cuda = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU"
    return {"vpae": __version__, "python": platform.python_version(), **found}


def changed(before: Sequence[Any], now: dict[str, Any]) -> str:
    """Names what differs between the versions that made a cache and those of now."""
    then = before[-1] if before and isinstance(before[-1], dict) else {}
    differing = [f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
    return "; ".join(differing) or "the same versions"
