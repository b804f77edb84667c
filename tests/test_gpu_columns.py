"""Columns of a pass on a real GPU: right in every width, and no bit of one depends on the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flashformer
from column_checks import (
    CONTEXT,
    SAMPLED,
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
from flashformer import SamplingParams
from flashformer.backends.cuda import CudaRunner, RandomWeights, probe
from flashformer.backends.cuda import load as load_runner
from flashformer.bench import check_kernel
from flashformer.checkpoint import Checkpoint
from flashformer.formats import NAMED, choose
from flashformer.models import build_graph
from flashformer.plan import KvType, make_plan
from flashformer.shapes import shape
from flashformer.targets import Target, get
from model_files import make_config, write_folder
from running import run_checkpoint

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {"hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 503}
WIDE: dict[str, Any] = {  # x of 16 columns does not fit into shared memory
    "hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 4099, "num_hidden_layers": 2,
}  # fmt: skip


@contextmanager
def running(
    checkpoint: Checkpoint, columns: int = 16, slots: int = 5, kv_type: KvType = "native", target: Target | None = None
) -> Iterator[CudaRunner]:
    """A model on this GPU."""
    info = probe()
    assert info is not None and info.target is not None
    formats = choose(checkpoint, build_graph(checkpoint.config).weights())
    target = target or info.target
    with run_checkpoint(checkpoint, load_runner, target, CONTEXT, info.workers, formats, kv_type, columns, slots) as (runner, _):
        yield runner


@pytest.mark.parametrize("size", ["small", "wide"])
@pytest.mark.parametrize("columns", [2, 4, 8, 16])
def test_every_width_agrees_with_the_reference(tmp_path: Path, columns: int, size: str) -> None:
    with opened(tmp_path, SHAPE if size == "small" else WIDE) as checkpoint, running(checkpoint, columns) as runner:
        check_logits(runner, checkpoint, 100 if size == "small" else 40)


def test_older_gpus(tmp_path: Path) -> None:
    """The way of GPUs without bulk copies, forced on this one."""
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, 8, target=replace(get("sm_80"), arch=_arch())) as runner:
        check_logits(runner, checkpoint, 100)


def _arch() -> str:
    info = probe()
    assert info is not None and info.target is not None
    return info.target.arch


@pytest.mark.parametrize("kv_type", ["native", "int8", "fp8"])
@pytest.mark.parametrize("columns", [2, 16])
def test_random_companions_change_no_bit(tmp_path: Path, columns: int, kv_type: KvType) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, columns, kv_type=kv_type) as runner:
        check_companions(runner, SHAPE["vocab_size"], 15)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "mxfp4", "nf4", "nvfp4"])
@pytest.mark.parametrize("columns", [2, 4, 16])
def test_codes(name: str, columns: int) -> None:
    config = replace(shape("llama-3.2-1b"), num_layers=2, vocab_size=20_011)
    weights = RandomWeights(config, format=NAMED[name])
    info = probe()
    assert info is not None and info.target is not None
    plan = make_plan(config, build_graph(config), info.target, CONTEXT, info.workers, weights.formats, columns=columns, slots=5)
    runner = load_runner(plan, weights)
    try:
        check_kernel(runner, weights)  # raises where it is out of tolerance
        check_companions(runner, config.vocab_size, 3)
    finally:
        runner.close()


def test_more_sequences_than_columns_take_turns(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, 2) as runner:
        check_taking_turns(runner, 40, in_order=False)


def test_turns_end_one_by_one(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint) as runner:
        check_ends(runner)


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_drafts_change_no_token(tmp_path: Path, params: SamplingParams) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, 4) as runner:
        check_drafts(runner, SHAPE["vocab_size"], params)


def test_a_prefix_is_copied_between_slots(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint) as runner:
        check_copies(runner, checkpoint)


def test_scores_that_are_not_finite_end_one_turn(tmp_path: Path) -> None:
    check_scores_not_finite(running, tmp_path, SHAPE)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, slots=2) as runner:
        check_refusals(runner)


def test_a_cancelled_turn_wakes_who_waits(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, slots=2) as runner:
        check_cancelled_asleep(runner)


def test_speculation_changes_no_token(tmp_path: Path) -> None:
    write_folder(tmp_path, make_config(**SHAPE))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts = [[5, 6] * 10, [9, 8, 7]]
    with flashformer.load(tmp_path, "cuda", CONTEXT, columns=8) as engine:
        alone = [[result.token for result in engine.generate(prompt, params)] for prompt in prompts]
    with flashformer.load(tmp_path, "cuda", CONTEXT, columns=8, slots=2, draft="lookup") as engine:
        made: list[list[int]] = [[], []]
        for index, result in engine.generate(prompts, params):
            made[index].append(result.token)
    assert made == alone
