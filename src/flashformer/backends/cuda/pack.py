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
from ...formats import PLAIN, Format, encode
from ...geometry import round_up
from ...plan import Plan, Stage
from ...quant.forms import Form
from ...tape import Tape, all_offsets, block_rows
from .. import Progress
from .codegen import LAYOUTS, Vectors, code_layout
from .driver import Context
from .random_weights import RandomWeights, drawn_bytes, replacement

SLOTS = 16
READING = 12  # of the slots, at most, are being filled; the others travel
READERS = 8  # threads at most: more do not read faster than the bus carries
SLOT_BYTES = (1 << 20, 8 << 20)  # least and most; between them, all slots together are as large as the largest matrix
THREADS = 256
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # SourceType in tools.cuh
SCALE_TYPES = {**TYPES, "exponent": 3, "e4m3": 4}  # ScaleType in code_tools.cuh
KINDS = {("int", 4): 0, ("int", 8): 1, ("fp8", 8): 2, ("table", 4): 3}  # CodeKind in code_tools.cuh


class Weights(Protocol):
    """What is packed: a checkpoint. The matrices of `RandomWeights` are drawn on the device. Several threads call it at a time."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `Checkpoint.read`."""
        ...

    def form(self, name: str, rows: slice | None = None) -> Form | None:
        """See `Checkpoint.form`."""
        ...


def _integers(*names: str, kind: Any = ctypes.c_uint32) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Placement(ctypes.Structure):
    """Where a matrix goes on the tapes: `Placement` in tools.cuh."""

    _fields_ = [
        *_integers("tape", "tile_offset", kind=ctypes.c_uint64),
        *_integers("first_row", "rows", "columns", "row_base", "row_group", "row_stride", "column_group", "column_stride"),
        ("half", ctypes.c_int32),
        *_integers("warps_columns", "fragments", "parts", "short_warps"),
    ]


class PackJob(ctypes.Structure):
    """The argument of the kernel that packs 16-bit values: `PackJob` in tools.cuh."""

    _fields_ = [*_integers("source", "strange", kind=ctypes.c_uint64), ("place", Placement), *_integers("type", "half_type")]


class CodeJob(ctypes.Structure):
    """The argument of the kernels that pack codes and scales: `CodeJob` in code_tools.cuh."""

    _fields_ = [
        *_integers("codes", "scales", "scale_offset", kind=ctypes.c_uint64),
        ("place", Placement),
        *_integers("layout", "group", "groups", "scale_values", "scale_bytes"),
    ]


class ExpandJob(ctypes.Structure):
    """The argument of the kernel that makes 16-bit values of codes: `ExpandJob` in code_tools.cuh."""

    _fields_ = [
        *_integers("codes", "scales", "divisors", "to", "values", kind=ctypes.c_uint64),
        *_integers("columns", "kind", "scale_type", "half_type", "group", "groups", "scale_values", "minimum"),
        ("table", ctypes.c_float * 16),
    ]


@dataclass(frozen=True)
class Matrix:
    """A matrix of the checkpoint and where it goes: onto the tapes (`place`), into the embedding table, or (tied) both."""

    name: str
    rows: int
    columns: int
    strange: int  # address of the word that says whether it has values that are not finite
    place: Placement | None
    scale_offset: int  # address
    divisor_shift: int  # bytes from the scales of a tile in its last chunk to the divisors
    format: Format
    embedding: int | None  # address of the table

    @property
    def groups(self) -> int:
        """Groups of a row of codes."""
        return self.format.groups(self.columns)

    def divisors(self, rows: int) -> int:
        """Where in a slot the divisors of so many rows of codes begin, in bytes."""
        return round_up(rows * self.columns, 16)

    def scales(self, rows: int) -> int:
        """Where in a slot the scales of so many rows of codes begin, in bytes."""
        return self.divisors(rows) + rows * self.format.divisor_bytes

    def slot_rows(self, nbytes: int, value_bytes: int) -> int:
        """How many rows a slot of so many bytes holds: a multiple of 8."""
        beside = self.groups * self.format.group_bytes + self.format.divisor_bytes
        row = self.columns + beside if self.format != PLAIN else self.columns * value_bytes
        return (nbytes - 16) // row // 8 * 8


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


@dataclass(frozen=True)
class Read:
    """What was read into a slot: bytes, their type (0 of codes), and whether codes stand for finite values."""

    nbytes: int
    type: int
    finite: bool = True


_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64


