"""Causal attention with grouped key and value heads (arXiv 2305.13245)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ..graph import Operator
from ..plan import LEAST_SCALE, KvType
from . import State

ROWS = 128  # positions whose scores are held at a time
# Type of the codes, and which of them the largest value of a vector may have. NOTE: steps of e4m3 double at each power of two, so which
# code that is decides what is lost: with the best of four it is a fifth less, squared, than with the largest.
CODES: dict[KvType, tuple[np.dtype[Any], tuple[float, ...]]] = {
    "int8": (np.dtype(np.int8), (127.0,)),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), (448.0, 384.0, 320.0, 256.0)),
}


def mix(x: np.ndarray) -> np.ndarray:
    """A Hadamard transform of vectors [..., head_dim] in groups of 2 n dimensions: n, a power of two, of each half.

    Applied twice it is a multiplication by 2 n.
    """
    half = x.shape[-1] // 2
    hadamard = np.ones((1, 1), x.dtype)
    while half % (2 * len(hadamard)) == 0:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    low, high = x[..., :half], x[..., half:]
    groups = np.stack((low + high, low - high), axis=-2).reshape(*x.shape[:-1], -1, len(hadamard))
    return np.asarray((groups @ hadamard).reshape(x.shape))


def encode(x: np.ndarray, kv_type: KvType) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., head_dim] of vectors of that shape in a cache of type int8 or fp8, and their scales in bfloat16 [..., 1].

    The largest value of a vector has one of the codes named in `CODES`: the first of those with which the least is lost, in squares.
    A scale is not finite where any value is not.
    """
    dtype, largest = CODES[kv_type]
    top = np.maximum(np.abs(x).max(axis=-1, keepdims=True), x.dtype.type(LEAST_SCALE * largest[0]))
    scales = [(top * x.dtype.type(1 / code)).astype(ml_dtypes.bfloat16) for code in largest]
    with np.errstate(invalid="ignore"):  # what is not finite has some code
        exact = [x / scale.astype(x.dtype) for scale in scales]
        codes = [(np.rint(one) if kv_type == "int8" else one).astype(dtype) for one in exact]
        if len(scales) == 1:
            return codes[0], scales[0]
        off = [one.astype(x.dtype) * scale.astype(x.dtype) - x for one, scale in zip(codes, scales, strict=True)]
    best = np.argmin([(one**2).sum(axis=-1, keepdims=True) for one in off], axis=0)[None]
    return np.take_along_axis(np.stack(codes), best, 0)[0], np.take_along_axis(np.stack(scales), best, 0)[0]


def round_trip(x: np.ndarray, kv_type: KvType) -> np.ndarray:
    """What a cache of type int8 or fp8 gives back of vectors [..., head_dim]."""
    codes, scale = encode(x, kv_type)
    return codes.astype(x.dtype) * np.where(np.isfinite(scale), scale.astype(x.dtype), x.dtype.type(np.nan))


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """Softmax(q k^T / sqrt(head_dim)) v over all positions up to each one; keeps this block's keys and values in `state`.

    There may be fewer queries than keys: they are those of the block's last positions.
    """
    head_dim, kv_heads = op.attributes["head_dim"], op.attributes["kv_heads"]
    q, k, v = (x.reshape(len(x), x.shape[-1] // head_dim, head_dim) for x in inputs)
    if state.kv_type != "native":
        k = mix(round_trip(mix(k), state.kv_type)) / q.dtype.type(head_dim & -head_dim)
        v = round_trip(v, state.kv_type)
    keys = state.keys[op.layer] = np.concatenate((state.keys[op.layer][: state.start], k)) if state.start else k
    values = state.values[op.layer] = np.concatenate((state.values[op.layer][: state.start], v)) if state.start else v
    group, start = q.shape[1] // kv_heads, state.start + len(k) - len(q)
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        key, value = keys[:, head // group], values[:, head // group]
        for first in range(0, len(q), ROWS):
            rows = q[first : first + ROWS, head]
            seen = start + first + len(rows)
            scores = rows @ key[:seen].T / q.dtype.type(np.sqrt(head_dim))
            later = np.arange(seen)[None] > start + first + np.arange(len(rows))[:, None]
            scores[later] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[first : first + ROWS, head] = scores @ value[:seen] / scores.sum(axis=-1, keepdims=True)
    return out.reshape(inputs[0].shape)
