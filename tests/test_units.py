"""How several columns' parts of the KV cache are shared by the blocks (units.cuh): the kernel's own code, on the emulated GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulated_gpu import Context, Device, compile_source
from flashformer.backends.cuda.codegen import EVEN, PIECE_BLOCKS, generate, most_pieces, most_units, piece_step
from flashformer.models import build_graph
from flashformer.plan import BLOCK_POSITIONS, Plan, make_plan
from flashformer.shapes import SHAPES, shape
from flashformer.targets import get
from test_validate import model

POSITIONS = 1 << 20
WORKERS = 7
# In the place of the model's kernel: a warp of each block writes down its units of a pass.
KERNEL = """
extern "C" __global__ void list_units(const u32* positions, const u32* firsts, u32 count, uint2* runs, uint4* list, u32* neighbours) {
  const u32 shared = shared_address(memory), lane = threadIdx.x;
  const Params p = {};
  const Block<Model> block{p, shared, 0, lane, Watch{p, 0}};
  if (lane == 0) store_shared(shared + Layout<Model>::kPass, count);
  if (lane < count) {
    store_shared(shared + Layout<Model>::kColumn + lane * 32 + 4, positions[lane]);
    store_shared(shared + Layout<Model>::kColumn + lane * 32 + 16, firsts[lane]);
  }
  __syncwarp();
  Units<Model>::lay(block);
  const Units<Model> units(block);
  runs[blockIdx.x] = uint2{units.next, units.behind};
  if (lane < count) neighbours[lane] = units.neighbour;
  for (u32 number = units.next; number < units.behind; number++) {
    const auto unit = units[number];
    const u32 who = unit.column | unit.newest() << 8 | unit.members << 12 | unit.head << 16;
    if (lane == 0) list[number] = uint4{who, unit.position, unit.first, unit.end};
  }
}
"""


class Unit(NamedTuple):
    """As in the kernel."""

    column: int
    members: int
    newest: int
    head: int
    position: int
    first: int
    end: int


class Lister:
    """A plan's units of any pass."""

    def __init__(self, columns: int, **changes: int) -> None:
        config = model(max_positions=POSITIONS, **changes)
        self.plan: Plan = make_plan(config, build_graph(config), get("sm_90"), workers=WORKERS, columns=columns)
        text = generate(self.plan).text
        kernel = compile_source(text[: text.index('extern "C"')] + KERNEL, self.plan.target)
        self.context = Context(Device(self.plan.target, 0, 64))
        self.function = self.context.function(self.context.load(kernel.cubin), "list_units")
        self.most = most_units(self.plan)
        self.positions = self.context.allocate(4 * columns, "positions")
        self.firsts = self.context.allocate(4 * columns, "first columns")
        self.neighbours = self.context.allocate(4 * columns, "neighbours")
        self.runs = self.context.allocate(8 * WORKERS, "runs")
        self.list = self.context.allocate(16 * self.most, "list")

    def __call__(self, positions: Sequence[int], firsts: Sequence[int] | None = None) -> list[Unit]:
        """The units of a pass with columns at these positions, by number; `firsts`: the first column of each's sequence, if not it."""
        for address, column_values in ((self.positions, positions), (self.firsts, firsts or range(len(positions)))):
            values = np.array(column_values, np.uint32)
            self.context.copy_async(address, values.ctypes.data, values.nbytes)
            self.context.wait()
        pointers = [ctypes.c_uint64(p) for p in (self.positions, self.firsts, self.runs, self.list, self.neighbours)]
        arguments = (*pointers[:2], ctypes.c_uint32(len(positions)), *pointers[2:])
        self.context.launch(self.function, WORKERS, 32, arguments, self.plan.target.shared_bytes)
        self.context.wait()
        begins, ends = self.context.download(self.runs, np.empty((WORKERS, 2), np.uint32), "runs").T.tolist()
        total = ends[-1]
        assert [0, *ends[:-1]] == begins and np.ptp(np.subtract(ends, begins)) <= 1  # equal runs of all of them
        assert total <= self.most  # there is room for so many results
        rows = self.context.download(self.list, np.empty((total, 4), np.uint32), "list").tolist()
        units = [Unit(who & 255, who >> 12 & 15, who >> 8 & 1, who >> 16, *at) for who, *at in rows]
        numbers = self.context.download(self.neighbours, np.empty(len(positions), np.uint32), "neighbours").tolist()
        members = {unit.column: unit.members for unit in units}
        assert numbers == [i for _, count in sorted(members.items()) for i in range(count)]  # everybody is in one group of them
        return units


