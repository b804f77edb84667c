"""Token id -> its row of the embedding table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Operator
from . import State


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """Rows of the table [vocab, hidden] for token ids [positions]."""
    return weights[0][inputs[0]]
