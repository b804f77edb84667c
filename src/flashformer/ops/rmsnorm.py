"""Root mean square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Operator
from . import State


def normalise(x: np.ndarray, eps: float) -> np.ndarray:
    """x divided by the root of the mean square of its last axis."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + x.dtype.type(eps))


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """Normalise each position and scale by the weight [size]."""
    return normalise(inputs[0], op.attributes["eps"]) * weights[0]
