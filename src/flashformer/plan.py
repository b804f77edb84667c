"""Graph + Target -> Plan: every decision about a kernel, as plain data.

A *stage* is what runs between two exchanges. A linear stage's rows are cut into *tiles*; every worker (an SM's thread block, a
CPU core) owns a run of them and reads their weights, stage after stage, as one long *tape* of chunks (see `tape.py`). A
*buffer* is a vector that all workers write and all read: an exchange. The plan needs no device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from .config import ModelConfig
from .errors import PlanError
from .formats import PLAIN, Format, join
from .fuse import LinearSpec, StageSpec, fuse
from .geometry import Geometry, ceil_div, choose_batch, choose_geometry, choose_share, round_up
from .graph import Graph
from .targets import Target

BLOCK_POSITIONS = 16  # positions in a block of the KV cache: the rows of one matrix instruction
HEAD_MULTIPLE = 16  # a head's values are padded to this: the columns of one matrix instruction
COLUMN_HEADS = 8  # query heads that one matrix instruction serves
KvType = Literal["native", "int8", "fp8"]
KV_TYPES: tuple[KvType, ...] = get_args(KvType)
LEAST_SCALE = 2.0**-60  # of a key or value in the cache: one of zeros has it, and its logarithm is finite
# Of its share, that a worker may have more of a stage to make good for what it has less of others: the first that leaves loads even enough.
# NOTE: not more than it takes. 8B in bf16 is even without; with 0.08 a token takes 1.2 % longer, Qwen2.5-1.5B (0.90 without) 1.2 % less.
UNEVEN = (0.0, 0.08, 0.15)
EVEN = 0.97  # the mean load by the largest
FEW_COLUMNS = 2  # of a pass, whose kernels leave registers for another warp
COPY_UNIT = 16  # bytes that a GPU copies into shared memory at once


@dataclass(frozen=True)
class Buffer:
    """A vector handed from all workers to all, and how it travels.

    `half` is 16-bit values, `float` 32-bit ones; `moment` says that each worker adds the sum of squares of its part.
    """

    name: str
    values: int
    kind: Literal["half", "float", "token"]
    moment: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage of a token. `first[w]` and `count[w]` are the tiles of worker w (empty: decided on the device, by length)."""

    name: str  # "embed", "qkv", "attention", "combine", "attention_output", "gate_up", "down", "head", "token"
    kind: Literal["embed", "linear", "attention", "combine", "token"]
    layer: int
    reads: tuple[str, ...]
    writes: str
    tiles: int = 0
    first: tuple[int, ...] = ()
    count: tuple[int, ...] = ()
    linear: LinearSpec | None = None
    geometry: Geometry | None = None
    publish_gamma: str = ""  # norm weight that the values are multiplied by when they are handed on
    head_norms: tuple[str, ...] = ()  # weights of the norms on each head of q and k, applied as attention reads them

    @property
    def weight_bytes(self) -> int:
        """Bytes that this stage reads from the tapes, padding included."""
        return sum(self.geometry.bytes_of(tiles) * workers for tiles, workers in Counter(self.count).items()) if self.geometry else 0


@dataclass(frozen=True)
class KvLayout:
    """The KV cache: per layer and kv head, blocks of 16 positions; first the keys of a block, then its values, then their scales.

    `native` keeps 16-bit values; `int8` and `fp8` keep codes of 8 bits (fp8: e4m3) and, for each position's key and for its value, a
    scale in bfloat16. Keys are mixed before: by a Hadamard transform, to even out their dimensions.
    """

    heads: int
    head_dim: int
    head_pad: int  # head_dim padded for the matrix instruction
    group: int  # query heads that share a kv head
    virtual_heads: int  # kv heads after groups larger than 8 are split (each split reads the cache again)
    virtual_group: int  # query heads of a virtual head
    max_context: int
    blocks: int  # per head
    type: KvType = "native"

    @property
    def mixed(self) -> int:
        """How many dimensions of a key are mixed with each other: both halves, and a power of two that divides them."""
        return self.head_dim & -self.head_dim

    @property
    def value_bytes(self) -> int:
        """Bytes of one value."""
        return 2 if self.type == "native" else 1

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale of one key or value."""
        return 0 if self.type == "native" else 2

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: keys and values of 16 positions of one head."""
        return 2 * BLOCK_POSITIONS * (self.head_pad * self.value_bytes + self.scale_bytes)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's cache."""
        return self.heads * self.blocks * self.block_bytes

    def bytes_read(self, context: int) -> int:
        """KV bytes that one layer reads for a token with `context` positions before it (whole blocks not counted)."""
        return 2 * self.heads * (self.head_dim * self.value_bytes + self.scale_bytes) * context


