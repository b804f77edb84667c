"""The tapes of a plan: each worker's weights in exactly the order in which it reads them.

A tape is a list of chunks: one part of the columns of one group of tiles of one stage. Inside a chunk the warps follow each
other (warp = row of the group * warps_columns + column split), each with its fragments in order. An attention stage leaves a
marker of zero bytes: there the worker reads the KV cache, whose length only the device knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import Plan, Stage, ceil_div

UNIT = 512  # bytes: chunk offsets count these, so that 32 bits reach 2 TB


@dataclass(frozen=True)
class Tape:
    """Chunks of all workers: row i of worker w is its i-th chunk; rows past `length[w]` are empty.

    offset int64 [chunks, workers] in UNITs into one arena; size int32 [chunks, workers] in bytes; stage int32
    [chunks, workers] index into `plan.stages` (-1: none); length int32 [workers].
    """

    offset: np.ndarray
    size: np.ndarray
    stage: np.ndarray
    length: np.ndarray
    nbytes: int  # of the arena

    def first_chunk(self, stage: int) -> np.ndarray:
        """Index of each worker's first chunk of a stage, int64 [workers] (its length where it has none)."""
        hit = self.stage == stage
        return np.where(hit.any(axis=0), hit.argmax(axis=0), self.length)


def chunk_sizes(stage: Stage, tiles: int) -> np.ndarray:
    """Bytes of the chunks with which one worker reads `tiles` tiles of a linear stage, int64 [groups * parts]."""
    g = stage.geometry
    assert g is not None
    groups = ceil_div(tiles, g.warps_rows)
    in_group = np.minimum(tiles - np.arange(groups) * g.warps_rows, g.warps_rows)  # tiles of each group
    parts = np.array(g.part_sizes())
    return (in_group[:, None] * g.warps_columns * parts[None, :] * g.fragment_bytes).reshape(-1).astype(np.int64)


def lay_tapes(plan: Plan) -> Tape:
    """Place every chunk: chunk i of all workers side by side, so that what is in flight at a time is one region of memory.

    CPU workers stream better from a region of their own, so there each tape is contiguous.
    """
    workers = plan.target.workers
    sizes: list[list[np.ndarray]] = [[] for _ in range(workers)]
    stages: list[list[np.ndarray]] = [[] for _ in range(workers)]
    known: dict[tuple[object, ...], np.ndarray] = {}
    for index, stage in enumerate(plan.stages):
        if stage.kind == "attention":
            marker = np.zeros(1, np.int64)
            for w in range(workers):
                sizes[w].append(marker)
                stages[w].append(np.array([index]))
        elif stage.geometry is not None:
            for w in range(workers):
                key = (stage.geometry, stage.count[w])
                if key not in known:
                    known[key] = chunk_sizes(stage, stage.count[w])
                sizes[w].append(known[key])
                stages[w].append(np.full(len(known[key]), index))
    length = np.array([sum(map(len, s)) for s in sizes], np.int64)
    size = np.zeros((int(length.max()), workers), np.int64)
    stage_of = np.full(size.shape, -1, np.int32)
    for w in range(workers):
        size[: length[w], w] = np.concatenate(sizes[w])
        stage_of[: length[w], w] = np.concatenate(stages[w])
    order = size if plan.target.kind == "cuda" else size.T
    ends = np.cumsum(order.reshape(-1)).reshape(order.shape)
    offset = (ends - order) // UNIT
    if plan.target.kind != "cuda":
        offset = np.ascontiguousarray(offset.T)
    return Tape(offset, size.astype(np.int32), stage_of, length.astype(np.int32), int(size.sum()))


def tile_offsets(plan: Plan, tape: Tape, index: int) -> np.ndarray:
    """Where each tile of linear stage `index` begins in each of its chunks, int64 [tiles, parts] in bytes.

    Within a chunk, tile r of the group starts after the r tiles before it: r * warps_columns * part fragments.
    """
    stage = plan.stages[index]
    g = stage.geometry
    assert g is not None
    parts = np.array(g.part_sizes(), np.int64)
    first_chunk = tape.first_chunk(index)
    worker = np.repeat(np.arange(len(stage.count)), stage.count)
    local = np.arange(stage.tiles) - np.array(stage.first, np.int64)[worker]
    chunk = first_chunk[worker] + local // g.warps_rows * g.parts
    rows = chunk[:, None] + np.arange(g.parts)[None, :]
    start = tape.offset[rows, worker[:, None]] * UNIT
    inside = (local % g.warps_rows)[:, None] * (g.warps_columns * parts * g.fragment_bytes)[None, :]
    return start + inside
