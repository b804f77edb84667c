"""AWQ, the gemm version: 4 bits with zero points, packed along the output rows, columns first.

Stored (AutoAWQ): `qweight` int32 [K, N / 8], `qzeros` int32 [groups, N / 8], `scales` [groups, N]; nibble i of a word is row
8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. Value: (q - zero) * scale.
"""

from __future__ import annotations

import numpy as np

from ..config import Keys
from .forms import Affine
from .scheme import Quantization, Scheme, choice, group_size, names
from .source import FLOATS, Source, unpack_words

METHOD = "awq"
PARTS = ("qweight", "qzeros", "scales")

_ROW_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF_ROW = np.argsort(_ROW_OF_NIBBLE)

_HARMLESS = frozenset({"backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "quant_method"})
_NEUTRAL: dict[str, tuple[object, ...]] = {"zero_point": (True,)}


def parse(keys: Keys) -> Quantization:
    """What the configuration says; the gemv and llm-awq layouts are refused by name."""
    format_key = "version" if keys.mapping.get("version") is not None else "format"
    layout = choice(keys, format_key, ("gemm",), default="gemm")
    bits = keys.integer("w_bit" if "w_bit" in keys.mapping else "bits", 4, 4)
    scope, group = group_size(keys, "q_group_size" if "q_group_size" in keys.mapping else "group_size")
    ignored = names(keys, "modules_to_not_convert")
    keys.get("version", None), keys.get("format", None)
    keys.finish(_HARMLESS, _NEUTRAL)
    return Quantization(METHOD, ((("Linear",), Scheme(layout, bits, scope, group, symmetric=False)),), ignored)


def decode(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Affine:
    """A matrix, or some of its rows."""
    (n, k), group = shape, scheme.columns(shape[1])
    source.only(*PARTS)
    source.multiple("qweight", "N", n, 8)
    source.multiple("scales", "K", k, group)
    groups = k // group
    weight = source.get("qweight", "int32", (k, n // 8))
    zeros = source.get("qzeros", "int32", (groups, n // 8))
    scale = source.sound("scales", source.get("scales", FLOATS, (groups, n)).T[rows].astype(np.float32))
    return Affine(_rows(weight, rows, n), 4, group, scale, zero=_rows(zeros, rows, n).astype(np.int16))


def _rows(words: np.ndarray, rows: slice, n: int) -> np.ndarray:
    """int32 [R, N / 8] -> uint8 [rows, R]; only the words that hold those rows are unpacked."""
    start, stop, step = rows.indices(n)
    low, high = (start // 8, -(-stop // 8)) if step > 0 else (0, n // 8)
    packed = words[:, low : max(high, low)]
    codes = unpack_words(packed, 4).reshape(*packed.shape, 8)[..., _NIBBLE_OF_ROW].reshape(len(words), -1)
    shifted = slice(start - 8 * low, stop - 8 * low, step) if step > 0 else rows
    return np.ascontiguousarray(codes[:, shifted].T)
