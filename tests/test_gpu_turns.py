"""Several sequences on a real GPU: slots, turns and copies change no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashformer
from column_checks import check_cancelled_asleep, check_prompt_kernel
from flashformer import Engine, SamplingParams
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.check import sample_tokens
from model_files import make_config, write_folder

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=1, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300))
    with flashformer.load(folder, "cuda", 256, slots=3) as engine:
        yield engine


def test_a_list_gives_what_each_prompt_gives_alone(engine: Engine) -> None:
    prompts = [[5, 6, i] for i in range(7)]
    alone = [[r.token for r in engine.generate(prompt, PARAMS)] for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    for index, result in engine.generate(prompts, [PARAMS] * len(prompts)):
        made[index].append(result.token)
    assert made == alone


def test_slots_hold_their_own_and_copies_are_exact(engine: Engine) -> None:
    runner, tokens = engine.runner, sample_tokens(engine.config, 90, seed=2)
    whole = runner.logits(tokens, 0, 0)
    assert np.array_equal(runner.logits(tokens, 0, 2), whole)
    runner.logits(tokens[::-1], 0, 1)
    assert np.array_equal(runner.logits(tokens[50:], 50, 2), whole[50:])
    runner.copy(2, 1, 37)
    assert np.array_equal(runner.logits(tokens[37:], 37, 1), whole[37:])


def test_a_cancelled_turn_wakes_who_waits(engine: Engine) -> None:
    assert isinstance(engine.runner, CudaRunner)
    check_cancelled_asleep(engine.runner)


@pytest.mark.parametrize("columns", [2, 16])
def test_a_kernel_for_prompts(tmp_path: Path, columns: int) -> None:
    check_prompt_kernel(write_folder(tmp_path, make_config(vocab_size=300)), 256, columns)
