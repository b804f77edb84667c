"""Causal attention with grouped key and value heads (arXiv 2305.13245)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Operator
from . import State

ROWS = 128  # positions whose scores are held at a time


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """Softmax(q k^T / sqrt(head_dim)) v over all positions up to each one; keeps this block's keys and values in `state`."""
    head_dim, kv_heads = op.attributes["head_dim"], op.attributes["kv_heads"]
    q, k, v = (x.reshape(len(x), -1, head_dim) for x in inputs)
    keys = state.keys[op.layer] = np.concatenate((state.keys[op.layer][: state.start], k)) if state.start else k
    values = state.values[op.layer] = np.concatenate((state.values[op.layer][: state.start], v)) if state.start else v
    group = q.shape[1] // kv_heads
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        key, value = keys[:, head // group], values[:, head // group]
        for first in range(0, len(q), ROWS):
            rows = q[first : first + ROWS, head]
            seen = state.start + first + len(rows)
            scores = rows @ key[:seen].T / q.dtype.type(np.sqrt(head_dim))
            later = np.arange(seen)[None] > state.start + first + np.arange(len(rows))[:, None]
            scores[later] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[first : first + ROWS, head] = scores @ value[:seen] / scores.sum(axis=-1, keepdims=True)
    return out.reshape(inputs[0].shape)
