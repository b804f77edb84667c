"""Weights -> tapes, on the GPU: matrices go up as they are and a kernel puts every value in its place.

A matrix goes in pieces of whole rows. Threads read pieces into pinned slots of host memory, while slots filled before are on
their way to the GPU or being packed there. The host needs these slots and nothing else, whatever the size of the model.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import CheckpointError
from ...plan import Plan, round_up
from ...tape import Tape, block_rows, tile_offsets
from .. import Progress
from .codegen import Vectors
from .driver import Context
from .random_weights import RandomWeights

SLOTS = 16
READING = 12  # of the slots, at most, are being filled; the others travel
READERS = 8  # threads at most: more do not read faster than the bus carries
SLOT_BYTES = (1 << 20, 8 << 20)  # least and most; between them, all slots together are as large as the largest matrix
THREADS = 256
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # SourceType in tools.cuh


class Weights(Protocol):
    """What is packed: a checkpoint. The matrices of `RandomWeights` are drawn on the device."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, as bfloat16, float16 or float32. Several threads call it at a time."""
        ...


class PackJob(ctypes.Structure):
    """The packing kernel's argument: `PackJob` in tools.cuh."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("source", "tape", "tile_offset", "strange")),
        *((name, ctypes.c_uint32) for name in ("type", "half_type", "first_row", "rows", "columns")),
        *((name, ctypes.c_uint32) for name in ("row_base", "row_group", "row_stride", "column_group", "column_stride")),
        ("half", ctypes.c_int32),
        *((name, ctypes.c_uint32) for name in ("warps_columns", "fragments", "parts")),
    ]


@dataclass(frozen=True)
class Matrix:
    """A matrix of the checkpoint and where it goes: onto the tapes (`job`), into the embedding table, or (tied) both."""

    name: str
    rows: int
    columns: int
    strange: int  # address of the word that says whether it has values that are not finite
    job: PackJob | None
    embedding: int | None  # address of the table


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix."""

    matrix: Matrix
    first: int
    rows: int

    @property
    def values(self) -> int:
        """How many values they hold."""
        return self.rows * self.matrix.columns


