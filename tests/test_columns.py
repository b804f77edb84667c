"""Columns of a pass on the CPU: right in every width, and no bit of one depends on the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from column_checks import (
    CONTEXT,
    SAMPLED,
    check_companions,
    check_copies,
    check_drafts,
    check_ends,
    check_logits,
    check_refusals,
    check_scores_not_finite,
    check_taking_turns,
    opened,
)  # fmt: skip
from flashformer import SamplingParams
from flashformer.backends.cpu import CpuRunner
from flashformer.backends.cpu import load as load_runner
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.errors import DeviceError, PlanError
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import KvType, make_plan
from flashformer.targets import get
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from running import run_checkpoint
from test_formats import forms_of

SHAPE: dict[str, Any] = {"hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 503}


@contextmanager
def running(checkpoint: Checkpoint, columns: int = 16, slots: int = 5, kv_type: KvType = "native") -> Iterator[CpuRunner]:
    """A model on the CPU."""
    formats = choose(checkpoint, build_graph(checkpoint.config).weights())
    with run_checkpoint(checkpoint, load_runner, get("cpu"), CONTEXT, 2, formats, kv_type, columns, slots) as (runner, _):
        yield runner


@pytest.mark.parametrize("columns", [1, 2, 4, 8, 16])
def test_every_width_agrees_with_the_reference(tmp_path: Path, columns: int) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, columns) as runner:
        assert runner.columns == columns
        check_logits(runner, checkpoint, 100)


@pytest.mark.parametrize("kv_type", ["native", "int8"])
@pytest.mark.parametrize("columns", [2, 16])
def test_random_companions_change_no_bit(tmp_path: Path, columns: int, kv_type: KvType) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, columns, kv_type=kv_type) as runner:
        check_companions(runner, SHAPE["vocab_size"], 15)


# Groups of 16, 32, 64, 128 and whole rows; no offsets, zeros and minima; every kind of code.
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q6_K", "int4 rows", "int8 zeros", "NF4", "fp8 blocks", "NVFP4"])
def test_companions_with_quantised_weights(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, make_config(hidden_size=256, head_dim=32, intermediate_size=384, vocab_size=291))
    quantise, format_name = FORMS[name]
    with open_checkpoint(tmp_path) as plain:
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, quantise, {}))
        with running(checkpoint) as runner:
            assert format_name in {stage.geometry.format.name for stage in runner.plan.stages if stage.geometry}
            check_companions(runner, 291, 4)


def test_more_sequences_than_columns_take_turns(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, 2) as runner:
        check_taking_turns(runner)


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
        for source, target, positions in ((0, 5, 1), (-1, 0, 1), (0, 1, CONTEXT + 1)):
            with pytest.raises(DeviceError, match="cannot be copied"):
                runner.copy(source, target, positions)


def test_scores_that_are_not_finite_end_one_turn(tmp_path: Path) -> None:
    check_scores_not_finite(running, tmp_path, SHAPE)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, SHAPE) as checkpoint, running(checkpoint, slots=2) as runner:
        check_refusals(runner)
        graph = build_graph(checkpoint.config)
        with pytest.raises(PlanError, match="columns is 3; cpu has kernels for 1, 2, 4, 8, 16"):
            make_plan(checkpoint.config, graph, get("cpu"), columns=3)
        with pytest.raises(PlanError, match="columns is 8; sm_86 has kernels for 1, 2, 4"):
            make_plan(checkpoint.config, graph, get("sm_86"), columns=8)
        with pytest.raises(PlanError, match="at least one slot"):
            make_plan(checkpoint.config, graph, get("cpu"), slots=0)
