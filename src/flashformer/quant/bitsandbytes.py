"""bitsandbytes NF4: codes into a fixed table of 16 values, a scale per block of (usually) 64 values, itself quantised or not.

Stored: `weight` uint8 [N K / 2, 1], row by row, the high nibble first; `weight.absmax` float32, one scale a block;
`weight.quant_map` float32 [16], the table; `weight.quant_state.bitsandbytes__nf4`, JSON as bytes. Double quantisation:
`weight.absmax` uint8, codes into `weight.nested_quant_map` [256]; scale = map[code] * nested_absmax[block // 256] + nested_offset.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..checkpoint import shown
from ..config import Keys, parse_json
from .forms import Table
from .scheme import Quantization, Scheme, choice, names
from .source import Source, unpack_bytes

METHOD = "bitsandbytes"

_STATE = "weight.quant_state.bitsandbytes__nf4"
_STATE_LIMIT = 4096  # bytes
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
PARTS = ("weight", "weight.absmax", "weight.quant_map", _STATE, *_NESTED)

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on

_HARMLESS = frozenset({
    "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
    "llm_int8_threshold", "quant_method",
})  # fmt: skip
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "_load_in_4bit": (True,),
    "_load_in_8bit": (False,),
    "bnb_4bit_quant_storage": ("uint8",),
    "load_in_4bit": (True,),
    "load_in_8bit": (False,),
}


def parse(keys: Keys) -> Quantization:
    """What the configuration says; int8 and FP4 are refused."""
    layout = choice(keys, "bnb_4bit_quant_type", ("nf4",), "fp4")
    ignored = names(keys, "llm_int8_skip_modules")
    keys.finish(_HARMLESS, _NEUTRAL)
    return Quantization(METHOD, ((("Linear",), Scheme(layout, 4, "group", floating=True)),), ignored)


def decode(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Table:
    """A matrix, or some of its rows. The block size is what the tensor's own state says."""
    n, k = shape
    state = _state(source)
    group = _integer(source, state, "blocksize")
    if state.get("quant_type") != "nf4":
        source.fail(_STATE, "quant_type must be nf4")
    if state.get("shape") != [n, k]:
        source.fail(_STATE, f"the shape differs from the configuration's {[n, k]}")
    if k % group or group % 2:
        source.fail(_STATE, f"K = {k} is not a multiple of blocksize = {group}, or that is odd: blocks across rows are not supported")
    if not np.array_equal(source.get("weight.quant_map", "float32", (16,)), NF4):
        source.fail("weight.quant_map", "is not the table of NF4")
    weight = source.get("weight", "uint8", (n * k // 2, 1), (1, n * k // 2), (n * k // 2,)).reshape(n, k // 2)
    source.only(*PARTS)
    if any(source.has(part) for part in _NESTED):
        scale = _nested_scales(source, state, (n, k // group), rows)
    else:  # zero: a block of zeros has such a scale
        absmax = source.get("weight.absmax", "float32", (n * k // group,))
        scale = source.sound("weight.absmax", absmax.reshape(n, k // group)[rows], zero=True)
    return Table(unpack_bytes(weight[rows], high_first=True), NF4, group, scale)


def _nested_scales(source: Source, state: dict[str, Any], shape: tuple[int, int], rows: slice) -> np.ndarray:
    """Scales that were quantised themselves, of some rows: float32 [rows, groups], of `shape` [N, groups]."""
    count = shape[0] * shape[1]
    size = _integer(source, state, "nested_blocksize")
    offset = state.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset) or abs(offset) > 1e30:
        source.fail(_STATE, "nested_offset must be a finite number")
    codes = source.get("weight.absmax", "uint8", (count,)).reshape(shape)[rows]
    block = np.arange(shape[0])[rows, None] * shape[1] + np.arange(shape[1])
    table = source.scales("weight.nested_quant_map", "float32", (256,), zero=True)
    outer = source.scales("weight.nested_absmax", "float32", (-(-count // size),), zero=True)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = table[codes] * outer[block // size] + np.float32(offset)
    return source.sound("weight.nested_absmax", scales, zero=True)


def _state(source: Source) -> dict[str, Any]:
    """The JSON that lies beside the weight as bytes, with no key that is not known."""
    stored = source.vector(_STATE, "uint8")
    if stored.size > _STATE_LIMIT:
        source.fail(_STATE, f"has {stored.size} bytes; at most {_STATE_LIMIT} are expected")
    state = parse_json(stored.tobytes(), shown(f"{source.module}.{_STATE}"))
    known = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
    for key in sorted(set(state) - known):
        source.fail(_STATE, f"the key {ascii(key)[:60]} is not known")
    return state


def _integer(source: Source, state: dict[str, Any], key: str) -> int:
    """A block size of the state."""
    value = state.get(key)
    if type(value) is not int or not 1 <= value <= 65_536:
        source.fail(_STATE, f"{key} must be a size from 1 to 65536")
    return value