@dataclass(frozen=True)
class Plan:
    """All decisions for one model on one target with `target.workers` workers."""

    config: ModelConfig
    target: Target
    max_context: int
    buffers: tuple[Buffer, ...]
    stages: tuple[Stage, ...]
    kv: KvLayout
    embedding: str  # name of the embedding table
    embedding_format: Format  # in which its rows are looked up: the head's, where that is the same table
    weights: Mapping[str, tuple[int, ...]]  # every tensor that the model reads, with its shape
    columns: int = 1  # token positions that a pass carries, at most
    slots: int = 1  # sequences that have a KV cache, each of `max_context` positions
    prompt_columns: int = 0  # of a second kernel, which feeds prompts; 0: there is none

    def buffer(self, name: str) -> Buffer:
        """The buffer called `name`."""
        return next(b for b in self.buffers if b.name == name)

    def layer_stages(self, layer: int) -> tuple[Stage, ...]:
        """The stages of one decoder layer, in order (-1: those before and after the layers)."""
        return tuple(s for s in self.stages if s.layer == layer)

    def weight_bytes(self) -> int:
        """Weight bytes read per token from the model's point of view: scales but no padding, the embedding only if tied."""
        return sum(s.linear.rows_used * s.geometry.format.row_bytes(s.linear.columns_used) for s in self.stages if s.linear and s.geometry)

    def kv_bytes(self) -> int:
        """Bytes of the KV cache of all slots."""
        return self.slots * self.config.num_layers * self.kv.layer_bytes

    def tape_bytes(self) -> int:
        """Bytes of all tapes, padding included."""
        return sum(s.weight_bytes for s in self.stages)

    def embedding_bytes(self) -> int:
        """Bytes of the embedding table."""
        return self.config.vocab_size * self.embedding_format.row_bytes(self.config.hidden_size)

    def token_bytes(self, context: int) -> int:
        """Bytes that a token must read with `context` positions before it: weights and KV cache."""
        return self.weight_bytes() + self.config.num_layers * self.kv.bytes_read(context)

    def bytes_of(self, context: int, tokens: int) -> int:
        """Bytes that so many tokens read, one after the other, the first with `context` positions before it."""
        return (self.token_bytes(context) + self.token_bytes(context + tokens - 1)) * tokens // 2  # each reads as much more as the next


