"""Kernels whose stages begin before all of their input is there, on an emulated GPU: right in whatever order threads run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulated_gpu import emulated_gpu
from flashformer.backends.cuda import load as load_runner
from flashformer.check import compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import KvType
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from running import assert_near, run_checkpoint
from test_formats import STAGES, forms_of

POSITIONS = 10


@dataclass(frozen=True)
class Case:
    """A model, of one layer unless it says otherwise: forms of weights by stage (others are plain), and what is to come late."""

    shape: dict[str, int]
    late: dict[str, int]  # slices of each stage
    forms: dict[str, str]
    arch: str = "sm_90"
    workers: int = 3
    late_bytes: int = 1


WIDE, LONG = {"hidden_size": 2048, "intermediate_size": 64}, {"hidden_size": 64, "intermediate_size": 2048}
VERY_LONG = {"hidden_size": 64, "intermediate_size": 8192}
BOTH = {"qkv": 1, "gate_up": 1}
CASES = {
    "the residual": Case(WIDE, BOTH, {}, workers=4),
    "the residual, by copies of older GPUs": Case({**WIDE, "num_hidden_layers": 2}, BOTH, {}, "sm_80", 5),
    "what down reads": Case({**LONG, "num_hidden_layers": 2}, {"down": 1}, {}, workers=5),
    "integers, groups ahead": Case(WIDE, BOTH, {"qkv": "Q4_0", "gate_up": "int8 zeros"}),
    "integers of rows and tables, groups ahead": Case(WIDE, BOTH, {"qkv": "int8 rows", "gate_up": "NF4"}),
    "few slots": Case(WIDE, BOTH, {"qkv": "MXFP4", "gate_up": "FP4 divided"}, "sm_86"),
    "groups of two parts ahead": Case(VERY_LONG, {"down": 3}, {"down": "int4 g128 zeros"}, late_bytes=200_000),
    "many parts, rows": Case(VERY_LONG, {"down": 1}, {"down": "int8 rows"}),
    "many parts, a slice within one": Case(VERY_LONG, {"down": 1}, {"down": "fp8 blocks"}),
    "divided tables": Case(VERY_LONG, {"down": 1}, {"down": "NVFP4"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_stages_begin_early(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    device = emulated_gpu(monkeypatch, case.arch, case.workers)
    target = replace(device.target, late_bytes=case.late_bytes)
    sizes: dict[str, Any] = {"vocab_size": 200, "head_dim": 32, "num_hidden_layers": 1, **case.shape}
    write_folder(tmp_path, make_config(**sizes))
    with open_checkpoint(tmp_path) as plain:
        others = {**{part: FORMS[form][0] for stage, form in case.forms.items() for part in STAGES[stage]}, "": None}
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, FORMS["Q8_0"][0], others))
        formats = choose(checkpoint, build_graph(plain.config).weights())
        with run_checkpoint(checkpoint, load_runner, target, 64, target.workers, formats) as (runner, reference):
            late = {s.name: s.geometry.late_slices for s in runner.plan.stages if s.geometry and s.geometry.late_slices}
            assert late == case.late
            tokens = sample_tokens(plain.config, POSITIONS, seed=4)
            found = runner.logits(tokens, 0)
            assert_near(compare(found, reference.logits(tokens)), 2e-2)
            for device.seed in (50, 60):
                assert np.array_equal(runner.logits(tokens[-3:], POSITIONS - 3), found[-3:])


def heads(queries: int, keys: int, size: int, **others: Any) -> dict[str, Any]:
    """A model with such heads."""
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": size, **others}


HEADS: dict[str, tuple[dict[str, Any], KvType, int, int]] = {  # a model, its cache, workers, positions
    "norms of heads, int8": (heads(6, 2, 24, architecture="Qwen3ForCausalLM", hidden_size=56), "int8", 5, 40),
    "a group that is split": (heads(18, 1, 16), "native", 3, 40),
    "wide heads, fp8": (heads(2, 1, 256), "fp8", 2, 24),
    "every warp has blocks": (heads(4, 2, 32, num_hidden_layers=1), "native", 2, 200),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_attention_begins_with_the_queries(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as where a token's own keys and values come at the same time."""
    shape, kv_type, workers, positions = HEADS[name]
    device = emulated_gpu(monkeypatch, workers=workers)
    write_folder(tmp_path, make_config(**{"vocab_size": 203, "intermediate_size": 96, **shape}))
    found = []
    with open_checkpoint(tmp_path) as checkpoint:
        tokens = sample_tokens(checkpoint.config, positions, seed=4)
        for late_bytes in (0, 1):
            target = replace(device.target, late_bytes=late_bytes)
            with run_checkpoint(checkpoint, load_runner, target, positions, workers, {}, kv_type) as (runner, reference):
                assert [s.name for s in runner.plan.layer_stages(0) if s.early] == ["qkv"] * late_bytes
                found.append(runner.logits(tokens, 0))
        assert_near(compare(found[0], reference.logits(tokens)), 3e-2)
    assert np.array_equal(*found)
