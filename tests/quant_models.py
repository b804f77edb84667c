"""Models whose matrices are quantised in memory, in any form, over a folder that `model_files` wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from flashformer.checkpoint import Checkpoint, TensorSpec
from flashformer.quant.forms import Affine, Form, Scaled, Table
from flashformer.quant.source import E2M1
from flashformer.tokenizer import Tokenizer

ROW = 1 << 20  # columns of a group that is a whole row
TYPES = {"bfloat16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn, "exponent": ml_dtypes.float8_e8m0fnu}

NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip


def nearest(dtype: str, values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to a type."""
    return values.astype(TYPES.get(dtype, dtype)).astype(np.float32)


def affine(
    values: np.ndarray, bits: int, group: int, scale: str = "float16", zeros: bool = False, minima: bool = False, zero: int | None = None
) -> Affine:
    """Integers near `values` [N, K] with scales of a type; around `zero` (default: the middle), with zero points, or with minima."""
    n, k = values.shape
    group = min(group, k)
    groups = -(-k // group)
    padded = np.pad(values, ((0, 0), (0, groups * group - k)), mode="edge").reshape(n, groups, group)
    low, high = padded.min(-1), padded.max(-1)
    top = (1 << bits) - 1
    if not zeros and not minima:
        middle = 1 << (bits - 1) if zero is None else zero
        size = np.maximum(np.abs(low) / middle, np.abs(high) / max(top - middle, 1))
    else:
        middle, size = 0, (np.maximum(high, 0) - np.minimum(low, 0)) / top
    steps = nearest(scale, size)
    offsets = nearest(scale, np.minimum(low, 0)) if minima else None
    points = np.clip(np.round(-np.minimum(low, 0) / steps), 0, top) if zeros else np.full(steps.shape, middle)
    shift = -offsets / steps if offsets is not None else points
    q = np.clip(np.round(padded / steps[..., None] + shift[..., None]), 0, top).reshape(n, -1)[:, :k].astype(np.uint8)
    return Affine(q, bits, group, steps, None if minima else points.astype(np.int16), offsets)


def tabled(values: np.ndarray, table: np.ndarray, group: int, scale: str = "float32", divisor: float = 1.0) -> Table:
    """The nearest of 16 values for each of `values` [N, K], whose groups divide K."""
    n, k = values.shape
    groups = values.reshape(n, k // group, group)
    steps = nearest(scale, np.abs(groups).max(-1) / np.abs(table).max() * divisor)
    codes = np.abs(groups[..., None] / (steps / divisor)[..., None, None] - table).argmin(-1)
    return Table(codes.reshape(n, k).astype(np.uint8), table, group, steps, divisor)


def nvfp4(values: np.ndarray) -> Table:
    """The values of NVFP4 near `values` [N, K], with a divisor as its makers choose it."""
    return tabled(values, E2M1, 16, "e4m3", divisor=float(np.float32(448 * 6) / np.abs(values).max()))


def scaled(values: np.ndarray, block: tuple[int, int], dtype: str = "float8_e4m3fn", scale_type: str = "float32") -> Scaled:
    """Values of 8 bits near `values` [N, K], with a scale per block."""
    n, k = values.shape
    block = (min(block[0], n), min(block[1], k))
    rows, columns = -(-n // block[0]), -(-k // block[1])
    padded = np.pad(values, ((0, rows * block[0] - n), (0, columns * block[1] - k))).reshape(rows, block[0], columns, block[1])
    largest = 127 if dtype == "int8" else 448
    scale = nearest(scale_type, np.abs(padded).max((1, 3)) / largest)
    whole = np.repeat(np.repeat(scale, block[0], 0)[:n], block[1], 1)[:, :k]
    quotient = values / whole
    quotient = np.clip(quotient, -largest, largest)
    codes = np.round(quotient).astype(np.int8) if dtype == "int8" else quotient.astype(ml_dtypes.float8_e4m3fn)
    return Scaled(codes, block, scale)


# Every kind of matrix that has a format of its own, from float32 values [N, K], and the name of that format.
FORMS: dict[str, tuple[Callable[[np.ndarray], Form], str]] = {
    "Q8_0": (lambda v: affine(v, 8, 32), "int8 g32 float16"),
    "Q4_0": (lambda v: affine(v, 4, 32), "int4 g32 float16"),
    "Q4_1": (lambda v: affine(v, 4, 32, minima=True), "int4 g32 minimum float16"),
    "Q5_0": (lambda v: affine(v, 5, 32), "int8 g32 float16"),
    "Q4_K": (lambda v: affine(v, 4, 32, "float32", minima=True), "int4 g32 minimum float32"),
    "Q6_K": (lambda v: affine(v, 6, 16, "float32"), "int8 g16 float32"),
    "int8 rows": (lambda v: affine(v, 8, ROW, "bfloat16"), "int8 row bfloat16"),
    "int8 zeros": (lambda v: affine(v, 8, 64, zeros=True), "int8 g64 zero float16"),
    "int4 rows": (lambda v: affine(v, 4, ROW), "int4 row float16"),
    "int4 g64": (lambda v: affine(v, 4, 64, "bfloat16"), "int4 g64 bfloat16"),
    "int4 g128 zeros": (lambda v: affine(v, 4, 128, zeros=True), "int4 g128 zero float16"),
    "int3": (lambda v: affine(v, 3, 32), "int4 g32 float16"),
    "NF4": (lambda v: tabled(v * np.float32(1.1), NF4, 32), "table g32 float32"),
    "MXFP4": (lambda v: tabled(v, E2M1, 32, "exponent"), "table g32 exponent"),
    "NVFP4": (nvfp4, "table g16 e4m3"),
    "FP4": (lambda v: tabled(v, E2M1, 64, "bfloat16"), "table g64 bfloat16"),
    "FP4 divided": (lambda v: tabled(v, E2M1, 16, "float32", divisor=3.7), "table g16 float32"),
    "fp8 blocks": (lambda v: scaled(v, (128, 128)), "fp8 g128 float32"),
    "fp8 exponents": (lambda v: scaled(v, (128, 128), scale_type="exponent"), "fp8 g128 exponent"),
    "int8 exponents": (lambda v: affine(v, 8, 16, "exponent"), "int8 g16 exponent"),
    "int4 exponents": (lambda v: affine(v, 4, ROW, "exponent"), "int4 row exponent"),
    "fp8 rows": (lambda v: scaled(v, (1, ROW)), "fp8 row float32"),
    "int8 channels": (lambda v: scaled(v, (1, ROW), "int8"), "int8 row float32"),
}


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint with some matrices in forms. The others are as they are."""

    def __init__(self, plain: Checkpoint, forms: dict[str, Form]) -> None:
        self.plain, self.forms, self.path, self.config = plain, forms, plain.path, plain.config

    def names(self) -> Sequence[str]:
        return self.plain.names()

    def spec(self, name: str) -> TensorSpec:
        spec = self.plain.spec(name)
        return replace(spec, dtype="few bits", nbytes=spec.nbytes * 9 // 32) if name in self.forms else spec

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self.forms:
            return self.plain.read(name, rows)
        return self.forms[name].dequantize(rows or slice(None)).astype(ml_dtypes.bfloat16)

    def form(self, name: str, rows: slice | None = None) -> Form | None:
        return self.forms[name].take(rows or slice(None)) if name in self.forms else None

    def tokenizer(self) -> Tokenizer:
        return self.plain.tokenizer()

    def close(self) -> None:
        self.plain.close()
