"""The choice of a token: what sampling.hpp, sample.cuh and sample.h compute, in numpy. The same logits give the same token.

The order: bias, then penalties (repetition, frequency, presence) on the logits; then temperature; then top-k; then top-p on the
softmax of what top-k left; then min-p against the largest probability. A token that ties with the last one kept is kept, too; of
equal scores the lowest id is chosen. Noise depends on seed, position and token alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..backends.sampling import MASS_BITS, PROMPT_BIT, Flag, Sampling, Scores
from ..graph import Operator
from . import State

PHILOX_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
PHILOX_KEYS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
LOG = (
    0.05411103740334511, -0.12076649069786072, 0.14994485676288605, -0.1682431995868683, 0.19975914061069489, -0.2499321848154068,
    0.33333590626716614, -0.5000006556510925, 1.0,
)  # fmt: skip
EXP2 = (
    0.00011458053631940857, -0.0012907799100503325, 0.009596276096999645, -0.05549895390868187, 0.24022606015205383,
    -0.6931471824645996, 1.0,
)  # fmt: skip


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """The greedy token at each position: the largest logit, of equal ones the lowest id."""
    return inputs[0].argmax(axis=-1)


def choose(sampling: Sampling, logits: np.ndarray, position: int) -> int:
    """The token that float32 logits [vocab] give at `position` (0 is the first of the prompt). At least one must be allowed."""
    scores = adjusted(sampling, logits)
    if not sampling.flags & Flag.SAMPLED:
        return int(scores.argmax())
    noise = gumbel(philox(sampling.seed, position, np.arange(len(logits), dtype=np.uint32)))
    noisy = _fused(scores, np.float32(sampling.struct().inverse_temperature), noise)
    return int(np.where(kept(sampling, scores), noisy, -np.inf).argmax())


def adjusted(sampling: Sampling, logits: np.ndarray) -> np.ndarray:
    """Logits after bias and penalties, float32 [vocab]."""
    x = np.asarray(logits, np.float32)
    if sampling.bias is not None:
        x = x + sampling.bias
    if sampling.seen is not None:
        numbers = sampling.struct()
        count = (sampling.seen & np.uint32(PROMPT_BIT - 1)).astype(np.float32)
        penalty = np.float32(numbers.repetition)
        x = np.where(sampling.seen != 0, np.where(x > 0, x / penalty, x * penalty), x)
        x = _fused(-np.float32(numbers.frequency), count, x)
        x = np.where(count > 0, x - np.float32(numbers.presence), x)
    return x


def kept(sampling: Sampling, scores: np.ndarray) -> np.ndarray:
    """Which tokens top-k, top-p and min-p leave of adjusted logits: bool [vocab]."""
    numbers, flags = sampling.struct(), sampling.flags
    keep = np.ones(len(scores), bool)
    largest = scores.max()
    if flags & Flag.TOP_K:
        keep = scores >= np.sort(scores)[-min(sampling.top_k, len(scores))]
    if flags & Flag.TOP_P:
        masses = np.where(keep, mass((largest - scores) * np.float32(numbers.mass_scale)), 0)
        descending = np.argsort(-scores, kind="stable")
        reached = np.cumsum(masses[descending])
        target = max(int(reached[-1]) * numbers.top_p >> 32, 1)
        keep &= scores >= scores[descending[int((reached >= target).argmax())]]
    if flags & Flag.MIN_P:
        keep &= scores >= largest + np.float32(numbers.min_p_margin)
    return keep


def philox(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Philox 4x32-10: word token % 4 of block (token / 4, position, 0, 0) under the key `seed`; uint32, as `tokens`."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.zeros((4, len(tokens)), np.uint64)
    counter[0], counter[1] = tokens >> 2, position
    keys = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
    for _ in range(10):
        a, b = counter[0] * PHILOX_MULTIPLIERS[0], counter[2] * PHILOX_MULTIPLIERS[1]
        counter = np.stack([b >> half ^ counter[1] ^ keys[0], b & low, a >> half ^ counter[3] ^ keys[1], a & low])
        keys = keys + PHILOX_KEYS & low
    return counter[tokens & 3, np.arange(len(tokens))].astype(np.uint32)


def gumbel(h: np.ndarray) -> np.ndarray:
    """Gumbel noise of u = 1 - (h + 1/2) / 2^32 for uint32 h, float32."""
    scale, half = np.float32(2.0**-32), np.float32(2.0**-33)
    v, u = _fused(h.astype(np.float32), scale, half), _fused((~h).astype(np.float32), scale, half)
    return -_log(np.where(h < 0x40000000, -_log1p(np.minimum(v, np.float32(0.25)) * np.float32(-1)), -_log(u)))


def mass(y: np.ndarray) -> np.ndarray:
    """2^-y in units of 2^-36, uint64, for float32 y >= 0."""
    y = np.minimum(y, np.float32(63))
    n = y.astype(np.uint32)
    q = _polynomial(EXP2, y - n.astype(np.float32)) * np.float32(1 << 24)
    return (q.astype(np.uint64) << np.uint64(MASS_BITS - 24)) >> n.astype(np.uint64)


def scores_of(logits: np.ndarray, token: int, alternatives: int) -> Scores:
    """Log probabilities of a token and of the most likely ones, by the softmax of the logits themselves."""
    x = np.asarray(logits, np.float64)
    x = x - x.max() - math.log(np.exp(x - x.max()).sum())
    best = np.argsort(-x, kind="stable")[:alternatives]
    return Scores(float(x[token]), tuple((int(i), float(x[i])) for i in best))


def _log(x: np.ndarray) -> np.ndarray:
    """ln(x) of normal float32 numbers."""
    bits = x.view(np.uint32)
    k = (bits - np.uint32(0x3F400000)).view(np.int32) >> 23
    t = (bits - (k.view(np.uint32) << np.uint32(23))).view(np.float32) - np.float32(1)
    return _fused(k.astype(np.float32), np.float32(0.69314718), _log1p(t))


def _log1p(t: np.ndarray) -> np.ndarray:
    """ln(1 + t) for float32 t in [-1/4, 1/2]."""
    return t * _polynomial(LOG, t)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Horner's rule in float32, the highest power first."""
    p = np.full(x.shape, coefficients[0], np.float32)
    for c in coefficients[1:]:
        p = _fused(p, x, np.float32(c))
    return p


def _fused(a: np.ndarray | np.float32, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """a * b + c, rounded once to float32 (the product of two float32 is exact in float64)."""
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(np.float32)
