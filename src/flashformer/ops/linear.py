"""Matrix-vector product with an optional bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Operator
from . import State


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """x W^T + b: [positions, columns] -> [positions, rows]."""
    y = inputs[0] @ weights[0].T
    return y + weights[1] if len(weights) > 1 else y
