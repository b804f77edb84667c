"""The tapes of a plan: each worker's weights in exactly the order in which it reads them.

A tape is a list of chunks: one part of the columns of one group of tiles of one stage, or of a few groups. Group comes after group, or
batch after batch of groups: of these, each part of all. Inside a chunk the warps follow each other (warp = tile of the chunk *
warps_columns + column split), each with its fragments in order. An attention stage leaves a marker of zero bytes: there the worker reads
the KV cache, whose length only the device knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .geometry import Geometry, ceil_div
from .plan import Plan, Stage


@dataclass(frozen=True)
class Tape:
    """Chunks of all workers: row i of worker w is its i-th chunk; rows past `length[w]` are empty.

    offset int64 [chunks, workers] in units (so that 32 bits reach far) into one arena; size int32 [chunks, workers] in bytes; starts
    int32 [stages + 1, workers]: the chunk with which each stage of the plan begins (where it has none: would begin), and the end.
    """

    offset: np.ndarray
    size: np.ndarray
    starts: np.ndarray
    nbytes: int  # of the arena
    unit: int  # bytes

    @property
    def length(self) -> np.ndarray:
        """Chunks of each worker, int32 [workers]."""
        return self.starts[-1]

    @cached_property
    def stage(self) -> np.ndarray:
        """Index into `plan.stages` of every chunk, int32 [chunks, workers] (-1: none)."""
        stages = np.arange(len(self.starts) - 1, dtype=np.int32)
        out = np.full(self.size.shape, -1, np.int32)
        for w, chunks in enumerate(np.diff(self.starts, axis=0).T):
            out[: self.length[w], w] = np.repeat(stages, chunks)
        return out

    def first_chunk(self, stage: int) -> np.ndarray:
        """Index of each worker's first chunk of a stage, int32 [workers]."""
        return self.starts[stage]


def chunk_sizes(g: Geometry, tiles: int) -> np.ndarray:
    """Bytes of the chunks with which one worker reads `tiles` tiles of a linear stage, int32 [groups * parts]."""
    sizes = np.empty((ceil_div(tiles, g.chunk_tiles), g.parts), np.int32)
    sizes[:] = [g.chunk_bytes(g.chunk_tiles, part) for part in range(g.parts)]
    if tiles % g.chunk_tiles:
        sizes[-1] = [g.chunk_bytes(tiles % g.chunk_tiles, part) for part in range(g.parts)]
    return sizes.reshape(-1)[chunk_order(g, tiles)]


def chunk_order(g: Geometry, tiles: int) -> np.ndarray:
    """The chunks of a linear stage as one worker reads them, each as (number of its groups) * parts + part, int64 [groups * parts]."""
    numbers = np.arange(ceil_div(tiles, g.chunk_tiles) * g.parts).reshape(-1, g.parts)
    batches = (numbers[first : first + g.together].T.reshape(-1) for first in range(0, len(numbers), g.together))
    return np.concatenate([np.empty(0, np.int64), *batches])


def lay_tapes(plan: Plan) -> Tape:
    """Place every chunk: chunk i of all workers side by side, so that what is in flight at a time is one region of memory.

    CPU workers stream better from a region of their own, so there each tape is contiguous.
    """
    workers = plan.target.workers
    marker, none = np.zeros(1, np.int32), np.zeros(0, np.int32)
    runs: list[list[np.ndarray]] = []  # [stages][workers] sizes of the chunks
    known: dict[Geometry, dict[int, np.ndarray]] = {}
    for stage in plan.stages:
        if stage.geometry is None:
            runs.append([marker if stage.kind == "attention" else none] * workers)
            continue
        sizes = known.setdefault(stage.geometry, {})
        for tiles in set(stage.count) - sizes.keys():
            sizes[tiles] = chunk_sizes(stage.geometry, tiles)
        runs.append([sizes[tiles] for tiles in stage.count])
    starts = np.zeros((len(runs) + 1, workers), np.int32)
    np.cumsum([[len(run) for run in row] for row in runs], axis=0, out=starts[1:])
    size = np.zeros((workers, int(starts[-1].max())), np.int32)
    for w in range(workers):
        size[w, : starts[-1, w]] = np.concatenate([row[w] for row in runs])
    unit, cuda = plan.target.chunk_unit, plan.target.kind == "cuda"
    if cuda:
        size = np.ascontiguousarray(size.T)
    # In two steps, because a sum in 64 bits over all chunks of a large model would take longer than everything else here.
    units = size // unit
    ends: np.ndarray = np.cumsum(units, axis=1, dtype=np.int32 if cuda else np.int64)  # from the beginning of the row
    row_ends = np.cumsum(ends[:, -1], dtype=np.int64)
    offset = (row_ends - ends[:, -1])[:, None] + (ends - units)
    nbytes = int(row_ends[-1]) * unit
    return Tape(offset, size, starts, nbytes, unit) if cuda else Tape(offset.T, size.T, starts, nbytes, unit)


