"""Weights -> tapes: every row goes from the mapped checkpoint straight to its place, and what was packed is kept in the cache."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from ... import env
from ...build import cached_build
from ...checkpoint import Checkpoint
from ...errors import BuildError, CheckpointError, DeviceError
from ...formats import PLAIN, encode
from ...plan import Plan
from ...version import __version__
from .. import Progress
from ..source import Field, ctypes_fields, struct
from .codegen import LINE, headers
from .compile import compile_source
from .layout import Layout, Placement

PIECE_VALUES = 2 << 20  # of a weight, that one thread packs at a time
READ_BYTES = 8 << 20  # that one thread reads at a time
READ_AT_LEAST, READ_AT_MOST = 256 << 20, 1 << 30  # bytes for measuring: so many that it is not caches that are measured
READ_TIMES = 4  # between two looks at the clock
READ_SECONDS = 1.0  # for measuring
WEIGHTS, FACTS = "weights", "weights.json"  # files of a cache entry
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}

# How much of a weight a job packs, and how its columns lie on the tape.
EXTENT: tuple[Field, ...] = (
    ("rows", "u32", ctypes.c_uint32, ""),
    ("columns", "u32", ctypes.c_uint32, ""),
    ("column_group", "u32", ctypes.c_uint32, "columns that follow each other on the tape, too"),
    ("column_stride", "u32", ctypes.c_uint32, "from the first of one group to the first of the next, on the tape"),
)

# Some rows of a weight, and where they go.
PACK_JOB: tuple[Field, ...] = (
    ("source", "const u8*", ctypes.c_void_p, "[rows][columns]"),
    ("tape", "u8*", ctypes.c_void_p, ""),
    ("row_offset", "const u64*", ctypes.c_void_p, "[rows] bytes: the first line of each row"),
    ("source_type", "u32", ctypes.c_uint32, "a Type"),
    ("type", "u32", ctypes.c_uint32, "of the tape"),
    *EXTENT,
    ("lines", "u32", ctypes.c_uint32, "of a row on the tape"),
)

# Some rows of a weight in codes, and where they go.
CODE_JOB: tuple[Field, ...] = (
    ("codes", "const u8*", ctypes.c_void_p, "[rows][columns]"),
    ("scales", "const u8*", ctypes.c_void_p, "[rows][scale_count][scale_bytes]"),
    ("divisors", "const float*", ctypes.c_void_p, "[rows], or null"),
    ("tape", "u8*", ctypes.c_void_p, ""),
    ("row_offset", "const u64*", ctypes.c_void_p, "[rows] bytes: the first codes of each row"),
    ("scale_offset", "const u64*", ctypes.c_void_p, "[rows] bytes: its first scale"),
    ("divisor_offset", "const u64*", ctypes.c_void_p, "[rows] bytes: its divisor"),
    ("bits", "u32", ctypes.c_uint32, "of a code: 4 or 8"),
    *EXTENT,
    ("tape_columns", "u32", ctypes.c_uint32, "of a row on the tape"),
    ("scale_count", "u32", ctypes.c_uint32, "of a row, offsets included"),
    ("scale_bytes", "u32", ctypes.c_uint32, "of each"),
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class PackJob(ctypes.Structure):
    """`PackJob` of the generated source."""

    _fields_ = ctypes_fields(PACK_JOB)


class CodeJob(ctypes.Structure):
    """`CodeJob` of the generated source."""

    _fields_ = ctypes_fields(CODE_JOB)


class Tools:
    """The library of tools.h, and threads to call it from."""

    def __init__(self, plan: Plan) -> None:
        """Raises BuildError where it cannot be compiled."""
        types = ", ".join(f"kFrom{name.capitalize()} = {number}" for name, number in TYPES.items())
        lines = ['#include "prelude.h"', "", f"constexpr int kTileRows = {plan.target.tile_rows};", "", f"enum Type {{ {types} }};", ""]
        lines += [*struct("PackJob", PACK_JOB), *struct("CodeJob", CODE_JOB), '#include "tools.h"', ""]
        library = compile_source("\n".join(lines), "cpu-tools")
        self._pack = library.flashformer_pack
        self._pack.argtypes, self._pack.restype = [ctypes.POINTER(PackJob)], ctypes.c_uint32
        self._pack_codes = library.flashformer_pack_codes
        self._pack_codes.argtypes, self._pack_codes.restype = [ctypes.POINTER(CodeJob)], None
        self._read = library.flashformer_read
        self._read.argtypes, self._read.restype = [ctypes.c_void_p, ctypes.c_uint64], ctypes.c_uint64
        self.threads = min(plan.target.workers, os.cpu_count() or 1)

    def pack(self, memory: np.ndarray, layout: Layout, dtype: str, checkpoint: Checkpoint, progress: Progress) -> list[str]:
        """Fill zeroed memory, uint8 [layout.nbytes]; returns the names of weights with values that are not finite in `dtype`.

        Raises CheckpointError for a type that cannot be packed, and for what its format does not hold.
        """

        def pieces() -> Iterator[tuple[Placement, slice]]:
            for place in layout.placements:
                step = max(PIECE_VALUES // place.columns, 1)
                for first in range(0, len(place.row_offset), step):
                    yield place, slice(first, min(first + step, len(place.row_offset)))

        def work(piece: tuple[Placement, slice]) -> tuple[str, int, int]:
            place, rows = piece
            if place.geometry.format != PLAIN:
                return self._encode(memory, place, rows, checkpoint)
            source = np.ascontiguousarray(checkpoint.read(place.weight, rows))
            if source.dtype.name not in TYPES:
                raise CheckpointError(f"{place.weight} has values of type {source.dtype}; {', '.join(TYPES)} are supported")
            job = PackJob(
                source.ctypes.data, memory.ctypes.data, place.row_offset[rows].ctypes.data, TYPES[source.dtype.name], TYPES[dtype],
                len(source), place.columns, place.column_group, place.column_stride, place.geometry.columns // LINE,
            )  # fmt: skip
            return place.weight, len(source) * place.columns, int(self._pack(job))

        total = sum(len(place.row_offset) * place.columns for place in layout.placements)
        done, strange = 0, dict[str, None]()
        progress("packing weights", 0, total)
        for weight, values, found in self._all(work, pieces()):
            done += values
            progress("packing weights", done, total)
            if found:
                strange[weight] = None
        return list(strange)

    def _encode(self, memory: np.ndarray, place: Placement, rows: slice, checkpoint: Checkpoint) -> tuple[str, int, int]:
        """Pack some rows of a matrix as codes: its name, how many values, and whether any is not finite."""
        form, format = checkpoint.form(place.weight, rows), place.geometry.format
        assert form is not None
        encoded = encode(form, format, place.weight)
        codes, scales = np.ascontiguousarray(encoded.codes), np.ascontiguousarray(encoded.scales)
        job = CodeJob(
            codes.ctypes.data, scales.ctypes.data, None if encoded.divisors is None else encoded.divisors.ctypes.data, memory.ctypes.data,
            *(offset[rows].ctypes.data for offset in (place.row_offset, place.scale_offset, place.divisor_offset)),
            format.bits, len(codes), place.columns, place.column_group, place.column_stride, place.geometry.columns,
            scales.shape[1] * scales.shape[2], scales.itemsize,
        )  # fmt: skip
        self._pack_codes(job)
        return place.weight, len(codes) * place.columns, int(not encoded.finite)

    def checksum(self, memory: np.ndarray) -> str:
        """A checksum of memory whose size is a multiple of 512 bytes; reads all of it."""
        parts = [(memory.ctypes.data + at, min(READ_BYTES, len(memory) - at) // 8) for at in range(0, len(memory), READ_BYTES)]
        sums = list(self._all(lambda part: self._read(*part), parts))
        return hashlib.blake2b(np.array(sums, np.uint64).tobytes(), digest_size=16).hexdigest()

    def bandwidth(self, memory: np.ndarray) -> float:
        """The best rate at which all threads read memory, each a part of its own, in GB/s."""
        memory = memory[:READ_AT_MOST]
        if len(memory) < READ_AT_LEAST:
            memory = allocate(READ_AT_LEAST)
            memory[:] = 1
        size = len(memory) // self.threads // 512 * 512
        parts = [(memory.ctypes.data + i * size, size // 8) for i in range(self.threads)]
        best, end = 0.0, time.perf_counter() + READ_SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            list(self._all(lambda part: [self._read(*part) for _ in range(READ_TIMES)], parts))
            best = max(best, READ_TIMES * size * self.threads / (time.perf_counter() - began) / 1e9)
        return best

    def _all(self, work: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """work(item) for all items, in order, by all threads; the first error ends it."""
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                yield from pool.map(work, items)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def allocate(nbytes: int) -> np.ndarray:
    """Zeroed memory, uint8 [nbytes], in large pages where there are any. Raises DeviceError if there is not enough."""
    try:
        memory = mmap.mmap(-1, nbytes)
    except (OSError, MemoryError, OverflowError) as error:
        raise DeviceError(f"{nbytes / 1e9:.1f} GB of memory cannot be had ({error}); choose a smaller model") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a refusal costs speed only
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def packed_weights(plan: Plan, layout: Layout, checkpoint: Checkpoint, tools: Tools, progress: Progress) -> tuple[np.ndarray, list[str]]:
    """All matrices in their places, uint8 [layout.nbytes], and the names of those with values that are not finite.

    They are mapped from the cache, where they are packed if they are not there yet. Where the cache cannot take them they
    are packed into memory, with a warning. Raises what `Tools.pack` raises, and DeviceError for too little memory.
    """

    def produce(folder: Path) -> None:
        with (folder / WEIGHTS).open("wb") as file:
            file.truncate(layout.nbytes)
            if hasattr(os, "posix_fallocate"):
                # NOTE: a full disk must show here, not as a signal when a page of the mapping is written.
                os.posix_fallocate(file.fileno(), 0, layout.nbytes)
        memory = np.memmap(folder / WEIGHTS, np.uint8, "r+")
        strange = tools.pack(memory, layout, plan.config.dtype, checkpoint, progress)
        (folder / FACTS).write_text(json.dumps({"checksum": tools.checksum(memory), "strange": strange}))

    key = {
        "version": __version__,
        "files": "\n".join(identities(checkpoint.path)),
        "plan": repr((plan.config, plan.target, plan.stages, plan.embedding_format)),
        **headers(),
    }
    try:
        folder = cached_build("cpu-weights", key, produce)
        if (found := _sound(folder, tools)) is not None:
            return found
        env.debug(1, f"cache: {folder} is damaged and made again")
        (folder / WEIGHTS).unlink()
        if (found := _sound(cached_build("cpu-weights", key, produce), tools)) is not None:
            return found
        reason = f"{folder} does not keep what is written to it"
    except (BuildError, OSError) as error:
        reason = str(error)
    warnings.warn(f"packed weights cannot be kept, so each start packs them anew: {reason}", stacklevel=2)
    memory = allocate(layout.nbytes)
    return memory, tools.pack(memory, layout, plan.config.dtype, checkpoint, progress)


def _sound(folder: Path, tools: Tools) -> tuple[np.ndarray, list[str]] | None:
    """What a cache entry holds, or None if it is not what was written, as after a power failure."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        checksum, strange = str(facts["checksum"]), [str(name) for name in facts["strange"]]
    except (ValueError, KeyError, TypeError):
        return None
    memory = np.memmap(folder / WEIGHTS, np.uint8, "r")
    # NOTE: reading all of it also brings the file into memory, so that no worker waits for the disk while others wait for it.
    return (memory, strange) if tools.checksum(memory) == checksum else None


def identities(path: Path) -> list[str]:
    """What tells whether the files of a checkpoint are still the same: path, size and time of change of each."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stats = [(file.resolve(), file.stat()) for file in files]
    return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
