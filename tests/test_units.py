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
extern "C" __global__ void list_units(const u32* positions, u32 count, uint2* runs, uint4* list) {
  const u32 shared = shared_address(memory), lane = threadIdx.x;
  const Params p = {};
  const Block<Model> block{p, shared, 0, lane, Watch{p, 0}};
  if (lane == 0) store_shared(shared + Layout<Model>::kPass, count);
  if (lane < count) store_shared(shared + Layout<Model>::kColumn + lane * 32 + 4, positions[lane]);
  __syncwarp();
  const Units<Model> units(block);
  runs[blockIdx.x] = uint2{units.next, units.behind};
  for (u32 number = units.next; number < units.behind; number++) {
    const auto unit = units[number];
    if (lane == 0) list[number] = uint4{unit.column | unit.newest() << 8 | unit.head << 16, unit.position, unit.first, unit.end};
  }
}
"""


class Unit(NamedTuple):
    """As in the kernel."""

    column: int
    newest: int
    head: int
    position: int
    first: int
    end: int


class Lister:
    """A plan's units of any pass."""

    def __init__(self, columns: int) -> None:
        config = model(max_positions=POSITIONS)
        self.plan: Plan = make_plan(config, build_graph(config), get("sm_90"), workers=WORKERS, columns=columns)
        text = generate(self.plan).text
        kernel = compile_source(text[: text.index('extern "C"')] + KERNEL, self.plan.target)
        self.context = Context(Device(self.plan.target, 0, 64))
        self.function = self.context.function(self.context.load(kernel.cubin), "list_units")
        self.most = most_units(self.plan)
        self.positions = self.context.allocate(4 * columns, "positions")
        self.runs = self.context.allocate(8 * WORKERS, "runs")
        self.list = self.context.allocate(16 * self.most, "list")

    def __call__(self, positions: Sequence[int]) -> list[Unit]:
        """The units of a pass with columns at these positions, by number."""
        values = np.array(positions, np.uint32)
        self.context.copy_async(self.positions, values.ctypes.data, values.nbytes)
        pointers = [ctypes.c_uint64(p) for p in (self.positions, self.runs, self.list)]
        arguments = (pointers[0], ctypes.c_uint32(len(values)), *pointers[1:])
        self.context.launch(self.function, WORKERS, 32, arguments, self.plan.target.shared_bytes)
        self.context.wait()
        begins, ends = self.context.download(self.runs, np.empty((WORKERS, 2), np.uint32), "runs").T.tolist()
        total = ends[-1]
        assert [0, *ends[:-1]] == begins and np.ptp(np.subtract(ends, begins)) <= 1  # equal runs of all of them
        assert total <= self.most  # there is room for so many results
        rows = self.context.download(self.list, np.empty((total, 4), np.uint32), "list").tolist()
        return [Unit(who & 255, who >> 8 & 1, who >> 16, *at) for who, *at in rows]


@pytest.fixture(scope="module", params=[2, 16])
def units(request: pytest.FixtureRequest) -> Iterator[Lister]:
    """The units of a kernel of so many columns."""
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
                assert unit[:5] == (column, unit.end == blocks, head, position, end)
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


@pytest.mark.parametrize("columns", [2, 4, 8, 16])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_all_blocks_are_at_work_in_a_full_pass(name: str, columns: int) -> None:
    """Where all columns see as much, the units of a pass are hardly fewer than a multiple of the blocks."""
    config = shape(name)
    plan = make_plan(config, build_graph(config), get("sm_90"), max_context=4096, workers=132, columns=columns)
    units = columns * plan.kv.virtual_heads * piece_step(plan)
    assert units >= EVEN * 132 * -(-units // 132)
    assert most_pieces(plan) % piece_step(plan) == 0
