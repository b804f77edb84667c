"""Linear stages for several columns, on the emulated GPU: matrices that are cut in every way, and codes of every kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulated_gpu import Device, emulated_gpu
from flashformer.backends.cuda import load as load_runner
from flashformer.backends.cuda.codegen import place_buffers
from flashformer.backends.cuda.prompts import prompt_plan
from flashformer.check import check_runner, compare, sample_tokens
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.config import parse_config
from flashformer.formats import Format, choose
from flashformer.geometry import Geometry
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.reference import Reference
from flashformer.targets import get
from flashformer.validate import validate
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from running import assert_near
from test_formats import STAGES, forms_of

LENGTH = 19


@dataclass
class Case:
    """A model, the GPU that runs it, and what its plan must come to for the case to be what its name says."""

    columns: int
    arch: str = "sm_90"
    workers: int = 3
    panel_bytes: int = 132 << 10
    dtype: str = "bfloat16"
    config: dict[str, Any] = field(default_factory=dict)
    warps_rows: int | None = None  # of the stages that read the hidden state
    parts: int | None = None  # of the one that reads the activations
    together: int = 1  # groups of its batches
    short: int | None = None  # of its warps


CASES = {
    "two columns": Case(2),
    "four, no bulk copies": Case(4, arch="sm_80"),
    "four, fp16 and odd sizes": Case(4, dtype="float16", config={"hidden_size": 200, "intermediate_size": 341, "vocab_size": 301}),
    "eight, more blocks than tiles": Case(8, workers=12),
    "eight, one warp a tile": Case(8, config={"hidden_size": 32}, warps_rows=8),
    "two, short warps, four rows more": Case(
        2, config={"hidden_size": 330, "intermediate_size": 89 * 32 + 12}, warps_rows=1, parts=3, short=6
    ),
    "four, short warps of two tiles": Case(
        4, arch="sm_80", config={"hidden_size": 160, "intermediate_size": 36 * 32}, warps_rows=2, parts=2, short=4
    ),
    "sixteen, short warps": Case(16, config={"hidden_size": 320, "intermediate_size": 95 * 32}, parts=3, short=1),
    "four, short warps, panels in passing": Case(4, panel_bytes=0, config={"intermediate_size": 76 * 32}, parts=3, short=4),
    "eight, short warps, groups together": Case(
        8, panel_bytes=68 << 10, config={"intermediate_size": 18 * 256 - 120}, parts=5, together=3, short=3
    ),
    "sixteen, short warps, panels in passing": Case(
        16, panel_bytes=64 << 10, config={"hidden_size": 160, "intermediate_size": 100 * 32}, parts=4, together=4, short=4
    ),
    "sixteen, parts of two sizes": Case(16, config={"intermediate_size": 5 * 256}, parts=2),
    "four, panels in passing": Case(4, panel_bytes=0, config={"intermediate_size": 11 * 256}, parts=3),
    "eight, panels in passing, four parts": Case(8, panel_bytes=0, arch="sm_80", config={"intermediate_size": 13 * 256}, parts=4),
    "eight, three groups together": Case(8, panel_bytes=68 << 10, config={"intermediate_size": 18 * 256}, parts=5, together=3),
    "sixteen, batches of two sizes": Case(
        16, panel_bytes=64 << 10, config={"hidden_size": 160, "intermediate_size": 18 * 256}, parts=5, together=4
    ),
}  # fmt: skip


def geometry(plan: Plan, name: str) -> Geometry:
    return next(s.geometry for s in plan.stages if s.name == name and s.geometry)


def check(device: Device, checkpoint: Checkpoint, columns: int, formats: Mapping[str, Format] | None = None, most: float = 2e-2) -> Plan:
    """Logits as the reference has them; the same bits whatever order threads run in, and however the text is cut. Returns the plan."""
    graph = build_graph(checkpoint.config)
    plan = make_plan(checkpoint.config, graph, device.target, 64, None, formats, columns=columns)
    validate(plan)
    tokens = sample_tokens(checkpoint.config, LENGTH, seed=1)
    runner = load_runner(plan, checkpoint)
    try:
        ours = runner.logits(tokens, 0)
        assert_near(compare(ours, Reference(graph, checkpoint).logits(tokens)), most)
        device.seed += 1
        parts = [runner.logits(tokens[a:b], a) for a, b in ((0, 1), (1, 8), (8, LENGTH))]
        assert np.array_equal(np.concatenate(parts), ours)
    finally:
        runner.close()
    return plan


@pytest.mark.parametrize("name", CASES)
def test_plain_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    device = emulated_gpu(monkeypatch, case.arch, case.workers)
    device.target = replace(device.target, panel_bytes=case.panel_bytes, plain_panel_bytes=0)
    write_folder(tmp_path, make_config("Qwen2ForCausalLM", torch_dtype=case.dtype, **case.config), dtype=case.dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        plan = check(device, checkpoint, case.columns)
    assert case.warps_rows in (None, geometry(plan, "qkv").warps_rows)
    assert case.parts in (None, geometry(plan, "down").parts)
    assert case.together == geometry(plan, "down").together
    assert case.short in (None, geometry(plan, "down").short_warps)


def test_what_short_warps_lack_is_read_from_memory_that_nobody_writes() -> None:
    config = parse_config(make_config(intermediate_size=76 * 32))
    plan = make_plan(config, build_graph(config), replace(get("sm_90"), panel_bytes=0, plain_panel_bytes=0), 64, 3, columns=4)
    assert geometry(plan, "down").short_warps == 4
    places = place_buffers(plan)
    first = places.buffers["mlp_hidden"]
    following = min(at for at in (*places.buffers.values(), *places.flags.values(), places.appended) if at > first)
    assert following - first >= (76 + 1) * 32 * 4 // 4  # words of four values


def test_a_kernel_for_prompts_reads_the_same_tapes_in_its_own_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = emulated_gpu(monkeypatch, "sm_90", 3)
    device.target = replace(device.target, panel_bytes=64 << 10, plain_panel_bytes=0)
    write_folder(tmp_path, make_config("Qwen2ForCausalLM", hidden_size=160, intermediate_size=18 * 256))
    with open_checkpoint(tmp_path) as checkpoint:
        graph = build_graph(checkpoint.config)
        plan = make_plan(checkpoint.config, graph, device.target, 64, prompt_columns=16)
        assert (geometry(plan, "down").together, geometry(prompt_plan(plan), "down").together) == (1, 4)
        runner = load_runner(plan, checkpoint)
        try:
            assert_near(check_runner(runner, Reference(graph, checkpoint), sample_tokens(checkpoint.config, LENGTH, seed=1)), 2e-2)
        finally:
            runner.close()


# For five formats each: columns, architecture, bytes of the panel, type of the other weights, whether the widest stage reads in batches.
MODELS = [
    (16, "sm_90", 0, "bfloat16", True), (4, "sm_80", 48 << 10, "float16", True), (8, "sm_90", 80 << 10, "bfloat16", False),
    (2, "sm_90", 132 << 10, "float16", False), (8, "sm_80", 80 << 10, "bfloat16", True),
]  # fmt: skip
HELD = [(2, "sm_90", 132 << 10, "bfloat16", False), (4, "sm_90", 132 << 10, "bfloat16", False)]  # where integers meet all of x
WIDE = (16, "sm_90", 132 << 10, "bfloat16", True)  # two pairs of groups at a time


@pytest.mark.parametrize("model", [None, *HELD, WIDE], ids=["in turn", "two", "four", "sixteen"])
@pytest.mark.parametrize("number", range(len(MODELS)), ids=lambda i: ", ".join(list(FORMS)[i * len(STAGES) : (i + 1) * len(STAGES)]))
def test_codes(number: int, model: tuple[int, str, int, str, bool] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage in another format."""
    columns, arch, panel_bytes, dtype, batches = model or MODELS[number]
    names = list(FORMS)
    chosen = {stage: FORMS[names[(number * len(STAGES) + i) % len(names)]] for i, stage in enumerate(STAGES)}
    others = {part: chosen[stage][0] for stage, parts in STAGES.items() for part in parts}
    device = emulated_gpu(monkeypatch, arch)
    device.target = replace(device.target, panel_bytes=panel_bytes, plain_panel_bytes=0)
    sizes = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 2304, "vocab_size": 291, "tie_word_embeddings": True}
    if model == WIDE:
        sizes["intermediate_size"] *= 2
    write_folder(tmp_path, make_config(num_hidden_layers=1, torch_dtype=dtype, **sizes), dtype=dtype)
    with open_checkpoint(tmp_path) as plain:
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, others["q_proj"], others))
        plan = check(device, checkpoint, columns, choose(checkpoint, build_graph(plain.config).weights()))
    assert batches == (geometry(plan, "down").together > 1) and (geometry(plan, "down").together == 4) == (model == WIDE)
    assert [geometry(plan, stage).format.name for stage in STAGES] == [expected for _, expected in chosen.values()]
