"""The proof of plans: it refuses every damaged one, saying where, and no plan that is made as it should be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exchange_model import ExchangeModel
from flashformer.backends.cuda.codegen import VERSIONS
from flashformer.config import ModelConfig
from flashformer.errors import PlanError
from flashformer.formats import PLAIN, Format
from flashformer.fuse import LinearSpec
from flashformer.models import build_graph
from flashformer.plan import Plan, Stage, make_plan
from flashformer.shapes import SHAPES, shape
from flashformer.tape import Tape, lay_tapes
from flashformer.targets import Target, available, get
from flashformer.validate import validate
from flashformer.validate_tape import validate_tape

WORKERS = (1, 2, 3, 7, 84, 108, 132, 148, 170)


def model(**changes: Any) -> ModelConfig:
    """A small model with biases, head norms, padded heads, and a group of heads that is split."""
    sizes: dict[str, Any] = {
        "architecture": "Qwen3ForCausalLM", "hidden_size": 200, "num_layers": 3, "num_heads": 18, "num_kv_heads": 2, "head_dim": 24,
        "ffn_size": 341, "vocab_size": 1003, "norm_eps": 1e-6, "rope_theta": 1e4, "max_positions": 512,
        "qk_norm": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


def planned(config: ModelConfig, workers: int | None = 7, target: str = "sm_90") -> Plan:
    """The plan of a model."""
    return make_plan(config, build_graph(config), get(target), workers=workers)


# --- damaged plans ---------------------------------------------------------------------------------------------------------


def edit(plan: Plan, name: str, layer: int | None, how: Callable[[Stage], Stage]) -> Plan:
    """A plan with a stage changed, in one layer or in all."""
    chosen = [s.name == name and layer in (None, s.layer) for s in plan.stages]
    assert any(chosen)
    return replace(plan, stages=tuple(how(s) if c else s for s, c in zip(plan.stages, chosen, strict=True)))


def change(plan: Plan, name: str, layer: int | None = None, **fields: Any) -> Plan:
    """A plan with fields of a stage changed."""
    return edit(plan, name, layer, lambda s: replace(s, **fields))


def count(plan: Plan, name: str, layer: int | None, worker: int, more: int) -> Plan:
    """A plan in which a worker owns so many tiles more than it did; the others stay where they are."""
    return edit(plan, name, layer, lambda s: replace(s, count=tuple(c + more * (w == worker) for w, c in enumerate(s.count))))


def own(plan: Plan, name: str, layer: int | None, *counts: int) -> Plan:
    """A plan in which the workers own so many tiles of a stage, one after the other."""
    return change(plan, name, layer, count=counts, first=tuple(int(f) for f in np.cumsum([0, *counts[:-1]])))


def move(plan: Plan, name: str, layer: int | None) -> Plan:
    """A plan in which a tile of worker 0 belongs to worker 1."""
    a, b, *rest = next(s.count for s in plan.stages if s.name == name)
    return own(plan, name, layer, a - 1, b + 1, *rest)


def linear(plan: Plan, name: str, layer: int | None = None, **fields: Any) -> Plan:
    """A plan with fields of a linear stage's specification changed."""
    return edit(plan, name, layer, lambda s: replace(s, linear=replace(s.linear, **fields)))  # type: ignore[type-var]


def block(plan: Plan, name: str, layer: int | None, number: int, **fields: Any) -> Plan:
    """A plan with fields of one block of rows changed."""

    def changed(s: Stage) -> Stage:
        assert s.linear is not None
        blocks = tuple(replace(b, **fields) if i == number else b for i, b in enumerate(s.linear.blocks))
        return replace(s, linear=replace(s.linear, blocks=blocks))

    return edit(plan, name, layer, changed)


def geometry(plan: Plan, name: str, **fields: Any) -> Plan:
    """A plan with fields of a stage's geometry changed."""
    return edit(plan, name, None, lambda s: replace(s, geometry=replace(s.geometry, **fields)))  # type: ignore[type-var]


def swap(plan: Plan, a: int, b: int) -> Plan:
    """A plan with two stages exchanged."""
    stages = list(plan.stages)
    stages[a], stages[b] = stages[b], stages[a]
    return replace(plan, stages=tuple(stages))


def layers_swapped(plan: Plan) -> Plan:
    """A plan that comes to layer 1 before layer 0."""
    first, second, rest = plan.stages[1:7], plan.stages[7:13], plan.stages[13:]
    return replace(plan, stages=(plan.stages[0], *second, *first, *rest))


