"""The methods that V-PAE is compared with, as sections of a recipe (section ``method`` of ``kind: peer``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vpae.flow import TimeLaw
from vpae.sections import Head, Lora, Optimiser


@dataclass(frozen=True)
class Samples:
    """Clips by the teacher's own sampler, made once for the first ``count`` clips' conditions and kept in ``folder``.

    A step is two evaluations where the guidance scale is not 1. They are computed in fp32, ``batch`` at a time.
    """

    folder: str
    count: int
    steps: int
    guidance_scale: float
    seed: int
    batch: int


@dataclass(frozen=True)
class Dmd2:
    """DMD2 (arXiv 2405.14867), one step. ``fake_lora: null``: all of the fake score's weights, as in the paper."""

    kind: Literal["dmd2"]
    student_steps: int
    critic_per_student: int
    guidance_scale: float
    normaliser: Literal["dmd", "score", "none"]
    score_time: TimeLaw
    fake_time: TimeLaw
    judge_time: TimeLaw
    fake_lora: Lora | None
    taps: tuple[int, ...] | None
    head: Head
    student_gan_weight: float
    critic_gan_weight: float
    ema_decay: float
    student_optimiser: Optimiser
    critic_optimiser: Optimiser


@dataclass(frozen=True)
class Consistency:
    """Consistency distillation on ``grid_steps`` times, uniform under ``grid_shift``.

    A guidance scale of ``guidance_range`` is drawn for every sample; ``target`` is whose prediction is matched: the
    student's EMA, or the student itself.
    """

    student_steps: int
    grid_steps: int
    grid_shift: float
    guidance_range: tuple[float, float]
    target: Literal["ema", "student"]
    distance: Literal["huber", "squared"]
    huber_c: float
    ema_decay: float
    student_optimiser: Optimiser


@dataclass(frozen=True)
class Adversary:
    """PCM's discriminator: a head of its own on each tapped block of the frozen teacher."""

    weight: float
    head_per_student: int
    taps: tuple[int, ...] | None
    head: Head
    head_optimiser: Optimiser


@dataclass(frozen=True)
class Pcm:
    """PCM (arXiv 2405.18407) with one phase: an adversarial LCM; without ``adversary`` plain LCM (2310.04378)."""

    kind: Literal["pcm"]
    consistency: Consistency
    adversary: Adversary | None


@dataclass(frozen=True)
class Apt:
    """APT (arXiv 2501.08316): consistency distillation, then a GAN on real clips without the teacher.

    ``consistency: null`` lets the GAN start from the teacher's own weights.
    """

    kind: Literal["apt"]
    consistency: Consistency | None
    student_steps: int
    head_per_student: int
    judge_time: TimeLaw
    taps: tuple[int, ...] | None
    head: Head
    r1_weight: float
    r1_sigma: float
    ema_decay: float
    student_optimiser: Optimiser
    head_optimiser: Optimiser


@dataclass(frozen=True)
class Ladd:
    """LADD (arXiv 2403.12015): a GAN on the frozen teacher's features, against clips the teacher made.

    ``student_times`` are the noise levels that the student starts from, drawn by ``student_weights``.
    ``teacher_samples: null`` takes the data's own clips for real ones.
    """

    kind: Literal["ladd"]
    teacher_samples: Samples | None
    student_steps: int
    head_per_student: int
    student_times: tuple[float, ...]
    student_weights: tuple[float, ...]
    judge_time: TimeLaw
    share_noise: bool
    taps: tuple[int, ...] | None
    head: Head
    adversarial: Literal["hinge", "softplus"]
    ema_decay: float
    student_optimiser: Optimiser
    head_optimiser: Optimiser


@dataclass(frozen=True)
class Mse:
    """Regression of the teacher's samples on their noise: the floor that every other method has to clear."""

    kind: Literal["mse"]
    teacher_samples: Samples
    student_steps: int
    ema_decay: float
    student_optimiser: Optimiser


Method = Dmd2 | Apt | Pcm | Ladd | Mse


def samples_of(method: Method) -> Samples | None:
    """The teacher's clips that a method trains on instead of the data's own."""
    return getattr(method, "teacher_samples", None)


def taps_of(method: Method) -> tuple[tuple[int, ...] | None, str] | None:
    """A method's tapped blocks and the key that names them; None where it has no head."""
    if isinstance(method, Pcm):
        return None if method.adversary is None else (method.adversary.taps, "method.adversary.taps")
    return (method.taps, "method.taps") if hasattr(method, "taps") else None


def check(method: Method, student: str, need: Callable[[bool, str], None]) -> None:
    """What the types of a section ``method`` cannot say.

    Args:
        student: the recipe's ``student.kind``.
        need: ``need(condition, message)``.
    """
    owner, key = (method.adversary, "method.adversary") if isinstance(method, Pcm) else (method, "method")
    head: Head | None = getattr(owner, "head", None)
    if head is not None:
        need(head.width % head.num_heads == 0, f"{key}.head.width must be a multiple of head.num_heads")
        need(owner.taps is None or len(owner.taps) > 0, f"{key}.taps names no block; null takes the default ones")
    if isinstance(method, (Dmd2, Ladd)):
        need(method.judge_time.low < 1, "method.judge_time.low must be below 1: at t = 1 the judge sees noise alone")
    if isinstance(method, Dmd2):
        need(method.score_time.low > 0, "method.score_time.low must be above 0 (the score is infinite at t = 0)")
        need(
            student == "full" or method.fake_lora is not None,
            "student.kind is lora: all adapters stand on the teacher's weights, so method.fake_lora must be given too",
        )
    if isinstance(method, Ladd):
        times, weights = method.student_times, method.student_weights
        need(
            0 < len(times) == len(weights) and all(0 < t <= 1 for t in times),
            "method.student_times are times above 0, at most 1, each with a number in student_weights",
        )
        need(
            min(weights) >= 0 and sum(weights) > 0, "method.student_weights are at least 0, and one of them is above 0"
        )
    if isinstance(method, (Pcm, Apt)) and method.consistency is not None:
        low, high = method.consistency.guidance_range
        need(0 <= low <= high, "method.consistency.guidance_range is a range: at least 0, the smaller number first")
