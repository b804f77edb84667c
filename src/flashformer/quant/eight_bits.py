"""Values of 8 bits, e4m3 or int8, stored as they are beside the scales of the matrix, its rows or its blocks."""

from __future__ import annotations

import numpy as np

from .forms import Scaled
from .scheme import Scheme
from .source import E8M0, FLOATS, FP8, Source, e8m0


def decode_values(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice, scale_part: str) -> Scaled:
    """The matrix of shape [N, K], or some of its rows, whose values are in `weight` and whose scales are in `scale_part`."""
    n, k = shape
    values = source.get("weight", FP8 if scheme.floating else "int8", (n, k))
    if scheme.floating and ((values[rows].view(np.uint8) & 0x7F) == 0x7F).any():
        source.fail("weight", "a value is NaN; the file is damaged")
    block = {"tensor": (n, k), "channel": (1, k), "block": scheme.block or (n, k)}[scheme.scope]
    grid = (-(-n // block[0]), -(-k // block[1]))
    shapes_of: dict[str, list[tuple[int, ...]]] = {"tensor": [(), (1,), (1, 1)], "channel": [(n, 1), (n,)], "block": [grid]}
    shapes = shapes_of[scheme.scope]
    stored = source.get(scale_part, (*FLOATS, E8M0), *shapes)
    scale = e8m0(source, scale_part, stored.view(np.uint8)) if stored.dtype.name == E8M0 else source.scales(scale_part, FLOATS, *shapes)
    form = Scaled(values, block, scale.reshape(grid))
    return form if rows == slice(None) else form.take(rows)
