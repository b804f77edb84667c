"""Quantised matrices as compressed-tensors stores them (the layouts: `quant/compressed_tensors.py`), and the configuration beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ..quant import compressed_tensors
from ..quant.source import E2M1
from .grids import Grid, Quantized

_FORMATS = {"int": "pack-quantized", "fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized"}


def pack(grid: Grid, part: Quantized) -> dict[str, np.ndarray]:
    """The stored tensors of some rows by what follows the module's name; those of all rows are these, one below the other."""
    scale = part.scale.astype(grid.scale_type)
    if grid.kind == "fp8":
        return {"weight": part.values.astype(ml_dtypes.float8_e4m3fn), "weight_scale": scale}
    if grid.kind == "mxfp4":
        codes = np.searchsorted(E2M1[:8], np.abs(part.values)).astype(np.uint8) | np.where(part.values < 0, np.uint8(8), np.uint8(0))
        return {"weight_packed": _nibbles(codes), "weight_scale": (np.log2(part.scale) + 127).astype(np.uint8)}
    codes = (part.values + (1 << (grid.bits - 1))).astype(np.uint8)
    per_word = 32 // grid.bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    octets = codes if grid.bits == 8 else _nibbles(codes)
    return {"weight_packed": np.ascontiguousarray(octets).view("<i4"), "weight_scale": scale}


def assemble(grid: Grid, parts: Sequence[Mapping[str, np.ndarray]], columns: int) -> dict[str, np.ndarray]:
    """The stored tensors of a whole matrix with `columns` columns, from those of its rows in order."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if grid.kind == "int":
        whole["weight_shape"] = np.array([len(whole["weight_scale"]), columns], np.int64)
    return whole


def quantization_config(grid: Grid, ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear modules all have one grid, but for those that are `ignored`."""
    weights: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int" if grid.kind == "int" else "float",
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group,
        "symmetric": True,
        "dynamic": False,
    }
    if grid.kind == "mxfp4":
        weights["scale_dtype"] = "torch.uint8"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": compressed_tensors.METHOD,
        "format": _FORMATS[grid.kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": _FORMATS[grid.kind]}},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the low nibble first: uint8 [rows, 2 C] -> uint8 [rows, C]."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
