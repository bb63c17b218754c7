"""The model card of an exported student."""

from __future__ import annotations

from vpae import __version__
from vpae import recipe as recipes
from vpae.data.encoders import pipeline_kind
from vpae.loading import Model
from vpae.recipe import Distillation, Peer

_CARD = """---
library_name: diffusers
pipeline_tag: {task}
tags: [one-step, distillation, {tag}, wan]
---

# One-step {task} student

Distilled with vpae {version} by {method} from the teacher `{teacher}`, whose licence holds for it too.

- Weights: {source}.
- Recipe: `recipe.yaml` beside this file, digest {digest}.
- Trained on clips of {frames} frames of {height}x{width}; other shapes were never seen.

## Use

```python
import torch
from diffusers import {pipeline}
from diffusers.utils import {tools}

pipe = {pipeline}.from_pretrained("THIS_FOLDER", torch_dtype=torch.float32)
frames = pipe(
    {image}prompt="{prompt}",
    height={height}, width={width}, num_frames={frames},
    num_inference_steps=1, guidance_scale=1.0,
).frames[0]
export_to_video(frames, "out.mp4", fps=8)
```

- Steps: **1** (1 NFE). Guidance: **none** (`guidance_scale=1.0`; it is distilled in). Terminal time t = 1.
- Scheduler: the one in this folder (flow matching, Euler); at one step its grid is [1, 0].
- Four steps from the same weights re-noise at t = 1, 0.9375, 0.8333, 0.625, which the Euler scheduler does not do:
  `vpae sample THIS_FOLDER --steps 4`.
- `proof.json` says how closely the call above reproduced the trained student, with hashes of the weights.

## Measured

{measured}
"""


_V_PAE = "V-PAE (arXiv 2508.21019)"
_PEERS = {
    "dmd2": "DMD2 (arXiv 2405.14867)",
    "apt": "APT (arXiv 2501.08316)",
    "pcm": "PCM (arXiv 2405.18407)",
    "lcm": "LCM (arXiv 2310.04378)",
    "ladd": "LADD (arXiv 2403.12015)",
    "mse": "regression of the teacher's samples",
}
_NOT_MEASURED = "Not yet; for a student of Bounce: `vpae evaluate THIS_FOLDER`."


def _method(recipe: recipes.Recipe | None) -> tuple[str, str]:
    """Its tag and its name with the paper's number."""
    if not isinstance(recipe, Peer):
        return "v-pae", _V_PAE
    kind = recipe.method.kind
    tag = "lcm" if kind == "pcm" and recipe.method.adversary is None else kind
    return tag, _PEERS[tag]


def model_card(model: Model, measured: str | None) -> str:
    """Markdown: what it is, how to call it, and how good it is (``measured``, Markdown too)."""
    num_frames, height, width = model.shape
    recipe, bounce, pictures = model.recipe, model.is_bounce, pipeline_kind(model.pipeline) != "t2v"
    prompt = "A red ball moves right fast. No gravity." if bounce else "What the clip shows."
    tag, method = _method(recipe)
    return _CARD.format(
        tag=tag,
        method=method,
        task="image-to-video" if pictures else "text-to-video",
        pipeline="WanImageToVideoPipeline" if pictures else "WanPipeline",
        tools="export_to_video, load_image" if pictures else "export_to_video",
        image='image=load_image("first_frame.png"),\n    ' if pictures else "",
        source=model.source,
        teacher=recipe.teacher.path if isinstance(recipe, Distillation) else model.pipeline,
        version=__version__,
        digest="unknown" if recipe is None else recipes.digest(recipe),
        prompt="What happens after the first frame." if pictures and not bounce else prompt,
        height=height,
        width=width,
        frames=num_frames,
        measured=measured or (_NOT_MEASURED if pictures else "Not yet."),
    )
