"""The block types of GGUF: 32 or 256 columns each, with their scales beside the codes.

Layouts (ggml), in bytes; f16 d and m are a block's scale and minimum. Types of 32: the low nibbles of `qs` are columns 0 to 15, the
high ones 16 to 31.
- Q4_0: d, qs[16]: (q - 8) d.  Q4_1: d, m, qs[16]: q d + m.  Q8_0: d, i8[32]: q d.
- Q5_0: d, u32 h, qs[16]: (q - 16) d, bit i of h is the fifth bit of column i.
- Q4_K, Q5_K: d, m, S[12], (Q5_K: h[32]), qs[128]: 8 groups of 32, q (d s) - (m t) with 6-bit s and t from S. Group j is in the low
  (even j) or high nibbles of bytes 32 (j // 2) on; bit j of h[i] is the fifth bit of its column i.
- Q6_K: ql[128], qh[64], i8 s[16], d: 16 groups of 16, (q - 32) (d s).
"""

from __future__ import annotations

import numpy as np

from .forms import Affine
from .source import Source

# Columns and bytes of a block.
BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}


def decode(source: Source, kind: str, shape: tuple[int, int], rows: slice = slice(None)) -> Affine:
    """A matrix stored as `weight` uint8 [N, bytes of a row], or some of its rows.

    Scales of zero are legal: they are how ggml writes groups of equal values. Raises CheckpointError for a type that is not
    known, a shape that does not fit, or a scale that is infinite or NaN.
    """
    if kind not in BLOCKS:
        source.fail("weight", f"the type {ascii(kind)[:40]} is not supported; supported are {', '.join(BLOCKS)}")
    (n, k), (columns, size) = shape, BLOCKS[kind]
    source.only("weight")
    source.multiple("weight", "K", k, columns)
    stored = source.get("weight", "uint8", (n, k // columns * size))[rows]
    form = unpack(kind, stored)
    if not np.isfinite(form.scale).all() or not (form.minimum is None or np.isfinite(form.minimum).all()):
        source.fail("weight", "a scale is infinite or NaN; the file is damaged")
    return form


def unpack(kind: str, stored: np.ndarray) -> Affine:
    """Rows of whole blocks, uint8 [N, bytes], of a type in BLOCKS; scales are not checked."""
    columns, size = BLOCKS[kind]
    (n, row), k = stored.shape, stored.shape[1] // size * columns
    blocks = np.ascontiguousarray(stored).reshape(n * row // size, size)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale may be infinite or NaN
        q, bits, group, scale, zero, minimum = _UNPACK[kind](blocks)
    shape = (n, k // group)
    zeros = None if zero is None else np.full(shape, zero, np.int16)
    minima = None if minimum is None else minimum.reshape(shape)
    return Affine(q.reshape(n, k), bits, group, scale.reshape(shape), zeros, minima)


# What the functions below return of blocks: codes uint8 [blocks, columns], bits, columns of a group, scale float32 [blocks, groups],
# and either the zero point or the minimum float32 [blocks, groups].
_Parts = tuple[np.ndarray, int, int, np.ndarray, int | None, np.ndarray | None]


def _q4_0(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 2:]), 4, 32, _half(blocks, 0), 8, None


def _q4_1(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 4:]), 4, 32, _half(blocks, 0), None, _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> _Parts:
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    return _nibbles(blocks[:, 6:]) | fifth << 4, 5, 32, _half(blocks, 0), 16, None


def _q8_0(blocks: np.ndarray) -> _Parts:
    return blocks[:, 2:] ^ 0x80, 8, 32, _half(blocks, 0), 128, None  # a signed byte plus 128


def _q4_k(blocks: np.ndarray) -> _Parts:
    scale, minimum = _six_bits(blocks)
    return _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 256), 4, 32, scale, None, minimum


def _q5_k(blocks: np.ndarray) -> _Parts:
    scale, minimum = _six_bits(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    group = np.arange(8, dtype=np.uint8)[:, None]
    fifth = blocks[:, None, 16:48] >> group & 1
    return (low | fifth << 4).reshape(-1, 256), 5, 32, scale, None, minimum


def _q6_k(blocks: np.ndarray) -> _Parts:
    # In each half of 128 columns: 4 runs of 32, whose low nibbles are the low ones of 64 bytes and then the high ones, and whose
    # upper two bits lie side by side in the same byte of qh.
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 2, 4, 32)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (low | upper << 4).reshape(-1, 256), 6, 16, scale, 32, None


_UNPACK = {"q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at `offset` of every block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [R, C] -> uint8 [R, 2 C]: all low nibbles of a row, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _six_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of Q4_K and Q5_K, float32 [blocks, 8]: d s and -(m t)."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1).astype(np.float32)
    t = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1).astype(np.float32)
    return _half(blocks, 0) * s, -(_half(blocks, 2) * t)
