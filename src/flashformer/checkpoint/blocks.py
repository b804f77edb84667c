"""The block formats of GGUF, 32 elements each: expansion to bfloat16.

Layouts (ggml): Q8_0 = f16 d, i8[32], value q * d. Q4_0 = f16 d, 16 bytes, (q - 8) * d. Q4_1 = f16 d, f16 m, 16 bytes,
q * d + m. The low nibbles of the 16 bytes are elements 0 to 15, the high ones 16 to 31. Values are computed in float32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK = 32  # elements
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}

# Blocks expanded at a time: their float32 values (512 KB) stay in the cache of a core between the passes over them.
_STEP = 4096


def expand(kind: str, blocks: np.ndarray) -> np.ndarray:
    """Expand whole blocks, uint8 [n, bytes per block], to bfloat16 [n, 32], rounded to nearest, ties to even."""
    out = np.empty((len(blocks), BLOCK), ml_dtypes.bfloat16)
    values = np.empty((_STEP, BLOCK), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale may be infinite or NaN: so are its values then
        for i in range(0, len(blocks), _STEP):
            part = blocks[i : i + _STEP]
            x = values[: len(part)]
            scale = _half(part, 0)
            if kind == "q8_0":
                np.multiply(part[:, 2:].view(np.int8), scale, out=x)
            elif kind == "q4_0":
                np.subtract(_nibbles(part[:, 2:]), np.float32(8), out=x)
                x *= scale
            elif kind == "q4_1":
                np.multiply(_nibbles(part[:, 4:]), scale, out=x)
                x += _half(part, 2)
            else:
                raise ValueError(f"not a block format: {kind}")
            out[i : i + _STEP] = x
    return out


def _half(part: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at `offset` of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(part[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> uint8 [n, 32]: all low nibbles of a block, then all high ones."""
    nibbles = np.empty((len(packed), BLOCK), np.uint8)
    np.bitwise_and(packed, 15, out=nibbles[:, :16])
    np.right_shift(packed, 4, out=nibbles[:, 16:])
    return nibbles
