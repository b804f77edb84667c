"""What a kernel's sampler must do, on any backend: the reference's very tokens, and the distribution that the options describe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from flashformer import SamplingParams
from flashformer.backends import Runner
from flashformer.ops import sample

PROMPT = [5, 6, 7, 5]

# Every option alone, and together.
OPTIONS: dict[str, dict[str, object]] = {
    "temperature": {"temperature": 1.0},
    "low temperature": {"temperature": 0.4},
    "top_k": {"temperature": 1.2, "top_k": 20},
    "top_p": {"temperature": 0.8, "top_p": 0.7},
    "min_p": {"temperature": 1.5, "min_p": 0.2},
    "top_k and top_p": {"temperature": 1.5, "top_k": 40, "top_p": 0.8},
    "penalties": {"temperature": 0.5, "repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bias": {"temperature": 0.7, "logit_bias": {3: 4.0, 5: -2.0, 11: -math.inf}},
    "all": {
        "temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": -0.2, "logit_bias": {3: 1.0, 8: -math.inf}, "logprobs": 5,
    },
}  # fmt: skip


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """Any combination of options, the extreme values among them."""
    banned = rng.integers(0, vocab, rng.integers(0, 4))
    return SamplingParams(
        max_tokens=1,
        seed=int(rng.integers(1 << 63)),
        temperature=float(rng.choice([0, 0.01, 0.3, 0.7, 1, 1.5, 5])),
        top_k=int(rng.choice([0, 0, 1, 5, 50, 10 * vocab])),
        top_p=float(rng.choice([0, 0.1, 0.5, 0.9, 0.99, 1, 1])),
        min_p=float(rng.choice([0, 0, 0.05, 0.5, 1])),
        repetition_penalty=float(rng.choice([1, 1, 1.3, 0.7])),
        presence_penalty=float(rng.choice([0, 0.5])),
        frequency_penalty=float(rng.choice([0, -0.3])),
        logit_bias={int(t): float(rng.choice([1, -1, -np.inf])) for t in banned},
        logprobs=int(rng.choice([0, 5, 20])) if rng.random() < 0.5 else None,
    )


def check_steps(runner: Runner, params: SamplingParams, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens of one launch: each is what the reference chooses from the kernel's own logits, with its log probabilities."""
    vocab = runner.logits(prompt, 0).shape[1]
    made, reports = [], []
    for token in runner.generate(prompt, 0, count, (), params.lower(vocab, prompt)):
        made.append(token)
        if params.logprobs is not None:
            reports.append(runner.scores(len(made) - 1))
    rows = runner.logits([*prompt, *made[:-1]], 0)[len(prompt) - 1 :]
    for i, (token, row) in enumerate(zip(made, rows, strict=True)):
        assert token == sample.choose(params.lower(vocab, prompt, made[:i]), row, len(prompt) + i), (params, i)
    for token, row, report in zip(made, rows, reports, strict=False):
        expected = sample.scores_of(row, token, min(params.logprobs or 0, vocab))
        assert [t for t, _ in report.top] == [t for t, _ in expected.top]
        ours, theirs = ([s.logprob, *(p for _, p in s.top)] for s in (report, expected))
        assert np.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert not reports or len(reports) == count
    return made


def draws(runner: Runner, params: dict[str, object], count: int) -> Iterator[int]:
    """The token after PROMPT for each of `count` seeds."""
    vocab = runner.logits(PROMPT, 0).shape[1]
    for seed in range(count):
        lowered = SamplingParams(**{**params, "seed": seed}).lower(vocab, PROMPT)  # type: ignore[arg-type]
        yield from runner.generate(PROMPT, 0, 1, (), lowered)


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What a token after PROMPT should be distributed like, as the documentation says it, in float64 and in its order."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(PROMPT):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    x = x / params.temperature
    order = np.argsort(-x)
    if params.top_k:
        x[order[params.top_k :]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.top_p < 1:
        first = int((np.cumsum(p[order]) >= params.top_p).argmax())
        p[order[first + 1 :]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def chi_square_tail(tokens: Sequence[int], probabilities: np.ndarray) -> float:
    """How likely draws from `probabilities` are to fit them no better than `tokens` do. Rare tokens count together."""
    seen = Counter(tokens)
    assert all(probabilities[token] > 0 for token in seen), "a token that must not come came"
    expected = probabilities * len(tokens)
    often = np.flatnonzero(expected >= 5)
    cells = [(seen[int(t)], expected[t]) for t in often]
    rest = expected[(expected > 0) & (expected < 5)].sum()
    if rest >= 1:
        cells.append((len(tokens) - sum(n for n, _ in cells), rest))
    freedom = len(cells) - 1
    if freedom == 0:
        return 1.0
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    # Wilson and Hilferty: the cube root of chi square over its degrees of freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
