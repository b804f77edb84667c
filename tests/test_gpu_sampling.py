"""Sampling in the whole-model kernel on a real GPU: the tokens of the numpy reference, their distribution, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashformer
from flashformer import SamplingParams
from flashformer.backends.cuda import CudaRunner, RandomWeights
from flashformer.backends.cuda import load as load_runner
from flashformer.backends.cuda.codegen import ROUND_TAGS
from flashformer.backends.sampling import Sampling
from flashformer.bench import plan_for_gpu
from flashformer.errors import DeviceError
from flashformer.shapes import shape
from model_files import make_config, write_folder
from sampler_checks import OPTIONS, PROMPT, check_steps, chi_square_tail, distribution, draws, random_params
from test_gpu import make, running

pytestmark = pytest.mark.gpu

# By vocabulary: fewer rows than blocks, a ragged one, and the largest of a real model's.
VOCABULARIES = {"tiny": 300, "odd": 1003, "real": 128_256}


@pytest.fixture(scope="module", params=VOCABULARIES)
def runner(request: pytest.FixtureRequest, cache_dir: Path) -> Iterator[CudaRunner]:
    """Random weights: one layer of the 1B shape, with another vocabulary."""
    config = replace(shape("llama-3.2-1b"), num_layers=1, vocab_size=VOCABULARIES[request.param], max_positions=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FF_CACHE_DIR", str(cache_dir))
        made = load_runner(plan_for_gpu(config), RandomWeights(config))
        yield made
        made.close()


def test_every_combination_gives_the_tokens_of_the_reference(runner: CudaRunner) -> None:
    rng = np.random.default_rng(1)
    vocab = runner.plan.config.vocab_size
    for _ in range(60 if vocab < 2000 else 25):
        prompt = [int(t) for t in rng.integers(0, vocab, rng.integers(1, 6))]
        check_steps(runner, random_params(rng, vocab), prompt, int(rng.integers(1, 12)))


@pytest.mark.parametrize("name", OPTIONS)
def test_distributions(tmp_path: Path, name: str, record_property: Callable[[str, object], None]) -> None:
    with running(make(tmp_path, vocab_size=300)) as (runner, _):
        params = OPTIONS[name]
        tokens = list(draws(runner, params, 5000))
        expected = distribution(runner.logits(PROMPT, 0)[-1], SamplingParams(**params))  # type: ignore[arg-type]
        fit = chi_square_tail(tokens, expected)
        record_property("chi_square_tail", fit)
        assert fit > 1e-3


def test_a_seeded_result_does_not_depend_on_launches(runner: CudaRunner) -> None:
    vocab = runner.plan.config.vocab_size
    params = SamplingParams(**{**OPTIONS["all"], "seed": 12, "logprobs": None})  # type: ignore[arg-type]
    whole = list(runner.generate(PROMPT, 0, 12, (), params.lower(vocab, PROMPT)))
    made: list[int] = []
    for count in (1, 5, 4, 2):
        fed, start = (PROMPT, 0) if not made else (made[-1:], len(PROMPT) + len(made) - 1)
        made += list(runner.generate(fed, start, count, (), params.lower(vocab, PROMPT, made)))
    assert made == whole


def test_the_same_bits_fifty_times(runner: CudaRunner) -> None:
    vocab = runner.plan.config.vocab_size
    params = SamplingParams(**{**OPTIONS["all"], "seed": 5})  # type: ignore[arg-type]
    found = []
    for _ in range(50):
        made = list(runner.generate(PROMPT, 0, 20, (), params.lower(vocab, PROMPT)))
        found.append((made, [runner.scores(i) for i in range(20)]))
    assert all(other == found[0] for other in found)


def test_long_runs_and_tags_that_wrap(runner: CudaRunner) -> None:
    """Many tokens of one launch, each with several exchanges, with greedy launches between."""
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, seed=1)
    for turn in range(3):
        check_steps(runner, params, PROMPT, 200)
        list(runner.generate(PROMPT, 0, 20, ()))
        if turn == 0:
            runner.params.epoch = (1 << 32) // max(runner.plan.config.num_layers + 1, ROUND_TAGS) - 300


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.0, "top_k": 3}, {"temperature": 0.001}]
)
def test_what_comes_to_the_greedy_choice(runner: CudaRunner, options: dict[str, float]) -> None:
    greedy = list(runner.generate(PROMPT, 0, 10, ()))
    params = SamplingParams(**{"temperature": 1.0, "seed": 4, **options})  # type: ignore[arg-type]
    assert list(runner.generate(PROMPT, 0, 10, (), params.lower(runner.plan.config.vocab_size, PROMPT))) == greedy


def test_bans(runner: CudaRunner) -> None:
    vocab = runner.plan.config.vocab_size
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "logprobs": 2}):
        only = SamplingParams(logit_bias={77: float("inf")}, **options)  # type: ignore[arg-type]
        assert list(runner.generate(PROMPT, 0, 3, (), only.lower(vocab, PROMPT))) == [77] * 3
        none = replace(only.lower(vocab, PROMPT), bias=np.full(vocab, -np.inf, np.float32))
        with pytest.raises(DeviceError, match="at position 4 no token is allowed"):
            list(runner.generate(PROMPT, 0, 3, (), none))
    assert len(list(runner.generate(PROMPT, 0, 3, (), Sampling()))) == 3


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_folder(tmp_path, make_config(vocab_size=300), dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), flashformer.load(folder, "cuda", 64) as engine:
        for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=4, top_p=0.9, logprobs=3)):
            with pytest.raises(DeviceError, match="scores for position 4 are not finite"):
                list(engine.generate(PROMPT, params))
        assert not np.isfinite(engine.logits(PROMPT)).all()


def test_both_backends_choose_the_same_tokens_of_the_same_logits(tmp_path: Path) -> None:
    """Their logits differ in the last bits, so only nearly all tokens can be the same."""
    folder = make(tmp_path, vocab_size=300)
    params = [SamplingParams(**{**OPTIONS["all"], "seed": seed, "max_tokens": 1}) for seed in range(200)]  # type: ignore[arg-type]
    made = []
    for device in ("cuda", "cpu"):
        with flashformer.load(folder, device) as engine:
            made.append([r.token for p in params for r in engine.generate(PROMPT, p)])
    assert np.mean(np.array(made[0]) == np.array(made[1])) > 0.9
