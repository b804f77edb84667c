"""Tapes: against a slow and obvious way to lay them, and read back as a kernel reads them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashformer.config import ModelConfig
from flashformer.formats import PLAIN, Format
from flashformer.geometry import Geometry
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.shapes import shape
from flashformer.tape import Tape, chunk_sizes, lay_tapes, reordered, tile_offsets
from flashformer.targets import get
from flashformer.validate_tape import validate_tape


def planned(workers: int, target: str, **changes: Any) -> Plan:
    """The plan of a small model."""
    sizes: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "hidden_size": 328, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 20,
        "ffn_size": 1200, "vocab_size": 303, "norm_eps": 1e-5, "rope_theta": 1e4, "max_positions": 256,
    }  # fmt: skip
    config = ModelConfig(**{**sizes, **changes})
    return make_plan(config, build_graph(config), get(target), workers=workers)


def obvious(plan: Plan) -> list[list[tuple[int, int, list[tuple[int, int]]]]]:
    """The tape of each worker, chunk by chunk: (stage, bytes, the (tile, part)s in it)."""
    tapes = []
    for w in range(plan.target.workers):
        tape: list[tuple[int, int, list[tuple[int, int]]]] = []
        for index, stage in enumerate(plan.stages):
            if stage.kind == "attention":
                tape.append((index, 0, []))
            if stage.geometry is None:
                continue
            g = stage.geometry
            tiles = list(range(stage.first[w], stage.first[w] + stage.count[w]))
            groups = [tiles[i : i + g.chunk_tiles] for i in range(0, len(tiles), g.chunk_tiles)]
            while groups:
                batch, groups = groups[: g.together], groups[g.together :]
                for (part, fragments), group in product(enumerate(g.part_sizes()), batch):
                    in_part = g.warps_columns * fragments - (g.short_warps if part == g.parts - 1 else 0)
                    nbytes = len(group) * in_part * g.tile_rows * g.fragment_columns * g.format.bits // 8
                    f, columns = g.format, fragments * g.fragment_columns
                    scales = g.warps_columns * -(-columns // f.group) if f.group else int(part == g.parts - 1)
                    nbytes += g.tile_rows * len(group) * scales * f.group_bytes
                    nbytes += -nbytes % plan.target.chunk_unit
                    tape.append((index, nbytes, [(tile, part) for tile in group]))
        tapes.append(tape)
    return tapes


def check(plan: Plan, tape: Tape) -> None:
    """Compare a tape with the obvious one."""
    tapes = obvious(plan)
    chunks = max(map(len, tapes))
    # On a GPU chunk i of all workers lie side by side, on a CPU all chunks of a worker.
    order = [(i, w) for i in range(chunks) for w in range(len(tapes))]
    if plan.target.kind == "cpu":
        order.sort(key=lambda at: at[::-1])
    position = 0
    offset = np.zeros((chunks, len(tapes)), np.int64)
    for i, w in order:
        offset[i, w] = position
        position += tapes[w][i][1] if i < len(tapes[w]) else 0
    assert tape.nbytes == position == plan.tape_bytes()
    assert tape.length.tolist() == [len(t) for t in tapes]
    assert tape.size.shape == tape.offset.shape == tape.stage.shape == offset.shape
    found: dict[int, dict[tuple[int, int], int]] = {}
    for w, t in enumerate(tapes):
        assert tape.stage[:, w].tolist() == [chunk[0] for chunk in t] + [-1] * (chunks - len(t))
        assert tape.size[:, w].tolist() == [chunk[1] for chunk in t] + [0] * (chunks - len(t))
        assert (tape.offset[:, w] * tape.unit).tolist() == offset[:, w].tolist()
        for i, (index, _, parts) in enumerate(t):
            geometry = plan.stages[index].geometry
            for number, (tile, part) in enumerate(parts):
                assert geometry is not None
                found.setdefault(index, {})[tile, part] = int(offset[i, w]) + number * geometry.part_bytes(part)
    for index, stage in enumerate(plan.stages):
        first = [next((i for i, chunk in enumerate(t) if chunk[0] == index), None) for t in tapes]
        assert all(f is None or f == ours for f, ours in zip(first, tape.first_chunk(index).tolist(), strict=True))
        if stage.geometry is not None:
            starts = tile_offsets(plan, tape, index)
            assert {(t, p): int(starts[t, p]) for t in range(stage.tiles) for p in range(stage.geometry.parts)} == found[index]


@pytest.mark.parametrize("target", ["sm_90", "cpu"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 20, 84])
def test_tapes_are_laid_as_they_are_read(workers: int, target: str) -> None:
    plan = planned(workers, target)
    check(plan, lay_tapes(plan))


FORMATS = (
    Format("int", 4, 32, "minimum", "float16"), Format("int", 8), Format("int", 8, 64, "zero", "bfloat16"), Format("int", 4, 128),
    Format("table", 4, 16, table=(0.0,) * 16),
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("target", ["sm_90", "cpu"])
@pytest.mark.parametrize("hidden", [576, 256])
def test_tapes_of_codes_and_their_scales(format: Format, target: str, hidden: int) -> None:
    config = planned(1, "cpu", hidden_size=hidden, head_dim=32, vocab_size=3001).config
    graph = build_graph(config)
    plan = make_plan(config, graph, get(target), workers=5, formats=dict.fromkeys(graph.weights(), format))
    assert all(s.geometry.format == format for s in plan.stages if s.geometry)
    assert any(s.geometry.stack > 1 for s in plan.stages if s.geometry) == (target == "sm_90")
    check(plan, lay_tapes(plan))
    assert plan.weight_bytes() < plan.tape_bytes() < make_plan(config, graph, get(target), workers=5).tape_bytes()


@pytest.mark.parametrize(
    ("format", "panel", "workers", "batch"),
    [(PLAIN, 64, 2, 8), (PLAIN, 64, 7, 6), (PLAIN, 64, 60, 1), (PLAIN, 72, 2, 1), (FORMATS[0], 128, 2, 8), (FORMATS[0], 128, 7, 3)],
)
def test_groups_whose_x_does_not_stay_are_read_in_batches(format: Format, panel: int, workers: int, batch: int) -> None:
    config = planned(1, "cpu", hidden_size=320, ffn_size=18 * 256).config
    target, graph = replace(get("sm_90"), panel_bytes=panel << 10, plain_panel_bytes=0), build_graph(config)
    formats = dict.fromkeys(graph.weights(), format) if format != PLAIN else None
    plan = make_plan(config, graph, target, workers=workers, formats=formats, columns=8)
    assert {s.geometry.together for s in plan.stages if s.geometry and s.name == "down"} == {batch}
    tape = lay_tapes(plan)
    check(plan, tape)
    validate_tape(plan, tape)


@pytest.mark.parametrize(("workers", "columns"), [(2, (1, 8)), (7, (1, 8)), (7, (16, 8)), (3, (8, 1)), (60, (1, 16))])
def test_a_tape_can_be_read_in_other_batches(workers: int, columns: tuple[int, int]) -> None:
    config = planned(1, "cpu", hidden_size=320, ffn_size=18 * 256).config
    target, graph = replace(get("sm_90"), panel_bytes=64 << 10, plain_panel_bytes=0), build_graph(config)
    plan, other = (make_plan(config, graph, target, workers=workers, columns=n) for n in columns)
    own, tape = lay_tapes(other), lay_tapes(plan)
    read = reordered(tape, plan, other)
    assert (read.nbytes, read.starts.tolist(), read.size.tolist()) == (tape.nbytes, own.starts.tolist(), own.size.tolist())
    assert np.array_equal(np.sort(read.offset, axis=0), np.sort(tape.offset, axis=0))  # each chunk once
    for index, stage in enumerate(plan.stages):
        if stage.geometry:  # a tile's parts are where the other order puts them, in the same memory
            assert np.array_equal(tile_offsets(other, read, index), tile_offsets(plan, tape, index))
    assert (read.offset.tolist() == tape.offset.tolist()) == all(
        a.geometry.together == b.geometry.together for a, b in zip(plan.stages, other.stages, strict=True) if a.geometry and b.geometry
    )


@settings(max_examples=30)
@given(
    st.integers(1, 30), st.sampled_from(["sm_90", "cpu"]), st.integers(1, 600), st.integers(1, 3000), st.integers(1, 900),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 40),
)  # fmt: skip
def test_tapes_of_any_shape(workers: int, target: str, hidden: int, ffn: int, vocab: int, kv_heads: int, group: int, half: int) -> None:
    sizes = {"hidden_size": hidden, "ffn_size": ffn, "vocab_size": vocab, "num_layers": 1}
    plan = planned(workers, target, **sizes, num_kv_heads=kv_heads, num_heads=kv_heads * group, head_dim=2 * half)
    check(plan, lay_tapes(plan))


def test_idle_workers_come_to_the_head_at_the_end() -> None:
    plan = planned(84, "sm_90")
    tape = lay_tapes(plan)
    idle = np.array(plan.stages[-2].count) == 0
    assert idle.any() and (tape.first_chunk(len(plan.stages) - 2)[idle] == tape.length[idle]).all()


def test_chunks_of_the_known_shapes_are_counted_in_units() -> None:
    plan = make_plan(shape("llama-3.1-8b"), build_graph(shape("llama-3.1-8b")), get("sm_90"))
    tape = lay_tapes(plan)
    assert tape.nbytes == 15_009_316_864 == int(tape.size.sum(dtype=np.int64))  # no padding at all
    assert (tape.size % 512 == 0).all() and tape.size.max() == 16384
    assert (tape.size == 16384).mean() > 0.97  # nearly all chunks fill their slots


def test_a_last_group_may_be_short() -> None:
    g = Geometry(8, 32, warps_rows=4, warps_columns=2, fragments=7, parts=2)
    assert chunk_sizes(g, 5).tolist() == [4 * 2 * 4 * 512, 4 * 2 * 3 * 512, 1 * 2 * 4 * 512, 1 * 2 * 3 * 512]
    assert chunk_sizes(g, 0).tolist() == []
    uneven = replace(g, short_warps=1)
    assert chunk_sizes(uneven, 5).tolist() == [4 * 2 * 4 * 512, 4 * (2 * 3 - 1) * 512, 1 * 2 * 4 * 512, 1 * (2 * 3 - 1) * 512]


@pytest.mark.parametrize(
    ("target", "ffn", "cut"),
    [("sm_90", 1200, (8, 5, 2, 2)), ("sm_90", 1280, (8, 5, 2, 0)), ("sm_90", 215, (4, 2, 1, 1)), ("cpu", 1200, (1, 19, 1, 0))],
)
def test_a_product_from_the_tapes(target: str, ffn: int, cut: tuple[int, ...]) -> None:
    """Rows are placed by `tile_offsets` as a packer does; then each worker reads straight ahead, multiplies, and gets W x."""
    plan = planned(5, target, ffn_size=ffn)
    tape = lay_tapes(plan)
    index = next(i for i, s in enumerate(plan.stages) if s.name == "down")
    stage = plan.stages[index]
    g, spec = stage.geometry, stage.linear
    assert g is not None and spec is not None and (g.warps_columns, g.fragments, g.parts, g.short_warps) == cut
    own = [g.fragments - (warp >= g.warps_columns - g.short_warps) for warp in range(g.warps_columns)]
    first = np.cumsum([0, *own])  # fragment of each warp
    rng = np.random.default_rng(0)
    w = np.zeros((stage.tiles * g.tile_rows, g.columns))
    w[: spec.rows, : spec.columns] = rng.integers(-9, 10, (spec.rows, spec.columns))
    x = rng.integers(-9, 10, g.columns).astype(float)

    arena = np.full(tape.nbytes // 2, np.nan)  # of values of two bytes
    starts = tile_offsets(plan, tape, index) // 2
    values = g.fragment_bytes // 2
    first_of_part = np.cumsum([0, *g.part_sizes()])
    for tile in range(stage.tiles):
        for warp in range(g.warps_columns):
            for f in range(own[warp]):
                part = int(np.searchsorted(first_of_part, f, side="right")) - 1
                column = (first[warp] + f) * g.fragment_columns
                before = sum(min(of, first_of_part[part + 1]) - first_of_part[part] for of in own[:warp])
                at = starts[tile, part] + (before + f - first_of_part[part]) * values
                fragment = w[tile * g.tile_rows : (tile + 1) * g.tile_rows, column : column + g.fragment_columns]
                assert np.isnan(arena[at : at + values]).all()
                arena[at : at + values] = fragment.reshape(-1)

    y = np.zeros(len(w))
    for worker in range(plan.target.workers):
        chunk = int(tape.first_chunk(index)[worker])
        for group in range(0, stage.count[worker], g.warps_rows):
            tiles = min(g.warps_rows, stage.count[worker] - group)
            for part, size in enumerate(g.part_sizes()):
                at = int(tape.offset[chunk, worker]) * tape.unit // 2
                read = arena[at : at + int(tape.size[chunk, worker]) // 2]
                fragments = read.reshape(tiles, -1, g.tile_rows, g.fragment_columns)
                for warp in range(g.warps_columns):
                    begin = int(first_of_part[part])
                    n = min(size, own[warp] - begin)
                    mine, fragments = fragments[:, :n], fragments[:, n:]
                    column = (first[warp] + begin) * g.fragment_columns
                    part_of_x = x[column : column + n * g.fragment_columns].reshape(n, g.fragment_columns)
                    row = (stage.first[worker] + group) * g.tile_rows
                    y[row : row + tiles * g.tile_rows] += np.einsum("tfrc,fc->tr", mine, part_of_x).reshape(-1)
                assert fragments.size == 0
                chunk += 1
    assert np.array_equal(y, w @ x)
