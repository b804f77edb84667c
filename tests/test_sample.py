"""The sampler: its numpy reference, and the CPU kernel against it. The GPU's is in test_gpu_sampling.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flashformer
from flashformer import SamplingParams
from flashformer.backends.cpu import CpuRunner, load
from flashformer.backends.sampling import Sampling
from flashformer.checkpoint import open_checkpoint
from flashformer.errors import DeviceError
from flashformer.ops import sample
from flashformer.targets import get
from model_files import make_config, write_folder
from running import run_checkpoint
from sampler_checks import OPTIONS, PROMPT, check_steps, chi_square_tail, distribution, draws, random_params

VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits spread enough for probabilities from nearly one to nearly none."""
    folder = write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=VOCAB), dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=[1, 3])
def runner(folder: Path, request: pytest.FixtureRequest, cache_dir: Path) -> Iterator[CpuRunner]:
    """The model with one worker, and with three, who share its rows unevenly."""
    with (
        pytest.MonkeyPatch.context() as patch,
        open_checkpoint(folder) as checkpoint,
    ):
        patch.setenv("FF_CACHE_DIR", str(cache_dir))
        with run_checkpoint(checkpoint, load, get("cpu"), 64, request.param) as (made, _):
            yield made


# --- The reference ---------------------------------------------------------------------------------------------------------


def test_philox_gives_the_known_answer() -> None:
    """The one that its authors publish for a counter and a key of zeros (philox4x32-10)."""
    assert sample.philox(0, 0, np.arange(4, dtype=np.uint32)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_gumbel_noise() -> None:
    h = np.concatenate([np.arange(2000), (1 << 32) - 1 - np.arange(2000), np.random.default_rng(0).integers(0, 1 << 32, 200_000)])
    exact = -np.log(-np.log1p(-(h.astype(np.float64) + 0.5) / 2**32))
    assert np.abs(sample.gumbel(h.astype(np.uint32)) - exact).max() < 3e-6
    drawn = sample.gumbel(sample.philox(1, 2, np.arange(400_000, dtype=np.uint32)))
    assert abs(drawn.mean() - np.euler_gamma) < 0.01 and abs(drawn.var() - math.pi**2 / 6) < 0.02


def test_mass_is_a_power_of_two() -> None:
    y = np.concatenate([np.linspace(0, 40, 10_001), [63, 1e9, np.inf]]).astype(np.float32)
    ours = sample.mass(y).astype(np.float64)
    assert ours[0] == 2.0**36 and (np.diff(ours) <= 0).all()
    assert np.abs(ours - 2.0 ** (36 - y.astype(np.float64))).max() <= 2.0**36 * 3e-7
    assert ours[-3:].tolist() == [0, 0, 0]


def test_ties_stay_together() -> None:
    x = np.array([1, 3, 2, 3, 2, 0, -0.0, 0], np.float32)

    def kept(**options: Any) -> list[int]:
        return [int(i) for i in np.flatnonzero(sample.kept(Sampling(temperature=1.0, **options), x))]

    assert kept(top_k=1) == [1, 3] and kept(top_k=3) == [1, 2, 3, 4] and kept(top_k=6) == list(range(8))
    assert kept(top_p=0.0) == [1, 3] and kept(top_p=0.01) == [1, 3] and kept(min_p=1.0) == [1, 3]
    assert kept(top_p=0.999999) == list(range(8))
    assert kept(top_k=4, top_p=0.7) == [1, 3]  # 0.73 of the four, 0.65 of all
    assert kept(top_p=0.7) == [1, 2, 3, 4]


# --- The kernel ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_distributions(runner: CpuRunner, name: str) -> None:
    params = OPTIONS[name]
    tokens = list(draws(runner, params, 2000))
    expected = distribution(runner.logits(PROMPT, 0)[-1], SamplingParams(**params))  # type: ignore[arg-type]
    assert len(set(tokens)) > 5
    assert chi_square_tail(tokens, expected) > 1e-3


def test_the_test_of_distributions_can_fail(runner: CpuRunner) -> None:
    tokens = list(draws(runner, {"temperature": 1.0}, 3000))
    logits = runner.logits(PROMPT, 0)[-1]
    assert chi_square_tail(tokens, distribution(logits, SamplingParams(temperature=1.0))) > 1e-3
    assert chi_square_tail(tokens, distribution(logits, SamplingParams(temperature=1.15))) < 1e-3


def test_every_combination_gives_the_tokens_of_the_reference(runner: CpuRunner) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        prompt = [int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 6))]
        check_steps(runner, random_params(rng, VOCAB), prompt, int(rng.integers(1, 6)))