class Packer:
    """Packs one model's weights through slots that it owns."""

    def __init__(self, context: Context, tools: Any, plan: Plan, weights: Weights, progress: Progress) -> None:
        self.context, self.plan, self.weights, self.progress = context, plan, weights, progress
        self.pack = context.function(tools, "flashformer_pack")
        self.convert = context.function(tools, "flashformer_convert")
        self.random = context.function(tools, "flashformer_random")
        self.half_type = int(plan.config.dtype == "float16")
        shapes = [shape for shape in plan.weights.values() if len(shape) == 2]
        fair = max(rows * columns for rows, columns in shapes) * 2 // SLOTS
        widest = max(columns for _, columns in shapes) * 4 * 8  # 8 rows of float32
        self.slot_bytes = round_up(max(min(max(fair, SLOT_BYTES[0]), SLOT_BYTES[1]), widest), 4096)

    def run(self, tape: Tape, arena: int, embedding: int) -> list[str]:
        """Fill the arena of all tapes and the embedding table; returns the names of weights with values that are not finite.

        Raises CheckpointError for a type that cannot be packed, and whatever reading the weights raises.
        """
        context = self.context
        offsets = [tile_offsets(self.plan, tape, i).reshape(-1) for i, stage in enumerate(self.plan.stages) if stage.geometry]
        offset_table = context.upload(np.concatenate(offsets).astype(np.uint64), "tile offsets")
        begins = np.cumsum([0, *(len(part) for part in offsets)])
        flags = context.allocate(4 * (len(self.plan.weights) + 1), "flags", fill=0)
        slots = context.allocate(SLOTS * self.slot_bytes, "staging")
        matrices = self._matrices(arena, [offset_table + 8 * int(at) for at in begins], flags, embedding)
        total = sum(m.rows * m.columns for m in matrices)
        done = 0
        self.progress("packing weights", done, total)
        context.wait()  # memory is cleared on the first stream
        with closing(self._draw(matrices, slots) if isinstance(self.weights, RandomWeights) else self._send(matrices, slots)) as packed:
            for piece in packed:
                done += piece.values
                if done < total:
                    self.progress("packing weights", done, total)
        context.wait()
        found = context.download(flags, np.zeros(len(self.plan.weights) + 1, np.uint32), "flags")
        for pointer in (offset_table, flags, slots):
            context.free(pointer)
        self.progress("packing weights", total, total)
        return [m.name for m, strange in zip(matrices, found, strict=False) if strange]

    def _matrices(self, arena: int, offsets: Sequence[int], flags: int, embedding: int) -> list[Matrix]:
        """All matrices in the order in which the kernel reads them; `offsets`: addresses of each linear stage's tile offsets."""
        found: list[Matrix] = []
        linear = [stage for stage in self.plan.stages if stage.geometry]
        for stage, tile_offset in zip(linear, offsets, strict=False):
            base, g, spec = 0, stage.geometry, stage.linear
            assert g is not None and spec is not None
            for number, block in enumerate(spec.blocks):
                strange = flags + 4 * len(found)
                job = PackJob(
                    tape=arena, tile_offset=tile_offset, strange=strange, half_type=self.half_type, columns=spec.columns_used,
                    row_base=base, row_group=block.group, row_stride=block.stride,
                    column_group=spec.column_group, column_stride=spec.column_stride,
                    half=number if spec.interleave else -1, warps_columns=g.warps_columns, fragments=g.fragments, parts=g.parts,
                )  # fmt: skip
                table = embedding if block.weight == self.plan.embedding else None
                found.append(Matrix(block.weight, block.rows, spec.columns_used, strange, job, table))
                base += block.padded
        if all(m.embedding is None for m in found):
            strange = flags + 4 * len(found)
            config = self.plan.config
            found.append(Matrix(self.plan.embedding, config.vocab_size, config.hidden_size, strange, None, embedding))
        return found

    def _pieces(self, matrices: Sequence[Matrix]) -> Iterator[Piece]:
        """Every matrix cut so that each piece fits into a slot; all but its last have a multiple of 8 rows."""
        for m in matrices:
            if isinstance(self.weights, RandomWeights):
                value_bytes = 2
            else:
                probe = self.weights.read(m.name, slice(0, 1))
                if probe.dtype.name not in TYPES:
                    raise CheckpointError(f"{m.name} has values of type {probe.dtype}; {', '.join(TYPES)} are supported")
                value_bytes = probe.itemsize
            step = self.slot_bytes // (m.columns * value_bytes) // 8 * 8
            for first in range(0, m.rows, step):
                yield Piece(m, first, min(step, m.rows - first))

    def _send(self, matrices: Sequence[Matrix], device: int) -> Generator[Piece, None, None]:
        """Read all pieces and send them to the slots at `device`, each as soon as it and all before it are read."""
        context = self.context
        address, memory = context.allocate_pinned(SLOTS * self.slot_bytes, "staging")
        # The pieces take turns on two streams, so that one is packed while the next is copied.
        streams = (context.stream, context.new_stream())
        reading: deque[tuple[int, Piece, Future[np.dtype[Any]]]] = deque()
        travelling: deque[Any] = deque()  # an event for each piece, in order

        def read(piece: Piece, at: int) -> np.dtype[Any]:
            part = np.ascontiguousarray(self.weights.read(piece.matrix.name, slice(piece.first, piece.first + piece.rows)))
            memory[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)
            return part.dtype

        def send() -> Piece:
            number, piece, dtype = reading.popleft()
            at, stream, kind = number % SLOTS * self.slot_bytes, streams[number % 2], dtype.result()
            context.copy_async(device + at, address + at, piece.values * kind.itemsize, stream)
            self._place(piece, device + at, TYPES[kind.name], stream)
            travelling.append(context.event(stream))
            return piece

        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            for number, piece in enumerate(self._pieces(matrices)):
                if len(reading) == READING:
                    yield send()
                if number >= SLOTS:
                    context.finish(travelling.popleft())
                reading.append((number, piece, pool.submit(read, piece, number % SLOTS * self.slot_bytes)))
            while reading:
                yield send()
        for event in travelling:
            context.finish(event)
        context.free_pinned(address)

    def _draw(self, matrices: Sequence[Matrix], device: int) -> Generator[Piece, None, None]:
        """Draw all pieces in the slot at `device`, one after the other."""
        assert isinstance(self.weights, RandomWeights)
        for piece in self._pieces(matrices):
            seed, scale = self.weights.stream(piece.matrix.name)
            pairs = -(-piece.values // 2)
            arguments = (
                ctypes.c_uint64(device), ctypes.c_uint64(pairs), ctypes.c_uint64(piece.first * piece.matrix.columns // 2),
                ctypes.c_uint32(seed), ctypes.c_float(float(scale)),
            )  # fmt: skip
            self.context.launch(self.random, -(-pairs // THREADS), THREADS, arguments)
            self._place(piece, device, TYPES["bfloat16"], self.context.stream)
            yield piece

    def _place(self, piece: Piece, source: int, kind: int, stream: Any) -> None:
        """Values that are on the device to where the kernel reads them."""
        m = piece.matrix
        if m.job is not None:
            m.job.source, m.job.type, m.job.first_row, m.job.rows = source, kind, piece.first, piece.rows
            threads = -(-piece.rows // 8) * m.job.warps_columns * m.job.fragments * 32
            self.context.launch(self.pack, -(-threads // THREADS), THREADS, (m.job,), stream=stream)
        if m.embedding is not None:
            arguments = (
                ctypes.c_uint64(source), ctypes.c_uint64(m.embedding + piece.first * m.columns * 2), ctypes.c_uint64(piece.values),
                ctypes.c_uint32(kind), ctypes.c_uint32(self.half_type), ctypes.c_uint64(m.strange),
            )  # fmt: skip
            self.context.launch(self.convert, -(-piece.values // (2 * THREADS)), THREADS, arguments, stream=stream)


def gather_vectors(plan: Plan, vectors: Vectors, weights: Weights) -> tuple[np.ndarray, list[str]]:
    """Norm weights and biases as the kernel finds them, float32 [vectors.size], and the names of those that are not finite."""
    out = np.zeros(vectors.size, np.float32)
    strange = []

    def vector(name: str) -> np.ndarray:
        values = weights.read(name).astype(np.float32)
        if not np.isfinite(values).all():
            strange.append(name)
        return values

    for stage in plan.stages:
        if stage.kind == "embed":
            out[vectors.embed_gamma : vectors.embed_gamma + plan.config.hidden_size] = vector(stage.publish_gamma)
        base = stage.layer * vectors.layer_size
        for at, name in zip((vectors.query_norm, vectors.key_norm), stage.head_norms, strict=False):
            out[base + at : base + at + plan.kv.head_dim] = vector(name)
        if stage.linear is None or stage.layer < 0:
            continue
        if stage.publish_gamma:
            at = base + vectors.gamma[stage.name]
            out[at : at + plan.config.hidden_size] = vector(stage.publish_gamma)
        for number, block in enumerate(stage.linear.blocks):
            if block.bias:
                out[base + vectors.bias[stage.name] + block_rows(stage, number)] = vector(block.bias)
    return out, strange


def pack_words(stages: Sequence[Any], plan: Plan, shift: int) -> np.ndarray:
    """Tile ranges of every block, uint32 [words, workers]: first << shift | count. The order is `Block::tiles` (roles.cuh)."""

    def word(stage: Any) -> np.ndarray:
        return np.array(stage.first, np.uint32) << shift | np.array(stage.count, np.uint32)

    by_layer = {(s.layer, s.name): s for s in stages}
    combine = next(s for s in stages if s.kind == "combine")
    words = [word(stages[0]), word(combine)]
    for layer in range(plan.config.num_layers):
        words += [word(by_layer[layer, "qkv"]), word(by_layer[layer, "gate_up"])]
    words.append(word(by_layer[-1, "head"]))
    return np.stack(words)