class Packer:
    """Packs one model's weights through slots that it owns."""

    def __init__(self, context: Context, tools: Any, plan: Plan, weights: Weights, progress: Progress) -> None:
        self.context, self.plan, self.weights, self.progress = context, plan, weights, progress
        self.tools = tools
        self.functions: dict[str, Any] = {}
        self.half_type = int(plan.config.dtype == "float16")
        shapes = [shape for shape in plan.weights.values() if len(shape) == 2]
        fair = max(rows * columns for rows, columns in shapes) * 2 // SLOTS
        widest = max(columns for _, columns in shapes) * 4 * 8 + 16  # 8 rows of float32, or of codes with large scales
        self.slot_bytes = round_up(max(min(max(fair, SLOT_BYTES[0]), SLOT_BYTES[1]), widest), 4096)

    def run(self, tape: Tape, arena: int, embedding: int) -> list[str]:
        """Fill the arena of all tapes and the embedding table; returns the names of weights with values that are not finite.

        Raises CheckpointError for a type that cannot be packed, and whatever reading the weights raises.
        """
        context = self.context
        offsets = all_offsets(self.plan, tape)
        offset_table = context.upload(np.concatenate(offsets).astype(np.uint64), "tile offsets")
        begins = np.cumsum([0, *(len(part) for part in offsets)])
        starts = [offset_table + 8 * int(at) for at in begins]
        flags = context.allocate(4 * (len(self.plan.weights) + 1), "flags", fill=0)
        slots = context.allocate(SLOTS * self.slot_bytes, "staging")
        matrices = self._matrices(arena, list(zip(starts[::2], starts[1::2], strict=False)), flags, embedding)
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

    def _matrices(self, arena: int, offsets: Sequence[tuple[int, int]], flags: int, embedding: int) -> list[Matrix]:
        """All matrices in the order in which the kernel reads them; `offsets`: addresses of each linear stage's tile and scale offsets."""
        found: list[Matrix] = []
        linear = [stage for stage in self.plan.stages if stage.geometry]
        for stage, (tile_offset, scale_offset) in zip(linear, offsets, strict=True):
            base, g, spec = 0, stage.geometry, stage.linear
            assert g is not None and spec is not None
            for number, block in enumerate(spec.blocks):
                place = Placement(
                    tape=arena, tile_offset=tile_offset, columns=spec.columns_used,
                    row_base=base, row_group=block.group, row_stride=block.stride,
                    column_group=spec.column_group, column_stride=spec.column_stride,
                    half=number if spec.interleave else -1,
                    warps_columns=g.warps_columns, fragments=g.fragments, parts=g.parts, short_warps=g.short_warps,
                )  # fmt: skip
                table = embedding if block.weight == self.plan.embedding else None
                strange = flags + 4 * len(found)
                shift = g.scale_bytes(g.parts - 1) - g.tile_rows * g.format.divisor_bytes
                found.append(Matrix(block.weight, block.rows, spec.columns_used, strange, place, scale_offset, shift, g.format, table))
                base += block.padded
        if all(m.embedding is None for m in found):
            strange = flags + 4 * len(found)
            config = self.plan.config
            found.append(Matrix(self.plan.embedding, config.vocab_size, config.hidden_size, strange, None, 0, 0, PLAIN, embedding))
        return found

    def _pieces(self, matrices: Sequence[Matrix]) -> Iterator[Piece]:
        """Every matrix cut so that each piece fits into a slot; all but its last have a multiple of 8 rows."""
        for m in matrices:
            value_bytes = 2
            if m.format == PLAIN and not isinstance(self.weights, RandomWeights):
                probe = self.weights.read(m.name, slice(0, 1))
                if probe.dtype.name not in TYPES:
                    raise CheckpointError(f"{m.name} has values of type {probe.dtype}; {', '.join(TYPES)} are supported")
                value_bytes = probe.itemsize
            step = m.slot_rows(self.slot_bytes, value_bytes)
            for first in range(0, m.rows, step):
                yield Piece(m, first, min(step, m.rows - first))

    def _send(self, matrices: Sequence[Matrix], device: int) -> Generator[Piece, None, None]:
        """Read all pieces and send them to the slots at `device`, each as soon as it and all before it are read."""
        context = self.context
        address, memory = context.allocate_pinned(SLOTS * self.slot_bytes, "staging")
        # The pieces take turns on two streams, so that one is packed while the next is copied.
        streams = (context.stream, context.new_stream())
        reading: deque[tuple[int, Piece, Future[Read]]] = deque()
        travelling: deque[Any] = deque()  # an event for each piece, in order

        def read(piece: Piece, at: int) -> Read:
            m, rows = piece.matrix, slice(piece.first, piece.first + piece.rows)
            if m.format == PLAIN:
                part = np.ascontiguousarray(self.weights.read(m.name, rows))
                memory[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)
                return Read(part.nbytes, TYPES[part.dtype.name])
            form = self.weights.form(m.name, rows)
            assert form is not None
            encoded = encode(form, m.format, m.name)
            scales = np.ascontiguousarray(encoded.scales).reshape(-1).view(np.uint8)
            memory[at : at + piece.values] = encoded.codes.reshape(-1)
            if encoded.divisors is not None:
                memory[at + m.divisors(piece.rows) : at + m.scales(piece.rows)] = encoded.divisors.view(np.uint8)
            nbytes = m.scales(piece.rows) + scales.nbytes
            memory[at + nbytes - scales.nbytes : at + nbytes] = scales
            return Read(nbytes, 0, encoded.finite)

        def send() -> Piece:
            number, piece, future = reading.popleft()
            at, stream, done = number % SLOTS * self.slot_bytes, streams[number % 2], future.result()
            context.copy_async(device + at, address + at, done.nbytes, stream)
            if not done.finite:
                context.driver.cuMemsetD32Async(piece.matrix.strange, 1, 1, stream)
            self._place(piece, device + at, done.type, stream)
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
        weights, stream = self.weights, self.context.stream
        assert isinstance(weights, RandomWeights)
        for piece in self._pieces(matrices):
            m, first = piece.matrix, piece.first * piece.matrix.columns
            if m.format == PLAIN:
                seed, scale = weights.stream(m.name)
                pairs = -(-piece.values // 2)
                values = (_u64(device), _u64(pairs), _u64(first // 2), _u32(seed), ctypes.c_float(float(scale)))
                self._run("flashformer_random", pairs, *values)
            else:
                code_seed, scale_seed, base, divisor = weights.code_stream(m.name)
                code_kind, scale_kind = _u32(KINDS[m.format.kind, m.format.bits]), _u32(SCALE_TYPES[m.format.scale])
                codes = (_u64(device), _u64(piece.values), _u64(first), _u32(code_seed), code_kind, *map(_u32, replacement(m.format)))
                self._run("flashformer_random_codes", piece.values, *codes)
                at, count = device + m.scales(piece.rows), piece.rows * m.groups
                stream_of_scales = (_u64(at), _u64(count), _u64(piece.first * m.groups), _u32(scale_seed), scale_kind)
                bounds = (ctypes.c_float(float(base)), *map(_u32, drawn_bytes(m.format, base)))
                self._run("flashformer_random_scales", count, *stream_of_scales, *bounds)
                if m.format.divisor_bytes:
                    bits = int(divisor.view(np.uint32))
                    self.context.driver.cuMemsetD32Async(device + m.divisors(piece.rows), bits, piece.rows, stream)
            self._place(piece, device, TYPES["bfloat16"], stream)
            yield piece

    def _place(self, piece: Piece, source: int, kind: int, stream: Any) -> None:
        """Values or codes that are on the device to where the kernel reads them."""
        m = piece.matrix
        if m.place is not None:
            m.place.first_row, m.place.rows = piece.first, piece.rows
            lanes = -(-piece.rows // 8) * (m.place.warps_columns * m.place.fragments - m.place.short_warps) * 32
            if m.format == PLAIN:
                self._run("flashformer_pack", lanes, PackJob(source, m.strange, m.place, kind, self.half_type), stream=stream)
            else:
                f, layout = m.format, LAYOUTS[code_layout(m.format)]
                sizes = (f.group, m.groups, f.scale_values, f.group_bytes // f.scale_values)
                job = CodeJob(source, source + m.scales(piece.rows), m.scale_offset, m.place, layout, *sizes)
                self._run("flashformer_pack_codes", lanes * f.bits // 4, job, stream=stream)
                self._run("flashformer_pack_scales", piece.rows * m.groups * f.scale_values, job, stream=stream)
                if f.divisor_bytes:  # go where a row's only scale would be, but behind the others
                    place = Placement.from_buffer_copy(m.place)
                    place.tape += m.divisor_shift
                    job = CodeJob(source, source + m.divisors(piece.rows), m.scale_offset, place, layout, 0, 1, 1, f.divisor_bytes)
                    self._run("flashformer_pack_scales", piece.rows, job, stream=stream)
        if m.embedding is not None:
            to = m.embedding + piece.first * m.columns * 2
            if m.format == PLAIN:
                arguments = (_u64(source), _u64(to), _u64(piece.values), _u32(kind), _u32(self.half_type), _u64(m.strange))
                self._run("flashformer_convert", -(-piece.values // 2), *arguments, stream=stream)
            else:
                f = m.format
                expand = ExpandJob(
                    source, source + m.scales(piece.rows), source + m.divisors(piece.rows), to, piece.values,
                    m.columns, KINDS[f.kind, f.bits], SCALE_TYPES[f.scale], self.half_type,
                    f.group, m.groups, f.scale_values, int(f.offset == "minimum"), tuple(f.table) or (0.0,) * 16,
                )  # fmt: skip
                self._run("flashformer_expand", piece.values, expand, stream=stream)

    def _run(self, name: str, count: int, *arguments: Any, stream: Any = None) -> None:
        """Launch one of the tools with a thread for each of `count` things."""
        if name not in self.functions:
            self.functions[name] = self.context.function(self.tools, name)
        self.context.launch(self.functions[name], -(-count // THREADS), THREADS, arguments, stream=stream or self.context.stream)


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


def pack_words(stages: Sequence[Stage], plan: Plan, shift: int) -> np.ndarray:
    """Tile ranges of every block, uint32 [words, workers]: first << shift | count. The order is `Block::tiles` (roles.cuh)."""

    def word(stage: Stage) -> np.ndarray:
        return np.array(stage.first, np.uint32) << shift | np.array(stage.count, np.uint32)

    by_layer = {(s.layer, s.name): s for s in stages}
    combine = next(s for s in stages if s.kind == "combine")
    words = [word(stages[0]), word(combine)]
    for layer in range(plan.config.num_layers):
        words += [word(by_layer[layer, "qkv"]), word(by_layer[layer, "gate_up"])]
    words.append(word(by_layer[-1, "head"]))
    return np.stack(words)