def test_penalties_follow_what_is_generated(runner: CpuRunner) -> None:
    greedy = list(runner.generate(PROMPT, 0, 30, ()))
    for options in ({"repetition_penalty": 1.5}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}, {"frequency_penalty": -1.0}):
        made = check_steps(runner, SamplingParams(**options), PROMPT, 30)  # type: ignore[arg-type]
        assert made != greedy
        assert (len(set(made)) > len(set(greedy))) == (options.get("frequency_penalty", 1) > 0)


def test_a_seeded_result_does_not_depend_on_launches(runner: CpuRunner) -> None:
    params = SamplingParams(**{**OPTIONS["all"], "seed": 12, "logprobs": None})  # type: ignore[arg-type]
    whole = list(runner.generate(PROMPT, 0, 12, (), params.lower(VOCAB, PROMPT)))
    made: list[int] = []
    for count in (1, 5, 4, 2):
        fed, start = (PROMPT, 0) if not made else (made[-1:], len(PROMPT) + len(made) - 1)
        made += list(runner.generate(fed, start, count, (), params.lower(VOCAB, PROMPT, made)))
    assert made == whole
    assert list(runner.generate(PROMPT, 0, 12, (), params.lower(VOCAB, PROMPT))) == whole
    other = SamplingParams(**{**OPTIONS["all"], "seed": 13, "logprobs": None})  # type: ignore[arg-type]
    assert list(runner.generate(PROMPT, 0, 12, (), other.lower(VOCAB, PROMPT))) != whole


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}, {"temperature": 0.001},
        {"temperature": 1e5, "top_k": 1},
    ],
)  # fmt: skip
def test_what_comes_to_the_greedy_choice(runner: CpuRunner, options: dict[str, float]) -> None:
    greedy = list(runner.generate(PROMPT, 0, 10, ()))
    params = SamplingParams(**{"temperature": 1.0, "seed": 4, **options})  # type: ignore[arg-type]
    assert list(runner.generate(PROMPT, 0, 10, (), params.lower(VOCAB, PROMPT))) == greedy


def test_what_comes_to_no_selection(runner: CpuRunner) -> None:
    plain = SamplingParams(temperature=1.0, seed=4)
    expected = list(runner.generate(PROMPT, 0, 10, (), plain.lower(VOCAB, PROMPT)))
    for options in ({"top_p": 1.0}, {"top_k": VOCAB}, {"top_k": 10 * VOCAB}, {"min_p": 0.0}, {"logit_bias": {5: 0.0}}):
        params = SamplingParams(temperature=1.0, seed=4, **options)  # type: ignore[arg-type]
        assert list(runner.generate(PROMPT, 0, 10, (), params.lower(VOCAB, PROMPT))) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_but_one_banned(runner: CpuRunner, temperature: float) -> None:
    for bias in ({t: -math.inf for t in range(VOCAB) if t != 77}, {77: math.inf}, {77: math.inf, 78: -math.inf}):
        for options in ({}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}):
            params = SamplingParams(temperature=temperature, logit_bias=bias, **options)  # type: ignore[arg-type]
            assert list(runner.generate(PROMPT, 0, 3, (), params.lower(VOCAB, PROMPT))) == [77] * 3


def test_all_banned_is_an_error_and_not_a_token(runner: CpuRunner) -> None:
    bias = np.full(VOCAB, -np.inf, np.float32)
    for sampling in (Sampling(bias=bias), Sampling(1.0, bias=bias), Sampling(1.0, top_k=5, top_p=0.5, min_p=0.5, bias=bias)):
        with pytest.raises(DeviceError, match="at position 4 no token is allowed"):
            list(runner.generate(PROMPT, 0, 3, (), sampling))
    assert len(list(runner.generate(PROMPT, 0, 3, ()))) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(folder: Path, tmp_path: Path, value: float) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), flashformer.load(tmp_path, "cpu", 64) as engine:
        for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=4, top_p=0.9, logprobs=3)):
            with pytest.raises(DeviceError, match="scores for position 4 are not finite"):
                list(engine.generate(PROMPT, params))
        assert not np.isfinite(engine.logits(PROMPT)).all()  # to be looked at


def test_reuse_changes_no_sampled_token(folder: Path) -> None:
    params = SamplingParams(**{**OPTIONS["all"], "seed": 3, "max_tokens": 6, "ignore_eos": True})  # type: ignore[arg-type]
    with flashformer.load(folder, "cpu", 64) as engine:
        text = [5, 6, 7, 8]
        for _ in range(4):
            made = list(engine.generate(text, params))
            with flashformer.load(folder, "cpu", 64) as fresh:
                assert list(fresh.generate(text, params)) == made
            text += [*(r.token for r in made), 9]
        assert engine.stats.reused_tokens > 20
