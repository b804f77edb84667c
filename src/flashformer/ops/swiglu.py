"""SwiGLU (arXiv 2002.05202): the gate's SiLU times the other half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Operator
from . import State


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """gate * sigmoid(gate) * up."""
    gate, up = inputs
    # Written with tanh, which does not overflow.
    return gate * (0.5 * (1 + np.tanh(0.5 * gate))) * up
