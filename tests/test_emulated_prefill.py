"""The kernel for long prompts, on the emulated GPU: models of all kinds, and codes of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulated_gpu import emulated_gpu
from flashformer.backends.cuda import codegen
from flashformer.backends.cuda.codegen import Source
from flashformer.backends.cuda.prefill import possible
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.errors import DeviceError
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from model_files import make_config, write_folder
from prefill_checks import CASES, LAYER_STAGES, SUITED, UNSUITED, cache_of, check_engine, check_prefill, running
from quant_models import FORMS, QuantizedCheckpoint
from test_formats import STAGES, forms_of

LONG = 134  # tokens: more than a block of threads multiplies at a time
CONTEXT = 144


@pytest.mark.parametrize("name", CASES)
def test_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    device = emulated_gpu(monkeypatch)
    write_folder(tmp_path, make_config(case.architecture, torch_dtype=case.dtype, **case.config), dtype=case.dtype)
    with open_checkpoint(tmp_path) as checkpoint, running(checkpoint, device.target, CONTEXT, case.kv) as (runner, reference):
        check_prefill(runner, reference, LONG, case.limit)


@pytest.mark.parametrize("form", ["", "int4 g128 zeros", "fp8 rows"])
def test_splits(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whether blocks share the splits of a stage, or each takes all of its own."""
    device = emulated_gpu(monkeypatch, workers=6)
    caches = []
    with quantised(tmp_path, dict.fromkeys(LAYER_STAGES, form) if form else {}, "bfloat16") as checkpoint:
        for shares in (codegen.most_shares, lambda plan: 0):
            monkeypatch.setattr(codegen, "most_shares", shares)
            with running(checkpoint, device.target, CONTEXT, quantised=bool(form)) as (runner, reference):
                splits = codegen.prefill_splits(runner.plan)
                assert splits["attention_output"] == 2 and splits["down"] == 3
                check_prefill(runner, reference, LONG, 2e-2)
                caches.append(cache_of(runner))
    assert np.array_equal(*caches)


# Every format that has it, a stage each, as many as a layer has at a time.
@pytest.mark.parametrize("number", range(-(-len(SUITED) // len(LAYER_STAGES))))
def test_codes(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage in another format."""
    names = [SUITED[(number * len(LAYER_STAGES) + i) % len(SUITED)] for i in range(len(LAYER_STAGES))]
    device = emulated_gpu(monkeypatch)
    stages, dtype = dict(zip(LAYER_STAGES, names, strict=True)), "float16" if number % 2 else "bfloat16"
    with (
        quantised(tmp_path, stages, dtype) as checkpoint,
        running(checkpoint, device.target, CONTEXT, quantised=True) as (runner, reference),
    ):
        found = {s.name: s.geometry.format.name for s in runner.plan.stages if s.geometry}
        assert [found[stage] for stage in LAYER_STAGES] == [FORMS[name][1] for name in names]
        check_prefill(runner, reference, LONG, 2e-2)


@pytest.mark.parametrize("name", UNSUITED)
def test_formats_without_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts go through the kernel of several columns there."""
    target = emulated_gpu(monkeypatch).target
    with quantised(tmp_path, {"down": name}, "bfloat16") as checkpoint:
        graph = build_graph(checkpoint.config)
        plan = make_plan(checkpoint.config, graph, target, CONTEXT, formats=choose(checkpoint, graph.weights()), prompt_columns=2)
    assert any(s.geometry.format.name == FORMS[name][1] for s in plan.stages if s.geometry) and not possible(plan)


def test_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_gpu(monkeypatch)
    check_engine(write_folder(tmp_path, make_config(vocab_size=300)), CONTEXT)


def test_a_stuck_kernel_gives_up_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that leaves before the others; and the kernel works again afterwards, if it does not."""
    device = emulated_gpu(monkeypatch)
    folder = write_folder(tmp_path, make_config(num_hidden_layers=2))

    def leaving(plan: Plan, trace: bool = False, prefill: bool = False) -> Source:
        source = codegen.generate(plan, trace, prefill)
        text = source.text.replace("CachePrefill<Model>::run(block, layer);", "if (blockIdx.x == 1 && p.count == 5) return;", 1)
        return Source(text, source.stage_names, source.vectors, source.exchange_words, source.plain_words) if prefill else source

    monkeypatch.setattr("flashformer.backends.cuda.runner.generate", leaving)
    with open_checkpoint(folder) as checkpoint, running(checkpoint, device.target, CONTEXT) as (runner, _):
        assert runner.prefill is not None
        with pytest.raises(DeviceError, match="waited too long and gave up: stage 'attention', layer 0"):
            runner.prefill.feed([1, 2, 3, 4, 5], 0, 0)
        runner.prefill.feed([1, 2, 3, 4], 0, 0)


@contextmanager
def quantised(folder: Path, names: dict[str, str], dtype: str) -> Iterator[Checkpoint]:
    """A checkpoint whose stages have these of FORMS."""
    others: dict[str, Any] = {part: None for parts in STAGES.values() for part in parts}
    others |= {part: FORMS[name][0] for stage, name in names.items() for part in STAGES[stage]}
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 291, "num_hidden_layers": 2}
    write_folder(folder, make_config(torch_dtype=dtype, **sizes), dtype=dtype)
    with open_checkpoint(folder) as plain:
        yield QuantizedCheckpoint(plain, forms_of(plain, FORMS[next(iter(names.values()))][0], others)) if names else plain
