"""Rounding to nearest: the scale of each group holds its largest weight. Needs no data."""

from __future__ import annotations

import numpy as np

from .grids import Grid, Quantized


def quantize(weights: np.ndarray, grid: Grid) -> Quantized:
    """Some rows of a matrix, float32 [rows, K]."""
    scale = grid.scale(grid.largest(weights))
    each = np.repeat(scale, grid.columns(weights.shape[1]), axis=1)
    return Quantized(grid.nearest(weights / each), scale)
