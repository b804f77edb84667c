"""compressed-tensors, what llm-compressor writes: packed integers, fp8 and int8 values, and the two FP4 formats.

Stored, by the format of a config group:
- pack-quantized: `weight_packed` int32 [N, ceil(K bits / 32)] along the columns in natural order, `weight_scale` [N, groups],
  `weight_shape`; asymmetric: `weight_zero_point` int32 [ceil(N bits / 32), groups] along the rows. Codes and zeros are stored plus
  2^(bits - 1). `weight_g_idx` int32 [K], where an old release wrote it, is the group of each column.
- float-quantized, int-quantized: `weight` e4m3 or int8 [N, K]; `weight_scale` per tensor, row or block.
- nvfp4-pack-quantized: `weight_packed` uint8 [N, K / 2], E2M1 codes, the low nibble first; `weight_scale` e4m3 [N, K / 16];
  `weight_global_scale` float32 [1], which divides.
- mxfp4-pack-quantized: the same codes; `weight_scale` uint8 [N, K / 32], an exponent: 2^(e - 127).
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np

from ..checkpoint import shown
from ..config import Keys
from .eight_bits import decode_values
from .forms import Affine, Form, Scaled, Table
from .scheme import WEIGHTS_ONLY, Quantization, Scheme, block_size, choice, group_size, names
from .source import E2M1, E8M0, FLOATS, FP8, Source, e8m0, groups_of_columns, unpack_bytes, unpack_some_words, unpack_words

METHOD = "compressed-tensors"

# The tensors of each kind of format, and of all.
_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_g_idx", "weight_zero_point")
_FP4_PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
_VALUE_PARTS = ("weight", "weight_scale", "input_scale", "input_zero_point", "output_scale")
PARTS = tuple(dict.fromkeys(_PACKED_PARTS + _FP4_PARTS + _VALUE_PARTS))

# What each format can hold: type, bits, scopes.
_FORMATS: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {
    "pack-quantized": ("int", (4, 8), ("channel", "group")),
    "int-quantized": ("int", (8,), ("tensor", "channel")),
    "float-quantized": ("float", (8,), ("tensor", "channel", "block")),
    "nvfp4-pack-quantized": ("float", (4,), ("group",)),
    "mxfp4-pack-quantized": ("float", (4,), ("group",)),
}
_MOST_GROUPS = 32  # of a configuration
_GROUPS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}  # columns, where the format fixes them

_HARMLESS = frozenset({"global_compression_ratio", "quant_method", "run_compressed", "version"})
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "kv_cache_scheme": (None,),
    "moe_sparsity_config": (None,),
    "quantization_status": ("compressed", "frozen", None),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_WEIGHTS_HARMLESS = frozenset({"observer", "observer_kwargs", "zp_dtype", "scale_dtype"})


def parse(keys: Keys) -> Quantization:
    """What the configuration says: a scheme for each config group."""
    top = choice(keys, "format", (*_FORMATS, "mixed-precision", "naive-quantized"))
    groups = keys.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= _MOST_GROUPS:
        keys.fail("config_groups", f"must be an object of 1 to {_MOST_GROUPS} groups")
    schemes, notes = [], []
    for name, value in groups.items():
        if not isinstance(value, dict):
            keys.fail("config_groups", f"{shown(name)} must be an object")
        group = Keys(value, f"{keys.where}: config_groups: {shown(name)}")
        targets = names(group, "targets")
        if not targets:
            group.fail("targets", "the key is required")
        schemes.append((targets, _scheme(group, top)))
        if group.get("input_activations", None) is not None:
            notes.append(WEIGHTS_ONLY)
        group.finish((), {"output_activations": (None,)})
    ignored = names(keys, "ignore")
    keys.finish(_HARMLESS, _NEUTRAL)
    return Quantization(METHOD, tuple(schemes), ignored, tuple(dict.fromkeys(notes)))


def _scheme(group: Keys, top: str) -> Scheme:
    """The scheme of one config group."""
    value = group.get("weights")
    if not isinstance(value, dict):
        group.fail("weights", "must be an object")
    weights = Keys(value, f"{group.where}: weights")
    kind = choice(weights, "type", ("int", "float"), "int")
    layout = choice(group, "format", (*_FORMATS, "naive-quantized"), top if top != "mixed-precision" else None)
    if layout == "naive-quantized":
        layout = f"{kind}-quantized"
    expected_kind, allowed_bits, scopes = _FORMATS[layout]
    bits = weights.integer("num_bits", 1, 16, default=8)
    if kind != expected_kind or bits not in allowed_bits:
        weights.fail("num_bits", f"{kind} of {bits} bits is not supported in {layout}")
    scope, columns = _scope(weights)
    if scope not in scopes or columns != _GROUPS.get(layout, columns):
        weights.fail("strategy", f"{scope} with groups of {columns} is not supported in {layout}")
    symmetric = weights.flag("symmetric", True)
    if not symmetric and layout != "pack-quantized":
        weights.fail("symmetric", f"must be true in {layout}")
    block = block_size(weights, "block_structure")
    if (block is None) == (scope == "block"):
        weights.fail("block_structure", f"does not fit the strategy {scope}")
    indexed = weights.mapping.get("actorder") not in (None, False)
    if indexed:  # "weight" and its alias "static" order the calibration alone, not what is stored
        indexed = choice(weights, "actorder", ("weight", "static", "group", "dynamic")) in ("group", "dynamic")
    weights.finish(_WEIGHTS_HARMLESS, {"actorder": (None, False), "dynamic": (False, None)})
    return Scheme(layout, bits, scope, columns, symmetric, block, indexed, kind == "float")


def _scope(weights: Keys) -> tuple[Literal["tensor", "channel", "group", "block"], int | None]:
    """Scope and group size; where no strategy is given, the group size implies it."""
    given = weights.get("group_size", None)
    implied = "tensor" if given is None else "channel" if given == -1 else "group"
    scope = choice(weights, "strategy", ("tensor", "channel", "group", "block", "tensor_group"), implied)
    if scope in ("group", "tensor_group"):
        group = group_size(weights)[1]
        if group is None:
            weights.fail("group_size", "must be positive with this strategy")
        return "group", group
    if given not in (None, -1):
        weights.fail("group_size", f"does not fit the strategy {scope}")
    return cast(Literal["tensor", "channel", "block"], scope), None


def decode(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Form:
    """A matrix, or some of its rows."""
    if scheme.format == "pack-quantized":
        return _packed(source, shape, scheme, rows)
    if scheme.format in _GROUPS:
        return _fp4(source, shape, scheme, rows)
    return _values(source, shape, scheme, rows)


def _packed(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Affine:
    (n, k), bits, group = shape, scheme.bits, scheme.columns(shape[1])
    source.only(*(_PACKED_PARTS[:-1] if scheme.symmetric else _PACKED_PARTS))
    stored = source.get("weight_shape", ("int64", "int32"), (2,)).tolist()
    if stored != [n, k]:
        source.fail("weight_shape", f"says {stored}, the configuration {[n, k]}")
    source.multiple("weight_scale", "K", k, group)
    packed = source.get("weight_packed", "int32", (n, -(-k * bits // 32)))
    scale = source.scales("weight_scale", FLOATS, (n, k // group), rows=rows)
    index = None
    # NOTE: -1 everywhere is how old releases initialise the index and leave it where columns are in order.
    unused = source.has("weight_g_idx") and (source.get("weight_g_idx", "int32", (k,)) == -1).all()
    if scheme.indexed or (source.has("weight_g_idx") and not unused):
        index = groups_of_columns(source, "weight_g_idx", k, group)
    q = unpack_words(packed[rows], bits)[:, :k]
    if scheme.symmetric:
        zero = np.full((len(q), k // group), 1 << (bits - 1), np.int16)
    else:
        zeros = source.get("weight_zero_point", "int32", (-(-n * bits // 32), k // group))
        zero = unpack_some_words(zeros.T, bits, rows, n).T.astype(np.int16)
    return Affine(q, bits, group, scale, zero=zero, group_of=index)


def _fp4(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Table:
    (n, k), group = shape, scheme.columns(shape[1])
    nvidia = scheme.format == "nvfp4-pack-quantized"
    source.only(*(_FP4_PARTS if nvidia else _FP4_PARTS[:2]))
    source.multiple("weight_packed", "K", k, group)
    packed = source.get("weight_packed", "uint8", (n, k // 2))
    divisor = 1.0
    if nvidia:
        scale = source.scales("weight_scale", FP8, (n, k // group), rows=rows)
        divisor = source.scales("weight_global_scale", "float32", (1,), ()).item()
        with np.errstate(over="ignore"):
            if not np.isfinite(scale / np.float32(divisor)).all():
                source.fail("weight_global_scale", f"is {divisor:g}, which makes scales infinite; the file is damaged")
    else:
        exponents = source.get("weight_scale", ("uint8", E8M0), (n, k // group))[rows].view(np.uint8)
        scale = e8m0(source, "weight_scale", exponents)
    return Table(unpack_bytes(packed[rows]), E2M1, group, scale, divisor)


def _values(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Scaled:
    source.only(*_VALUE_PARTS)
    return decode_values(source, shape, scheme, rows, "weight_scale")
