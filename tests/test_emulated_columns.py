"""Columns of a pass on CUDA, without a GPU: the kernels as they are, on an emulated one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import flashformer
from column_checks import (
    CONTEXT,
    SAMPLED,
    Open,
    check_cancelled_asleep,
    check_companions,
    check_copies,
    check_drafts,
    check_ends,
    check_logits,
    check_refusals,
    check_scores_not_finite,
    check_taking_turns,
    opened,
)
from emulated_gpu import emulated_gpu
from flashformer import SamplingParams
from flashformer.backends.cuda import load as load_runner
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.checkpoint import Checkpoint
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import KvType
from model_files import make_config, write_folder
from running import run_checkpoint

SHAPE: dict[str, Any] = {
    "hidden_size": 72, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 90, "vocab_size": 203,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Open:
    """How to run a model on an emulated GPU."""
    device = emulated_gpu(monkeypatch)

    @contextmanager
    def open_runner(checkpoint: Checkpoint, columns: int = 8, slots: int = 5, kv_type: KvType = "native") -> Iterator[CudaRunner]:
        formats = choose(checkpoint, build_graph(checkpoint.config).weights())
        target = device.target
        with run_checkpoint(checkpoint, load_runner, target, CONTEXT, target.workers, formats, kv_type, columns, slots) as (runner, _):
            yield runner

    return open_runner


@pytest.mark.parametrize("columns", [2, 4, 8, 16])
def test_every_width_agrees_with_the_reference(running: Open, tmp_path: Path, columns: int) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, columns) as runner:
        assert runner.columns == columns
        check_logits(runner, checkpoint, 50)


@pytest.mark.parametrize(("columns", "kv_type"), [(2, "native"), (8, "int8")])
def test_random_companions_change_no_bit(running: Open, tmp_path: Path, columns: int, kv_type: KvType) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, columns, kv_type=kv_type) as runner:
        check_companions(runner, SHAPE["vocab_size"], 3, 6)


def test_more_sequences_than_columns_take_turns(running: Open, tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, 2) as runner:
        check_taking_turns(runner)


def test_turns_end_one_by_one(running: Open, tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint) as runner:
        check_ends(runner, 60)


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_drafts_change_no_token(running: Open, tmp_path: Path, params: SamplingParams) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, 4) as runner:
        check_drafts(runner, SHAPE["vocab_size"], params, (2, 5))


def test_a_prefix_is_copied_between_slots(running: Open, tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint) as runner:
        check_copies(runner, checkpoint)


def test_scores_that_are_not_finite_end_one_turn(running: Open, tmp_path: Path) -> None:
    check_scores_not_finite(running, tmp_path, SHAPE)


def test_what_does_not_fit_is_refused(running: Open, tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, slots=2) as runner:
        check_refusals(runner)


def test_a_cancelled_turn_wakes_who_waits(running: Open, tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, slots=2) as runner:
        check_cancelled_asleep(runner)


def test_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lists of prompts, streams and speculation, as users have them: every text as if it were alone."""
    emulated_gpu(monkeypatch)
    folder = write_folder(tmp_path, make_config(torch_dtype="bfloat16", **SHAPE), dtype="bfloat16")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 5, 6, 5, 6, 5], [9], [7, 8, 9] * 6]
    with flashformer.load(folder, "cuda", 64, slots=2, columns=4) as engine:
        alone = [[result.token for result in engine.generate(prompt, params)] for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        for index, result in engine.generate(prompts, params):
            made[index].append(result.token)
        assert made == alone
        with engine.stream(prompts[0], params) as stream:
            assert next(stream).token == alone[0][0]
        assert [result.token for result in engine.generate(prompts[1], params)] == alone[1]
    with flashformer.load(folder, "cuda", 64, columns=4, draft="lookup") as engine:
        assert [[result.token for result in engine.generate(prompt, params)] for prompt in prompts] == alone
