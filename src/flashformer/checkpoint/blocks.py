"""The block formats of GGUF, expanded to bfloat16. What they are: `quant/gguf_blocks.py`."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..quant.gguf_blocks import BLOCKS, unpack

# Values expanded at a time: in float32 (512 KB) they stay in the cache of a core between the passes over them.
_STEP = 1 << 17


def expand(kind: str, blocks: np.ndarray) -> np.ndarray:
    """Expand whole blocks, uint8 [n, bytes per block], to bfloat16 [n, columns of a block], rounded to nearest, ties to even."""
    columns = BLOCKS[kind][0]
    step = _STEP // columns
    out = np.empty((len(blocks), columns), ml_dtypes.bfloat16)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale may be infinite or NaN: so are its values then
        for i in range(0, len(blocks), step):
            out[i : i + step] = unpack(kind, blocks[i : i + step]).dequantize()
    return out
