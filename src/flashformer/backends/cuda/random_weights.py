"""A model with random weights, plain or quantised: a checkpoint that lies nowhere. For benchmarks, and for checking what they time.

The device draws matrices by itself (`flashformer_random` in tools.cuh, and code_tools.cuh); what is read on the host has the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ...checkpoint import Checkpoint, TensorSpec
from ...config import ModelConfig
from ...errors import CheckpointError
from ...formats import NAN, PLAIN, SCALES, Format
from ...models import build_graph
from ...quant.forms import Affine, Form, Scaled, Table

if TYPE_CHECKING:
    from ...tokenizer import Tokenizer

BLOCK = 1 << 18  # values that are drawn together: their intermediates stay in the cache of a core
FIRST_E4M3 = 0x70  # 128
VECTOR_SCALE = np.float32(0.2)  # norm weights lie in 1 +- this, biases in 0 +- this


def random_bits(first: int, count: int, seed: int) -> np.ndarray:
    """Numbers first, first + 1, ... of the stream `seed`, uint32 [count]: `random_bits` in tools.cuh."""
    n = np.arange(first, first + count, dtype=np.uint64)
    h = n.astype(np.uint32) * np.uint32(0x9E3779B1)
    h ^= (n >> np.uint64(32)).astype(np.uint32) * np.uint32(0x85EBCA77)
    h ^= np.uint32(seed)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h


def draw(first: int, count: int, seed: int, scale: np.float32) -> np.ndarray:
    """Values first, first + 1, ... of the stream `seed`: bfloat16 [count], uniform in [-scale, scale).

    `flashformer_random` in tools.cuh does the same.
    """
    out = np.empty(count, ml_dtypes.bfloat16)
    step = np.float32(scale) / np.float32(1 << 23)
    for at in range(0, count, BLOCK):
        h = random_bits(first + at, min(BLOCK, count - at), seed)
        out[at : at + len(h)] = ((h >> np.uint32(8)).astype(np.int32) - np.int32(1 << 23)).astype(np.float32) * step
    return out


def draw_codes(first: int, count: int, seed: int, format: Format) -> np.ndarray:
    """Codes first, first + 1, ... of the stream `seed`: uint8 [count]; `flashformer_random_codes` in code_tools.cuh does the same."""
    codes = (random_bits(first, count, seed) >> np.uint32(32 - format.bits)).astype(np.uint8)
    if format.kind == "fp8":
        codes[(codes & NAN) == NAN] ^= 1
    instead, of = replacement(format)
    codes[codes == of] = instead
    return codes


def code_values(format: Format) -> np.ndarray:
    """What each code of a format stands for, float32 [2^bits]."""
    codes = np.arange(1 << format.bits, dtype=np.uint8)
    if format.kind == "table":
        return np.array(format.table, np.float32)
    if format.kind == "fp8":
        return np.where((codes & NAN) == NAN, 0, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    return codes.astype(np.float32) - 8 if format.bits == 4 else codes.view(np.int8).astype(np.float32)


def drawn_bytes(format: Format, base: np.float32) -> tuple[int, int]:
    """Of scales of one byte: (the first that is drawn, how many of those that follow): all of e4m3 from 128, or two exponents."""
    return (FIRST_E4M3, 8) if format.scale == "e4m3" else (int(np.float32(base).view(np.uint32)) >> 23, 2)


@lru_cache
def replacement(format: Format) -> tuple[int, int]:
    """(a, b): drawing code a for code b brings the mean nearest to zero. A matrix whose values have a mean has one direction in which
    it is much larger than in others; a model of such matrices magnifies every rounding."""
    values = code_values(format).astype(np.float64)
    a, b = np.unravel_index(np.abs(values.sum() + values[:, None] - values[None, :]).argmin(), (len(values), len(values)))
    return int(a), int(b)


class RandomWeights(Checkpoint):
    """Weights of any configuration, uniform; matrices are scaled so that activations stay of order one.

    Values are bfloat16. Where a format is given (one without offsets), matrices are its codes, but for the embedding that is no head,
    and, with `plain_head`, the head.
    """

    def __init__(self, config: ModelConfig, seed: int = 1, format: Format = PLAIN, plain_head: bool = False) -> None:
        self.path, self.config, self.seed, self.format = Path("random weights"), config, seed, format
        graph = build_graph(config)
        self._weights = graph.weights()
        table = next(op.weights[0].name for op in graph.operators if op.kind == "embed")
        head = [op for op in graph.operators if op.kind == "linear"][-1].weights[0].name
        plain = {table, head} if plain_head else {table} - {head}
        self.formats = {name: format for name, w in self._weights.items() if format != PLAIN and len(w.shape) == 2 and name not in plain}
        self._deviation = float(code_values(format).std()) if format != PLAIN else 1.0

    def names(self) -> Sequence[str]:
        """See `Checkpoint.names`."""
        return list(self._weights)

    def spec(self, name: str) -> TensorSpec:
        """See `Checkpoint.spec`."""
        if name not in self._weights:
            raise CheckpointError(f"random weights: this model has no tensor {name}")
        shape = self._weights[name].shape
        return TensorSpec(name, shape, "bfloat16", 2 * int(np.prod(shape)))

    def stream(self, name: str) -> tuple[int, np.float32]:
        """(seed, scale) with which the values of a tensor are drawn."""
        shape = self.spec(name).shape
        scale = np.float32(np.sqrt(3.0 / shape[1])) if len(shape) == 2 else VECTOR_SCALE
        return zlib.crc32(name.encode()) ^ self.seed, scale

    def code_stream(self, name: str) -> tuple[int, int, np.float32, np.float32]:
        """(seed of the codes, seed of the scales, about the smallest scale, what a row is divided by) of a matrix in codes."""
        seed = self.stream(name)[0]
        base = np.float32(0.8 / (self._deviation * np.sqrt(self.spec(name).shape[1])))
        # NOTE: matrices of one stage differ in their divisors, as those of checkpoints do.
        divisor = np.float32(128) / base * np.float32(1 + seed % 16 / 64) if self.format.divisor_bytes else np.float32(1)
        return seed, seed ^ 0x5CA1E, base, divisor

    def form(self, name: str, rows: slice | None = None) -> Form | None:
        """See `Checkpoint.form`."""
        shape, format = self.spec(name).shape, self.format
        if name not in self.formats:
            return None
        first, last, _ = (rows or slice(None)).indices(shape[0])
        count, columns, groups = max(last - first, 0), shape[1], format.groups(shape[1])
        code_seed, scale_seed, base, divisor = self.code_stream(name)
        codes = draw_codes(first * columns, count * columns, code_seed, format).reshape(count, columns)
        bits, type = random_bits(first * groups, count * groups, scale_seed), SCALES[format.scale]
        if type.itemsize == 1:
            byte, number = drawn_bytes(format, base)
            drawn = (np.uint32(byte) + bits % np.uint32(number)).astype(np.uint8).view(type)
        else:
            drawn = (base * (np.float32(1) + (bits & np.uint32(255)).astype(np.float32) * np.float32(1 / 512))).astype(type)
        scale = drawn.astype(np.float32).reshape(count, groups)
        group = format.group or columns
        if format.kind == "table":
            return Table(codes, np.array(format.table, np.float32), group, scale, float(divisor))
        if format.kind == "int" and format.bits == 4:
            return Affine(codes, 4, group, scale, zero=np.full_like(scale, 8, np.int16))
        return Scaled(codes.view(np.int8 if format.kind == "int" else ml_dtypes.float8_e4m3fn), (1, group), scale)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `Checkpoint.read`; drawn anew each time."""
        shape = self.spec(name).shape
        form = self.form(name, rows)
        if form is not None:
            return form.dequantize().astype(ml_dtypes.bfloat16)
        first, last, _ = (rows or slice(None)).indices(shape[0])
        width = int(np.prod(shape[1:]))
        values = draw(first * width, max(last - first, 0) * width, *self.stream(name)).reshape(-1, *shape[1:])
        if len(shape) == 1 and not name.endswith(".bias"):
            values = (values.astype(np.float32) + np.float32(1)).astype(ml_dtypes.bfloat16)
        return values

    def values(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `Checkpoint.values`; as many threads as there are cores draw some rows each, whose intermediates stay in a cache."""
        shape = self.spec(name).shape
        first, last, _ = (rows or slice(None)).indices(shape[0])
        step = max(BLOCK // int(np.prod(shape[1:])), 1)
        parts = [slice(at, min(at + step, last)) for at in range(first, last, step)]
        draw_rows = super().values
        if len(shape) == 1 or len(parts) < 2:
            return draw_rows(name, rows)
        out = np.empty((last - first, *shape[1:]), np.float32 if name in self.formats else ml_dtypes.bfloat16)

        def fill(part: slice) -> None:
            out[part.start - first : part.stop - first] = draw_rows(name, part)

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, parts))
        return out

    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError: there is none."""
        raise CheckpointError("random weights have no tokenizer")

    def close(self) -> None:
        """Nothing to let go of."""
