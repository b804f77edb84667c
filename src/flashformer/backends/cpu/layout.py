"""Where everything lies: rows of weights on the tapes, norm weights and biases in the memory of vectors, tiles of the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...checkpoint import Checkpoint
from ...fuse import LinearSpec
from ...geometry import Geometry, round_up
from ...plan import Plan
from ...tape import block_rows, lay_tapes, tile_offsets
from .codegen import LAYER_RANGES, Source, linear_stages, table_geometry

PAGE_BYTES = 512  # the memory is a multiple of this, which is what a checksum takes at a time
SEGMENT = np.dtype([("offset", "u8"), ("first", "u4"), ("count", "u4")])  # `Segment` in worker.h


@dataclass(frozen=True)
class Placement:
    """A matrix on the tapes: where each of its rows begins, and how its columns are padded."""

    weight: str
    geometry: Geometry
    row_offset: np.ndarray  # uint64 [rows] bytes
    scale_offset: np.ndarray  # uint64 [rows] bytes
    divisor_offset: np.ndarray  # uint64 [rows] bytes
    columns: int
    column_group: int
    column_stride: int


@dataclass(frozen=True)
class Layout:
    """The memory of packed weights: the workers' tapes, then the embedding table if it is no head."""

    placements: tuple[Placement, ...]
    tape_start: np.ndarray  # uint64 [workers] bytes
    embedding: np.ndarray  # SEGMENT [n], ascending: where the rows of the embedding table lie
    nbytes: int


def lay_out(plan: Plan) -> Layout:
    """Place all weights. A tied embedding table is not stored twice: the head's tiles serve both."""
    tape = lay_tapes(plan)
    placements = []

    def place(weight: str, spec: LinearSpec, g: Geometry, rows: np.ndarray, tiles: np.ndarray) -> None:
        tile, row = tiles[rows // g.tile_rows], rows % g.tile_rows
        # Where the second row of a tile begins: after a line of the first, or after its values of a plane.
        step = {16: 64, 8: 4, 4: 16}[g.format.bits]
        scales = tile + g.fragments * g.fragment_bytes
        scale = scales + row * (g.format.group_bytes // g.format.scale_values)
        divisor = scales + g.scale_bytes(0) - (g.tile_rows - row) * g.format.divisor_bytes
        offsets = (tile + row * step).astype(np.uint64), scale.astype(np.uint64), divisor.astype(np.uint64)
        placements.append(Placement(weight, g, *offsets, spec.columns_used, spec.column_group, spec.column_stride))

    for index, stage in enumerate(plan.stages):
        if stage.linear is not None and stage.geometry is not None:
            tiles = tile_offsets(plan, tape, index)[:, 0]
            for number, block in enumerate(stage.linear.blocks):
                place(block.weight, stage.linear, stage.geometry, block_rows(stage, number), tiles)
    (head,) = linear_stages(plan, plan.config.num_layers)
    assert head.linear is not None
    nbytes = tape.nbytes
    if head.linear.blocks[0].weight == plan.embedding:
        where = [(int(tiles[first]) if count else 0, first, count) for first, count in zip(head.first, head.count, strict=True)]
    else:
        # The table has the head's shape, so it is laid like one.
        table = table_geometry(plan)
        place(plan.embedding, head.linear, table, block_rows(head, 0), nbytes + np.arange(head.tiles) * table.tile_bytes)
        where = [(nbytes, 0, head.tiles)]
        nbytes += head.tiles * table.tile_bytes
    starts = (tape.offset[0] * tape.unit).astype(np.uint64)
    return Layout(tuple(placements), starts, np.array(where, SEGMENT), round_up(nbytes, PAGE_BYTES))


def tile_ranges(plan: Plan, source: Source) -> np.ndarray:
    """First tile and number of tiles of every worker in every stage, uint32 [workers, source.ranges, 2]."""
    stages = [next(s for s in plan.stages if s.kind == kind) for kind in ("embed", "combine")]
    assert len(stages) == LAYER_RANGES
    for layer in range(plan.config.num_layers + 1):
        stages += linear_stages(plan, layer)
    assert len(stages) == source.ranges
    return np.array([[s.first, s.count] for s in stages], np.uint32).transpose(2, 0, 1).copy()


def gather_vectors(plan: Plan, source: Source, checkpoint: Checkpoint) -> tuple[np.ndarray, list[str]]:
    """Norm weights and biases, float32 [layers + 1, layer_size], and the names of those with values that are not finite."""
    vectors = source.vectors
    out = np.zeros((plan.config.num_layers + 1, vectors.layer_size), np.float32)
    strange = []

    def put(layer: int, place: np.ndarray, name: str) -> None:
        values = checkpoint.read(name).astype(np.float32)
        if not np.isfinite(values).all():
            strange.append(name)
        out[layer, place] = values

    published = {s.writes: s.publish_gamma for s in plan.stages if s.kind == "embed"}
    for stage in plan.stages:
        for place, name in zip((vectors.query_norm, vectors.key_norm), stage.head_norms, strict=False):
            put(stage.layer, place + np.arange(plan.kv.head_dim), name)
        if stage.linear is None:
            continue
        layer = stage.layer if stage.layer >= 0 else plan.config.num_layers
        if stage.linear.eps:
            put(layer, vectors.gamma[stage.name] + np.arange(plan.config.hidden_size), published[stage.reads[0]])
        published[stage.writes] = stage.publish_gamma
        for number, block in enumerate(stage.linear.blocks):
            if block.bias:
                put(layer, vectors.bias[stage.name] + block_rows(stage, number), block.bias)
    return out, strange
