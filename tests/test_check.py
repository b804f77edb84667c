"""The comparison that decides whether a kernel is right."""

from __future__ import annotations

import numpy as np

from flashformer.check import compare


def logits(seed: int = 0) -> np.ndarray:
    """Random logits of 200 positions."""
    return np.random.default_rng(seed).normal(size=(200, 500)).astype(np.float32) * 3


def test_small_errors_are_within() -> None:
    noise = np.random.default_rng(1).normal(size=(200, 500)) * 0.005
    result = compare(logits() + noise, logits())
    assert result.within and 0 < result.kl_mean < 1e-4 and result.decided > 150


def test_a_constant_shift_changes_no_distribution() -> None:
    assert compare(logits() + 5, logits()).kl_max < 1e-9


def test_kl_is_what_the_definition_says() -> None:
    ours, want = logits(1)[:3, :7], logits(2)[:3, :7]
    p = np.exp(want) / np.exp(want).sum(-1, keepdims=True)
    q = np.exp(ours) / np.exp(ours).sum(-1, keepdims=True)
    assert np.isclose(compare(ours, want).kl_mean, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)


def test_what_is_wrong_is_named() -> None:
    assert any("mean KL" in p for p in compare(logits(1), logits()).problems())
    broken = logits()
    broken[3, 4] = np.nan
    assert any("not finite" in p for p in compare(broken, logits()).problems())
    one = logits()
    one[7] = one[7][::-1]
    assert [p.split()[0] for p in compare(one, logits()).problems()][:2] == ["mean", "largest"]


def test_ties_of_the_reference_are_not_held_against_us() -> None:
    """Where the two best are nearer than the error, either may win; elsewhere a wrong winner counts."""
    want = np.zeros((100, 50), np.float32)
    want[:, 0], want[:, 1] = 5.0, 4.9999
    ours = want + np.random.default_rng(0).normal(size=want.shape).astype(np.float32) * 1e-2
    result = compare(ours, want)
    assert result.decided == 0 and result.within
    want[:, 1] = 0
    swapped = want.copy()
    swapped[:5, 0], swapped[:5, 1] = 0, 5
    assert any("top-1" in p for p in compare(swapped, want).problems())
