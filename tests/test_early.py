"""Values that are handed on early: which tiles make them, who owns these, and where they lie on the tapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer.backends.cuda import RandomWeights
from flashformer.config import ModelConfig
from flashformer.errors import PlanError
from flashformer.formats import NAMED, Format
from flashformer.geometry import SLICE
from flashformer.models import build_graph
from flashformer.plan import Early, Plan, Stage, make_plan, retarget, spread_late
from flashformer.shapes import shape
from flashformer.tape import block_rows, lay_tapes, scale_offsets, tile_offsets, tile_order
from flashformer.targets import get
from flashformer.validate import validate

READERS = {"qkv", "gate_up", "down"}
WRITERS = {"embed", "attention_output", "gate_up", "down"}  # of what the readers read


def planned(config: ModelConfig, late_bytes: int = 40_000, weights: Mapping[str, Format] | None = None, workers: int = 132) -> Plan:
    """A plan whose readers begin early."""
    graph = build_graph(config)
    return make_plan(config, graph, replace(get("sm_90"), late_bytes=late_bytes), 512, workers, weights)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=150), st.data())
def test_late_tiles_are_spread(count: list[int], data: st.DataObject) -> None:
    late = data.draw(st.integers(0, sum(count)))
    each = spread_late(count, late)
    assert sum(each) == late and all(0 <= n <= c for n, c in zip(each, count, strict=True))
    most = max(each)
    assert all(n >= most - 1 or n == c for n, c in zip(each, count, strict=True))


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "qwen3-14b", "llama-3.1-70b"])
def test_the_values_of_the_last_slices_are_made_last(name: str) -> None:
    plan = planned(shape(name))
    validate(plan)
    assert {s.name for s in plan.stages if s.early} == {*WRITERS, "qkv"}
    assert {s.name for s in plan.stages if s.geometry and s.geometry.late_slices} == READERS
    writer: Stage | None = None
    for stage in plan.layer_stages(0):
        g = stage.geometry
        if g and g.late_slices and writer:
            early = writer.early
            assert early
            values = 4 if writer.name == "gate_up" else 8  # of a tile
            ends = range(g.warp_columns, g.columns + 1, g.warp_columns)
            late = {c for end in ends for c in range(end - g.late_slices * SLICE, end)}
            order, at = tile_order(writer), 0
            for count, own in zip(writer.count, early.count, strict=True):
                tiles = order[at : at + count]
                assert all((t * values in late) == (i >= own) for i, t in enumerate(tiles.tolist()))
                at += count
        writer = stage


@pytest.mark.parametrize("name", ["qwen3-0.6b", "smollm2-135m", "llama-3.1-8b"])
def test_queries_come_before_keys_and_values(name: str) -> None:
    plan = planned(shape(name))
    validate(plan)
    qkv = plan.stages[1]
    assert qkv.early and qkv.linear
    queries = plan.config.num_heads * plan.kv.head_pad // 8
    order, at = tile_order(qkv), 0
    for count, own in zip(qkv.count, qkv.early.count, strict=True):
        assert [t < queries for t in order[at : at + count].tolist()] == [i < own for i in range(count)]
        at += count


def test_late_is_what_takes_some_time_to_make() -> None:
    """Of llama 8B a tile of gate_up is 64 KB, and in one slice of each warp there are 256 of them."""

    def slices(late_bytes: int) -> int:
        down = planned(shape("llama-3.1-8b"), late_bytes).layer_stages(0)[5]
        assert down.geometry
        return down.geometry.late_slices

    one = 256 * 65536 // 132
    assert [slices(n) for n in (0, 1, one, one + 1, 3 * one, 1 << 30)] == [0, 1, 1, 2, 3, 7]


def test_owners_of_the_residual_make_it_in_one_order() -> None:
    plan = planned(shape("llama-3.1-8b"))
    assert len({s.early for s in plan.stages if s.name in WRITERS - {"gate_up"}}) == 1


@pytest.mark.parametrize("name", ["qwen3-0.6b", "smollm2-135m"])
def test_vectors_that_are_too_short_come_at_once(name: str) -> None:
    """Warps have 128 columns of the residual or less, and 384 of what down reads, or 192, which is no whole number of slices."""
    late = {s.name for s in planned(shape(name)).stages if s.geometry and s.geometry.late_slices}
    assert late == ({"down"} if name == "qwen3-0.6b" else set())


def test_readers_that_cut_a_vector_in_different_ways_wait_for_all() -> None:
    """Of groups of rows that two warps share, and four."""
    config = shape("llama-3.1-8b")
    plan = planned(config)
    stages = tuple(
        replace(s, geometry=replace(s.geometry, warps_rows=2, warps_columns=4, fragments=32)) if s.name == "qkv" and s.geometry else s
        for s in plan.stages
    )
    late = {s.name for s in retarget(replace(plan, stages=stages)).stages if s.geometry and s.geometry.late_slices}
    assert late == {"down"}


def test_several_columns_come_at_once() -> None:
    config = shape("llama-3.1-8b")
    plan = make_plan(config, build_graph(config), replace(get("sm_90"), late_bytes=40_000), 512, columns=2)
    assert not any(s.early or (s.geometry and s.geometry.late_slices) for s in plan.stages)
    assert retarget(plan, late_bytes=1).stages == plan.stages


def test_other_numbers_move_nothing_else() -> None:
    plan = planned(shape("llama-3.1-8b"))
    usual = retarget(plan, late_bytes=0)
    assert usual == planned(shape("llama-3.1-8b"), 0) and retarget(usual, late_bytes=40_000) == plan
    a, b = lay_tapes(plan), lay_tapes(usual)
    assert np.array_equal(a.offset, b.offset) and np.array_equal(a.size, b.size)


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_each_tile_lies_where_its_owner_reads_it(weights: str) -> None:
    """Tile `order[k]` lies where tile k of an order that is not changed does."""
    config = shape("llama-3.2-1b")
    plan = planned(config, weights=RandomWeights(config, format=NAMED[weights]).formats)
    usual = retarget(plan, late_bytes=0)
    tape, before = lay_tapes(plan), lay_tapes(usual)
    moved = 0
    for index, stage in enumerate(plan.stages[:8]):
        if stage.geometry:
            order = tile_order(stage)
            assert sorted(order) == list(range(stage.tiles))
            moved += int((order != np.arange(stage.tiles)).any())
            for offsets in (tile_offsets, scale_offsets):
                assert np.array_equal(offsets(plan, tape, index)[order], offsets(usual, before, index))
            for number in range(len(stage.linear.blocks) if stage.linear else 0):
                assert np.array_equal(block_rows(stage, number), block_rows(usual.stages[index], number))
    assert moved == 5


DAMAGE = {
    "too many": (lambda e: replace(e, count=(e.count[0] + 100, *e.count[1:])), "a worker has more early tiles than tiles"),
    "lost": (lambda e: replace(e, count=(e.count[0] - 1, *e.count[1:])), r"the workers have \d+ of \d+ early tiles"),
    "of other workers": (lambda e: replace(e, count=e.count[1:]), "a worker has more early tiles than tiles"),
    "all": (lambda e: replace(e, tiles=e.period), "tiles cannot come early"),
    "period": (lambda e: replace(e, period=e.period - 1), "tiles cannot come early"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_orders_are_refused(name: str) -> None:
    damage, message = DAMAGE[name]
    plan = planned(shape("llama-3.2-1b"))

    def damaged(s: Stage) -> Stage:
        early: Early | None = s.early
        return replace(s, early=damage(early)) if early and s.name == "gate_up" else s

    with pytest.raises(PlanError, match=f"layer 0 gate_up: .*{message}"):
        validate(replace(plan, stages=tuple(map(damaged, plan.stages))))


def test_owners_with_two_orders_are_refused() -> None:
    plan = planned(shape("llama-3.2-1b"))
    stages = tuple(replace(s, early=None) if s.name == "down" and s.layer == 1 else s for s in plan.stages)
    with pytest.raises(PlanError, match="layer 1 down: worker 0 does not own the tiles that it owns in embed: they have moved"):
        validate(replace(plan, stages=stages))


def test_late_slices_are_whole() -> None:
    plan = planned(shape("llama-3.2-1b"))
    for late in (2, 3, -1):
        qkv = [replace(s, geometry=replace(s.geometry, late_slices=late)) for s in plan.stages if s.name == "qkv" and s.geometry]
        stages = tuple(qkv[s.layer] if s.name == "qkv" else s for s in plan.stages)
        with pytest.raises(PlanError, match=f"layer 0 qkv: wrong geometry: {late} late slices of 256 columns of a warp"):
            validate(replace(plan, stages=stages))