@pytest.fixture(scope="module", params=[2, 16])
def units(request: pytest.FixtureRequest) -> Iterator[Lister]:
    """The units of a kernel of so many columns, for a model that fills the matrix instructions with one of them."""
    lister = Lister(request.param)
    yield lister
    lister.context.close()


EDGES = [0, 15, 16, 127, 128, 1023, 1024, 4095, 4096, POSITIONS - 1]
PLACES = st.one_of(st.integers(0, 5000), st.integers(0, POSITIONS - 1), st.sampled_from(EDGES))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_block_of_every_head_is_in_one_unit(units: Lister, data: st.DataObject) -> None:
    plan = units.plan
    positions = data.draw(st.lists(PLACES, min_size=1, max_size=plan.columns))
    found = iter(units(positions))
    for column, position in enumerate(positions):
        blocks = position // BLOCK_POSITIONS + 1
        for head in range(plan.kv.virtual_heads):
            sizes, end = [], 0
            while end < blocks:
                unit = next(found)
                assert unit[:6] == (column, 1, unit.end == blocks, head, position, end)
                sizes.append(unit.end - end)
                end = unit.end
            assert end == blocks and 0 < max(sizes) <= min(sizes) + 1
            most = most_pieces(plan)
            assert max(sizes) <= max(PIECE_BLOCKS, -(-blocks // most)) and len(sizes) <= most
            assert len(sizes) % piece_step(plan) == 0 or len(sizes) == blocks
    assert next(found, None) is None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_other_columns_do_not_change_how_one_is_cut(units: Lister, data: st.DataObject) -> None:
    positions = data.draw(st.lists(PLACES, min_size=2, max_size=units.plan.columns))
    column = data.draw(st.integers(0, len(positions) - 1))
    among_others = [unit[1:] for unit in units(positions) if unit.column == column]
    assert among_others == [unit[1:] for unit in units([positions[column]])]


@pytest.fixture(scope="module", params=[1, 2, 3])
def sharing(request: pytest.FixtureRequest) -> Iterator[tuple[int, Lister]]:
    """How many neighbours there may be, and the units of a kernel of 16 columns, for so many queries a head."""
    lister = Lister(16, num_heads=2 * request.param, num_kv_heads=2)
    yield {1: 8, 2: 4, 3: 2}[request.param], lister
    lister.context.close()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_neighbours_have_units_together(sharing: tuple[int, Lister], data: st.DataObject) -> None:
    """Those of one sequence whose positions differ in their last bits only; each is cut as if it were alone. They are apart where that
    gives no thread block less to do."""
    most, lister = sharing
    positions: list[int] = []
    firsts: list[int] = []
    for place, length in data.draw(st.lists(st.tuples(PLACES, st.integers(1, 16)), min_size=1, max_size=4)):
        first, count = len(positions), min(length, 16 - len(positions))
        positions += [min(place, POSITIONS - 16) + i for i in range(count)]
        firsts += [first] * count
    found = lister(positions, firsts)
    groups = [(unit.column, unit.members) for unit in found if unit.head == 0 and unit.first == 0]
    expected: list[list[int]] = []
    for column, (position, first) in enumerate(zip(positions, firsts, strict=True)):
        if expected and first <= expected[-1][0] and positions[expected[-1][0]] // most == position // most:
            expected[-1].append(column)
        else:
            expected.append([column])
    alone = {column: [unit[2:] for unit in lister([position])] for column, position in enumerate(positions)}
    for column, _ in groups:
        assert [unit[2:] for unit in found if unit.column == column] == alone[column]
    together, apart = (sum(len(alone[column]) for column in some) for some in ([group[0] for group in expected], range(len(positions))))
    if -(-together // WORKERS) < -(-apart // WORKERS):
        assert groups == [(group[0], len(group)) for group in expected]
    else:
        assert groups == [(column, 1) for column in range(len(positions))]


@pytest.mark.parametrize("columns", [2, 4, 8, 16])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_all_blocks_are_at_work_in_a_full_pass(name: str, columns: int) -> None:
    """Where all columns see as much, the units of a pass are hardly fewer than a multiple of the blocks."""
    config = shape(name)
    plan = make_plan(config, build_graph(config), get("sm_90"), max_context=4096, workers=132, columns=columns)
    units = columns * plan.kv.virtual_heads * piece_step(plan)
    assert units >= EVEN * 132 * -(-units // 132)
    assert most_pieces(plan) % piece_step(plan) == 0
