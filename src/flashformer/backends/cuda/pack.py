"""Weights -> tapes, on the GPU: matrices go up as they are and a kernel puts every value in its place.

The host needs two pinned staging buffers and nothing else, whatever the size of the model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from ...errors import CheckpointError
from ...plan import Plan
from ...tape import Tape, block_rows, tile_offsets
from .. import Progress
from .codegen import Vectors
from .driver import Context
from .random_weights import RandomWeights

STAGING_BYTES = 64 << 20
THREADS = 256
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # SourceType in tools.cuh


class Weights(Protocol):
    """What is packed: a checkpoint. The matrices of `RandomWeights` are drawn on the device."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, as bfloat16, float16 or float32."""
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


class Packer:
    """Packs one model's weights through staging buffers that it owns."""

    def __init__(self, context: Context, tools: Any, plan: Plan, weights: Weights, progress: Progress) -> None:
        self.context, self.plan, self.weights, self.progress = context, plan, weights, progress
        self.pack = context.function(tools, "flashformer_pack")
        self.convert = context.function(tools, "flashformer_convert")
        self.random = context.function(tools, "flashformer_random")
        self.half_type = int(plan.config.dtype == "float16")
        self.host = [] if isinstance(weights, RandomWeights) else [context.allocate_pinned(STAGING_BYTES, "staging") for _ in (0, 1)]
        self.device = [context.allocate(STAGING_BYTES, "staging") for _ in (0, 1)]
        self.busy: list[Any] = [None, None]  # event after the last use of each buffer
        self.turn = 0
        self.flags = context.allocate(4 * 4096, "flags", fill=0)
        self.flag_names: list[str] = []
        self.pool = ThreadPoolExecutor(4)
        self.done_bytes = 0
        self.total_bytes = plan.weight_bytes() + plan.config.vocab_size * plan.config.hidden_size * 2

    def run(self, tape: Tape, arena: int, embedding: int) -> list[str]:
        """Fill the arena of all tapes and the embedding table; returns the names of weights with values that are not finite."""
        for index, stage in enumerate(self.plan.stages):
            if stage.linear is None or stage.geometry is None:
                continue
            offsets = self.context.upload(tile_offsets(self.plan, tape, index).astype(np.uint64), "tile offsets")
            base = 0
            for number, block in enumerate(stage.linear.blocks):
                g = stage.geometry
                job = PackJob(
                    tape=arena, tile_offset=offsets, half_type=self.half_type, columns=stage.linear.columns_used,
                    row_base=base, row_group=block.group, row_stride=block.stride,
                    column_group=stage.linear.column_group, column_stride=stage.linear.column_stride,
                    half=number if stage.linear.interleave else -1,
                    warps_columns=g.warps_columns, fragments=g.fragments, parts=g.parts,
                )  # fmt: skip
                for source, kind, first, rows, flag in self._pieces(block.weight, block.rows, stage.linear.columns_used):
                    job.source, job.type, job.first_row, job.rows, job.strange = source, kind, first, rows, flag
                    threads = -(-rows // 8) * g.warps_columns * g.fragments * 32
                    self.context.launch(self.pack, -(-threads // THREADS), THREADS, (job,))
                base += block.padded
            self.context.wait()
            self.context.free(offsets)
        self._embed(embedding)
        return self._finish()

    def _embed(self, embedding: int) -> None:
        """The embedding table, row by row as it is, in the kernel's 16-bit type."""
        hidden, vocab = self.plan.config.hidden_size, self.plan.config.vocab_size
        name = self.plan.embedding
        for source, kind, first, rows, flag in self._pieces(name, vocab, hidden):
            values = rows * hidden
            to = embedding + first * hidden * 2
            arguments = (
                ctypes.c_uint64(source), ctypes.c_uint64(to), ctypes.c_uint64(values),
                ctypes.c_uint32(kind), ctypes.c_uint32(self.half_type), ctypes.c_uint64(flag),
            )  # fmt: skip
            self.context.launch(self.convert, -(-values // (2 * THREADS)), THREADS, arguments)

    def _finish(self) -> list[str]:
        """Wait, free the staging buffers, and report which weights are not finite."""
        self.context.wait()
        flags = self.context.download(self.flags, np.zeros(4096, np.uint32), "flags")
        for pointer in (*self.device, self.flags):
            self.context.free(pointer)
        self.pool.shutdown()
        return [name for name, flag in zip(self.flag_names, flags, strict=False) if flag]

    def _flag(self, name: str) -> int:
        """Address of the word that says whether `name` has strange values."""
        if name not in self.flag_names:
            self.flag_names.append(name)
        return self.flags + 4 * min(self.flag_names.index(name), 4095)

    def _pieces(self, name: str, rows: int, columns: int) -> Iterator[tuple[int, int, int, int, int]]:
        """A matrix in pieces on the device: (address, source type, first row, rows, flag); rows are multiples of 8."""
        flag = self._flag(name)
        if isinstance(self.weights, RandomWeights):
            seed, scale = self.weights.stream(name)
            step = max(STAGING_BYTES // (columns * 2) // 8 * 8, 8)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                to, pairs = self._take(), -(-count * columns // 2)
                arguments = (
                    ctypes.c_uint64(to), ctypes.c_uint64(pairs), ctypes.c_uint64(first * columns // 2),
                    ctypes.c_uint32(seed), ctypes.c_float(float(scale)),
                )  # fmt: skip
                self.context.launch(self.random, -(-pairs // THREADS), THREADS, arguments)
                yield to, TYPES["bfloat16"], first, count, flag
                self._give(count * columns * 2)
            return
        probe = self.weights.read(name, slice(0, 1))
        kind = TYPES.get(probe.dtype.name)
        if kind is None:
            raise CheckpointError(f"{name} has values of type {probe.dtype}; bfloat16, float16 or float32 are needed")
        step = STAGING_BYTES // (columns * probe.itemsize) // 8 * 8
        if step == 0:
            raise CheckpointError(f"{name} has rows of {columns} values, more than the staging buffer holds")
        for first in range(0, rows, step):
            part = self.weights.read(name, slice(first, min(first + step, rows)))
            to = self._take()
            address, buffer = self.host[self.turn]
            self._copy(buffer[: part.nbytes], part)
            self.context.copy_async(to, address, part.nbytes)
            yield to, kind, first, len(part), flag
            self._give(part.nbytes)

    def _copy(self, to: np.ndarray, part: np.ndarray) -> None:
        """Into pinned memory, by several threads: one core does not keep up with the bus."""
        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        cuts = [len(raw) * i // 4 for i in range(5)]

        def work(i: int) -> None:
            to[cuts[i] : cuts[i + 1]] = raw[cuts[i] : cuts[i + 1]]

        list(self.pool.map(work, range(4)))

    def _take(self) -> int:
        """The next staging buffer, once the device is done with it."""
        self.turn ^= 1
        if self.busy[self.turn] is not None:
            self.context.elapsed(self.busy[self.turn], self.context.event())
        self.busy[self.turn] = None
        return self.device[self.turn]

    def _give(self, nbytes: int) -> None:
        """Mark the end of what uses the present staging buffer."""
        self.busy[self.turn] = self.context.event()
        self.done_bytes += nbytes
        self.progress("packing weights", min(self.done_bytes, self.total_bytes), self.total_bytes)


def gather_vectors(plan: Plan, vectors: Vectors, weights: Weights) -> np.ndarray:
    """Norm weights and biases, float32 [vectors.size], as the kernel finds them."""
    out = np.zeros(vectors.size, np.float32)

    def vector(name: str) -> np.ndarray:
        return np.asarray(weights.read(name)).astype(np.float32)

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
    return out


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