def spread(tiles: int, workers: int) -> list[int]:
    """`tiles` over `workers` as evenly as whole tiles allow, the same every time: fixed owners."""
    return [(w + 1) * tiles // workers - w * tiles // workers for w in range(workers)]


def balance(tiles: int, workers: Sequence[int], load: Sequence[int], nbytes: int, more: int = 0) -> list[int]:
    """`tiles` of so many bytes over some workers, so that these come out with bytes as even as can be.

    Each gets at most `more` tiles beyond an even share, and one at least where there are enough. load: bytes that a worker has so far.
    """
    most, least = ceil_div(tiles, len(workers)) + more, min(tiles // len(workers), 1)
    # What each has before its next tile, and the one after that ...: the lowest of all these take one.
    before = np.array([load[w] for w in workers])[:, None] + np.arange(least, most) * nbytes
    takers = np.argsort(before, axis=None, kind="stable")[: tiles - least * len(workers)] // max(most - least, 1)
    count = [0] * len(load)
    for w, taken in zip(workers, np.bincount(takers, minlength=len(workers)).tolist(), strict=True):
        count[w] = least + taken
    return count


def prefix(count: list[int]) -> tuple[int, ...]:
    """First tile of each worker."""
    total, first = 0, []
    for c in count:
        first.append(total)
        total += c
    return tuple(first)


def make_kv_layout(config: ModelConfig, max_context: int, type: KvType = "native") -> KvLayout:
    """The KV cache of a model for `max_context` positions."""
    group = config.num_heads // config.num_kv_heads
    splits = ceil_div(group, COLUMN_HEADS)
    return KvLayout(
        heads=config.num_kv_heads,
        head_dim=config.head_dim,
        head_pad=round_up(config.head_dim, HEAD_MULTIPLE),
        group=group,
        virtual_heads=config.num_kv_heads * splits,
        virtual_group=ceil_div(group, splits),
        max_context=max_context,
        blocks=ceil_div(max_context, BLOCK_POSITIONS),
        type=type,
    )


def choose_formats(specs: Sequence[StageSpec], target: Target, formats: Mapping[str, Format]) -> list[Format]:
    """The format of each stage: the cheapest that holds all of its matrices exactly, or 16-bit values where there is none.

    `formats` names one for each matrix that is not stored plainly.
    """

    def chosen(spec: StageSpec) -> Format:
        if spec.linear is None:
            return PLAIN
        found = join(formats.get(block.weight, PLAIN) for block in spec.linear.blocks)
        # Groups of columns follow each other without padding.
        fits = found is not None and (not found.group or spec.linear.column_group == spec.linear.column_stride)
        return (target.fit(found) if fits else None) or PLAIN

    each = [chosen(spec) for spec in specs]
    if target.mixed_layers:
        return each
    alike: dict[str, Format | None] = {}
    for spec, format in zip(specs, each, strict=True):
        alike[spec.name] = join((alike.get(spec.name, format), format))
    return [target.fit(alike[spec.name]) or PLAIN for spec in specs]


def make_plan(
    config: ModelConfig, graph: Graph, target: Target, max_context: int | None = None, workers: int | None = None,
    formats: Mapping[str, Format] | None = None, kv_type: KvType = "native", columns: int = 1, slots: int = 1, prompt_columns: int = 0,
) -> Plan:  # fmt: skip
    """Decide everything for `graph` on `target`.

    max_context: positions that the KV cache holds (default: all that the model was made for).
    workers: the device's real number of SMs or cores. formats: of the matrices that need not be expanded to 16-bit values (see
    `formats.choose`). kv_type: see `KvLayout`. columns: token positions that a pass carries at most. slots: sequences that have a KV
    cache at a time. prompt_columns: of a second kernel beside one of one column, which feeds prompts; 0: none. Raises PlanError for a model
    that the target cannot hold.
    """
    if columns not in target.columns:
        raise PlanError(f"columns is {columns}; {target.name} has kernels for {', '.join(map(str, target.columns))}")
    if prompt_columns and (columns > 1 or target.kind == "cpu"):
        whose = f"one of {columns} columns" if columns > 1 else "that of a CPU"
        raise PlanError(f"prompt_columns is {prompt_columns}; it is for a GPU's kernel of one column: {whose} feeds prompts itself")
    if prompt_columns and prompt_columns not in target.columns[1:]:
        raise PlanError(f"prompt_columns is {prompt_columns}; {target.name} has kernels for {', '.join(map(str, target.columns[1:]))}")
    if slots < 1:
        raise PlanError(f"a plan needs at least one slot, not {slots}")
    if workers is not None:
        if workers < 1:
            raise PlanError(f"a plan needs at least one worker, not {workers}")
        target = replace(target, workers=workers)
    context = config.max_positions if max_context is None else max_context
    if not 1 <= context <= config.max_positions:
        raise PlanError(f"max_context is {context}; this model supports 1 to {config.max_positions} positions")
    kv = make_kv_layout(config, context, kv_type)
    specs = fuse(graph, kv.head_pad)
    owners = [w for w, tiles in enumerate(spread(ceil_div(config.hidden_size, target.tile_rows), target.workers)) if tiles]
    formats = formats or {}
    chosen = choose_formats(specs, target, formats)
    share = choose_share(specs, target, chosen, columns)
    for uneven in UNEVEN if target.kind == "cuda" else UNEVEN[:1]:
        load = [0] * target.workers
        each = zip(specs, chosen, strict=True)
        stages = tuple(_assign(spec, format, target, share, columns, owners, load, uneven) for spec, format in each)
        if sum(load) >= EVEN * max(load) * len(load):
            break
    if columns <= FEW_COLUMNS and 0 < target.many_groups <= plain_groups(stages):
        target = replace(target, finisher_warps=target.finisher_warps + 1)
    if columns == 1 and sum(stage.weight_bytes for stage in stages if stage.layer == 0) <= target.short_layer_bytes:
        target = replace(target, first_look_cycles=target.short_first_look_cycles)
    buffers: dict[str, Buffer] = {}
    for spec in specs:
        if spec.writes and spec.writes not in buffers:
            values = {"partials": 0, "token": 1}.get(spec.writes, spec.values)
            kind: Literal["half", "float", "token"] = "half"
            if spec.writes in ("qkv", "partials"):
                kind = "float"
            elif spec.writes == "token":
                kind = "token"
            buffers[spec.writes] = Buffer(spec.writes, values, kind, moment=bool(spec.publish_gamma))
    embedding = next(op.weights[0].name for op in graph.operators if op.kind == "embed")
    weights = {name: weight.shape for name, weight in graph.weights().items()}
    tied = (s.geometry.format for s in stages if s.linear and s.geometry and s.linear.blocks[0].weight == embedding)
    table = PLAIN if target.plain_table else next(tied, target.fit(formats.get(embedding, PLAIN)) or PLAIN)
    return Plan(config, target, context, tuple(buffers.values()), stages, kv, embedding, table, weights, columns, slots, prompt_columns)


def in_batches(geometry: Geometry, target: Target, columns: int, count: Sequence[int]) -> Geometry:
    """How a stage of which workers have so many tiles is read by a kernel of so many columns."""
    return replace(geometry, together=choose_batch(target, geometry, columns, ceil_div(max(count), geometry.warps_rows)))


def plain_groups(stages: Sequence[Stage]) -> int:
    """Groups of tiles of 16-bit values that a worker has in a layer, at most: each is handed to a finisher."""
    plain = [(s.geometry, max(s.count)) for s in stages if s.layer == 0 and s.geometry and s.geometry.format == PLAIN]
    return sum(ceil_div(tiles, geometry.warps_rows) for geometry, tiles in plain)


def retarget(plan: Plan, **numbers: Any) -> Plan:
    """The same stages with other numbers of the target, as far as these leave the shape of what lies in memory."""
    return replace(plan, target=replace(plan.target, **numbers))


def _assign(
    spec: StageSpec, format: Format, target: Target, share: float, columns: int, owners: list[int], load: list[int], uneven: float
) -> Stage:  # fmt: skip
    """Give the tiles of one stage to the workers.

    `owners` are those of the residual, `load` collects each worker's bytes. uneven: see UNEVEN.
    """
    stage = Stage(
        spec.name, spec.kind, spec.layer, spec.reads, spec.writes,
        linear=spec.linear, publish_gamma=spec.publish_gamma, head_norms=spec.head_norms,
    )  # fmt: skip
    if spec.kind in ("attention", "token"):
        return stage
    tiles = ceil_div(spec.values, target.tile_rows)
    if spec.linear is None:
        count = spread(tiles, target.workers)
        return replace(stage, tiles=tiles, count=tuple(count), first=prefix(count))
    geometry = choose_geometry(target, spec.linear.columns, format, share)
    tiles = ceil_div(spec.linear.rows, target.tile_rows)
    if spec.linear.interleave:
        # A tile holds half its rows of gate, then the same rows of up.
        tiles = ceil_div(spec.linear.rows // 2, target.tile_rows // 2)
    # The residual of a row stays with its owner, so stages that add to it have fixed owners; the others even out the bytes.
    if spec.linear.epilogue == "residual":
        count = spread(tiles, target.workers)
    else:
        # NOTE: nobody waits for a tile of padding. A worker that had nothing else might read its input when that is overwritten already.
        among = owners if spec.linear.has_empty_tiles(target.tile_rows) else range(target.workers)
        # NOTE: the head has to make good for a layer alone: what comes out uneven in all of them is waited for in each.
        more = int(tiles / len(among) * uneven) if spec.layer >= 0 else 0
        count = balance(tiles, among, load, geometry.tile_bytes, more)
    geometry = in_batches(geometry, target, columns, count)
    nbytes = {c: geometry.bytes_of(c) for c in set(count)}
    for w, c in enumerate(count):
        load[w] += nbytes[c]
    return replace(stage, tiles=tiles, count=tuple(count), first=prefix(count), geometry=geometry)
