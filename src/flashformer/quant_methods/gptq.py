"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and each one's error is made up for by those that follow.

The second moments of the matrix's input say how. Columns go in the order of their input's size, the largest first, while the groups
stay as they lie (so the file needs no permutation); scales are chosen beforehand, for the least error weighted by the input's size.
"""

from __future__ import annotations

import numpy as np

from ..errors import CheckpointError
from .grids import Grid, Quantized

BLOCK = 128  # columns whose corrections to all that follow are applied together
DAMPING = 0.01  # share of the mean second moment that is added to each column's: keeps the matrix well-conditioned


class Solver:
    """What the input of a matrix says about its columns; serves every matrix that reads this input."""

    def __init__(self, moments: np.ndarray) -> None:
        """`moments`: sum of x x^T over the inputs x, float32 [K, K]. Raises CheckpointError if it is not finite."""
        if not np.isfinite(moments).all():
            raise CheckpointError("activations overflow on the calibration text; this model cannot be calibrated")
        self.importance = np.diag(moments).copy()
        self.order = np.argsort(-self.importance, kind="stable")
        ordered = moments[np.ix_(self.order, self.order)].astype(np.float64)
        self._corrections = _inverse_factor(ordered).astype(np.float32)

    def quantize(self, weights: np.ndarray, grid: Grid) -> Quantized:
        """Some rows of a matrix, float32 [rows, K]; rows do not depend on each other."""
        scale = grid.search(weights, self.importance)
        group_of = self.order // grid.columns(weights.shape[1])
        rest = np.ascontiguousarray(weights[:, self.order].T)  # [K, rows]: a column lies together
        values = np.empty_like(rest)
        scales = np.ascontiguousarray(scale.T)
        u = self._corrections
        for first in range(0, len(rest), BLOCK):
            end = min(first + BLOCK, len(rest))
            errors = np.empty((end - first, rest.shape[1]), np.float32)
            for i in range(first, end):
                each = scales[group_of[i]]
                values[i] = grid.nearest(rest[i] / each)
                errors[i - first] = (rest[i] - values[i] * each) / u[i, i]
                rest[i + 1 : end] -= np.outer(u[i, i + 1 : end], errors[i - first])
            rest[end:] -= u[first:end, end:].T @ errors
        out = np.empty(weights.shape, np.float32)
        out[:, self.order] = values.T
        return Quantized(out, scale)


def _inverse_factor(moments: np.ndarray) -> np.ndarray:
    """The upper triangular U with U^T U = (moments + damping)^-1, float64 [K, K]; `moments` is overwritten."""
    diagonal = np.einsum("ii->i", moments)  # a view
    step = DAMPING * float(diagonal.mean()) or 1.0
    while True:
        diagonal += step
        try:  # with rows and columns reversed, the lower factor is the upper factor R of moments = R R^T, and U = R^-1
            factor = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:  # rounding made it indefinite
            step *= 10
            continue
        return np.linalg.inv(factor)