def kv(plan: Plan, **fields: int | str) -> Plan:
    """A plan with fields of the KV cache changed."""
    return replace(plan, kv=replace(plan.kv, **fields))


def buffer(plan: Plan, buffer: str, **fields: Any) -> Plan:
    """A plan with fields of a buffer changed."""
    return replace(plan, buffers=tuple(replace(b, **fields) if b.name == buffer else b for b in plan.buffers))


def hand_over(plan: Plan, name: str, to: str, buffer: str) -> Plan:
    """A plan in which two stages, one after the other, use another buffer."""
    return change(change(plan, name, writes=buffer), to, reads=(buffer,))


Q1 = "model.layers.1.self_attn.q_proj.weight"

DAMAGE: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "lost tile": (lambda p: count(p, "gate_up", 1, worker=6, more=-1), "layer 1 gate_up: the workers own 85 of 86 tiles"),
    "lost tile within": (lambda p: count(p, "gate_up", 1, worker=3, more=-1), "layer 1 gate_up: worker 4 owns .* a tile is lost"),
    "doubled tile": (lambda p: count(p, "head", None, worker=2, more=1), "head: worker 3 owns .* a tile is lost or owned twice"),
    "negative run": (lambda p: own(p, "head", None, 127, -1, 0, 0, 0, 0, 0), "head: worker 1 owns -1 tiles"),
    "worker forgotten": (lambda p: change(p, "down", 2, count=(25,), first=(0,)), "layer 2 down gives tiles to 1 workers, not 7"),
    "wait without writer": (
        lambda p: change(p, "combine", tiles=0, count=(0,) * 7, first=(0,) * 7), "layer 0 combine has no tiles: whoever reads attended",
    ),
    "values without writer": (
        lambda p: own(change(p, "combine", tiles=71), "combine", None, 71, *[0] * 6), "combine makes 576 values in 71 tiles .* no writer",
    ),
    "tiles beyond": (lambda p: own(change(p, "head", tiles=127), "head", None, 127, *[0] * 6), "head makes 1003 values in 127 tiles"),
    "residual moved": (lambda p: move(p, "down", 1), "layer 1 down: worker 0 does not own the tiles that it owns in embed"),
    "residual moved in all layers": (lambda p: move(p, "attention_output", None), "layer 0 attention_output: worker 0 does not own"),
    "combine moved": (lambda p: move(p, "combine", 2), "layer 2 combine: worker 0 does not own the tiles that it owns in layer 0 combine"),
    "missing exchange": (lambda p: change(p, "gate_up", reads=("attention_input",)), "gate_up reads attention_input, but layer 0 att"
                         "ention_output has handed on mlp_input: an exchange is missing"),
    "read before written": (lambda p: change(p, "qkv", reads=("mlp_input",)), "layer 0 qkv reads 'mlp_input' before any stage"),
    "unknown buffer": (lambda p: change(p, "down", 1, reads=("nowhere",)), "layer 1 down uses 'nowhere', which is no buffer"),
    "two inputs": (lambda p: change(p, "down", 1, reads=("mlp_hidden", "mlp_input")), "layer 1 down reads 2 buffers"),
    "nothing written": (lambda p: change(p, "attention", 1, writes=""), "layer 1 attention reads 1 buffers and writes ''"),
    "two buffers of one name": (lambda p: replace(p, buffers=(*p.buffers, p.buffers[2])), "two buffers are called"),
    "reused too early": (
        lambda p: hand_over(p, "attention", "combine", "qkv"),
        "layer 0 attention writes qkv while a worker may still read it in layer 0 attention: reused too early",
    ),
    "reused too early by combine": (
        lambda p: hand_over(buffer(p, "partials", values=576), "combine", "attention_output", "partials"),
        "layer 0 combine writes partials while a worker may still read it in layer 0 combine",
    ),
    "versions alike": (
        lambda p: hand_over(p, "attention_output", "gate_up", "attention_input"),
        "layer 0 attention_output writes attention_input a second time in front of layer 0",
    ),
    "stages swapped": (lambda p: swap(p, 4, 5), r"stage 4 is layer 0 gate_up \(linear\); the kernel comes to attention_output"),
    "layers swapped": (layers_swapped, r"stage 1 is layer 1 qkv \(linear\); the kernel comes to qkv \(linear\) of layer 0"),
    "stage lost": (lambda p: replace(p, stages=p.stages[:-1]), "the plan has 20 stages; the kernel walks through 21"),
    "stage doubled": (lambda p: replace(p, stages=(*p.stages, p.stages[-1])), "the plan has 22 stages"),
    "weight doubled": (lambda p: block(p, "qkv", 0, 0, weight=Q1), f"layer 1 qkv reads {re.escape(Q1)}, which another stage reads"),
    "weight lost": (lambda p: replace(p, weights={**p.weights, "extra": (3, 4)}), "no stage reads the weight extra$"),
    "bias lost": (lambda p: block(p, "down", 2, 0, bias=""), r"no stage reads the weight model\.layers\.2\.mlp\.down_proj\.bias$"),
    "head norm lost": (lambda p: change(p, "attention", head_norms=()), r"no stage reads .*0\.self_attn\.k_norm\.weight, nor 5 others"),
    "norm lost": (lambda p: change(p, "down", 0, publish_gamma=""), r"no stage reads the weight model\.layers\.1\.input_layernorm"),
    "weight unknown": (lambda p: block(p, "down", 1, 0, weight="nothing"), r"layer 1 down reads nothing as \[200, 341\]; it is no weight"),
    "weight misshapen": (lambda p: block(p, "down", 1, 0, rows=199), r"reads .* as \[199, 341\]; it has the shape \[200, 341\]"),
    "columns cut": (lambda p: linear(p, "head", columns_used=196), r"head reads lm_head.weight as \[1003, 196\]"),
    "table unknown": (lambda p: replace(p, embedding="lm_head"), "the embedding table 'lm_head' is no weight"),
    "rows not in groups": (lambda p: block(p, "qkv", 0, 1, group=23), "layer 0 qkv: 48 rows of .*k_proj.weight do not lie in groups of 23"),
    "no room in a group": (lambda p: block(p, "qkv", 0, 1, stride=16), "do not lie in groups of 24, 16 apart"),
    "columns not in groups": (lambda p: linear(p, "attention_output", column_stride=8), "432 columns do not lie in groups of 24, 8 apart"),
    "gate and up not interleaved": (lambda p: linear(p, "gate_up", interleave=False), "layer 0 gate_up: swiglu"),
    "heads shifted": (lambda p: block(p, "qkv", 0, 2, stride=48), "layer 0 qkv does not make 18 heads"),
    "heads read elsewhere": (
        lambda p: linear(p, "attention_output", column_group=12, column_stride=16), "attention_output does not read heads of 24 values",
    ),
    "buffer too short": (lambda p: buffer(p, "mlp_hidden", values=336), "gate_up makes 341 values in 86 tiles of 4; mlp_hidden has 336"),
    "columns uncovered": (lambda p: geometry(p, "down", fragments=1, parts=1, short_warps=0), "256 of 341 columns"),
    "warps not shared out": (lambda p: geometry(p, "down", warps_rows=2), "layer 0 down: wrong geometry: it does not share out 8 warps"),
    "too many fragments": (lambda p: geometry(p, "down", fragments=129, parts=33), "129 fragments a warp, which holds 1 to 128"),
    "short warps of a fragment each": (
        lambda p: geometry(p, "down", fragments=1, parts=1, short_warps=1), "layer 0 down: wrong geometry: short warps have no fragments",
    ),
    "all warps short": (lambda p: geometry(p, "down", short_warps=8), "layer 0 down: wrong geometry: 8 of 8 warps are short"),
    "a short warp too many": (lambda p: geometry(p, "down", short_warps=6), "320 of 341 columns are covered"),
    "parts too long": (lambda p: geometry(p, "down", fragments=13, parts=2), "parts of 7 fragments; a chunk holds 6"),
    "no parts": (lambda p: geometry(p, "down", parts=0), "cannot be read in 0 parts"),
    "tiles of another target": (lambda p: geometry(p, "down", tile_rows=4), "its fragments are not those of sm_90"),
    "KV cache too small": (lambda p: kv(p, blocks=31), "KV cache: 31 blocks are too few for 512 positions"),
    "KV cache of another model": (lambda p: kv(p, heads=1, group=18), "KV cache: 1 heads of 24 are not the model's"),
    "group of another size": (lambda p: kv(p, group=8), "groups of 8 query heads are not the model's 18"),
    "group split wrong": (lambda p: kv(p, virtual_group=4), "a group of 9 query heads does not go into 2 splits of 4"),
    "empty split": (lambda p: kv(p, virtual_heads=6), "a group of 9 query heads does not go into 3 splits of 5"),
    "too many heads at a time": (lambda p: kv(p, virtual_heads=2, virtual_group=9), "9 query heads at a time; 8 fit"),
    "splits uneven": (lambda p: kv(p, virtual_heads=3), "3 virtual heads are no multiple of 2"),
    "KV cache of an unknown type": (lambda p: kv(p, type="fp4"), "KV cache: its type is 'fp4'; known are native, int8, fp8"),
    "heads not padded": (lambda p: kv(p, head_pad=24), "KV cache: heads of 24 values are not padded to 24"),
    "longer than the model": (lambda p: replace(kv(p, max_context=600, blocks=38), max_context=600), "600 positions; the model supports"),
    "another context": (lambda p: replace(p, max_context=100), "made for 512 positions, the plan for 100"),
    "sums of squares not carried": (
        lambda p: buffer(p, "mlp_input", moment=False), "attention_output must hand on sums of squares with mlp_input",
    ),
    "norm of something else": (lambda p: linear(p, "attention_output", eps=1e-5), "attention_output norms attended, which comes without"),
    "a layer of its own": (lambda p: linear(p, "gate_up", 1, eps=1e-5), "layer 1 gate_up differs from the same stage of layer 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A valid plan."""
    made = planned(model())
    validate(made)
    return made


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_plans_are_refused(plan: Plan, name: str) -> None:
    damage, message = DAMAGE[name]
    with pytest.raises(PlanError, match=message):
        validate(damage(plan))


def test_heads_that_a_slot_cannot_hold_are_refused() -> None:
    validate(planned(model(head_dim=256)))
    with pytest.raises(PlanError, match="heads of 258 are too large: a block has 17408 bytes, a slot of the ring 16384"):
        validate(planned(model(head_dim=258)))
    validate(planned(model(head_dim=258), target="cpu"))


def test_positions_that_cannot_be_counted_are_refused() -> None:
    config = model(max_positions=16_000_000, num_heads=64, num_kv_heads=64)
    with pytest.raises(PlanError, match="16000000 positions are more than 32 bits can share out"):
        validate(planned(config, workers=132))
    validate(make_plan(config, build_graph(config), get("sm_90"), 1_000_000, workers=132))


def test_moments_need_a_place_for_each_owner(plan: Plan) -> None:
    """With idle workers an owner's place is the number of its tile, so it must have one only."""
    counts = (5, 5, 5, 5, 5, 0, 0)
    moved = own(own(own(plan, "embed", None, *counts), "attention_output", None, *counts), "down", None, *counts)
    with pytest.raises(PlanError, match="embed: worker 0 owns 5 tiles and worker 5 none"):
        validate(moved)


def padding_anywhere(config: ModelConfig, workers: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan whose tiles of padding may belong to anybody."""
    with monkeypatch.context() as patch:
        patch.setattr(LinearSpec, "has_empty_tiles", lambda *_: False)
        return planned(config, workers)


def test_padding_must_be_owned_by_somebody_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model(hidden_size=64, num_layers=2)
    with pytest.raises(PlanError, match=r"layer 0 qkv: worker \d+ owns a tile of padding and no part of the residual"):
        validate(padding_anywhere(config, 40, monkeypatch))


CPU = get("cpu")


def quantised(format: Format, target: Target = CPU, **changes: Any) -> Plan:
    """A plan with all matrices in one format."""
    config = model(head_dim=32, **changes)
    graph = build_graph(config)
    return make_plan(config, graph, target, workers=7, formats=dict.fromkeys(graph.weights(), format))


FORMAT_DAMAGE: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "no kernel": (
        lambda p: geometry(p, "down", format=Format("int", 4, 40)), "layer 0 down: wrong geometry: cpu has no kernel for int4 g40",
    ),
    "wider codes": (lambda p: geometry(p, "down", format=PLAIN), "layer 0 down: wrong geometry: its fragments are not those of cpu"),
    "chunks unpadded": (lambda p: geometry(p, "down", chunk_unit=1), "layer 0 down: wrong geometry: its fragments are not those of cpu"),
    "padding in groups": (
        lambda p: linear(p, "attention_output", column_group=16), "attention_output: wrong geometry: groups of 64 columns with padding",
    ),
    "table of its own": (lambda p: replace(p, embedding_format=PLAIN), "rows of model.embed_tokens.weight cannot be looked up in 16-bit"),
    "table unknown": (lambda p: replace(p, embedding_format=Format("int", 2)), "cannot be looked up in int2"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_DAMAGE)
def test_wrong_formats_are_refused(name: str) -> None:
    plan = quantised(Format("int", 4, 64, "zero"), tied_embeddings=True)
    validate(plan)
    damage, message = FORMAT_DAMAGE[name]
    with pytest.raises(PlanError, match=message):
        validate(damage(plan))


def test_codes_have_no_short_warps() -> None:
    plan = quantised(Format("int", 4, 64, "zero"), get("sm_90"))
    validate(plan)
    with pytest.raises(PlanError, match=r"layer 0 qkv: wrong geometry: short warps of int4 g64.*, on sm_90"):
        validate(geometry(plan, "qkv", fragments=2, short_warps=1))


def test_layers_have_one_format_where_a_kernel_has_one_body() -> None:
    plan = quantised(Format("int", 4, 64, "zero"))
    one = geometry(plan, "down", format=Format("int", 4, 64))
    stages = tuple(mixed if s.layer == 1 else s for s, mixed in zip(plan.stages, one.stages, strict=True))
    validate(replace(plan, stages=stages))
    target = replace(plan.target, mixed_layers=False)
    with pytest.raises(PlanError, match="layer 1 down differs from the same stage of layer 0"):
        validate(replace(plan, stages=stages, target=target))


def test_parts_end_with_groups() -> None:
    narrow = replace(get("sm_90"), code_columns=64)
    validate(quantised(Format("int", 8, 64), narrow))
    with pytest.raises(PlanError, match="a part ends inside a group of 128 columns"):
        validate(quantised(Format("int", 8, 128), narrow, ffn_size=64 * 9))


def test_groups_share_chunks_of_one_part() -> None:
    plan = quantised(Format("int", 4, 64), get("sm_90"), hidden_size=256, ffn_size=8192)
    validate(plan)
    found = {s.name: s.geometry for s in plan.layer_stages(0) if s.geometry}
    assert found["qkv"].stack > 1 == found["qkv"].parts and found["down"].parts > 1 == found["down"].stack
    with pytest.raises(PlanError, match="2 groups in a chunk of one part of"):
        validate(geometry(plan, "down", stack=2))
    with pytest.raises(PlanError, match="batches of 2 groups of 1 parts"):
        validate(geometry(plan, "qkv", together=2))


# --- damaged tapes ---------------------------------------------------------------------------------------------------------


def with_row(values: np.ndarray, chunk: int, worker: int, value: int) -> np.ndarray:
    """A copy with one value replaced."""
    out = values.copy()
    out[chunk, worker] = value
    return out


TAPE_DAMAGE: dict[str, tuple[Callable[[Tape], Tape], str]] = {
    "overlap": (lambda t: replace(t, offset=with_row(t.offset, 5, 3, t.offset[5, 2])), "worker [23]: chunk 5 overlaps another one"),
    "overlap by a unit": (lambda t: replace(t, offset=with_row(t.offset, 9, 1, t.offset[9, 1] - 1)), "worker 1: chunk 9 overlaps"),
    "before the arena": (lambda t: replace(t, offset=t.offset - 1), "the tapes take bytes -(64|128) to"),
    "arena too small": (lambda t: replace(t, nbytes=t.nbytes - 512), "of an arena of"),
    "arena beyond 32 bits": (lambda t: replace(t, nbytes=(t.unit << 32) + t.unit), "of an arena of"),
    "truncated": (lambda t: replace(t, offset=t.offset[:-1], size=t.size[:-1]), "truncated: they have [0-9]+ chunks"),
    "chunk cut": (lambda t: replace(t, size=with_row(t.size, 7, 0, t.size[7, 0] - 512)), "worker 0: chunk 7 has [0-9]+ bytes, not"),
    "chunk after the end": (lambda t: replace(t, size=np.where(t.size < 0, 0, t.size) + 512 * (t.stage < 0)), r"has 512 bytes, not 0"),
    "attention forgotten": (lambda t: replace(t, size=t.size + 512 * (t.stage == 2)), "has 512 bytes, not 0"),
    "stages misplaced": (lambda t: replace(t, starts=with_row(t.starts, 4, 2, t.starts[4, 2] + 1)), "worker 2 ends layer 0 combine at"),
    "other units": (lambda t: replace(t, unit=32), "the tapes count units of 32 bytes; those of"),
    "stages forgotten": (lambda t: replace(t, starts=t.starts[:-1]), "the tapes begin 20 stages; the plan has 21"),
}


@pytest.mark.parametrize("target", ["sm_90", "cpu"])
@pytest.mark.parametrize("name", TAPE_DAMAGE)
def test_damaged_tapes_are_refused(name: str, target: str) -> None:
    plan = planned(model(), 6, target)  # whose tapes are not equally long
    tape = lay_tapes(plan)
    validate_tape(plan, tape)
    damage, message = TAPE_DAMAGE[name]
    with pytest.raises(PlanError, match=message):
        validate_tape(plan, damage(tape))


def test_chunks_may_lie_in_any_order(plan: Plan) -> None:
    """What counts is that they do not overlap."""
    tape = lay_tapes(plan)
    end = tape.nbytes // tape.unit
    validate_tape(plan, replace(tape, offset=end - tape.offset - tape.size // tape.unit))


# --- valid plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", available())
def test_every_known_shape_is_accepted(target: str) -> None:
    for config in SHAPES.values():
        validate(planned(config, None, target))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"])
def test_any_number_of_workers_is_accepted(name: str, workers: int) -> None:
    for target in ("sm_90", "cpu"):
        validate(planned(shape(name), workers, target))


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Models of any shape that the targets hold."""
    kv_heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    widest = min(32768 // (kv_heads * group) // 16 * 16, 256)  # of a head: a matrix has at most 32,768 columns
    return model(
        architecture=draw(st.sampled_from(["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])),
        hidden_size=draw(st.integers(1, 1500)), num_layers=draw(st.integers(1, 4)), num_kv_heads=kv_heads, num_heads=kv_heads * group,
        head_dim=2 * draw(st.integers(1, widest // 2)), ffn_size=draw(st.integers(1, 3000)), vocab_size=draw(st.integers(1, 5000)),
        max_positions=draw(st.integers(1, 5000)), tied_embeddings=draw(st.booleans()), qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()), output_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=150)
@given(configurations(), st.sampled_from(WORKERS), st.sampled_from(sorted(available())))
def test_any_shape_is_accepted(config: ModelConfig, workers: int, target: str) -> None:
    validate(planned(config, workers, target))


@pytest.mark.parametrize("vocab", [128256, 262144])
def test_the_proof_takes_no_time(vocab: int) -> None:
    plan = planned(replace(shape("llama-3.1-8b"), vocab_size=vocab), workers=132)
    times = []
    for _ in range(3):
        began = time.process_time()
        validate(plan)
        times.append(time.process_time() - began)
    assert min(times) < 0.3


# --- the argument about overwriting, event by event ------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 6, "ffn_size": 50, "vocab_size": 100}


@settings(max_examples=60)
@given(configurations(), st.integers(1, 40), st.integers(1, 5))
def test_nothing_accepted_overtakes_a_reader(config: ModelConfig, workers: int, blocks: int) -> None:
    small = replace(
        config, hidden_size=config.hidden_size % 300 + 1, ffn_size=config.ffn_size % 200 + 1, vocab_size=config.vocab_size % 200 + 1,
        num_layers=config.num_layers % 2 + 1, head_dim=(config.head_dim - 2) % 40 + 2,
    )  # fmt: skip
    plan = planned(small, workers)
    validate(plan)
    assert ExchangeModel(plan, blocks).late == []
    for resumed in (False, True):
        vectors = ExchangeModel(plan, blocks, tokens=3, versions=VERSIONS, resumed=resumed)
        assert vectors.late == [] and vectors.stale == []


def test_the_events_show_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule that is proved is needed: without it, events can come in the wrong order."""
    plan = planned(model(**SMALL), 40)
    assert ExchangeModel(plan, 3, tokens=3).late == []
    assert any("down 0" in late and "qkv 0" in late for late in ExchangeModel(plan, 3, all_publish_moments=True).late)
    assert any("token of" in late for late in ExchangeModel(plan, 3, tokens=3, token_copies=1).late)
    assert any("gate_up 1" in stale for stale in ExchangeModel(plan, 3, versions=VERSIONS - 1).stale)  # a worker that only reads
    assert ExchangeModel(padding_anywhere(model(**SMALL), 40, monkeypatch), 3).late != []
    reused = hand_over(buffer(plan, "partials", values=6 * 32), "combine", "attention_output", "partials")
    assert any("combine 0 of" in late and "overtakes combine 0" in late for late in ExchangeModel(reused, 3).late)
