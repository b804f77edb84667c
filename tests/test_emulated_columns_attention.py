"""Attention of several columns, on the emulated GPU: heads of every kind, whose caches are cut into many pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from column_checks import check_companions, opened
from emulated_gpu import emulated_gpu
from flashformer.backends.cuda import codegen
from flashformer.backends.cuda import load as load_runner
from flashformer.check import compare, sample_tokens
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import KvType, make_plan
from flashformer.reference import Reference
from flashformer.validate import validate
from running import assert_near

LENGTH, CONTEXT, VOCAB = 75, 80, 203


@dataclass
class Case:
    """A model's heads, the GPU that runs it, and how a head's cache is cut: into pieces of so many blocks, or at most so many pieces."""

    columns: int
    heads: int
    kv_heads: int
    head_dim: int
    piece_blocks: int = 1
    pieces: int = 32
    kv_type: KvType = "native"
    arch: str = "sm_90"
    workers: int = 3
    dtype: str = "bfloat16"


CASES = {
    "two columns, a piece a block": Case(2, 4, 2, 16),
    "four, a split group, e4m3, two pieces at most": Case(4, 18, 2, 24, pieces=2, kv_type="fp8"),
    "four, large heads, int8": Case(4, 4, 1, 256, piece_blocks=2, kv_type="int8"),
    "eight, more workers than units, no bulk copies, fp16": Case(8, 4, 1, 40, piece_blocks=8, arch="sm_80", workers=10, dtype="float16"),
    "sixteen, one kv head, more pieces than one look": Case(16, 12, 1, 8),
    "sixteen, eight neighbours, more workers than units": Case(16, 2, 2, 24, piece_blocks=2, workers=10),
    "sixteen, two neighbours of three queries each, e4m3": Case(16, 6, 2, 16, pieces=2, kv_type="fp8"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference has it; the same bits however the text is cut, whatever the other columns are, in whatever order threads run."""
    case = CASES[name]
    device = emulated_gpu(monkeypatch, case.arch, case.workers)
    monkeypatch.setattr(codegen, "PIECE_BLOCKS", case.piece_blocks)
    monkeypatch.setattr(codegen, "KV_PIECES", case.pieces)
    shape = {
        "hidden_size": 64, "head_dim": case.head_dim, "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads,
        "intermediate_size": 96, "vocab_size": VOCAB, "num_hidden_layers": 2,
    }  # fmt: skip
    with opened(tmp_path, shape, case.dtype) as checkpoint:
        graph = build_graph(checkpoint.config)
        formats = choose(checkpoint, graph.weights())
        plan = make_plan(checkpoint.config, graph, device.target, CONTEXT, None, formats, case.kv_type, case.columns, 3)
        validate(plan)
        runner = load_runner(plan, checkpoint)
        try:
            tokens = sample_tokens(checkpoint.config, LENGTH, seed=1)
            ours = runner.logits(tokens, 0, 1)
            assert_near(compare(ours, Reference(graph, checkpoint, kv_type=case.kv_type).logits(tokens)), 2e-2)
            device.seed += 1
            parts = [runner.logits(tokens[a:b], a, 2) for a, b in ((0, 1), (1, 18), (18, 20), (20, LENGTH))]
            assert np.array_equal(np.concatenate(parts), ours)
            check_companions(runner, VOCAB, 1, 6)
        finally:
            runner.close()
