"""The kernel for long prompts on a real GPU: right, and the same bits however a prompt is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashformer.backends.cuda.prefill import ROOM
from flashformer.bench import gpu_target
from flashformer.checkpoint import open_checkpoint
from model_files import make_config, write_folder
from prefill_checks import CASES, Case, check_engine, check_prefill, running

pytestmark = pytest.mark.gpu

LONG = 700  # tokens
LARGER = {
    "four heads a kv head, more tokens than a launch has": Case(
        config={"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5632,
                "num_hidden_layers": 2, "vocab_size": 1000, "max_position_embeddings": 2048},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _has_it() -> None:
    if not gpu_target().prefill:
        pytest.skip("this GPU's target has no kernel for long prompts")


@pytest.mark.parametrize("name", [*CASES, *LARGER])
def test_models(name: str, tmp_path: Path) -> None:
    case = {**CASES, **LARGER}[name]
    length = ROOM + 200 if name in LARGER else LONG
    config = {"max_position_embeddings": 1024, **case.config}
    write_folder(tmp_path, make_config(case.architecture, torch_dtype=case.dtype, **config), dtype=case.dtype)
    with open_checkpoint(tmp_path) as checkpoint, running(checkpoint, gpu_target(), length + 8, case.kv) as (runner, reference):
        check_prefill(runner, reference, length, case.limit)


def test_engine(tmp_path: Path) -> None:
    check_engine(write_folder(tmp_path, make_config(vocab_size=300)), 256)
