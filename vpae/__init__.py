"""One-step distillation of image-to-video diffusion: variational priming, then adversarial equilibrium."""

from __future__ import annotations

__version__ = "0.1.0"
