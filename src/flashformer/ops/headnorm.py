"""RMSNorm on each head of q or k, one weight for all heads (Qwen3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Operator
from . import State
from .rmsnorm import normalise


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """Normalise each head of each position and scale by the weight [head_dim]."""
    heads = inputs[0].reshape(len(inputs[0]), -1, op.attributes["head_dim"])
    return (normalise(heads, op.attributes["eps"]) * weights[0]).reshape(inputs[0].shape)
