"""How far a kernel is from the reference, and whether that is near enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .backends import Runner, Turn
from .config import ModelConfig
from .reference import Reference

# Tolerances for weights and activations of 16 bits. KL in nats, of the distributions over the vocabulary.
KL_MEAN, KL_MAX = 1e-3, 1e-2
TOP1_AGREEMENT = 0.99  # of the positions where the reference's lead exceeds the error
LEAD = 4.0  # a lead counts where it exceeds this many times the root mean square error of a logit


@dataclass(frozen=True)
class Comparison:
    """Logits of a kernel against those of the reference, over some positions."""

    positions: int
    finite: bool  # all of our logits are
    max_error: float  # of a logit
    rms_error: float  # of the logits
    rms_reference: float  # of the reference's logits around their mean at each position
    kl_mean: float  # of the reference's distribution to ours, in nats
    kl_max: float
    decided: int  # positions where the reference's lead exceeds LEAD rms errors
    agreed: int  # of those, with the same most likely token
    greedy_differs: int | None = None  # first greedy token that is not the largest of the kernel's own logits; None: all are

    @property
    def top1_agreement(self) -> float:
        """Share of the decided positions with the same most likely token."""
        return self.agreed / self.decided if self.decided else 1.0

    def problems(self) -> list[str]:
        """What is out of tolerance, in words."""
        found = []
        if not self.finite:
            found.append("some logits are not finite")
        if not self.kl_mean <= KL_MEAN:
            found.append(f"mean KL {self.kl_mean:.2e} exceeds {KL_MEAN:.0e}")
        if not self.kl_max <= KL_MAX:
            found.append(f"largest KL {self.kl_max:.2e} exceeds {KL_MAX:.0e}")
        if self.top1_agreement < TOP1_AGREEMENT:
            found.append(f"top-1 agreement {self.top1_agreement:.1%} is below {TOP1_AGREEMENT:.0%}")
        if self.greedy_differs is not None:
            found.append(f"greedy token {self.greedy_differs} is not the largest of the kernel's own logits")
        return found

    @property
    def within(self) -> bool:
        """Whether everything is within tolerance."""
        return not self.problems()

    def describe(self) -> str:
        """All figures and the verdict, as text."""
        lines = [
            f"positions        {self.positions}",
            f"logit error      max {self.max_error:.2e}, rms {self.rms_error:.2e} (logits: rms {self.rms_reference:.2e})",
            f"KL divergence    mean {self.kl_mean:.2e}, max {self.kl_max:.2e} nats",
            f"top-1 agreement  {self.top1_agreement:.1%} of {self.decided} positions where the reference's lead exceeds the error",
        ]
        return "\n".join([*lines, *(f"out of tolerance: {problem}" for problem in self.problems())] + (["within tolerance"] * self.within))


def compare(ours: np.ndarray, reference: np.ndarray) -> Comparison:
    """Compare logits [positions, vocab]."""
    finite = bool(np.isfinite(ours).all())
    want = reference.astype(np.float64)
    have = np.nan_to_num(ours.astype(np.float64), posinf=0.0, neginf=0.0)
    difference = have - want
    p, q = log_softmax(want), log_softmax(have)
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    rms = float(np.sqrt(np.mean(np.square(difference))))
    top = np.sort(want, axis=-1)[:, -2:] if want.shape[1] > 1 else np.repeat(want, 2, axis=1)
    decided = top[:, 1] - top[:, 0] > LEAD * rms
    agree = have.argmax(axis=-1) == want.argmax(axis=-1)
    return Comparison(
        positions=len(want),
        finite=finite,
        max_error=float(np.abs(difference).max()),
        rms_error=rms,
        rms_reference=float(want.std(axis=-1).mean()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        decided=int(decided.sum()),
        agreed=int((decided & agree).sum()),
    )


def check_runner(runner: Runner, reference: Reference, tokens: Sequence[int]) -> Comparison:
    """Compare a runner's teacher-forced logits with the reference's; then its greedy tokens with its own logits.

    Where another kernel feeds prompts, so are the logits of the last quarter with that kernel's work before them. `tokens` need 2 positions
    at least; the runner's state is overwritten.
    """
    ours, wanted = runner.logits(tokens, 0), reference.logits(tokens)
    if runner.feeder(len(tokens)):
        fed = len(tokens) - max(len(tokens) // 4, 1)
        for _ in runner.run([Turn(0, tokens[: fed + 1], 0, 1)]):
            pass  # all but the last are the other kernel's
        ours, wanted = np.concatenate([ours, runner.logits(tokens[fed:], fed)]), np.concatenate([wanted, wanted[fed:]])
    result = compare(ours, wanted)
    prompt = list(tokens[: max(len(tokens) // 2, 1)])
    made = list(runner.generate(prompt, 0, len(tokens) - len(prompt), ()))
    best = runner.logits([*prompt, *made[:-1]], 0)[len(prompt) - 1 :].argmax(axis=-1)
    wrong = np.flatnonzero(best != np.array(made))
    return Comparison(**{**vars(result), "greedy_differs": int(wrong[0]) if len(wrong) else None})


def sample_tokens(config: ModelConfig, count: int, seed: int) -> list[int]:
    """Random token ids that begin with the last and the first of the vocabulary."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, count)
    ids[:2] = [config.vocab_size - 1, 0][:count]
    return [int(i) for i in ids]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
