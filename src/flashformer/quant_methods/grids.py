"""The values that codes of a format stand for, and the scales that place them among a matrix's weights.

All are symmetric about zero: weight = value * scale. A scale is held in the type that the format stores, so that what is computed
from it is what a reader will compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

Kind = Literal["int", "fp8", "mxfp4"]

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_LARGEST = 448.0
_E2M1_LARGEST = 6.0

# What the scale of a group's largest weight is multiplied with in a search for a better one: most weights are small, and gain from
# finer steps more than the largest loses by being clipped. Float grids are finest near zero and need it less.
_RATIOS: dict[Kind, np.ndarray] = {
    "int": np.arange(1.0, 0.49, -0.02, dtype=np.float32),
    "fp8": np.ones(1, np.float32),
    "mxfp4": np.array([1.0, 0.5, 2.0], np.float32),
}


class Quantized(NamedTuple):
    """Some rows of a matrix: values of a grid, float32 [rows, K], and their scales, float32 [rows, groups]."""

    values: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The weights that a reader will get, float32 [rows, K]."""
        groups = self.scale.shape[1]
        grouped = self.values.reshape(len(self.values), groups, self.values.shape[1] // groups)
        return (grouped * self.scale[:, :, None]).reshape(self.values.shape)


@dataclass(frozen=True)
class Grid:
    """What a format can hold."""

    kind: Kind
    bits: int
    group: int | None  # columns that share a scale; None: the whole row
    scale_type: np.dtype[Any]  # bfloat16 or float16; not used for mxfp4, whose scales are powers of two

    def columns(self, size: int) -> int:
        """How many of a row's `size` columns share a scale."""
        return self.group or size

    def nearest(self, x: np.ndarray) -> np.ndarray:
        """The values nearest to x, float32; ties go to the even code, what lies outside to the largest."""
        if self.kind == "int":
            half = float(1 << (self.bits - 1))
            return np.clip(np.rint(x), -half, half - 1)
        if self.kind == "fp8":
            return np.clip(x, -_FP8_LARGEST, _FP8_LARGEST).astype(_FP8).astype(np.float32)
        size = np.minimum(np.abs(x), np.float32(_E2M1_LARGEST))
        step = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
        return np.copysign(np.rint(size / step) * step, x)

    def scale(self, largest: np.ndarray) -> np.ndarray:
        """The scale that just holds weights up to `largest` (>= 0), as it will be stored, float32 of the same shape; never zero."""
        if self.kind == "mxfp4":  # as in the OCP specification, but up to the next power where 6 would clip by more than 1 / 7
            exponent = np.floor(np.log2(np.maximum(largest, 2.0**-120) / 1.75)) - 1
            return np.ldexp(np.float32(1), np.where(largest > 0, exponent, 0).astype(np.int32))
        most = _FP8_LARGEST if self.kind == "fp8" else ((1 << self.bits) - 1) / 2
        scale = (largest / np.float32(most)).astype(self.scale_type).astype(np.float32)
        return np.where(scale > 0, scale, np.float32(1))

    def largest(self, weights: np.ndarray) -> np.ndarray:
        """The largest magnitude in each group: float32 [rows, K] -> [rows, groups]."""
        return np.abs(self._grouped(weights)).max(axis=-1)

    def search(self, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """The scales [rows, groups] with the least squared error of weights [rows, K], each column's times `importance` [K]."""
        grouped, largest = self._grouped(weights), self.largest(weights)
        heavy = importance.reshape(1, *grouped.shape[1:])
        best = self.scale(largest)
        least = np.full(best.shape, np.inf, np.float32)
        for ratio in _RATIOS[self.kind]:
            scale = self.scale(largest * ratio)
            error = self.nearest(grouped / scale[..., None])
            error *= scale[..., None]
            error -= grouped
            error *= error
            error *= heavy
            total = error.sum(axis=-1)
            better = total < least
            best, least = np.where(better, scale, best), np.where(better, total, least)
        return best

    def _grouped(self, weights: np.ndarray) -> np.ndarray:
        """[rows, K] -> [rows, groups, columns], a view."""
        rows, size = weights.shape
        return weights.reshape(rows, size // self.columns(size), self.columns(size))