def reordered(tape: Tape, plan: Plan, other: Plan) -> Tape:
    """The tape of `plan` as a plan reads it that differs in the batches of its stages alone: the same memory in another order."""
    offset, size = tape.offset.copy(), tape.size.copy()
    for index, (stage, read) in enumerate(zip(plan.stages, other.stages, strict=True)):
        if stage.geometry is None or read.geometry is None or stage.geometry == read.geometry:
            continue
        count = np.array(stage.count)
        for tiles in set(stage.count):
            workers = np.flatnonzero(count == tiles)
            place = np.argsort(chunk_order(stage.geometry, tiles))  # of each chunk on the tape
            rows = place[chunk_order(read.geometry, tiles)][:, None]
            first = tape.first_chunk(index)[workers]
            to = first + np.arange(len(rows))[:, None]
            offset[to, workers] = tape.offset[first + rows, workers]
            size[to, workers] = tape.size[first + rows, workers]
    return replace(tape, offset=offset, size=size)


def block_rows(stage: Stage, number: int) -> np.ndarray:
    """The row of a linear stage at which each row of its block `number` lies, int64 [rows]."""
    assert stage.linear is not None and stage.geometry is not None
    block, half = stage.linear.blocks[number], stage.geometry.tile_rows // 2
    r = np.arange(block.rows)
    if stage.linear.interleave:
        return r // half * stage.geometry.tile_rows + number * half + r % half
    return sum(b.padded for b in stage.linear.blocks[:number]) + r // block.group * block.stride + r % block.group


def tile_offsets(plan: Plan, tape: Tape, index: int) -> np.ndarray:
    """Where each tile of linear stage `index` begins in each of its chunks, int64 [tiles, parts] in bytes.

    Within a chunk, tile r of the group starts after the r tiles before it, each of `part_bytes`. Scales are behind them.
    """
    return _offsets(plan, tape, index)[0]


def scale_offsets(plan: Plan, tape: Tape, index: int) -> np.ndarray:
    """Where the scales of each tile of linear stage `index` begin in each of its chunks, int64 [tiles, parts] in bytes."""
    return _offsets(plan, tape, index)[1]


def all_offsets(plan: Plan, tape: Tape) -> list[np.ndarray]:
    """Those of the tiles and those of the scales of each linear stage, in turn, each flat."""
    linear = [index for index, stage in enumerate(plan.stages) if stage.geometry]
    return [offsets.reshape(-1) for index in linear for offsets in _offsets(plan, tape, index)]


def _offsets(plan: Plan, tape: Tape, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the fragments and of the scales of each tile in each chunk."""
    stage = plan.stages[index]
    g = stage.geometry
    assert g is not None
    fragments = np.array([g.part_bytes(part) for part in range(g.parts)], np.int64)
    scales = np.array([g.scale_bytes(part) for part in range(g.parts)], np.int64)
    worker = np.repeat(np.arange(len(stage.count)), stage.count)
    local = np.arange(stage.tiles) - np.array(stage.first, np.int64)[worker]
    count = np.array(stage.count)[worker]
    chunk, number = local // g.chunk_tiles, local // g.chunk_tiles % g.together  # of those of its part, and in its batch
    batch = np.minimum(-(-count // g.chunk_tiles) - (chunk - number), g.together)  # chunks of each part in it
    rows = (tape.first_chunk(index)[worker] + (chunk - number) * g.parts + number)[:, None] + np.arange(g.parts)[None, :] * batch[:, None]
    start = tape.offset[rows, worker[:, None]] * tape.unit
    before = (local % g.chunk_tiles)[:, None]  # tiles in the same chunks
    in_chunk = np.minimum(count - (local - local % g.chunk_tiles), g.chunk_tiles)[:, None]
    return start + before * fragments, start + in_chunk * fragments + before * scales
